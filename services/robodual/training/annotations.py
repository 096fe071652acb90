"""Language annotations in CALVIN's format: which steps of the recording show which instruction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robodual.training.object_array import read_object
from robodual.training.replacement import replacing

EMBEDDING_WIDTH = 384  # of the sentence encoder whose output CALVIN's files carry; written as zeros here


class DatasetError(ValueError):
    """A data set that cannot be used: one line that says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class Span:
    """Steps `start` to `end`, inclusive, during which `task` was done as `instruction` says."""

    start: int
    end: int
    task: str
    instruction: str

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"span of steps {self.start} to {self.end}: expected 0 <= start <= end")


def find_annotations(split: Path) -> Path:
    """`lang_annotations/auto_lang_ann.npy` of a split folder, or `auto_lang_ann.npy` in the folder itself.

    Raises:
        DatasetError: if there is neither.
    """
    candidates = [split / "lang_annotations" / "auto_lang_ann.npy", split / "auto_lang_ann.npy"]
    for path in candidates:
        if path.is_file():
            return path
    raise DatasetError(f"{candidates[0]}: no such file; copy the data set's lang_annotations folder again")


def read_annotations(path: Path) -> list[Span]:
    """The spans of an `auto_lang_ann.npy`, in the file's order. Nothing in the file is executed.

    Raises:
        DatasetError: if the file does not hold what CALVIN's does.
        ObjectArrayError: if it holds anything but plain data.
    """
    content = read_object(path)
    instructions = _field(path, content, "language", "ann")
    tasks = _field(path, content, "language", "task")
    limits = _field(path, content, "info", "indx")
    if not len(instructions) == len(tasks) == len(limits):
        raise DatasetError(
            f"{path}: {len(instructions)} instructions (language.ann), {len(tasks)} tasks (language.task) and "
            f"{len(limits)} spans (info.indx); expected as many of each"
        )
    spans = []
    for index, (instruction, task, limit) in enumerate(zip(instructions, tasks, limits)):
        if not isinstance(instruction, str) or not isinstance(task, str):
            raise DatasetError(f"{path}: entry {index} of language.ann and language.task must be strings")
        ends = tuple(np.asarray(limit).tolist()) if isinstance(limit, tuple | list | np.ndarray) else ()
        if len(ends) != 2 or not all(isinstance(step, int) for step in ends) or not 0 <= ends[0] <= ends[1]:
            raise DatasetError(f"{path}: entry {index} of info.indx must be the steps (start, end), got {limit!r}")
        spans.append(Span(*ends, task, instruction))
    return spans


def _field(path: Path, content: Any, group: str, name: str) -> Sequence[Any]:
    try:
        values = content[group][name]
    except (KeyError, TypeError, IndexError):
        raise DatasetError(f"{path}: no {group}.{name}; expected CALVIN's language annotations") from None
    if not isinstance(values, list | tuple | np.ndarray):
        raise DatasetError(f"{path}: {group}.{name} must be a list, got {type(values).__name__}")
    return list(values)


def write_annotations(split: Path, spans: Sequence[Span]) -> Path:
    """Writes `lang_annotations/auto_lang_ann.npy`, replacing it in one step; embeddings are zeros.

    Returns the file's path.
    """
    content = {
        "language": {
            "ann": [span.instruction for span in spans],
            "task": [span.task for span in spans],
            "emb": np.zeros((len(spans), 1, EMBEDDING_WIDTH), np.float32),
        },
        "info": {"episodes": [], "indx": [(span.start, span.end) for span in spans]},
    }
    path = split / "lang_annotations" / "auto_lang_ann.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_array(path, np.array(content, dtype=object))
    return path


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a `.npy` file beside its place and moves it there: a reader sees the old one or the new one."""
    with replacing(path) as partial, partial.open("wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())
