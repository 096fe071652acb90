"""Kill -9 in the middle of 50 sequences, of whatever takes part: the result is that of an undisturbed run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import outcomes, start, wait_for_lines, wait_until_gone, workers_of

from robodual_client.calvin import Options, evaluate
from robodual_client.calvin.options import shard
from robodual_client.calvin.results import merge

FIFTY = tuple(range(50))

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def kill_a_worker(runner: int) -> None:
    os.kill(workers_of(runner)[0], signal.SIGKILL)


def test_shards_whose_workers_and_runner_were_killed_merge_to_the_whole_run(
    options: Callable[..., Options], tmp_path: Path
) -> None:
    whole = evaluate(options("whole", FIFTY))
    pause = {"pause": 0.005}
    halves = [options(f"half-{part}", shard(FIFTY, f"{part}/2"), workers=2, policy_options=pause) for part in (1, 2)]
    for half in halves:
        process = start(half)
        file = half.out / "sequences.jsonl"
        wait_for_lines(file, 3)
        kill_a_worker(process.pid)
        wait_for_lines(file, 8)
        workers = workers_of(process.pid)
        process.kill()
        process.communicate()
        wait_until_gone(workers)
        assert 8 <= file.read_bytes().count(b"\n") < 25
    for part, half in zip((1, 2), halves):
        resumed = evaluate(options(half.out.name, half.numbers, policy_options=pause, resume=True))
        assert len(resumed.sequences) == 25, part
    merged = merge([half.out for half in halves], tmp_path / "merged")
    assert outcomes(merged) == outcomes(whole)
    assert len({record.solved for record in whole.sequences.values()}) == 6


@pytest.fixture
def pair() -> Iterator[Any]:
    pairs = pytest.importorskip("robodual.pair", reason="needs the services, on Python 3.10 or newer")
    with pairs.Pair(pairs.Options()) as started:
        yield started


def kill_and_restart(pair: Any, service: str) -> None:
    process = pair._processes[service]
    process.kill()
    process.wait()
    pair._spawn(service)


@pytest.mark.slow
def test_a_run_through_services_that_were_killed_equals_an_undisturbed_one(
    options: Callable[..., Options], pair: Any
) -> None:
    served = {"policy": "services", "policy_options": pair.addresses, "env_options": {"wild": True}, "ep_len": 6}
    whole = evaluate(options("whole", FIFTY, workers=2, **served))
    disturbed = options("disturbed", FIFTY, workers=2, **served)
    process = start(disturbed)
    file = disturbed.out / "sequences.jsonl"
    wait_for_lines(file, 4)
    kill_a_worker(process.pid)
    wait_for_lines(file, 8)
    kill_and_restart(pair, "specialist")
    wait_for_lines(file, 16)
    kill_and_restart(pair, "generalist")
    wait_for_lines(file, 24)
    workers = workers_of(process.pid)
    process.kill()
    process.communicate()
    wait_until_gone(workers)
    assert 24 <= file.read_bytes().count(b"\n") < 50
    resumed = evaluate(options("disturbed", FIFTY, workers=2, resume=True, **served))
    assert outcomes(resumed) == outcomes(whole)
    assert len({record.solved for record in whole.sequences.values()}) > 2
