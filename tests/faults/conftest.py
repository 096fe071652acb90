"""The fault suite: one deployment of real processes, mended before each test, and a table of the recoveries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# For observations and requests: fake_services.py and replicas.py.
sys.path += [str(Path(__file__).parents[1] / name) for name in ("client", "services")]

from deployment import Deployment
from recovery import Report, Row
from robots import Robot, Undisturbed, recovered

ROWS = pytest.StashKey[list[Row]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    started = Deployment(tmp_path_factory.mktemp("faults"))
    try:
        started.mend()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def undisturbed(processes: Deployment) -> Undisturbed:
    episodes = Undisturbed(processes)
    for number in (1, 2, 3):
        episodes.of(number)
    episodes.of(2, episode=2)
    episodes.of(4, schedule="every-1000")
    return episodes


@pytest.fixture
def deployment(processes: Deployment) -> Deployment:
    """Whole again, whatever the last test did to it."""
    processes.mend()
    return processes


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The table at the end."""
    return request.config.stash.setdefault(ROWS, [])


@pytest.fixture
def report(rows: list[Row]) -> Report:
    """Notes that `robots` came through a scenario; whether they did well is for the test to check."""

    def add(scenario: str, robots: list[Robot], *, lost: float, back: float) -> None:
        longest = max(robot.longest for robot in robots)
        answers, errors = sum(len(robot.answers) for robot in robots), sum(len(robot.errors) for robot in robots)
        rows.append(Row(scenario, back - lost, recovered(robots, back), longest, answers, errors))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("faults: recovery, with every action exactly as undisturbed")
    width = max(len(row.scenario) for row in rows)
    heads = f"{'away s':>7}  {'recovered s':>11}  {'longest step s':>14}  {'answers':>7}  {'errors':>6}"
    terminalreporter.write_line(f"{'scenario':{width}}  {heads}")
    for row in rows:
        terminalreporter.write_line(
            f"{row.scenario:{width}}  {row.away:7.2f}  {row.recovered:11.2f}  {row.longest:14.2f}  "
            f"{row.answers:7}  {row.errors:6}"
        )
