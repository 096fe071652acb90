"""Whole steps captured on a GPU, from what the host has to the chunks: one copy of its arrays and one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robodual.capture import Recorder, Shapes
from robodual.specialist.config import ACTION, CHUNK
from robodual.specialist.frames import GRIPPER_DEPTH_OFFSET, STATIC_DEPTH_OFFSET, Frame, Preparation
from robodual.specialist.policy import needed
from robodual.specialist.request import Request
from robodual.specialist.step import Inputs, Step
from robodual.staging import Staging

MOST = 64  # graphs kept; a shape beyond them runs without
LENGTHS = 64  # conditionings are padded to multiples of it, so that few shapes occur

Sides = tuple[tuple[int, ...], ...]  # the shapes of the arrays that a model reads, in the order of its sensors
Key = tuple[int, int, Sides]  # requests, padded length of their conditionings, shapes of their frames
Outputs = tuple[Tensor, Tensor]  # float32 chunks [B, 8, 7], and the static frames' latents [B, latents, D]


@dataclass(frozen=True)
class _Memory:
    """What one graph reads, always the same memory."""

    host: Staging  # each sensor's arrays [B, ...], reference, noise, lengths and first
    previous: Tensor  # [B, latents, D]
    keys_values: Tensor  # [B, L, blocks * 2 * D]; beyond a request's length, whatever was there before
    mean: Tensor  # [B, D]


class CapturedSteps:
    """Runs steps by replaying what they did for as many requests with frames of the same shapes.

    The graphs share their memory, so one thread calls, and what a replay gives is copied before the next.
    """

    def __init__(self, step: Step, preparation: Preparation) -> None:
        self._step, self._preparation = step, preparation
        self._shapes = Shapes[Key, tuple[_Memory, Outputs]](Recorder(preparation.device), "steps run", MOST)

    def sides(self, frame: Frame) -> Sides:
        """What must be the same of all requests of a call.

        Raises:
            ValueError: naming the sensor, if the frame lacks one that the model reads.
        """
        return tuple(needed(getattr(frame, name), name).shape for name in self._preparation.config.sensors)

    def __call__(self, requests: Sequence[Request], previous: Sequence[Tensor | None]) -> Outputs | None:
        """The answers to requests of the same `sides`, without waiting for them; None where there is no graph for them.

        previous: of each the latents [latents, D] of the frame before, None where there is none.
        """
        length = max(len(request.conditioning.keys_values) for request in requests)
        key = len(requests), -(-length // LENGTHS) * LENGTHS, self.sides(requests[0].frame)
        memory: list[_Memory] = []

        def function() -> tuple[_Memory, Outputs]:
            if not memory:  # before the capture, in the first of the runs that warm up
                width = requests[0].conditioning.keys_values.shape[1]
                memory.append(self._allocated(key, width))
            return memory[0], self._step(self._prepared(memory[0]))

        found = self._shapes.find(key, function)
        if found is None:
            return None
        graph, (targets, outputs) = found
        _fill(targets, requests, previous)
        graph.replay()
        return outputs

    def _allocated(self, key: Key, keys_values_width: int) -> _Memory:
        config, device = self._preparation.config, self._preparation.device
        count, length, sides = key
        layout: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            name: ((count, *shape), np.uint8 if name.startswith("rgb") else np.float32)
            for name, shape in zip(config.sensors, sides, strict=True)
        }
        layout |= dict.fromkeys(("reference", "noise"), ((count, CHUNK, ACTION), np.float32))
        layout |= {"lengths": ((count,), np.int64), "first": ((count,), np.bool_)}
        return _Memory(
            host=Staging(layout, device),
            previous=torch.zeros(count, config.latents, config.width, device=device),
            keys_values=torch.zeros(count, length, keys_values_width, device=device),
            mean=torch.zeros(count, config.width, device=device),
        )

    def _prepared(self, memory: _Memory) -> Inputs:
        """What `SpecialistEngine` gathers of the same requests, bit for bit."""
        prepare, config, read = self._preparation, self._preparation.config, memory.host.tensors
        frames, maps = [read["rgb_static"]], []
        if config.with_depth:
            maps.append(prepare.maps(read["depth_static"], STATIC_DEPTH_OFFSET))
        if config.with_gripper:
            frames.append(read["rgb_gripper"])
            maps.append(prepare.maps(read["depth_gripper"], GRIPPER_DEPTH_OFFSET))
        places = torch.arange(memory.keys_values.shape[1], device=prepare.device)
        mask = places < read["lengths"][:, None]
        return Inputs(
            pixels=prepare.pixels(frames),
            maps=torch.cat(maps) if maps else None,
            tactile=prepare.touches(read["rgb_tactile"]) if config.with_tactile else None,
            proprio=read["proprio"],
            previous=memory.previous,
            first=read["first"].view(-1, 1, 1),
            # What is masked counts 0 times, and 0 times another session's infinity is not 0.
            keys_values=memory.keys_values.masked_fill(~mask[..., None], 0),
            mean=memory.mean,
            mask=mask,
            reference=read["reference"],
            noise=read["noise"],
        )


def _fill(memory: _Memory, requests: Sequence[Request], previous: Sequence[Tensor | None]) -> None:
    """Brings the requests to the graph's memory: the host's arrays in one copy, the device's tensors in a few."""
    host = memory.host
    targets, sources = [], []
    host.begin()
    sensors = {name: array for name, array in host.arrays.items() if name in Frame.__dataclass_fields__}
    for place, (request, latents) in enumerate(zip(requests, previous, strict=True)):
        for name, array in sensors.items():
            array[place] = getattr(request.frame, name)
        host.arrays["reference"][place] = request.reference_actions
        host.arrays["noise"][place] = request.noise
        context = request.conditioning
        length = len(context.keys_values)
        host.arrays["lengths"][place] = length
        host.arrays["first"][place] = latents is None
        targets += [memory.keys_values[place, :length], memory.mean[place]]
        sources += [context.keys_values, context.mean]
        if latents is not None:
            targets.append(memory.previous[place])
            sources.append(latents)
    host.send()
    torch._foreach_copy_(targets, sources)
