"""Runs a generalist: frames and instructions in, conditionings out."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from robodual.device import choose
from robodual.facts import EngineFacts, count_parameters, count_weight_bytes, device_memory, hash_state_dict
from robodual.generalist.adapters import read_adapter
from robodual.generalist.checkpoint import read_checkpoint
from robodual.generalist.decoding import decode
from robodual.generalist.model import Generalist, build, randomise
from robodual.generalist.processor import DevicePixels, Processor
from robodual.generalist.quantisation import check_quantisation, quantisable, quantise
from robodual.generalist.stepping import Stepper, suits
from robodual.generalist.tokens import ACTION, CHUNK, GENERATED, ROW, decode_actions, encode_actions
from robodual.generalist.weights import load_weights
from robodual.graphs import Graphs
from robodual.profiles import PROFILES
from robodual.staging import bring, stacked

ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "eager")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Thought:
    """What the generalist made of one frame.

    reference_actions: float32 [8, 7] in [-1, 1]; hidden_states: bfloat16 [L, width] on the CPU, L = prompt length + 63;
    malformed_tokens: how many of the 64 tokens broke the layout and were repaired (`tokens.decode_actions`); forwards:
    passes through the Llama that its batch took.
    """

    reference_actions: npt.NDArray[np.float32]
    hidden_states: torch.Tensor
    malformed_tokens: int
    forwards: int


class GeneralistEngine:
    """A model on its device. Not thread-safe: one thread calls `think`."""

    def __init__(
        self,
        model: Generalist,
        processor: Processor,
        facts: EngineFacts,
        *,
        constrained: bool,
        stepper: Stepper | None = None,
        speculation: bool = True,
    ) -> None:
        self.model = model
        self.processor = processor
        self.facts = facts
        self.constrained = constrained
        self.stepper = stepper
        self.speculation = speculation
        self.captures = stepper is not None and stepper.captures  # a graph for each batch size and padded length
        self.width = model.config.language.width
        self._on_gpu: Callable[[torch.Tensor], torch.Tensor] | None = None
        if model.device.type == "cuda":
            prepare = DevicePixels(processor.image, model.device, model.dtype)
            self._on_gpu = _captured(prepare, model.device) if self.captures else prepare
        # An instruction comes again with every frame.
        self._prompt = functools.lru_cache(maxsize=256)(
            lambda instruction: torch.tensor(processor.prompt(instruction), device=model.device)
        )

    def think(
        self,
        frames: Sequence[npt.NDArray[np.uint8]],
        instructions: Sequence[str],
        drafts: Sequence[npt.NDArray[np.floating] | None] = (),
    ) -> list[Thought]:
        """One thought per pair of frame (uint8 [H, W, 3], any size) and instruction.

        The answer for one pair does not depend on the others. drafts: for each pair the chunk [8, 7] that is expected,
        or None; a good one saves forwards and none changes an answer. Raises ValueError if a frame has another shape or
        type, or the lengths differ.
        """
        if len(frames) != len(instructions):
            raise ValueError(f"instructions: expected {len(frames)}, one for each frame, got {len(instructions)}")
        for frame in frames:
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(f"rgb_static: expected uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
        if drafts and len(drafts) != len(frames):
            raise ValueError(f"drafts: expected {len(frames)}, one for each frame, got {len(drafts)}")
        device, tokens = self.model.device, self.model.config.tokens
        expected = None
        if any(draft is not None for draft in drafts):
            rows = [encode_actions(np.zeros((CHUNK, ACTION)) if draft is None else draft, tokens) for draft in drafts]
            expected = torch.from_numpy(np.stack(rows)).to(device)
        decoded = decode(
            self.model,
            self._pixels(frames),
            [self._prompt(instruction) for instruction in instructions],
            constrained=self.constrained,
            drafts=expected,
            guessing=self.speculation,
            window=ROW if expected is None else GENERATED,
            stepper=self.stepper,
        )
        # On their way before the tokens, which are waited for.
        states = [hidden.to("cpu", torch.bfloat16, non_blocking=True) for hidden in decoded.hidden]
        thoughts = []
        for ids, hidden in zip(decoded.tokens.cpu().numpy(), states):
            actions, malformed = decode_actions(ids, tokens)
            thoughts.append(Thought(actions, hidden, malformed, decoded.forwards))
        return thoughts

    def _pixels(self, frames: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """Frames [H, W, 3] of any sizes to [B, 6, S, S] on the device, to which a GPU's frames travel as bytes."""
        device = self.model.device
        if self._on_gpu is None:
            return self.processor.pixels(frames).to(device, self.model.dtype)
        return torch.cat([self._on_gpu(bring(group, device)) for group in stacked(frames)])


def _captured(prepare: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    graphs = Graphs(lambda frames: (prepare(frames),), device, "frames are prepared")
    return lambda frames: graphs(frames)[0]


def load_generalist(
    profile: str,
    *,
    checkpoint: str | Path | None = None,
    adapters: Sequence[Path] = (),
    merge_adapters: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    attention: str = "auto",
    quantisation: str = "none",
    constrained: bool | None = None,
    speculation: bool = True,
    static_cache: bool = True,
) -> GeneralistEngine:
    """The engine of a profile: with a checkpoint's weights, or random ones that follow from `seed`.

    checkpoint: a folder as published on the Hugging Face hub, or a hub id; its own config.json and tokenizer replace
    the profile's. adapters: LoRA folders, merged into the checkpoint's weights in that order, or without
    merge_adapters kept beside them: a little slower, and the better way for quantised weights.
    device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N". dtype: "auto" (bfloat16 on CUDA, float32
    elsewhere) or a name of `DTYPES`. attention: one of `ATTENTIONS`, for the Llama's prompt; its steps after it take
    sdpa, but for "eager". quantisation: one of `QUANTISATIONS`, for the Llama's layers. constrained: whether
    decoding keeps to the layout of 8 x 7 actions; None leaves it to the profile. speculation: whether a forward checks
    guesses of the next actions (`decode`): the same tokens in fewer forwards. static_cache: whether it is made ready
    for decoding on one (stepping.py), which a training has no use for.

    Raises:
        CheckpointError: naming the file and the fix, for a checkpoint that cannot be used.
        ValueError: naming the argument, for one that is unknown or that the machine cannot do.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile: expected one of {sorted(PROFILES)}, got {profile!r}")
    if adapters and checkpoint is None:
        raise ValueError("adapters: need the checkpoint that they were trained on")
    config = PROFILES[profile].generalist
    place = choose(device)
    kind = _dtype(dtype, place)
    chosen = _attention(attention, place, kind)
    check_quantisation(quantisation, place)
    if checkpoint is None:
        tokenizer = PROFILES[profile].tokenizer(config.tokens)
        model = build(config, attention=chosen, dtype=kind)
        parameters = count_parameters(model)
        randomise(model, place, seed)
        if quantisation != "none":
            quantise(model, quantisable(model), quantisation, place)
    else:
        found = read_checkpoint(checkpoint, constrained=config.constrained)
        config, tokenizer = found.config, found.tokenizer
        model = build(config, attention=chosen, dtype=kind)
        parameters = count_parameters(model)
        load_weights(model, found.folder, place, tuple(map(read_adapter, adapters)), quantisation, merge=merge_adapters)
    processor = Processor(config.images, config.tokens, tokenizer)
    restricted = config.constrained if constrained is None else constrained
    stepper = Stepper(model) if static_cache and suits(model) else None
    execution = "dynamic cache" if stepper is None else "CUDA graphs" if stepper.captures else "static cache"
    if stepper is not None and stepper.is_fused:
        execution += ", fused layers"
    apart = " (kept apart)" if adapters and not merge_adapters else ""
    details = {
        "attention": chosen,
        "decoding": "constrained" if restricted else "free",
        "speculation": "on" if speculation else "off",
        "quantisation": quantisation,
        "adapters": ", ".join(folder.name for folder in adapters) + apart or "none",
        "image_resize_strategy": config.images.strategy,
        "execution": execution,
        **device_memory(place),
    }
    facts = EngineFacts(
        profile=profile,
        checkpoint=hash_state_dict(model),
        device=str(place),
        dtype=str(kind).removeprefix("torch."),
        parameters=parameters,
        weight_bytes=count_weight_bytes(model),
        details=details,
    )
    return GeneralistEngine(model, processor, facts, constrained=restricted, stepper=stepper, speculation=speculation)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype: expected auto or one of {list(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """FlashAttention-2 needs its package, an Ampere GPU (compute capability 8.0) or newer, and 16-bit values."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention: expected one of {ATTENTIONS}, got {name!r}")
    able = (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and importlib.util.find_spec("flash_attn") is not None
    )
    if name == "flash_attention_2" and not able:
        raise ValueError(
            "attention: flash_attention_2 needs the flash-attn package, a 16-bit dtype and a CUDA device of compute "
            "capability 8.0 or more"
        )
    return "sdpa" if name == "auto" else name
