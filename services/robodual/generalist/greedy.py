"""The greedy token at each place of a chunk."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robodual.generalist.config import TokenConfig
from robodual.generalist.model import Generalist
from robodual.generalist.tokens import ACTION, CHUNK, GENERATED, encode_actions


@functools.lru_cache(maxsize=16)
def chunk_layout(ids: TokenConfig, device: torch.device) -> Tensor:
    """int64 [64], not to be changed: the separators and the end where they belong, -1 in the actions' places."""
    places = torch.full((CHUNK, ACTION + 1), -1, device=device)
    places[:, ACTION] = ids.separator
    places[-1, ACTION] = ids.eos
    return places.view(GENERATED)


@functools.lru_cache(maxsize=16)
def standing_still(ids: TokenConfig, device: torch.device) -> Tensor:
    """int64 [64], not to be changed: the chunk of a robot that does not move, for want of a better guess."""
    return torch.from_numpy(encode_actions(np.zeros((CHUNK, ACTION)), ids)).to(device)


def greedy(model: Generalist, hidden: Tensor, layout: Tensor, constrained: bool) -> Tensor:
    """The best tokens [B, N] after hidden states [B, N, D], for the N places of a chunk that `layout` describes."""
    best = best_tokens(model, hidden, constrained)
    return torch.where(layout < 0, best + model.config.tokens.action_start, layout) if constrained else best


def best_tokens(model: Generalist, hidden: Tensor, constrained: bool) -> Tensor:
    """The best tokens [B, N] after hidden states [B, N, D]; constrained: of the actions' alone, counted from 0."""
    head, ids = model.language_model.lm_head, model.config.tokens
    if constrained:
        return F.linear(hidden, head.weight[ids.action_start : ids.action_end]).argmax(dim=-1)
    best: Tensor = head(hidden).argmax(dim=-1)
    return best
