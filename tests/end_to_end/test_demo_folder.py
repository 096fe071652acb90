from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from robodual.cli import app


@pytest.mark.parametrize(("name", "reason"), [("taken", "already holds a demo"), ("file/demo", "Not a directory")])
def test_a_demo_s_folder_is_refused_before_its_services_start(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "taken" / "pair").mkdir(parents=True)
    (tmp_path / "file").touch()
    ended = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / name)])
    assert ended.exit_code == 1
    assert reason in ended.output
    assert "choose another folder" in ended.output
