"""The denoising loop with everything in tables that does not depend on the noisy actions.

It computes what `Policy.sample` computes, to rounding, in about twenty operations a block:

- The conditioned and the free pass of classifier-free guidance are one batch, over the same keys and values.
- Keys and values of all blocks come from one product: the norm before them is the same but for its scale and shift,
  which are folded into the weights.
- Timesteps are known, so the modulation of every block at every step is one product a request, and for the free pass,
  whose conditioning vector is zero, a constant.
- The rotation of queries and keys is two elementwise operations: the quarter-turned channels come out of the same
  product as the channels themselves.
- gamma and the bias of cross-attention's output are folded into the weights around them.

Tensor names: B requests, G passes (2 with guidance), D the width, S the context's length, T denoising steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robodual.specialist import ddim
from robodual.specialist.config import ACTION, CHUNK, SpecialistConfig
from robodual.specialist.denoiser import Block, Denoiser, Rotary

PARTS = 6  # shift, scale and gate, twice a block


@dataclass(frozen=True)
class Linear:
    """y = x @ weight + bias."""

    weight: Tensor  # [in, out]
    bias: Tensor  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@dataclass(frozen=True)
class BlockTables:
    """One block's weights, folded."""

    qkv: Linear  # queries, keys, values, and the quarter-turned channels of queries and keys
    self_out: Linear
    norm_weight: Tensor
    norm_bias: Tensor
    query: Linear
    cross_out: Tensor  # [D, D]
    fc1: Linear
    fc2: Linear


class Sampler:
    """Denoises chunks for a batch of requests.

    The tables are made once, from a denoiser in its final device and dtype, and do not follow later changes of it.
    """

    def __init__(self, denoiser: Denoiser, config: SpecialistConfig) -> None:
        self.width, self.heads = config.width, config.heads
        self.guidance_scale = config.guidance_scale
        self.steps = ddim.schedule(config.diffusion_steps)
        blocks = [block for block in denoiser.blocks if isinstance(block, Block)]
        self.blocks = [_fold(block) for block in blocks]
        weight = denoiser.x_embedder.weight
        self.dtype = weight.dtype
        self.embed_reference = Linear(weight[:, :ACTION].t().contiguous(), denoiser.x_embedder.bias)
        self.embed_actions = weight[:, ACTION:].t().contiguous()
        self.out = _linear(denoiser.final_layer.linear)
        self.context_weight, self.context_bias = _fold_context(blocks)

        sequences = [block.adaLN_modulation for block in blocks] + [denoiser.final_layer.adaLN_modulation]
        sources = [_linear(sequence[1]) for sequence in sequences]
        self.modulation = Linear(
            torch.cat([source.weight for source in sources], dim=1),  # [D, (6 * blocks + 2) * D]
            torch.cat([source.bias for source in sources]),
        )
        timesteps = torch.tensor([step.timestep for step in self.steps], device=weight.device)
        self.timesteps = denoiser.t_embedder(timesteps)  # [T, D]
        self.free_modulation = self._modulation(self.timesteps)[:, None, None]  # [T, 1, 1, parts, D]

        rotary = blocks[0].attn_temporal.rotary_emb
        assert isinstance(rotary, Rotary)
        angles = rotary.table(CHUNK).repeat_interleave(2, dim=-1)[:, None, None]  # [8, 1, 1, rotated]
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def keys_values(self, tokens: Tensor) -> Tensor:
        """Context tokens [..., D] to all blocks' keys and values [..., blocks * 2 * D]."""
        normed = F.layer_norm(tokens, (self.width,))
        return F.linear(normed, self.context_weight, self.context_bias)

    def __call__(
        self, noise: Tensor, reference: Tensor, conditioning: Tensor, keys_values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Denoises.

        Args:
            noise: starting sample, float32 [B, 8, 7]
            reference: reference actions [B, 8, 7]
            conditioning: the conditioning vector without its timestep [B, D]
            keys_values: of the context [B, S, blocks * 2 * D]
            mask: bool [B, S], True where the context is no padding; None where there is none

        Returns:
            Actions, float32 [B, 8, 7].
        """
        batch, width, heads = len(noise), self.width, self.heads
        guided = self.guidance_scale != 1
        modulation = self._modulation(conditioning[:, None] + self.timesteps).transpose(0, 1)[:, :, None]
        if guided:  # [T, B, G, parts, D]: the free pass is the first
            modulation = torch.cat((self.free_modulation.expand(-1, batch, -1, -1, -1), modulation), dim=2)
        split = keys_values.view(batch, -1, len(self.blocks), 2, heads, width // heads)
        context = split.permute(2, 3, 0, 4, 1, 5).contiguous()  # [blocks, 2, B, heads, S, D / heads]
        visible = None if mask is None else mask[:, None, None]  # [B, 1, 1, S]
        base = self.embed_reference(reference.reshape(-1, ACTION))  # [B * 8, D]

        x = noise
        for step, table in zip(self.steps, modulation):
            parts = table[:, :, :, None].unbind(2)  # each [B, G, 1, D]
            actions = x.reshape(-1, ACTION).to(self.dtype)
            h = torch.addmm(base, actions, self.embed_actions).view(batch, 1, CHUNK, width)
            for index, block in enumerate(self.blocks):
                key, value = context[index].unbind(0)
                h = self._block(block, h, parts[PARTS * index : PARTS * (index + 1)], key, value, visible)
            shift, scale = parts[-2:]
            h = torch.addcmul(shift, F.layer_norm(h, (width,), eps=1e-6), scale)
            eps = self.out(h.view(-1, width)).view(batch, -1, CHUNK, ACTION).float()
            if guided:
                free, guide = eps.unbind(1)
                eps = free + self.guidance_scale * (guide - free)
            else:
                eps = eps[:, 0]
            x = step.apply(x, eps)
        return x

    def _block(
        self, block: BlockTables, x: Tensor, parts: tuple[Tensor, ...], key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        # x: [B, G or 1, 8, D], parts: [B, G, 1, D] each, key and value: [B, heads, S, D / heads]
        width, heads, rotated = self.width, self.heads, self.cos.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = torch.addcmul(shift1, F.layer_norm(x, (width,), eps=1e-6), scale1)
        batch, passes = h.shape[:2]
        rows = (batch * passes, CHUNK)
        qkv = block.qkv(h.view(-1, width))
        qk, v, turned = qkv.split_with_sizes((2 * width, width, 2 * heads * rotated), dim=-1)
        qk = qk.view(*rows, 2, heads, -1)
        qk[..., :rotated].mul_(self.cos).addcmul_(turned.view(*rows, 2, heads, rotated), self.sin)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
        v = v.view(*rows, heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)
        x = torch.addcmul(x, gate1, block.self_out(mixed).view(batch, passes, CHUNK, width))

        x = F.layer_norm(x, (width,), block.norm_weight, block.norm_bias).view(-1, width)
        q = block.query(x).view(batch, passes * CHUNK, heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2).reshape(-1, width)
        x = torch.addmm(x, mixed, block.cross_out).view(batch, passes, CHUNK, width)

        h = torch.addcmul(shift2, F.layer_norm(x, (width,), eps=1e-6), scale2)
        h = block.fc2(F.gelu(block.fc1(h.view(-1, width)), approximate="tanh"))
        return torch.addcmul(x, gate2, h.view(batch, passes, CHUNK, width))

    def _modulation(self, conditioning: Tensor) -> Tensor:
        """[..., D] to [..., parts, D], with 1 added to the scales."""
        flat = F.silu(conditioning).reshape(-1, self.width)
        parts = self.modulation(flat).view(*conditioning.shape[:-1], -1, self.width)
        parts[..., 1::3, :] += 1  # of the blocks; the final layer's scale is the last part, also at 1 modulo 3
        return parts


def _linear(layer: torch.nn.Module) -> Linear:
    assert isinstance(layer, torch.nn.Linear)
    return Linear(layer.weight.t().contiguous(), layer.bias)


def _fold(block: Block) -> BlockTables:
    self_attention, cross = block.attn_temporal, block.cross_attn
    heads = self_attention.heads
    weight, bias = self_attention.qkv.weight, self_attention.qkv.bias
    width = weight.shape[1]
    # A quarter turn of each pair (a, b) is (-b, a).
    rotated = 2 * len(self_attention.rotary_emb.freqs)
    partner = torch.arange(rotated, device=weight.device).view(-1, 2).flip(1).flatten()
    sign = torch.tensor([-1.0, 1.0], device=weight.device, dtype=weight.dtype).repeat(rotated // 2)
    turned_weight = weight[: 2 * width].view(2, heads, -1, width)[:, :, partner] * sign[:, None]
    turned_bias = bias[: 2 * width].view(2, heads, -1)[:, :, partner] * sign
    qkv = Linear(
        torch.cat((weight, turned_weight.flatten(0, 2))).t().contiguous(), torch.cat((bias, turned_bias.flatten()))
    )

    # v + gamma * (Wo m + bo) = (v + gamma * bo) + (gamma * Wo) m, with the constant moved into the norm's bias, whence
    # the query must lose it again.
    out, query = cross.attn.out_v_proj, cross.attn.v_proj
    constant = cross.gamma_v * out.bias
    return BlockTables(
        qkv=qkv,
        self_out=_linear(self_attention.proj),
        norm_weight=cross.layer_norm_v.weight,
        norm_bias=cross.layer_norm_v.bias + constant,
        query=Linear(query.weight.t().contiguous(), query.bias - query.weight @ constant),
        cross_out=(cross.gamma_v[:, None] * out.weight).t().contiguous(),
        fc1=_linear(block.mlp.fc1),
        fc2=_linear(block.mlp.fc2),
    )


def _fold_context(blocks: list[Block]) -> tuple[Tensor, Tensor]:
    """Weight [blocks * 2 * D, D] and bias of all keys and values, from the normed but not scaled context."""
    weights, biases = [], []
    for block in blocks:
        norm, attention = block.cross_attn.layer_norm_l, block.cross_attn.attn
        for layer in (attention.l_proj, attention.values_l_proj):
            weights.append(layer.weight * norm.weight)
            biases.append(layer.bias + layer.weight @ norm.bias)
    return torch.cat(weights), torch.cat(biases)
