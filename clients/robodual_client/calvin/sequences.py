"""The published CALVIN evaluation sequences, generated: an initial scene each, and five tasks that follow one another.

Restates mees/calvin, calvin_models/calvin_agent/evaluation (multistep_sequences.py and utils.py): which tasks are
possible in which symbolic state of the scene, the seeded draws that pick 1000 chains, and the simulator state that an
initial state stands for. The draws use NumPy's legacy generator, whose stream is frozen, so that every machine gets
the same sequences.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import Iterator, Mapping, Tuple, Union

import numpy as np

from robodual_client.calvin.tasks import BLOCKS, TASKS

Value = Union[int, str]
Change = Tuple[Mapping[str, Tuple[Value, ...]], Mapping[str, Value]]  # values that the state may have; those it gets

CHAIN = 5

_FILE = Path(__file__).with_name("sequences.json.gz")

# Order matters: of the names and of the values, to the enumeration and to the hash of an initial state.
_INITIAL: dict[str, tuple[Value, ...]] = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    "red_block": ("table", "slider_right", "slider_left"),
    "blue_block": ("table", "slider_right", "slider_left"),
    "pink_block": ("table", "slider_right", "slider_left"),
    "grasped": (0,),
}

_ROBOT_OBS = (
    *(0.02586889, -0.2313129, 0.5712808),  # TCP position
    *(3.09045411, -0.02908596, 1.50013585),  # TCP Euler angles
    0.07999963,  # gripper width
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928),  # arm joints
    1.0,  # gripper command
)
_SHELVES = {
    "slider_left": (-0.240851662, 0.0924044687, 0.460990009),
    "slider_right": (0.070341633, 0.0924044687, 0.460990009),
}
_TABLE_SPOTS = ((0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.11999514, 0.45999001))


@dataclass(frozen=True)
class Sequence:
    """One evaluation sequence: its place in the published order, the symbolic initial state, and the five tasks."""

    number: int
    initial_state: Mapping[str, Value]
    tasks: tuple[str, ...]

    def observations(self) -> tuple[np.ndarray, np.ndarray]:
        """(robot_obs (15), scene_obs (24)), float64, to reset the simulator to."""
        return observations(self.initial_state)


@lru_cache(maxsize=None)
def published() -> tuple[Sequence, ...]:
    """The 1000 published evaluation sequences in order, read from the file that `python -m
    robodual_client.calvin.sequences` wrote: drawing them again takes `generate` some 15 seconds."""
    rows = json.loads(gzip.decompress(_FILE.read_bytes()))
    return tuple(Sequence(number, row["initial_state"], tuple(row["tasks"])) for number, row in enumerate(rows))


def generate() -> tuple[Sequence, ...]:
    """Draws the 1000 published evaluation sequences, in order."""
    states = initial_states()
    shares = [len(share) for share in np.array_split(np.arange(1000), len(states))]
    drawn = [
        (state, tasks)
        for index, (state, share) in enumerate(zip(states, shares))
        for tasks in draw_chains(state, share, seed=index)
    ]
    order = np.random.RandomState(0).permutation(len(drawn))
    return tuple(Sequence(number, *drawn[index]) for number, index in enumerate(order))


def observations(initial_state: Mapping[str, Value]) -> tuple[np.ndarray, np.ndarray]:
    """(robot_obs (15), scene_obs (24)), float64, that a symbolic initial state stands for.

    The blocks' spots and angles are drawn with a seed that is the state's own hash.
    """
    draw = np.random.RandomState(_fnv1_32(f"dict_values({list(initial_state.values())})"))
    spots = [_TABLE_SPOTS[index] for index in draw.permutation(2)]
    first_free = {"red_block": 0, "blue_block": 1 if initial_state["red_block"] == "table" else 0, "pink_block": 1}

    scene_obs = np.zeros(24)
    scene_obs[0] = 0.28 if initial_state["slider"] == "left" else 0.0
    scene_obs[1] = 0.22 if initial_state["drawer"] == "open" else 0.0
    scene_obs[3] = 0.088 if initial_state["lightbulb"] == 1 else 0.0
    scene_obs[4] = initial_state["lightbulb"]
    scene_obs[5] = initial_state["led"]
    for index, (block, spot) in enumerate(first_free.items()):
        pose = scene_obs[6 + 6 * index : 12 + 6 * index]
        pose[:3] = _SHELVES.get(str(initial_state[block]), spots[spot])
        pose[5] = draw.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return np.array(_ROBOT_OBS), scene_obs


def initial_states() -> list[dict[str, Value]]:
    """One or two blocks on the table, no two in the same half of the cabinet."""
    return [
        dict(zip(_INITIAL, values))
        for values in product(*_INITIAL.values())
        if values.count("table") in (1, 2) and values.count("slider_right") < 2 and values.count("slider_left") < 2
    ]


def draw_chains(state: Mapping[str, Value], count: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Draws five different tasks at a time until `count` of the draws can be done one after the other."""
    names = list(TASKS)
    start = tuple(state.values())
    first = np.array([_after(start, name) is not None for name in names])
    together = np.array([[_category(one) != _category(other) for one in names] for other in names])
    draw = np.random.RandomState(seed)
    while count:
        orders = np.tile(np.arange(len(names)), (2048, 1))
        for order in orders:
            draw.shuffle(order)
        chains = orders[:, :CHAIN]
        fits = first[chains[:, 0]]
        for one, other in combinations(range(CHAIN), 2):
            fits &= together[chains[:, one], chains[:, other]]
        for chain in chains[fits].tolist():
            tasks = tuple(names[index] for index in chain)
            values: tuple[Value, ...] | None = start
            for task in tasks:
                values = None if values is None else _after(values, task)
            if values is not None and count:
                count -= 1
                yield tasks


@lru_cache(maxsize=None)
def _after(values: tuple[Value, ...], task: str) -> tuple[Value, ...] | None:
    """The state's values after the task; None if the task is impossible, or possible in more than one way."""
    state = dict(zip(_INITIAL, values))
    ways = [
        effect
        for condition, effect in _changes(task)
        if all(state[name] in allowed for name, allowed in condition.items())
    ]
    if len(ways) != 1:
        return None
    state.update(ways[0])
    return tuple(state.values())


def _category(task: str) -> str:
    """Two tasks of one category never share a chain."""
    verb, *rest = task.split("_")
    if verb in ("rotate", "push") and rest[-1] != "drawer":
        return "move a block"
    if verb == "lift":
        return f"lift from {rest[-1]}"
    if verb == "turn":
        return "lights"
    return {"open_drawer": "drawer", "close_drawer": "drawer"}.get(task, verb if verb in ("move", "place") else task)


def _changes(task: str) -> Iterator[Change]:
    """Each way in which the task can happen: what must hold of the state, and what becomes of it."""
    verb, *rest = task.split("_")
    empty: dict[str, tuple[Value, ...]] = {"grasped": (0,)}
    full: dict[str, tuple[Value, ...]] = {"grasped": (1,)}
    blocks = [f"{color}_block" for color in BLOCKS]
    if task == "push_into_drawer":
        shelf = ("slider_right", "slider_left")
        for block in blocks:
            others: dict[str, tuple[Value, ...]] = {other: shelf for other in blocks if other != block}
            yield {**empty, **others, block: ("table",), "drawer": ("open",)}, {block: "drawer", "grasped": 0}
    elif verb in ("rotate", "push"):
        yield {**empty, f"{rest[0]}_block": ("table",)}, {f"{rest[0]}_block": "table"}
    elif verb == "move":
        yield {**empty, "slider": ("left" if rest[-1] == "right" else "right",)}, {"slider": rest[-1]}
    elif verb in ("open", "close"):
        before, after = ("closed", "open") if verb == "open" else ("open", "closed")
        yield {**empty, "drawer": (before,)}, {"drawer": after}
    elif verb == "lift":
        block = f"{rest[0]}_block"
        held: dict[str, Value] = {block: "grasped", "grasped": 1}
        if rest[-1] == "slider":  # the door hides the half of the cabinet that it stands before
            yield {**empty, block: ("slider_left",), "slider": ("right",)}, held
            yield {**empty, block: ("slider_right",), "slider": ("left",)}, held
        elif rest[-1] == "drawer":
            yield {**empty, block: ("drawer",), "drawer": ("open",)}, held
        else:
            yield {**empty, block: ("table",)}, held
    elif task == "place_in_slider":
        for block, side in product(blocks, ("right", "left")):
            yield {**full, block: ("grasped",), "slider": (side,)}, {block: f"slider_{side}", "grasped": 0}
    elif task == "place_in_drawer":
        for block in blocks:
            yield {**full, block: ("grasped",), "drawer": ("open",)}, {block: "drawer", "grasped": 0}
    elif task == "stack_block":
        for top, bottom in product(blocks, blocks):
            if top != bottom:
                stacked: dict[str, Value] = {top: "stacked_top", bottom: "stacked_bottom", "grasped": 0}
                yield {**full, top: ("grasped",), bottom: ("table",)}, stacked
    elif task == "unstack_block":
        for top, bottom in product(blocks, blocks):
            if top != bottom:
                yield {**empty, top: ("stacked_top",), bottom: ("stacked_bottom",)}, {top: "table", bottom: "table"}
    elif verb == "turn":
        on = int(rest[0] == "on")
        yield {**empty, rest[-1]: (1 - on,)}, {rest[-1]: on}
    else:
        raise ValueError(f"{task!r} is not a CALVIN task")


def _fnv1_32(text: str) -> int:
    """FNV-1, 32 bits: for each byte, multiply by the prime, then exclusive-or."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value * 0x01000193 & 0xFFFFFFFF) ^ byte
    return value


if __name__ == "__main__":
    rows = [{"initial_state": sequence.initial_state, "tasks": sequence.tasks} for sequence in generate()]
    _FILE.write_bytes(gzip.compress(json.dumps(rows).encode(), mtime=0))
