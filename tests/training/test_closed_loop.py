"""During a training, checkpoints are driven through real services in the simulator, and the curve is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calvin_data import write_split
from tiny import SPECIALIST, data, settings
from typer.testing import CliRunner

from robodual.facts import CheckpointError
from robodual.pair import Options, PairError
from robodual.training import closed_loop, runs
from robodual.training.closed_loop import ClosedLoop
from robodual.training.generalist import ADAPTER, MERGED
from robodual.training.loop import Report
from robodual.training.runs import GeneralistOptions, Source, train_generalist, train_specialist
from robodual.training.specialist import WEIGHTS
from robodual.training.train_cli import train

TOY = Source("toy", device="cpu")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("closed-loop") / "training", lengths=[20])


@pytest.mark.slow
def test_every_so_many_steps_the_checkpoint_is_evaluated(split: Path, tmp_path: Path) -> None:
    reports: list[Report] = []
    loop = ClosedLoop("toy", "cpu", specialist=WEIGHTS, sequences=1, ep_len=10)
    values = settings(tmp_path, 4, batch_size=2, log_steps=3, eval_every=2)
    train_specialist(TOY, data(split), SPECIALIST, values, report=reports.append, evaluate=loop)
    assert [shown.step for shown in reports] == [2, 3, 4]
    assert [shown.metrics.get("eval_average_length") for shown in reports] == [0.0, None, 0.0]
    assert reports[0].metrics["eval_first_task"] == 0
    assert reports[0].metrics["eval_seconds"] > 0
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["all weights", "adapter"])
def test_a_generalist_drives_alone(split: Path, tmp_path: Path, whole: bool) -> None:
    reports: list[Report] = []
    base = MERGED
    source = TOY
    if not whole:
        train_generalist(TOY, data(split), GeneralistOptions(use_lora=False), settings(tmp_path / "base", 1))
        base = str(tmp_path / "base" / "checkpoints" / "step-00000001" / MERGED)
        source = Source("toy", base, device="cpu")
    loop = ClosedLoop("toy", "cpu", base, () if whole else (ADAPTER,), only="generalist", sequences=1, ep_len=10)
    values = settings(tmp_path / "run", 1, batch_size=2, eval_every=1)
    train_generalist(
        source, data(split), GeneralistOptions(use_lora=not whole), values, report=reports.append, evaluate=loop
    )
    assert reports[0].metrics["eval_average_length"] == 0


@pytest.mark.slow
def test_the_command_reports_to_its_log_tensorboard_and_wandb(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--profile", "toy", "--device", "cpu", "--num_workers", "0", "--batch_size", "2", "--max_steps", "2"]
    flags += ["--eval_every", "2", "--eval_sequences", "1", "--train_vision", "--wandb", "robodual"]
    result = CliRunner().invoke(train, ["specialist", str(split), *flags, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_average_length"] == 0
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(("model", "merged"), [("generalist", "false"), ("specialist", "true")])
def test_what_was_trained_on_a_quantised_base_is_evaluated_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, merged: str
) -> None:
    """A specialist's generalist is quantised with its adapters merged in; those of a generalist are trained beside."""
    started: list[Options] = []

    def start(options: Options) -> None:
        started.append(options)
        raise PairError("enough")

    def trained(*arguments: object, evaluate: ClosedLoop, **options: object) -> None:
        (tmp_path / "checkpoint" / ADAPTER).mkdir(parents=True)
        evaluate(tmp_path / "checkpoint")

    monkeypatch.setattr(closed_loop, "Pair", start)
    monkeypatch.setattr(runs, f"train_{model}", trained)
    (tmp_path / "given").mkdir()
    flags = ["--generalist", "base", "--adapter", str(tmp_path / "given"), "--quantisation", "nf4"]
    result = CliRunner().invoke(train, [model, str(tmp_path), *flags, "--output", str(tmp_path / "run")])
    assert "eval_every: enough" in result.stderr
    assert started[0].settings["ROBODUAL_GENERALIST_QUANTISATION"] == "nf4"
    assert started[0].settings["ROBODUAL_GENERALIST_MERGE_ADAPTERS"] == merged


def test_a_checkpoint_that_does_not_start_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="eval_every: the specialist exited with status 1"):
        ClosedLoop("toy", "cpu", specialist="nothing.safetensors", sequences=1)(tmp_path)
