"""The diffusion transformer: what noise is in an action chunk, given its reference, the sensors and the generalist."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.specialist.adapters import Pooling, Resampler
from robodual.specialist.config import ACTION, CHUNK, SpecialistConfig

ATTENTION_DROPOUT = 0.1  # on attention weights, in training; `Policy.set_attention_dropout` changes it
FREQUENCIES = 256  # width of the sinusoidal timestep embedding
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class Tokens:
    """What the encoders made of one observation; None where the model does not read the sensor.

    static [B, 2, N, D] (current frame, previous frame), gripper [B, 1, N, D]; the others [B, N', D'].
    """

    static: Tensor
    static_depth: Tensor | None = None
    gripper: Tensor | None = None
    gripper_depth: Tensor | None = None
    tactile: Tensor | None = None


class Rotary(nn.Module):
    """Rotary position embedding of the first half of each head's channels, in interleaved pairs (0, 1), (2, 3), ..."""

    freqs: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        rotated = head_width // 2
        self.register_buffer("freqs", ROTARY_BASE ** -(torch.arange(0, rotated, 2).float() / rotated))

    def table(self, length: int) -> Tensor:
        """Angles [length, rotated / 2] of positions 0 to length - 1."""
        return torch.arange(length, device=self.freqs.device)[:, None] * self.freqs

    def forward(self, x: Tensor) -> Tensor:
        # x: [B, heads, L, head width]
        angles = self.table(x.shape[2]).repeat_interleave(2, dim=-1)
        turned, kept = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
        quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        return torch.cat((turned * angles.cos() + quarter * angles.sin(), kept), dim=-1)


class SelfAttention(nn.Module):
    """Attention among the action tokens; not causal: the published code drops the mask it prepares."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rotary_emb = Rotary(width // heads)
        self.dropout = ATTENTION_DROPOUT

    def forward(self, x: Tensor) -> Tensor:
        # x: [B, L, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(self.rotary_emb(q), self.rotary_emb(k), v, dropout_p=dropout)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Action tokens look at the context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.v_proj = nn.Linear(width, width)
        self.l_proj = nn.Linear(width, width)
        self.values_l_proj = nn.Linear(width, width)
        self.out_v_proj = nn.Linear(width, width)
        self.dropout = ATTENTION_DROPOUT

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        # x: [B, L, D], context: [B, S, D], mask: [B, 1, 1, S], True where the context counts
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.v_proj(x), self.l_proj(context), self.values_l_proj(context))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.out_v_proj(mixed.transpose(1, 2).flatten(2))
        return out


class CrossAttentionBlock(nn.Module):
    """v + gamma * attention(v), where v is the normalised input: there is no residual from before the norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer_norm_v = nn.LayerNorm(width)
        self.layer_norm_l = nn.LayerNorm(width)
        self.attn = CrossAttention(width, heads)
        self.gamma_v = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        # x: [B * N, L, D], context: [B, S, D]: N samples that follow one another share a context
        v = self.layer_norm_v(x)
        seen = self.attn(v.reshape(len(context), -1, v.shape[-1]), self.layer_norm_l(context), mask)
        out: Tensor = v + self.gamma_v * seen.view_as(v)
        return out


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, scaled and shifted (DiT, arXiv 2212.09748): x [B, L, D], shift and scale [B, D]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """Self-attention and MLP modulated by the conditioning vector, with cross-attention to the context between them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn_temporal = SelfAttention(width, heads)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.cross_attn = CrossAttentionBlock(width, heads)

    def forward(self, x: Tensor, c: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        # x: [B * N, L, D], c: [B * N, D], context: [B, S, D], mask: [B, 1, 1, S], True where the context counts
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn_temporal(modulated(x, shift1, scale1))
        x = self.cross_attn(x, context, mask)
        out: Tensor = x + gate2.unsqueeze(1) * self.mlp(modulated(x, shift2, scale2))
        return out


class FinalLayer(nn.Module):
    """Tokens to noise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, ACTION)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        out: Tensor = self.linear(modulated(x, shift, scale))
        return out


class TimestepEmbedder(nn.Module):
    """Integer timesteps [B] to vectors [B, D], through cosines and sines of geometric frequencies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device).float() / half)
        angles = timesteps[:, None].float() * frequencies
        out: Tensor = self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.parameters()).dtype))
        return out


class Denoiser(nn.Module):
    """The network under `model.` in a checkpoint: adapters, conditioning vector and transformer."""

    def __init__(self, config: SpecialistConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.x_embedder = nn.Linear(2 * ACTION, width)
        self.t_embedder = TimestepEmbedder(width)
        self.proprio_embedder = nn.Sequential(nn.Linear(ACTION, width), nn.SiLU(), nn.Linear(width, width))
        self.context_adapter = nn.Linear(config.context_width, width)

        def resampler(frames: int) -> Resampler:
            return Resampler(
                vision_width=config.vision_width, width=width, heads=heads, latents=config.latents, frames=frames
            )

        def pooling() -> Pooling:
            return Pooling(token_width=config.depth_width, width=width, heads=heads, latents=config.latents)

        self.visual_adapter = resampler(frames=2)
        self.depth_adapter = pooling() if config.with_depth else None
        self.gripper_depth_adapter = pooling() if config.with_gripper else None
        self.gripper_visual_adapter = resampler(frames=1) if config.with_gripper else None
        self.tactile_adapter = pooling() if config.with_tactile else None
        # Read by nothing; checkpoints carry it.
        self.register_buffer("temp_embed", torch.zeros(1, CHUNK, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(config.blocks))
        self.final_layer = FinalLayer(width)

    @property
    def sensor_latents(self) -> int:
        """How many tokens `sensor_context` has."""
        adapters = (self.gripper_visual_adapter, self.depth_adapter, self.gripper_depth_adapter, self.tactile_adapter)
        return len(self.visual_adapter.latents) * (2 + sum(adapter is not None for adapter in adapters))

    def sensor_context(self, tokens: Tokens) -> Tensor:
        """The sensors' part of the context, [B, latents * frames and maps, D], in the published order."""
        parts = [self.visual_adapter(tokens.static).flatten(1, 2)]
        if self.depth_adapter is not None:
            parts.append(self.depth_adapter(tokens.static_depth))
        if self.gripper_visual_adapter is not None and self.gripper_depth_adapter is not None:
            parts.append(self.gripper_visual_adapter(tokens.gripper).flatten(1, 2))
            parts.append(self.gripper_depth_adapter(tokens.gripper_depth))
        if self.tactile_adapter is not None:
            parts.append(self.tactile_adapter(tokens.tactile))
        return torch.cat(parts, dim=1)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        *,
        reference: Tensor,
        tokens: Tokens,
        hidden_states: Tensor,
        proprio: Tensor,
        keep_conditioning: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        sensors: Tensor | None = None,
    ) -> Tensor:
        """One evaluation, everything computed anew, as published.

        A training may look at each observation with N noisy chunks, one after the other in x (published: N is 1).

        Args:
            x: noisy actions [B * N, 8, 7]
            timesteps: int64 [B * N]
            reference: the generalist's chunk, cut by the reference window [B, 8, 7]
            tokens: the encoders' output
            hidden_states: the generalist's [B, L, context width]
            proprio: [B, 7]
            keep_conditioning: [B * N] of 0 and 1; 0 masks a sample's conditioning vector for classifier-free guidance,
                and nothing else of it
            hidden_mask: bool [B, L], False where a sample's hidden states are padding; all count without it
            sensors: `sensor_context` of the tokens, for who has it already

        Returns:
            The predicted noise [B * N, 8, 7].
        """
        draws = len(x) // len(reference)
        projected = self.context_adapter(hidden_states)  # [B, L, D]
        if sensors is None:
            sensors = self.sensor_context(tokens)
        context = torch.cat((sensors, projected), dim=1)
        if hidden_mask is None:
            mask, mean = None, projected.mean(dim=1)  # [B, D]
        else:
            mask = F.pad(hidden_mask, (sensors.shape[1], 0), value=True)[:, None, None]
            mean = (projected * hidden_mask[..., None]).sum(dim=1) / hidden_mask.sum(dim=1, keepdim=True)
        c = (self.proprio_embedder(proprio) + mean).repeat_interleave(draws, dim=0)
        if keep_conditioning is not None:
            c = c * keep_conditioning[:, None].to(c.dtype)
        c = c + self.t_embedder(timesteps)
        x = self.x_embedder(torch.cat((reference.repeat_interleave(draws, dim=0), x), dim=-1))
        for block in self.blocks:
            x = block(x, c, context, mask)
        out: Tensor = self.final_layer(x, c)
        return out
