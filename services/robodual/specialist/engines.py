"""The engines of a service: loaded as its settings say, and warmed up."""

from __future__ import annotations

import numpy as np
import torch

from robodual.profiles import shipped
from robodual.serving.settings import SpecialistSettings
from robodual.specialist import observation
from robodual.specialist.engine import Frame, Request, SpecialistEngine, load_specialist

SENSOR_FLAGS = ("with_depth", "with_gripper", "with_tactile")
CONTEXT = 96  # tokens of a usual conditioning: the prompt's and 63


def load(settings: SpecialistSettings) -> tuple[SpecialistEngine, ...]:
    """An engine on each of the settings' devices. Raises what `load_specialist` does."""
    return tuple(
        load_specialist(
            settings.profile,
            checkpoint=settings.checkpoint or shipped(settings.profile, "specialist"),
            device=device,
            dtype=settings.dtype,
            seed=settings.seed,
            strategy=settings.image_strategy,
            sensors={name: value for name in SENSOR_FLAGS if (value := getattr(settings, name)) is not None},
            diffusion_steps=settings.diffusion_steps,
            guidance_scale=settings.guidance_scale,
        )
        for device in settings.places
    )


def warm_up(model: SpecialistEngine, max_batch: int) -> None:
    """One step of each kind that will come: with the previous frame's features, and without; for a model that captures
    its steps, batches of all sizes."""
    frame = Frame(
        rgb_static=np.zeros((200, 200, 3), np.uint8),
        rgb_gripper=np.zeros((84, 84, 3), np.uint8),
        depth_static=np.zeros((200, 200), np.float32),
        depth_gripper=np.zeros((84, 84), np.float32),
        rgb_tactile=np.zeros(observation.TACTILE, np.uint8),
        proprio=np.zeros(7, np.float32),
    )
    context = model.project(torch.zeros((CONTEXT, model.width), dtype=torch.bfloat16))
    chunk = np.zeros((8, 7), np.float32)
    first = Request(frame, None, context, chunk, chunk)
    following = Request(frame, model.act([first])[0].features, context, chunk, chunk)
    for size in range(1, (max_batch if model.captures else 1) + 1):
        model.act([following] * size)
