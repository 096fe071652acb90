from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "client"))

from fake_services import SENSORS, FakeGeneralist, FakeSpecialist
from running import outcomes

from robodual_client.calvin import EvaluationError, Options, Results, evaluate
from robodual_client.calvin.progress import Silent
from robodual_client.calvin.records import Record


@pytest.fixture
def pair() -> Iterator[tuple[FakeGeneralist, FakeSpecialist]]:
    generalist, specialist = FakeGeneralist(), FakeSpecialist()
    yield generalist, specialist
    generalist.kill()
    specialist.kill()


@pytest.fixture
def through(options: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist]) -> Callable[..., Options]:
    """Options of a run of the services on a table on which something happens whatever they answer."""
    addresses = {"generalist": pair[0].address, "specialist": pair[1].address, "schedule": "published"}
    settings: dict[str, Any] = {"policy": "services", "policy_options": addresses, "env_options": {"wild": True}}
    return lambda name, **changes: options(name, **{**settings, "ep_len": 90, **changes})


class Killer(Silent):
    """Kills a service when the second sequence is finished, and starts it anew, without memory."""

    def __init__(self, service: FakeSpecialist) -> None:
        super().__init__()
        self.service = service

    def finished(self, record: Record, results: Results, total: int) -> None:
        if len(results.sequences) == 2:
            self.service.kill()
            self.service.start()


def test_a_run_records_what_the_services_answered(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist]
) -> None:
    results = evaluate(through("run", numbers=(0, 1, 2)))
    steps = sum(sum(record.steps) for record in results.sequences.values())
    assert len(results.milliseconds("act")) == steps == sum(results.ages().values())
    assert len(results.milliseconds("condition")) == len(pair[0].requests("Condition"))
    assert max(results.ages()) == 7
    assert results.provenance[0]["services"]["specialist"]["checkpoint"] == "c0ffee"
    assert results.protocol["models"]["generalist"] == {"profile": "fake", "checkpoint": ""}
    assert results.protocol["policy_options"] == {"schedule": "published"}
    sessions = {request.session_id for request in pair[1].requests("Act")}
    assert len(sessions) == 3 == len(pair[1].requests("Close"))


def test_a_specialist_killed_in_the_middle_changes_nothing(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist]
) -> None:
    whole = evaluate(through("whole"))
    disturbed = evaluate(through("disturbed", workers=2), Killer(pair[1]))
    assert outcomes(whole) == outcomes(disturbed)
    assert len({record.solved for record in whole.sequences.values()}) > 1


def test_noise_depends_on_the_seed_and_the_sequence_alone(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist]
) -> None:
    evaluate(through("first", numbers=(4, 5)))
    first = {request.seed for request in pair[1].requests("Reset")}
    pair[1].calls.clear()
    evaluate(through("second", numbers=(5,)))
    second = {request.seed for request in pair[1].requests("Reset")}
    assert len(first) == 2
    assert second < first


def test_another_checkpoint_does_not_resume_the_run(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist]
) -> None:
    evaluate(through("run", numbers=(0,)))
    pair[1].checkpoint = "decaf"
    with pytest.raises(EvaluationError, match="models"):
        evaluate(through("run", numbers=(0, 1), resume=True))


def test_where_traces_go_changes_no_result(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist]
) -> None:
    evaluate(through("run", numbers=(0,), ep_len=2))
    addresses = {"generalist": pair[0].address, "specialist": pair[1].address, "schedule": "published"}
    traced = {**addresses, "traces": "http://127.0.0.1:9"}
    resumed = evaluate(through("run", numbers=(0, 1), ep_len=2, policy_options=traced, resume=True))
    assert len(resumed.sequences) == 2


class Redeployed(Silent):
    """Puts another model into a service's place when the second sequence is finished."""

    def __init__(self, service: FakeGeneralist | FakeSpecialist) -> None:
        super().__init__()
        self.service = service

    def finished(self, record: Record, results: Results, total: int) -> None:
        if len(results.sequences) == 2:
            self.service.kill()
            self.service.checkpoint = "decaf"
            self.service.start()


@pytest.mark.parametrize("which", [0, 1])
def test_another_model_in_the_middle_of_a_run_ends_it_and_keeps_what_is_done(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist], tmp_path: Path, which: int
) -> None:
    before = pair[which].checkpoint
    name = ("generalist", "specialist")[which]
    with pytest.raises(EvaluationError, match=f"services: {name} at .*decaf.*this run began with.*--resume") as caught:
        evaluate(through("run", ep_len=10), Redeployed(pair[which]))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "sequences.jsonl").read_text().count("\n") == 2
    pair[which].checkpoint = before
    assert len(evaluate(through("run", ep_len=10, resume=True)).sequences) == 8


def test_replicas_of_two_models_never_give_one_result(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist], tmp_path: Path
) -> None:
    other = FakeSpecialist()
    other.checkpoint = "decaf"
    addresses = {"generalist": pair[0].address, "specialist": [pair[1].address, other.address]}
    with pytest.raises(EvaluationError, match=r"services: specialist at .* serves"):
        evaluate(through("run", numbers=tuple(range(30)), ep_len=2, policy_options=addresses))
    other.kill()
    run = json.loads((tmp_path / "run" / "results.json").read_text())
    wrong = pair[1] if run["protocol"]["models"]["specialist"]["checkpoint"] == "decaf" else other
    assert wrong.requests("Act") == []


def test_services_that_are_away_end_the_run_before_it_starts(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist], tmp_path: Path
) -> None:
    pair[1].kill()
    with pytest.raises(EvaluationError, match=r"services: Specialist.GetInfo at 127.0.0.1"):
        evaluate(through("run"))
    assert not (tmp_path / "run").exists()


def test_ages_count_control_steps_where_answers_come_late(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist]
) -> None:
    results = evaluate(through("late", numbers=(0,), delay_steps=5, ep_len=21, env_options={"wild": False}))
    assert [request.step for request in pair[1].requests("Act")] == [0, 5, 10, 15, 20]
    # Due at 0, 7 and 15; the policy is free at the steps above.
    assert [request.step for request in pair[0].requests("Condition")] == [0, 10, 15]
    # Executed from step 5 to 20: of step 0's conditioning until the answer of step 10 is executed, and so on.
    ages = [*range(5, 15), *range(5, 10), 5]
    assert results.ages() == {age: ages.count(age) for age in sorted(set(ages))}
    assert results.action_ages() == {age: 3 + (age == 5) for age in range(5, 10)}
    assert results.held == 21 - 4


def test_latency_of_the_generalist_shows_in_its_round_trip_and_in_nothing_else(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist]
) -> None:
    plain = evaluate(through("plain", numbers=(0,)))
    slow = evaluate(through("slow", numbers=(0,), inject_delay={"generalist": 150.0}))
    assert outcomes(plain) == outcomes(slow)
    assert slow.milliseconds("condition").quantile(0.0) > 140 > slow.milliseconds("act").quantile(0.5)
    assert slow.protocol["inject_delay"] == {"generalist": 150.0}


def test_an_environment_without_a_sensor_that_the_model_reads_ends_the_run_before_it_starts(
    through: Callable[..., Options], pair: tuple[FakeGeneralist, FakeSpecialist], tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(through("blind", env_options={"cameras": 1}))
    assert "\n" not in str(caught.value)
    assert 'obs["rgb_obs"]["rgb_gripper"]' in str(caught.value)
    assert not (tmp_path / "blind" / "sequences.jsonl").exists()
    assert pair[1].requests("Reset") == []
    pair[1].sensors = (*SENSORS, "rgb_tactile")
    with pytest.raises(EvaluationError, match=r"rgb_tactile.*serve a checkpoint without it"):
        evaluate(through("tactile"))
