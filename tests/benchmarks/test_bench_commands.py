"""`robodual bench`: the command, and every benchmark behind it with the smallest settings."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from robodual import bench
from robodual.cli import app

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n"


def test_help_lists_the_benchmarks_and_what_they_measure() -> None:
    said = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"})

    assert said.exit_code == 0
    for name in ("batching", "conditioning", "generalist", "memory", "specialist", "system"):
        assert f"\n {name} " in said.stdout
    assert "One control step of the specialist" in said.stdout
    assert "measurement" not in said.stdout


def test_unknown_benchmark_is_one_line_with_those_there_are() -> None:
    said = CliRunner().invoke(app, ["bench", "specialst"])

    assert said.exit_code == 2
    (line,) = said.stderr.splitlines()
    assert "specialst" in line
    assert "specialist, system" in line


def test_installed_package_says_where_benchmarks_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)

    said = CliRunner().invoke(app, ["bench", "specialist"])

    assert said.exit_code == 2
    (line,) = said.stderr.splitlines()
    assert "come with the source checkout" in line
    assert "clone the repository" in line


def test_command_hands_over_arguments_and_status_from_any_folder(tmp_path: Path) -> None:
    arguments = ["memory", "--steps", "12", "--warmup", "4", "--json", "memory.json", "--bound", "-100"]

    done = subprocess.run(
        [sys.executable, "-m", "robodual", "bench", *arguments], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert "missed: memory grew by" in done.stderr
    record = json.loads((tmp_path / "memory.json").read_text())
    assert record["looks"][0][0] >= 4
    assert record["looks"][-1][0] == 12
    assert record["looks"][-1][1] > 50


def test_specialist_writes_draws_and_compares(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, picture = tmp_path / "specialist.json", tmp_path / "specialist.png"
    arguments = ["--profile", "toy", "--device", "cpu", "--rounds", "3", "--threads", "1"]

    assert load("specialist").main([*arguments, "--json", str(record), "--png", str(picture)]) == 0

    found = json.loads(record.read_text())
    plain, engine = found["rows"]
    assert plain["ratio"] == 1
    assert 0 < engine["median"] <= engine["p99"]
    assert found["largest_differences"]["engine"] < 1e-4
    assert picture.read_bytes().startswith(PNG)

    engine["ratio"] *= 100
    record.write_text(json.dumps(found))
    assert load("specialist").main([*arguments, "--compare", str(record)]) == 1
    assert "regression: engine: " in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "[]", '{"rows": [{"name": "engine"}]}'])
def test_record_to_compare_with_is_checked_before_the_run(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    record = tmp_path / "record.json"
    if content is not None:
        record.write_text(content)

    with pytest.raises(SystemExit) as stopped:
        load("specialist").main(["--compare", str(record)])

    assert stopped.value.code == 2
    assert "record.json is no record that a benchmark wrote by --json" in capsys.readouterr().err


def test_record_of_other_rows_is_a_regression(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    measurement = load("measurement")
    measurement.write(tmp_path / "record.json", "other", [measurement.Row("other", 1.0, 1.0, 1.0)])

    (line,) = measurement.regressions(tmp_path / "record.json", [measurement.Row("engine", 1.0, 1.0, 1.0)])

    assert "has none of these rows" in line


def test_tokens_are_the_same_in_every_way_to_decode(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "identity.json"
    arguments = ["--profile", "toy", "--device", "cpu", "--quantisation", "none", "--attention", "sdpa"]

    assert load("generalist").main([*arguments, "--threads", "1", "--identity", "2", "--json", str(record)]) == 0

    rows = {row["name"]: row for row in json.loads(record.read_text())["rows"]}
    assert len(rows) == 36
    assert all(row["identical"] == row["prompts"] == 2 for row in rows.values())
    forwards = {name: row["forwards"] / row["prompts"] for name, row in rows.items()}
    assert forwards["constrained, one token a forward"] == forwards["free, one token a forward"] == 64
    ways = ("one token a forward", "separators guessed", "actions guessed", "draft with 20% wrong", "batches of 8")
    for way in ways:  # of which only batches with guesses take fewer on a static cache
        assert forwards[f"constrained, static cache, {way}"] == forwards[f"constrained, {way}"]
    assert forwards["constrained, separators guessed"] == 57
    assert forwards["constrained, actions guessed"] < 57
    assert forwards["constrained, draft that is right"] == 2
    assert 2 < forwards["constrained, draft with 20% wrong"] < 57
    assert "| constrained, separators guessed | 2 | 2 | 57.0 |" in capsys.readouterr().out


def test_different_token_is_counted_and_fails(load: Callable[[str], ModuleType]) -> None:
    check = load("identity").Check("way")
    expected = torch.arange(128).view(2, 64)
    tokens = expected.clone()
    tokens[1, 63] += 1

    check.count(SimpleNamespace(tokens=tokens, forwards=57), expected)

    assert (check.prompts, check.identical, check.forwards) == (2, 1, 114)


def test_conditioning_is_timed_both_ways(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    record = tmp_path / "conditioning.json"

    assert load("conditioning").main(["--profile", "toy", "--rounds", "5", "--json", str(record)]) == 0

    found = json.loads(record.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["record_bytes"] == {"toy": 32 + 224 + 2 * 90 * 64}
    for way, stages in (
        ("plain", ("torch.save, SET, poll", "torch.load", "project on the device")),
        ("ours", ("put to announcement", "fetch and decode", "project on the device")),
    ):
        total = rows[f"toy, {way}: total"]["median"]
        assert total > max(rows[f"toy, {way}: {stage}"]["median"] for stage in stages) * 0.5 > 0
    assert rows["toy, plain: total"]["ratio"] == 1


def test_memory_of_a_training_is_what_a_real_step_takes(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    record, footprint = tmp_path / "footprint.json", load("footprint")

    assert footprint.main(["--profile", "toy", "--batch-size", "2", "8", "--json", str(record)]) == 0

    rows = json.loads(record.read_text())["rows"]
    for row, make in zip(rows, footprint.trainings("toy").values(), strict=True):
        assert row["weights"] < row["most"]["2"] < row["most"]["8"]
        learner, model, given = make()
        footprint.materialise(learner)
        footprint.materialise(model)
        footprint.place_rotary(model, torch.device("cpu"))
        for weights in (*learner.parameters(), *model.parameters()):
            weights.data.zero_()
        found = footprint.step(learner.train(), model, given(8))
        assert found == pytest.approx((row["weights"], row["most"]["8"]), rel=0.05)


def test_batched_sessions_are_timed_and_answer_as_alone(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    record = tmp_path / "batching.json"
    arguments = ["--sessions", "4", "--rounds", "1", "--turns", "2", "--device", "cpu", "--at-least", "0"]

    assert load("batching").main([*arguments, "--json", str(record)]) == 0

    found = json.loads(record.read_text())
    assert [row["name"] for row in found["rows"]] == [
        *("specialist, max_batch 1", "specialist, max_batch 8"),
        *("generalist, max_batch 1", "generalist, max_batch 8"),
    ]
    assert found["differences"]["specialist"] <= 1e-5
    assert found["differences"]["generalist"] == 0


def test_robots_go_through_the_pair_and_their_limit_is_found(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "system.json"
    arguments = ["--policy", "noop", "--rate", "8", "--seconds", "1", "--find-limit", "--most", "3", "--tolerate", "1"]

    assert load("system").main([*arguments, "--json", str(record)]) == 0

    found = json.loads(record.read_text())
    assert found["limit"] == 3
    assert [row["robots"] for row in found["rows"]] == [1, 2, 3]
    for row in found["rows"]:
        assert row["deadlines"] >= 4 * row["robots"]  # 8 a second, less what a busy machine takes at the ends
        assert 0 < row["median"] <= row["p99"]
        assert row["action_age"][0] >= 1
        assert 0 <= row["conditioning_age"][0] <= 8
        assert [process["name"] for process in row["processes"]] == ["generalist", "specialist", "redis", "robots"]
        assert all(process["rss"] > 1 for process in row["processes"])
        assert row["processes"][1]["cpu_seconds"] > 0
    assert "the most robots at 8 Hz with at most 100.00% of deadlines missed: 3" in capsys.readouterr().out


@pytest.mark.parametrize(("true", "most", "asked"), [(0, 64, [1]), (11, 64, [1, 2, 4, 8, 16, 12, 10, 11]), (9, 6, [])])
def test_limit_is_found_by_doubling_and_bisecting(
    load: Callable[[str], ModuleType], true: int, most: int, asked: list[int]
) -> None:
    numbers: list[int] = []

    def holds(count: int) -> bool:
        numbers.append(count)
        return count <= true

    assert load("system").highest(holds, most) == min(true, most)
    assert not asked or numbers == asked


async def test_late_answer_misses_the_steps_that_it_takes(load: Callable[[str], ModuleType]) -> None:
    robots = load("robots")
    skipped: list[int] = []
    delays = iter([0.0, 0.5, 0.0, 0.0])  # seconds; the second takes 2.5 periods

    class Client:
        last = SimpleNamespace(age=0, conditioning_step=0)
        skip = staticmethod(skipped.append)

        async def step(self, frame: object) -> None:
            await asyncio.sleep(next(delays))

    drill = robots.Drill({}, [0.0], "published", period=0.2, warmup=1, steps=5)

    log = await robots._drive(Client(), [{}] * robots.FRAMES, robots.time.perf_counter(), drill)

    assert skipped == [0, 2, 0, 0]
    assert (log.deadlines, log.missed) == (5, 2)
    assert log.action_ages == [2, 3, 3, 1, 1]
    assert 500 <= log.latencies[0] < 600


def test_plans_say_that_they_need_a_gpu(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    assert load("plans").main(["--device", "cpu"]) == 1
    assert "this machine has none" in capsys.readouterr().err


def test_tuning_keeps_what_is_faster(load: Callable[[str], ModuleType]) -> None:
    products = pytest.importorskip("robodual.generalist.products")
    start = products.CHAINED

    def milliseconds(plan: products.Plan) -> float:
        out, down = plan.tiles["out"], plan.tiles["down"]
        if out.columns == 64:
            return float("inf")  # does not fit
        return 10 - out.stages / 10 - down.ahead - (down.part == 128) * 2

    found = load("plans").tuned(start, milliseconds)

    assert found.tiles["out"].stages == 6
    assert found.tiles["out"].columns == start.tiles["out"].columns
    assert (found.tiles["down"].part, found.tiles["down"].ahead) == (128, 4)
    assert found.tiles["qkv"] == start.tiles["qkv"]
    assert found.chained
    assert load("plans").tuned(products.APART, milliseconds).tiles["down"].ahead == 0
