"""Conditionings computed once and kept on disk: a file for every annotated span, read by the data loader's workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from robodual import tensor_file
from robodual.facts import CheckpointError
from robodual.generalist.processor import Processor
from robodual.training.annotations import DatasetError
from robodual.training.conditioner import Conditioner, Conditioning
from robodual.training.dataset import CalvinDataset, Sample
from robodual.training.group import Group
from robodual.training.pool import resumable
from robodual.training.prompting import Prompts
from robodual.training.replacement import replacing
from robodual.training.window import starts


class ConditioningCache:
    """The conditionings of one generalist on one data set; about L x width x 2 bytes a window.

    A folder belongs to what `described` says (the generalist's hash, the mode, the data): with anything else it is
    refused, so that no stale conditioning is ever read.
    """

    def __init__(self, folder: Path, dataset: CalvinDataset) -> None:
        """
        Raises:
            DatasetError: if conditionings of this data set change from epoch to epoch (augmentation, enriched
                instructions), or windows move around missing steps.
        """
        if dataset.augment or dataset.enriched:
            raise DatasetError(
                "cache_conditioning: not with image_aug or enriched instructions, which change every epoch"
            )
        if dataset.detours:
            raise DatasetError(
                f"cache_conditioning: {dataset.detours} windows move around missing steps; copy them first"
            )
        self.folder = folder
        self.dataset = dataset

    def _path(self, span: int) -> Path:
        return self.folder / f"span-{span:06d}.safetensors"

    def fill(
        self,
        look: CalvinDataset,
        conditioner: Conditioner,
        processor: Processor,
        group: Group,
        described: dict[str, str],
        *,
        batch_size: int = 32,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """Computes what is missing, the spans shared out over the group's processes; can be interrupted.

        look: the same data set with chunk 0, whose samples are what the generalist sees.

        Raises:
            DatasetError: if the folder is of something else, or the disk is full.
        """
        if group.leads:
            with resumable(self.folder):
                self._claim(described)
        group.wait()
        spans = range(group.rank, len(self.dataset.spans), group.size)
        stride = self.dataset.stride
        windows = [len(starts(span, 0)[::stride]) for span in self.dataset.spans]
        firsts = list(accumulate(windows, initial=0))
        for done, span in enumerate(spans):
            progress(done, len(spans))
            needed = len(starts(self.dataset.spans[span], self.dataset.shifts)[::stride])
            if not needed or self._path(span).exists():
                continue
            found: list[tuple[Tensor, Tensor]] = []
            for begin in range(0, needed, batch_size):
                indices = range(firsts[span] + begin, firsts[span] + min(begin + batch_size, needed))
                batch = Prompts.collate([look[0, index] for index in indices], processor)
                found += conditioner(batch.to(group.device)).to(torch.device("cpu")).split()
            with resumable(self.folder):
                self._write(span, found)
        progress(len(spans), len(spans))
        group.wait()

    def _claim(self, described: dict[str, str]) -> None:
        path = self.folder / "cache.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before != described:
                raise DatasetError(
                    f"{self.folder}: holds conditionings of {before}, not of {described}; give another folder"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def _write(self, span: int, found: Sequence[tuple[Tensor, Tensor]]) -> None:
        hidden = torch.stack([states.to(torch.bfloat16) for states, _ in found])
        with replacing(self._path(span)) as partial:
            tensor_file.write({"hidden": hidden, "chunk": torch.stack([chunk for _, chunk in found])}, partial)

    def read(self, samples: Sequence[Sample]) -> Conditioning:
        """The samples' conditionings, hidden states as bfloat16 as in service.

        Raises:
            CheckpointError: if a file is damaged.
        """
        hidden, chunks = [], []
        for sample in samples:
            span = int(self.dataset.span_of[sample.key[1]])
            row = (sample.window.start - self.dataset.spans[span].start) // self.dataset.stride
            try:
                with safe_open(self._path(span), framework="pt") as file:
                    hidden.append(file.get_slice("hidden")[row : row + 1][0])
                    chunks.append(file.get_slice("chunk")[row : row + 1][0])
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._path(span)}: damaged ({error}); delete it and start again") from None
        return Conditioning.join(hidden, chunks)
