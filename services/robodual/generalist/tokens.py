"""Actions as tokens: the layout of a generated chunk, and its bins.

A chunk is 64 tokens: eight actions of seven action tokens, a separator after each of the first seven actions, and the
end token last.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from robodual.generalist.config import TokenConfig

CHUNK = 8
ACTION = 7
ROW = ACTION + 1  # an action and what separates it from the next
GENERATED = CHUNK * ROW


def bin_centres(bins: int) -> npt.NDArray[np.float64]:
    """Centres of the `bins` - 1 intervals whose edges are linspace(-1, 1, bins) (OpenVLA's action tokenizer)."""
    edges = np.linspace(-1.0, 1.0, bins)
    return (edges[:-1] + edges[1:]) / 2


def encode_actions(actions: npt.NDArray[np.floating], tokens: TokenConfig) -> npt.NDArray[np.int64]:
    """Actions [8, 7], clipped to [-1, 1] -> the 64 token ids that the model is trained to emit."""
    edges = np.linspace(-1.0, 1.0, tokens.bins)
    ids = np.full((CHUNK, ACTION + 1), tokens.separator, dtype=np.int64)
    ids[:, :ACTION] = tokens.action_end - np.digitize(np.clip(actions, -1.0, 1.0), edges)
    ids[-1, -1] = tokens.eos
    return ids.reshape(GENERATED)


def decode_actions(ids: npt.NDArray[np.int64], tokens: TokenConfig) -> tuple[npt.NDArray[np.float32], int]:
    """The 64 generated ids -> actions float32 [8, 7] in (-1, 1), and how many ids broke the layout.

    An action token t is bin clip(action_end - t - 1, 0, bins - 2), decoded to its centre. Where another token stands in
    an action's place, that value is repaired: it repeats the same dimension of the action before, and is 0 (no motion)
    in the first action. The published decoder reads such a token as an extreme bin instead, a full-speed motion that
    nobody asked for. A wrong separator or end token is counted and changes no value.
    """
    grid = ids.reshape(CHUNK, ACTION + 1)
    places = grid[:, :ACTION]
    valid = (places >= tokens.action_start) & (places < tokens.action_end)
    centres = bin_centres(tokens.bins)
    actions = centres[np.clip(tokens.action_end - places - 1, 0, len(centres) - 1)]
    previous = np.zeros(ACTION)
    for row, good in zip(actions, valid):
        row[~good] = previous[~good]
        previous = row
    breaks = np.count_nonzero(~valid) + np.count_nonzero(grid[:-1, ACTION] != tokens.separator)
    return actions.astype(np.float32), int(breaks + (grid[-1, ACTION] != tokens.eos))
