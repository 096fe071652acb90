"""Both clients against the real services: a Valkey, a generalist and two specialists, each a process of its own."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from fake_services import observation

from robodual.conditioning.valkey import free_port
from robodual.pair import Options, Pair
from robodual_client import Answer, AsyncDualSystemClient, DualSystemClient, Timeouts
from robodual_client.calls import Replicas
from robodual_client.errors import InvalidObservation, ServiceMismatch, SessionConflict

STEPS = 20
INSTRUCTION = "push the sliding door to the left side"
FRAMES = [observation(step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair(Options(profile="toy")) as pair:
        yield pair


@contextmanager
def another_specialist(pair: Pair) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port, http_port = free_port(), free_port()
    command = [sys.executable, "-m", "robodual", "serve", "specialist", "--profile", "toy"]
    command += ["--port", str(port), "--http-port", str(http_port)]
    environment = {**pair.environment, "ROBODUAL_LOG_LEVEL": "error"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _is_ready(http_port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def run_blocking(pair: Pair, **options) -> list[Answer]:
    with DualSystemClient(**{**pair.addresses, **options}) as client:
        client.reset(INSTRUCTION)
        answers = []
        for frame in FRAMES:
            client.step(frame)
            answers.append(client.last)
        return answers


async def run_async(pair: Pair, **options) -> list[Answer]:
    async with AsyncDualSystemClient(**{**pair.addresses, **options}) as client:
        await client.reset(INSTRUCTION)
        answers = []
        for frame in FRAMES:
            await client.step(frame)
            answers.append(client.last)
        return answers


def run(kind: str, pair: Pair, **options) -> list[Answer]:
    return run_blocking(pair, **options) if kind == "blocking" else asyncio.run(run_async(pair, **options))


def actions(answers: list[Answer]) -> np.ndarray:
    return np.array([answer.action for answer in answers])


@pytest.fixture(scope="module")
def reference(pair: Pair) -> np.ndarray:
    """The actions of the published schedule with seed 3."""
    return actions(run_blocking(pair, seed=3))


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
@pytest.mark.parametrize(
    ("schedule", "ages"),
    [
        ("published", [0, 1, 2, 3, 4, 5, 6, *range(8), *range(5)]),
        ("every-5", [0, 1, 2, 3, 4] * 4),
        ("async", None),
    ],
)
def test_episode_in_each_schedule(pair: Pair, kind: str, schedule: str, ages: list[int] | None) -> None:
    answers = run(kind, pair, schedule=schedule)
    for step, answer in enumerate(answers):
        assert (answer.episode, answer.step) == (1, step)
        assert answer.action.shape == (7,)
        assert np.abs(answer.action).max() <= 1
        assert answer.action[6] in (-1, 1)
        assert answer.chunk.shape == (8, 7)
        assert answer.conditioning_step + answer.age == step
        assert {"decode", "model"} <= set(answer.timings)
    if ages is not None:
        assert not any(answer.degraded for answer in answers)
        assert [answer.age for answer in answers] == ages
        assert answers[-1].conditioning.step == answers[-1].conditioning_step
    else:
        used = [answer.conditioning_step for answer in answers]
        assert used == sorted(used)
        assert used[-1] > 0


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
@pytest.mark.parametrize("stream", [True, False])
def test_seed_and_episode_decide_the_actions_however_they_travel(pair, reference, kind, stream) -> None:
    np.testing.assert_array_equal(actions(run(kind, pair, seed=3, stream=stream)), reference)
    if stream and kind == "blocking":
        assert not np.array_equal(actions(run(kind, pair, seed=4)), reference)


def test_sessions_side_by_side_do_not_disturb_each_other(pair: Pair, reference: np.ndarray) -> None:
    results: dict[int, np.ndarray] = {}

    def drive(seed: int) -> None:
        results[seed] = actions(run_blocking(pair, seed=seed))

    threads = [threading.Thread(target=drive, args=(seed,)) for seed in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(results[3], reference, atol=1e-5)
    assert not np.allclose(results[4], reference, atol=1e-3)


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_replica_takes_over_from_a_specialist_that_dies_in_the_middle_of_an_episode(
    pair: Pair, reference: np.ndarray, signal_name: str
) -> None:
    survivor = pair.addresses["specialist"]
    with another_specialist(pair) as (address, process):
        replicas = [survivor, address]
        session = next(name for name in map(str, range(1000)) if Replicas(replicas, name).current == address)
        with DualSystemClient(pair.addresses["generalist"], replicas, session=session, seed=3) as client:
            client.reset(INSTRUCTION)
            got, served = [], []
            for step, frame in enumerate(FRAMES):
                if step == 10:
                    process.send_signal(signal.Signals[signal_name])
                    process.wait(timeout=30)
                got.append(client.step(frame))
                served.append(client.last.address)
    assert served == [address] * 10 + [survivor] * 10
    np.testing.assert_array_equal(got, reference)


def test_session_id_in_use_is_a_conflict_that_names_the_way_out(pair: Pair) -> None:
    with DualSystemClient(**pair.addresses, session="robot-1") as first:
        first.reset(INSTRUCTION)
        first.step(FRAMES[0])
        second = DualSystemClient(**pair.addresses, session="robot-1")
        with pytest.raises(SessionConflict, match="episode=N"):
            second.reset(INSTRUCTION)
        second.reset(INSTRUCTION, episode=2)
        second.step(FRAMES[0])
        with pytest.raises(SessionConflict, match="the session is at episode 2"):
            first.step(FRAMES[1])


def test_closed_session_may_be_opened_again_under_its_name(pair: Pair, reference: np.ndarray) -> None:
    for _ in range(2):
        answers = run_blocking(pair, session="robot-2", seed=3)
        np.testing.assert_array_equal(actions(answers), reference)


def test_swapped_addresses_are_told(pair: Pair) -> None:
    swapped = {"generalist": pair.addresses["specialist"], "specialist": pair.addresses["generalist"]}
    with DualSystemClient(**swapped, timeouts=Timeouts(connect=1)) as client, pytest.raises(ServiceMismatch):
        client.reset(INSTRUCTION)


def test_missing_camera_is_told_before_the_first_step(pair: Pair) -> None:
    with DualSystemClient(**pair.addresses) as client:
        client.reset(INSTRUCTION)
        obs = {**FRAMES[0], "rgb_obs": {"rgb_static": FRAMES[0]["rgb_obs"]["rgb_static"]}}
        with pytest.raises(InvalidObservation, match=r'lacks obs\["rgb_obs"\]\["rgb_gripper"\]'):
            client.step(obs)
        assert client.step(FRAMES[0]).shape == (7,)


def _is_ready(http_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/readyz", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
