"""`robodual train` and `robodual data`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from calvin_data import write_split
from typer.testing import CliRunner

from robodual.specialist.engine import load_specialist
from robodual.training.train_cli import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert tiny.TINY
    return write_split(tmp_path_factory.mktemp("command") / "training", lengths=[20]).parent


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(train, [*arguments, "--profile", "tiny", "--device", "cpu", "--num_workers", "0"])
    return result.exit_code, " ".join((result.output + result.stderr).split())


def test_the_specialist_with_the_published_flags(folder: Path, tmp_path: Path) -> None:
    flags = ["--batch_size", "2", "--learning_rate", "1e-3", "--max_steps", "3", "--save_steps", "2"]
    flags += ["--log_steps", "1", "--num_inference_steps", "5", "--cond_drop_chance", "0.2", "--train_vision"]
    flags += ["--with_depth", "--without-gripper"]
    status, shown = invoke("specialist", str(folder), "--output", str(tmp_path), *flags)
    assert (status, "trained at step 3" in shown) == (0, True), shown
    weights = tmp_path / "checkpoints" / "step-00000003" / "specialist.safetensors"
    config = load_specialist("tiny", checkpoint=weights, device="cpu").policy.config
    assert (config.diffusion_steps, config.with_depth, config.with_gripper) == (5, True, False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss", "learning_rate", "gradient_norm", "samples_per_second"} <= lines[0].keys()
    status, shown = invoke("specialist", str(folder), "--output", str(tmp_path), *flags)
    assert status == 1
    assert "pass --resume" in shown


def test_the_generalist_with_dashed_flags(folder: Path, tmp_path: Path) -> None:
    flags = ["--batch-size", "2", "--grad-accumulation-steps", "1", "--max-steps", "1", "--lora-rank", "2", "--merged"]
    flags += ["--use-lora"]
    status, shown = invoke("generalist", str(folder / "training"), "--output", str(tmp_path), *flags)
    assert status == 0, shown
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    assert (checkpoint / "adapter" / "adapter_config.json").exists()
    assert (checkpoint / "generalist" / "config.json").exists()


def test_faults_are_one_line_and_exit_status_1(folder: Path, tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "run"))
    for arguments, message in (
        (("specialist", str(folder), *output), "vision_weights: the colour encoder is not trained"),
        (("specialist", str(tmp_path / "none"), "--train_vision", *output), "no such folder"),
        (
            ("specialist", str(folder), "--conditioning", "none", *output),
            "conditioning: expected one of forced, generated",
        ),
        (("generalist", str(folder), "--generalist", str(tmp_path / "none"), *output), "none"),
    ):
        status, shown = invoke(*arguments)
        assert status == 1, shown
        assert message in shown
        assert "Traceback" not in shown
