from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_table import FakeTable, Scripted
from running import outcomes, start, wait_for_lines, wait_until_gone, workers_of

from robodual_client.calvin import EvaluationError, evaluate, workers
from robodual_client.calvin.annotations import load
from robodual_client.calvin.results import load as load_run
from robodual_client.calvin.results import merge
from robodual_client.calvin.rollout import run_sequence
from robodual_client.calvin.sequences import published

Make = "Callable[..., Options]"


def test_a_chain_ends_at_its_first_failure_and_counts_its_steps() -> None:
    class FailsThird(Scripted):
        def reset(self, instruction: str) -> None:
            super().reset(instruction)
            self.asked = [*getattr(self, "asked", []), instruction]
            self.succeeds = len(self.asked) != 3

    env, sequence = FakeTable(), published()[7]
    policy = FailsThird(env, 0)
    record = run_sequence(env, policy, sequence, load(), ep_len=25)
    assert (record.solved, record.steps) == (2, [3, 3, 25])
    assert policy.asked == [load()[task] for task in sequence.tasks[:3]]
    assert len(record.milliseconds["env"]) == len(record.milliseconds["policy"]) == 31


def test_all_five_tasks_solved_is_a_chain_of_five() -> None:
    env = FakeTable()
    for number in range(200):
        record = run_sequence(env, Scripted(env, 0, skill=1.0), published()[number], load(), ep_len=5)
        assert (record.solved, record.steps) == (5, [3] * 5), published()[number].tasks


def test_an_action_that_is_no_action_stops_the_sequence() -> None:
    class Broken(Scripted):
        def step(self, obs: dict[str, Any]) -> Any:
            return super().step(obs)[:6]

    env = FakeTable()
    with pytest.raises(ValueError, match="7 finite numbers"):
        run_sequence(env, Broken(env, 0), published()[0], load())


def test_results_do_not_depend_on_the_number_of_workers_or_the_order(options: Make) -> None:
    alone = evaluate(options("alone"))
    pair = evaluate(options("pair", numbers=tuple(reversed(range(8))), workers=3))
    assert outcomes(alone) == outcomes(pair)
    assert 0 < alone.average_length < 5
    assert alone.average_length == pair.average_length


def test_merged_parts_equal_the_whole_run(options: Make, tmp_path: Path) -> None:
    whole = evaluate(options("whole"))
    evaluate(options("odd", numbers=(1, 3, 5, 7)))
    evaluate(options("even", numbers=(0, 2, 4, 6)))
    one = merge([tmp_path / "odd", tmp_path / "even"], tmp_path / "one")
    two = merge([tmp_path / "even", tmp_path / "odd", tmp_path / "whole"], tmp_path / "two")
    for merged in (one, two):
        assert outcomes(merged) == outcomes(whole)
        assert merged.to_json()["task_info"] == whole.to_json()["task_info"]
    assert (tmp_path / "one" / "results.json").is_file()
    assert len(one.provenance) == 2


def test_runs_of_different_protocols_are_not_merged(options: Make, tmp_path: Path) -> None:
    evaluate(options("a", numbers=(0,)))
    evaluate(options("b", numbers=(1,), seed=1))
    with pytest.raises(EvaluationError, match="seed"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")


def test_resume_runs_only_what_is_missing(options: Make, tmp_path: Path) -> None:
    whole = evaluate(options("whole"))
    evaluate(options("parts", numbers=(2, 3)))
    file = tmp_path / "parts" / "sequences.jsonl"
    before = file.read_bytes()
    with file.open("ab") as torn:
        torn.write(b'{"sequence":5,"tasks":["mo')
    resumed = evaluate(options("parts", resume=True))
    assert file.read_bytes().startswith(before)
    assert file.read_bytes().count(b"\n") == 8
    assert outcomes(resumed) == outcomes(whole)
    assert evaluate(options("parts", resume=True)).lengths() == whole.lengths()
    assert file.read_bytes().count(b"\n") == 8


def test_a_folder_with_a_run_is_not_written_over(options: Make) -> None:
    evaluate(options(numbers=(0,)))
    with pytest.raises(EvaluationError, match="--resume"):
        evaluate(options(numbers=(0, 1)))
    with pytest.raises(EvaluationError, match="ep_len is 20, not 30"):
        evaluate(options(numbers=(0, 1), ep_len=30, resume=True))


def test_a_folder_that_an_evaluation_writes_into_takes_no_second_one(options: Make, tmp_path: Path) -> None:
    whole = evaluate(options("whole"))
    first = start(options("held", policy_options={"pause": 0.05}))
    wait_for_lines(tmp_path / "held" / "run.json", 1)
    with pytest.raises(EvaluationError, match="another evaluation is writing into"):
        evaluate(options("held", seed=1))
    wait_for_lines(tmp_path / "held" / "sequences.jsonl", 1)
    with pytest.raises(EvaluationError, match="another evaluation is writing into"):
        evaluate(options("held", policy_options={"pause": 0.05}, resume=True))
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert outcomes(load_run(tmp_path / "held")) == outcomes(whole)
    assert (tmp_path / "held" / "sequences.jsonl").read_bytes().count(b"\n") == 8


def test_settings_that_a_file_gives_back_as_other_types_resume_the_run(options: Make) -> None:
    settings = {"env": "fake_table:sized", "env_options": {"size": (1, 2)}}
    evaluate(options(numbers=(0,), **settings))
    assert len(evaluate(options(numbers=(0, 1), resume=True, **settings)).sequences) == 2


@pytest.mark.parametrize("how", ["die", "raise"])
def test_a_worker_that_dies_is_replaced_and_its_sequence_repeated(options: Make, tmp_path: Path, how: str) -> None:
    whole = evaluate(options("whole"))
    trap = {"trap": str(tmp_path), "trapped": 3, "how": how}
    trapped = evaluate(options("trapped", workers=2, policy_options=trap))
    assert (tmp_path / "sprung").exists()
    assert outcomes(trapped) == outcomes(whole)


def test_a_sequence_that_always_fails_to_run_stops_the_evaluation(options: Make, tmp_path: Path) -> None:
    trap = {"trap": str(tmp_path), "trapped": 1, "how": "always"}
    with pytest.raises(EvaluationError, match="sequence 1 failed 3 times: RuntimeError: the scripted policy fell"):
        evaluate(options(numbers=(0, 1), policy_options=trap))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["sequences"] == 1


def test_a_simulator_that_cannot_start_is_one_line(options: Make) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(options(env_options={"broken": True}, workers=2))
    assert "\n" not in str(caught.value)
    assert "the fake simulator was told not to start" in str(caught.value)


def test_a_log_that_cannot_be_opened_ends_the_run_instead_of_holding_it_for_ever(options: Make, tmp_path: Path) -> None:
    (tmp_path / "run" / "logs" / "worker-2.log").mkdir(parents=True)
    with pytest.raises(EvaluationError, match=r"worker-2: IsADirectoryError: .*--resume"):
        evaluate(options(workers=2))


def test_a_process_that_cannot_be_started_ends_the_run_instead_of_holding_it_for_ever(
    options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    with pytest.raises(EvaluationError, match=r"worker-1: OSError: .*Too many open files"):
        evaluate(options())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_keeps_what_is_done_and_resumes_to_the_same_result(
    options: Make, tmp_path: Path, sent: signal.Signals
) -> None:
    pause = {"pause": 0.02}
    whole = evaluate(options("whole", policy_options=pause))
    process = start(options("stopped", workers=2, policy_options=pause))
    wait_for_lines(tmp_path / "stopped" / "sequences.jsonl", 2)
    children = workers_of(process.pid)
    assert children
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    wait_until_gone(children)
    if sent == signal.SIGINT:
        assert "KeyboardInterrupt" in stderr
        done = json.loads((tmp_path / "stopped" / "results.json").read_text())["sequences"]
        assert 2 <= done < 8
    resumed = evaluate(options("stopped", policy_options=pause, resume=True))
    assert outcomes(resumed) == outcomes(whole)
    assert os.path.exists(tmp_path / "stopped" / "run.json")
