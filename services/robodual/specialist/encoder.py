"""The encoders' blocks as the engine runs them: both are pre-norm ViTs, so one loop over packed layers serves both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robodual import vit
from robodual.specialist import depth, fusing, vision
from robodual.specialist.packing import Linear


@dataclass(frozen=True)
class _Block:
    norm1: nn.LayerNorm
    qkv: Linear
    out: Linear
    norm2: nn.LayerNorm
    fc1: Linear  # with its GELU
    fc2: Linear


class Encoder:
    """Computes what `VisionEncoder` or `PlainViT` computes, to rounding.

    The layers are laid out once and do not follow later changes of the module, for requests of so many images.
    `triton` allows Triton's kernels.
    """

    def __init__(self, module: vision.VisionEncoder | depth.PlainViT, images: int, *, triton: bool = True) -> None:
        self._attend = _choose_attention(module.cls_token, triton)
        self._embed = _choose_embedding(module, triton)
        places = module.pos_embed if isinstance(module, vision.VisionEncoder) else module.pos_embedding
        linear = partial(Linear.of, rows=images * places.shape[1], triton=triton)
        if isinstance(module, vision.VisionEncoder):
            self._blocks = [_of_vision(cast(vit.Block, block), linear) for block in module.blocks]
            self._heads = cast(vit.Block, module.blocks[0]).attn.heads
            self._norm = module.norm
        else:
            layers = [cast(nn.ModuleList, layer) for layer in module.transformer.layers]
            pairs = [cast("tuple[depth.Attention, depth.FeedForward]", tuple(layer)) for layer in layers]
            self._blocks = [_of_depth(*pair, linear) for pair in pairs]
            self._heads = cast(depth.Attention, layers[0][0]).heads
            self._norm = module.transformer.norm

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, S, S], in the module's dtype, to tokens [B, N, D], float32."""
        tokens = self._embed(images)
        batch, count, width = tokens.shape
        x = tokens.view(-1, width)  # [B * N, D]
        for block in self._blocks:
            mixed = self._attend(block.qkv(block.norm1(x)), batch, self._heads)  # [B * N, heads * C]
            x = block.out.add(x, mixed)
            x = block.fc2.add(x, block.fc1(block.norm2(x)))
        out: Tensor = self._norm(x).float().view(batch, count, width)
        return out


def attend(qkv: Tensor, batch: int, heads: int) -> Tensor:
    """Self-attention of B sequences, [B * N, 3 * heads * C] to [B * N, heads * C]."""
    split = qkv.view(batch, -1, 3, heads, qkv.shape[-1] // (3 * heads))
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, N, C]
    if q.is_cpu and q.dtype == torch.bfloat16:  # a CPU's fused kernel takes twice as long as the two products
        mixed = torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(dim=-1), v)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).reshape(len(qkv), -1)


def _choose_attention(weight: Tensor, triton: bool) -> Callable[[Tensor, int, int], Tensor]:
    """Triton's kernel where it is allowed and can run, or else plain operations."""
    if not _can_launch(weight, triton):
        return attend
    from robodual.specialist import attention  # it imports Triton

    return attention.attend


def _choose_embedding(module: vision.VisionEncoder | depth.PlainViT, triton: bool) -> Callable[[Tensor], Tensor]:
    """What makes of images [B, C, S, S] the blocks' input [B, N, D]: as a product where Triton's can run."""
    if not _can_launch(module.cls_token, triton):
        return cast(Callable[[Tensor], Tensor], module.embed)
    layers: tuple[Callable[[Tensor], Tensor], ...]
    if isinstance(module, vision.VisionEncoder):
        convolution, places = module.patch_embed.proj, module.pos_embed
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # the channel fastest, as patches have it
        layers = (depth.Patches(convolution.kernel_size[0]), Linear(weight, convolution.bias, triton=triton))
    else:
        cut, norm1, project, norm2 = module.to_patch_embedding
        layers = (cut, norm1, Linear.of(cast(nn.Linear, project), triton=triton), norm2)
        places = module.pos_embedding
    first = module.cls_token.detach()

    def embed(images: Tensor) -> Tensor:
        x = images
        for layer in layers:
            x = layer(x)
        return torch.cat((first.expand(len(x), -1, -1), x), dim=1) + places

    return embed


def _can_launch(weight: Tensor, triton: bool) -> bool:
    return triton and weight.dtype == torch.float32 and fusing.can_launch(weight.device)


def _of_vision(block: vit.Block, linear: Callable[..., Linear]) -> _Block:
    return _Block(
        norm1=block.norm1,
        qkv=linear(block.attn.qkv),
        out=linear(block.attn.proj),
        norm2=block.norm2,
        fc1=linear(block.mlp.fc1, gelu="none"),
        fc2=linear(block.mlp.fc2),
    )


def _of_depth(attention: depth.Attention, feed_forward: depth.FeedForward, linear: Callable[..., Linear]) -> _Block:
    norm2, fc1, _, _, fc2 = feed_forward.net
    return _Block(
        norm1=attention.norm,
        qkv=linear(attention.to_qkv),
        out=linear(cast(nn.Linear, attention.to_out[0])),
        norm2=cast(nn.LayerNorm, norm2),
        fc1=linear(cast(nn.Linear, fc1), gelu="none"),
        fc2=linear(cast(nn.Linear, fc2)),
    )
