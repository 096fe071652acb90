"""A full disk ends no training by way of what the training shows."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from robodual.training.display import shown
from robodual.training.loop import Report


def report(step: int) -> Report:
    return Report(step, 1.0, {"action_l1": 0.5}, 1e-4, 2.0, 30.0)


def test_a_full_disk_is_said_once_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with shown(tmp_path, 9, Console(file=io.StringIO())) as display:
        display(report(1))
        display.board.flush()  # its thread writes nothing more while files are limited
        with monkeypatch.context() as patch:
            patch.setattr(display.board, "add_scalar", full)
            resource.setrlimit(resource.RLIMIT_FSIZE, (display.path.stat().st_size + 20, limits[1]))
            try:
                display(report(2))
                display(report(3))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        display(report(4))
        monkeypatch.setattr(display.board, "close", full)
    assert [json.loads(line)["step"] for line in display.path.read_text().splitlines()] == [1, 4]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "log.jsonl: could not be written ([Errno 27] File too large); the training goes on without it" in said[0]
    assert "tensorboard: could not be written" in said[1]
