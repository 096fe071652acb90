"""The denoising loop as Triton kernels: six a block, one a step besides, where `Sampler` takes about thirty a block.

It computes what `Sampler` computes, to rounding. Import it where `fusing.fuses` holds, or with Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robodual.chained import chaining
from robodual.device import can_chain, current, padded
from robodual.specialist import ends, kernels
from robodual.specialist.config import ACTION, CHUNK, SpecialistConfig
from robodual.specialist.denoiser import Block, Denoiser
from robodual.specialist.sampler import PARTS, Prepared, Sampler, fold_cross

WIDE = 16  # columns of a program's product
GROUPS = 8  # of a product's channels side by side, one by each warp
SLAB = 1024  # most channels at a time, all from before a kernel's wait
KEYS = 256  # of the context, at a time
STAGES = 2


@dataclass(frozen=True)
class _Tables:
    """One block's weights, contiguous."""

    qkv: tuple[Tensor, Tensor]  # weight and bias, as the others
    cos: Tensor  # [8, C / 2], of a head's pairs of channels: 1 and a sine of 0 where they do not turn
    sin: Tensor
    self_out: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    cross_out: Tensor
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]


class FusedSampler(Sampler):
    """A `Sampler` of kernels; `precision` is that of their products, "tf32x3" or "ieee"."""

    def __init__(self, denoiser: Denoiser, config: SpecialistConfig, precision: str = "tf32x3") -> None:
        super().__init__(denoiser, config)
        self._tables = [_tables(block) for block in denoiser.blocks if isinstance(block, Block)]
        self._actions = denoiser.x_embedder.weight[:, ACTION:].detach().contiguous()  # [D, 7]
        final = denoiser.final_layer.linear
        self._final = final.weight.detach().contiguous(), final.bias.detach()
        head = self.width // self.heads
        self._shape = {
            "D": self.width,
            "D_PAD": max(padded(self.width), 16 * GROUPS),
            "GROUPS": GROUPS,
            "PRECISION": precision,
            "num_warps": GROUPS,
            "num_stages": STAGES,
            **chaining(can_chain(self._actions.device)),
        }
        self._head = {"C": head, "C_PAD": padded(head), "SCALE": head**-0.5}

    def try_one(self) -> None:
        """Denoises zeros, which compiles the kernels; raises what goes wrong."""
        noise = self._actions.new_zeros(1, CHUNK, ACTION)
        keys_values = noise.new_zeros(1, 16, 2 * self.width * len(self._tables))
        mask = torch.ones(1, 16, dtype=torch.bool, device=noise.device)
        found = self(noise, noise, noise.new_zeros(1, self.width), keys_values, mask)
        if not bool(found.isfinite().all()):  # also waits for the device, which may have something to say
            raise ArithmeticError("the denoiser's kernels gave values that are no numbers")

    def denoise(self, noise: Tensor, prepared: Prepared, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Denoises; arguments and result are those of `Sampler`."""
        batch, width = len(noise), self.width
        table = prepared.modulation.contiguous()  # [T, B * G, P, D]
        passes = table.shape[1] // batch
        rows = passes * CHUNK
        shape: dict[str, Any] = {"ROWS": rows, **self._shape}
        outer = {key: shape[key] for key in shape if key != "GROUPS"}
        guidance = (1 - self.guidance_scale, self.guidance_scale) if passes == 2 else (1.0, 0.0)
        keys_values = keys_values.contiguous()
        visible = None if mask is None else mask.contiguous().view(torch.uint8)
        base = prepared.base.contiguous()  # [B, 8, D]

        sample = noise.contiguous()
        embedded, h, u, v, mixed = (noise.new_empty(batch * rows, width) for _ in range(5))
        hidden = noise.new_empty(batch * rows, len(self._tables[0].fc1[1]))
        with current(noise.device):
            ends.begin[(batch,)](sample, self._actions, base, embedded, **outer)
            for step, parts in zip(self.steps, table.unbind(0)):
                for index, block in enumerate(self._tables):
                    x = h if index else embedded
                    own = keys_values[..., 2 * width * index :]
                    self._run(block, parts[:, PARTS * index :], own, visible, shape, (x, u, v, mixed, hidden, h))
                following = torch.empty_like(sample)
                coefficients = step.inverse_signal, step.noise_ratio, step.next_signal, step.next_noise
                ends.finish[(batch,)](
                    h, parts[:, -2:], *self._final, sample, following, self._actions, base, embedded,
                    *guidance, *coefficients, P=table.shape[2], **shape,
                )  # fmt: skip
                sample = following
        return sample

    def _run(
        self,
        block: _Tables,
        parts: Tensor,
        keys_values: Tensor,
        mask: Tensor | None,
        shape: dict[str, Any],
        buffers: tuple[Tensor, ...],
    ) -> None:
        """Of the buffers, the first is the block's input and the last its output; no kernel writes what it reads.

        parts [B * G, from this block's on, D] and keys_values [B, S, from this block's on] are views.
        """
        x, u, v, mixed, hidden, out = buffers
        batch, length = keys_values.shape[:2]
        table = {"P": PARTS * len(self._tables) + 2}
        keys = min(KEYS, max(16 * GROUPS, padded(length)))
        attention = {"STRIDE": 2 * self.width * len(self._tables), "KEYS": keys, "END": -(-length // keys) * keys}
        columns = -(-self.width // WIDE)
        product = {key: shape[key] for key in shape if key != "D_PAD"} | table | {"WIDE": WIDE}
        heads, second, wider = (batch, self.heads), parts[:, 3:], hidden.shape[1]
        slab, wider_slab = (min(SLAB, max(padded(size), 16 * GROUPS)) for size in (self.width, wider))

        kernels.self_attention[heads](x, parts, *block.qkv, block.cos, block.sin, mixed, **shape, **self._head, **table)
        kernels.gated_product[batch, columns](
            mixed, *block.self_out, parts[:, 2:], x, u, K=self.width, SLAB=slab, **product
        )
        kernels.cross_attention[heads](
            u, *block.norm, *block.query, keys_values, u if mask is None else mask, mixed, length,
            MASKED=mask is not None, **shape, **self._head, **attention,
        )  # fmt: skip
        kernels.normed_product[batch, columns](mixed, block.cross_out, u, *block.norm, v, WIDE=WIDE, **shape)
        kernels.expand[batch, -(-wider // WIDE)](v, second, *block.fc1, hidden, N=wider, WIDE=WIDE, **shape, **table)
        kernels.gated_product[batch, columns](
            hidden, *block.fc2, parts[:, 5:], v, out, K=wider, SLAB=wider_slab, **product
        )


def _tables(block: Block) -> _Tables:
    attention, norm_v = block.attn_temporal, block.cross_attn.layer_norm_v
    norm_bias, query_bias, cross_out = fold_cross(block.cross_attn)
    query = block.cross_attn.attn.v_proj.weight
    angles = attention.rotary_emb.table(CHUNK)  # [8, pairs that turn]
    still = query.shape[0] // attention.heads // 2 - angles.shape[1]
    angles = F.pad(angles, (0, still))

    def plain(*tensors: Tensor) -> Any:
        return tuple(tensor.detach().contiguous() for tensor in tensors)

    cos, sin, weight = plain(angles.cos(), angles.sin(), cross_out)
    return _Tables(
        qkv=plain(attention.qkv.weight, attention.qkv.bias),
        cos=cos,
        sin=sin,
        self_out=plain(attention.proj.weight, attention.proj.bias),
        norm=plain(norm_v.weight, norm_bias),
        query=plain(query, query_bias),
        cross_out=weight,
        fc1=plain(block.mlp.fc1.weight, block.mlp.fc1.bias),
        fc2=plain(block.mlp.fc2.weight, block.mlp.fc2.bias),
    )
