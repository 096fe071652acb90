"""The weights of the Llama's layers as the fused kernels read them: what is multiplied together in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from robodual.generalist.model import Generalist
from robodual.generalist.quantisation import Float8Linear


@dataclass(frozen=True)
class Matrix:
    """Linear layers' weights one below the other, [out, in]; scale: float8's [out]."""

    weight: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Layer:
    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    norm1: Tensor
    norm2: Tensor


def layers_of(model: Generalist) -> Sequence[LlamaDecoderLayer]:
    return cast(Sequence[LlamaDecoderLayer], model.language_model.model.layers)


def linears(layer: LlamaDecoderLayer) -> list[nn.Module]:
    """Queries, keys, values, out, gate, up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    own = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*own, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def lay_out(layer: LlamaDecoderLayer) -> Layer:
    parts = linears(layer)
    return Layer(
        qkv=_join(parts[:3]),
        out=_join(parts[3:4]),
        gate_up=_join(parts[4:6]),
        down=_join(parts[6:]),
        norm1=layer.input_layernorm.weight,
        norm2=layer.post_attention_layernorm.weight,
    )


def _join(layers: Sequence[nn.Module]) -> Matrix:
    """Moves the layers' weights into one tensor, of which they are parts from then on."""
    return Matrix(_joined(layers, "weight"), _joined(layers, "scale") if isinstance(layers[0], Float8Linear) else None)


def _joined(layers: Sequence[nn.Module], name: str) -> Tensor:
    parameters = [cast(nn.Parameter, getattr(layer, name)) for layer in layers]
    if len(parameters) == 1:
        return parameters[0].detach()
    # Bytes, since not all that joins tensors takes float8.
    whole = torch.cat([parameter.detach().view(torch.uint8) for parameter in parameters]).view(parameters[0].dtype)
    for parameter, part in zip(parameters, torch.split(whole, [len(p) for p in parameters])):
        parameter.data = part
    return whole
