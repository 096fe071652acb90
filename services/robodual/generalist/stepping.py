"""Decoding on a static key-value cache: on a GPU frames, prompts and steps are captured, and are then one launch each.

The plain way (decoding.py) makes its cache longer at every step, so that no two steps are alike, and a GPU waits for
the launches of their kernels. Here a step reads where it is from the device and leaves there what it has found: its
tokens, how many guesses were right, its hidden states, its keys and values. Nothing in it depends on a value, so
what it did once is right for every place of every chunk of that shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from robodual.capture import Recorder, Shapes
from robodual.device import Side, current
from robodual.generalist import layers
from robodual.generalist.fusing import fuse
from robodual.generalist.greedy import chunk_layout, greedy
from robodual.generalist.model import Generalist
from robodual.generalist.tokens import GENERATED, ROW
from robodual.graphs import Graphs

if TYPE_CHECKING:
    from robodual.generalist.fused import FusedLayers

logger = structlog.get_logger(__name__)

MOST = 128  # graphs kept of steps: one or two for each size of a batch and length of a cache
MOST_PROMPTS = 64  # and of prompts, for each size of a batch and length; a shape beyond them runs without
SLOTS = 64  # a cache is as long as a multiple of it, so that prompts of similar lengths share their graphs
LAST = GENERATED - 1  # the end token is never fed: what lies beyond the chunk is put in its place, where nobody reads


@dataclass(frozen=True)
class _State:
    """What a step reads and writes, for B sequences in caches of M slots; always the same memory."""

    keys: Tensor  # [layers, B, key-value heads, M, head width]
    values: Tensor  # the same
    tokens: Tensor  # int64 [B, 65]: the sure ones, then the guesses, -1 for none; the last column is for what is beyond
    hidden: Tensor  # [B, 64, D], of the tokens fed
    place: Tensor  # int64 [B, 1], the last sure token's in the chunk
    length: Tensor  # int64 [1], slots of the prompt, padding included
    padding: Tensor  # int64 [B, 1], slots in front that do not count
    limit: Tensor  # int64 [1], guesses of a step that may count
    every: Tensor  # int64 [M], the slots' numbers
    layout: Tensor  # int64 [64] (greedy.py); here, since a graph does not keep what it reads alive
    prompts: Tensor  # [B, M, D], embedded
    read: Tensor  # [B, M, D], their hidden states


class Stepper:
    """Decodes by static steps with one model; one thread calls, and one batch is in it at a time.

    On CUDA each shape of a step (sequences, new tokens, length of the cache) is captured when it first comes, and
    replayed from then on: the model's modules and their memory must stay, their values may change. So are the passes
    over frames and over prompts of one length; prompts of different lengths are read uncaptured, as are all with
    FlashAttention-2.
    """

    def __init__(self, model: Generalist, *, captures: bool | None = None, fuses: bool = True) -> None:
        """captures: whether passes are captured; None: on CUDA. fuses: whether Triton's kernels may run them."""
        self._model = model
        # Of every shape's keys, values and hidden states, since one batch is in it at a time.
        self._storage = torch.empty(0, dtype=model.dtype, device=model.device)
        self._too_large = math.inf
        self._states: dict[tuple[int, int], _State] = {}
        self._fused = fuse(model) if fuses else None
        self._record: Recorder | None = None
        if model.device.type == "cuda" if captures is None else captures:
            self._record = Recorder(model.device)
            self._side = Side(model.device)
            self._seen = Graphs(lambda pixels: (self._see(pixels),), model.device, "frames are seen")
            # FlashAttention-2's wrapper looks at the positions of a batch of one.
            most = 0 if _by_transformers(model) else MOST_PROMPTS
            self._prompts = Shapes[tuple[int, int], None](self._record, "prompts are read", most)
            self._steps = Shapes[tuple[int, int, int, bool, bool], None](self._record, "decoding runs", MOST)
        # The batch that is in it.
        self._state: _State
        self._constrained: bool
        self._refining: bool
        self._count: int

    @property
    def captures(self) -> bool:
        """Whether steps are captured."""
        return self._record is not None and self._steps.works

    @property
    def is_fused(self) -> bool:
        """Whether steps run by fused kernels."""
        return self._fused is not None

    def see(self, pixels: Tensor) -> Tensor:
        """`Generalist.see`."""
        return self._model.see(pixels) if self._record is None else self._seen(pixels)[0]

    def _see(self, pixels: Tensor) -> Tensor:
        """`Generalist.see` with its towers side by side, neither of which fills a GPU."""
        model, backbone = self._model, self._model.vision_backbone
        with self._side.beside():
            second = backbone.fused_featurizer(pixels[:, 3:])
        first = backbone.featurizer(pixels[:, :3])
        self._side.join()
        images: Tensor = model.projector(torch.cat([first, second], dim=2))
        return images

    def read(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor | None:
        """Takes over a batch: its prompts' keys and values, and their hidden states [B, T, D].

        None if the device has no memory for its keys and values.
        """
        batch, length, _ = embeddings.shape
        slots = -(-(length + GENERATED) // SLOTS) * SLOTS
        state = self._find(batch, slots)
        if state is None:
            return None
        # What is masked counts 0 times, and 0 times an old infinity is not 0.
        state.keys[..., length:, :].zero_()
        state.values[..., length:, :].zero_()
        state.length.fill_(length)
        state.padding.copy_(length - 1 - positions[:, -1:])
        self._state = state
        found = None
        if self._record is not None and mask is None:
            state.prompts[:, :length] = embeddings
            own, places = state.prompts[:, :length], state.every[:length].expand(batch, length)
            found = self._prompts.find((batch, length), lambda: self._read(state, own, places, None))
        if found is None:
            self._read(state, embeddings, positions, mask)
        else:
            found[0].replay()
        return state.read[:, :length].clone()

    def start(self, first: Tensor, guesses: Tensor, *, constrained: bool, refining: bool, window: int) -> None:
        """Begins with the steps of the batch that was read.

        first: int64 [B, 1], the first tokens. guesses: int64 [B, 64], -1 for none, the first and last of which are not
        read; a step takes less than `window` of them. refining: whether what a step says is the guess of the next.
        """
        state = self._state
        state.tokens[:, :1] = first
        state.tokens[:, 1:LAST] = guesses[:, 1:LAST]
        state.tokens[:, LAST:] = -1
        state.place.zero_()
        state.limit.fill_(window - 1)
        self._constrained, self._refining = constrained, refining
        self._count = max(window, ROW)

    def step(self, count: int) -> None:
        """Feeds the last sure token and the count - 1 guesses after it; those that were right become sure, and one more
        token. Does not wait for the device.
        """
        if self.captures or self.is_fused or self._model.dtype != torch.float32:
            # One shape for all, of a row at least: what is beyond the chunk does no harm, reading the weights takes as
            # long for one token as for eight, and in 16 bits the same kernels round alike, with guesses or without.
            count = self._count
        state, constrained, refining = self._state, self._constrained, self._refining

        def run() -> None:
            _step(self._model, self._fused, state, count, constrained, refining)

        found = None
        if self._record is not None:
            key = state.tokens.shape[0], count, state.keys.shape[3], constrained, refining
            # The runs before a capture are steps too, which the next ones write over once they are taken back.
            before = (state.place.clone(), state.tokens.clone()) if self._steps.is_to_come(key) else None
            found = self._steps.find(key, run)
            if before is not None:
                state.place.copy_(before[0])
                state.tokens.copy_(before[1])
        if found is None:
            run()
        else:
            found[0].replay()

    def sure(self) -> int:
        """How many tokens are sure by now, of each sequence. Waits for the device."""
        return int(min(self._state.place[:, 0].tolist())) + 1

    def results(self) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, 64], and the hidden states [B, 63, D] of all but the last; the caller's own."""
        return self._state.tokens[:, :GENERATED].clone(), self._state.hidden[:, :LAST].clone()

    def _read(self, state: _State, embeddings: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        """The pass over prompts [B, T, D], whose keys and values then stand in front."""
        model, fused, length = self._model, self._fused, embeddings.shape[1]
        llama, keys, values = model.language_model.model, state.keys, state.values
        if _by_transformers(model):
            cache = DynamicCache(config=model.language_model.config)
            read = model.read(embeddings, positions, mask, cache)
            for own_keys, own_values, layer in zip(keys, values, cast(list[DynamicLayer], cache.layers), strict=True):
                own_keys[:, :, :length] = cast(Tensor, layer.keys)
                own_values[:, :, :length] = cast(Tensor, layer.values)
        elif fused is not None and fused.reads:
            cos, sin = llama.rotary_emb(embeddings, positions)
            half = cos.shape[-1] // 2
            with current(model.device):
                read = fused.read(embeddings, (cos[..., :half], sin[..., :half]), mask, keys, values)
            read = layers.normed(llama.norm, read)
        else:
            read = layers.read(model, embeddings, positions, mask, keys, values)
        state.read[:, :length] = read

    def _find(self, batch: int, slots: int) -> _State | None:
        """The state for that shape, made when it first comes. The largest should come first: a larger one moves all."""
        if (batch, slots) not in self._states:
            config, device = self._model.config.language, self._model.device
            shapes = (
                (config.layers, 2, batch, config.key_value_heads, slots, config.width // config.heads),
                (batch, slots, config.width),
                (batch, slots, config.width),
                (batch, GENERATED, config.width),
            )
            sizes = [math.prod(shape) for shape in shapes]
            if sum(sizes) > self._storage.numel() and not self._grow(sum(sizes)):
                return None
            parts = torch.split(self._storage[: sum(sizes)], sizes)
            cache, prompts, read, hidden = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
            keys, values = cache.unbind(dim=1)
            one = torch.zeros(1, dtype=torch.int64, device=device)
            self._states[batch, slots] = _State(
                keys,
                values,
                tokens=one.repeat(batch, GENERATED + 1),
                hidden=hidden,
                place=one.repeat(batch, 1),
                length=one.clone(),
                padding=one.repeat(batch, 1),
                limit=one.clone(),
                every=torch.arange(slots, device=device),
                layout=chunk_layout(self._model.config.tokens, device),
                prompts=prompts,
                read=read,
            )
        return self._states[batch, slots]

    def _grow(self, size: int) -> bool:
        if size >= self._too_large:
            return False
        try:
            storage = self._storage.new_zeros(size)
        except torch.OutOfMemoryError as error:
            self._too_large = size
            logger.warning("no memory for a static key-value cache of this size", values=size, reason=str(error))
            return False
        self._storage = storage
        self._states.clear()
        if self._record is not None:
            self._prompts.clear()  # they write to the old memory
            self._steps.clear()
            self._record.renew()
        return True


def suits(model: Generalist) -> bool:
    """Whether static steps are right for the model: they are faster then, on a CPU too.

    bitsandbytes looks at values to choose its kernels, which a capture cannot follow, and attention that was asked for
    as "eager" stays so.
    """
    foreign = any(type(module).__module__.startswith("bitsandbytes") for module in model.modules())
    return not foreign and model.language_model.config._attn_implementation != "eager"


def _by_transformers(model: Generalist) -> bool:
    """Whether prompts are read by Transformers' own pass: with FlashAttention-2, which has its wrapper there."""
    chosen: str = model.language_model.config._attn_implementation
    return chosen == "flash_attention_2"


def _step(
    model: Generalist, fused: FusedLayers | None, state: _State, count: int, constrained: bool, refining: bool
) -> None:
    """One step of `count` new tokens a sequence: the last sure one and guesses, of which it keeps those that are right.

    With `refining`, what it says after a wrong one becomes the guess there, and a row on.
    """
    if fused is not None and fused.takes(state.tokens.shape[0] * count):
        _fused_step(model, fused, state, count, constrained, refining)
        return
    llama, ahead = model.language_model.model, state.every[:count]
    places = (state.place + ahead).clamp(max=LAST)  # [B, N], of the tokens fed
    slots = state.length + places  # [B, N]
    x = llama.embed_tokens(state.tokens.gather(1, places).clamp(min=0))  # [B, N, D]
    rotation = llama.rotary_emb(x, slots - state.padding)  # [B, N, W] each
    x = layers.step(model, x, rotation, slots, state.padding, state.keys, state.values)
    x = layers.normed(llama.norm, x)

    state.hidden.scatter_(1, places.unsqueeze(2).expand_as(x), x)
    following = state.place + 1 + ahead  # [B, N], of the answers
    layout = state.layout[following.clamp(max=LAST)]
    answers = greedy(model, x, layout, constrained)  # [B, N]
    places = following.clamp(max=GENERATED)
    if count == 1:
        state.tokens.scatter_(1, places, answers)
        state.place.add_(1).clamp_(max=LAST)
        return
    guesses = state.tokens.gather(1, places)
    right = (answers == guesses) & (ahead < state.limit)
    # An answer counts if all tokens before it were right.
    kept = F.pad(right[:, :-1], (1, 0), value=True).cumprod(dim=1)
    better = kept.bool()
    if refining:
        beyond = (following + ROW).clamp(max=GENERATED)
        theirs = state.layout[beyond.clamp(max=LAST)]
        there = state.tokens.gather(1, beyond)
        # Separators and the end, which the layout knows, stay as they are guessed.
        state.tokens.scatter_(1, beyond, torch.where(theirs < 0, answers, there))
        better |= layout < 0
    state.tokens.scatter_(1, places, torch.where(better, answers, guesses))
    state.place.add_(kept.sum(dim=1, keepdim=True)).clamp_(max=LAST)


def _fused_step(
    model: Generalist, fused: FusedLayers, state: _State, count: int, constrained: bool, refining: bool
) -> None:
    """The same by kernels."""
    first = model.config.tokens.action_start if constrained else None
    with current(model.device):
        stream, rotation, slots = fused.begin(state.tokens, state.place, state.length, state.padding, count)
        x = fused(stream, rotation, slots, state.padding, state.keys, state.values)
        x = layers.normed(model.language_model.model.norm, x)
        state.hidden.scatter_(1, (slots - state.length).unsqueeze(2).expand_as(x), x)
        best = fused.best(x, constrained)
        fused.conclude(best, state.tokens, state.place, state.limit, state.layout, first, refining)
