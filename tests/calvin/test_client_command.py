from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import wait_for_lines

from robodual_client.calvin import Options, rendering
from robodual_client.calvin.annotations import load
from robodual_client.cli import main

FAKE = ["--env", "fake_table:FakeTable", "--policy", "fake_table:Scripted", "--ep-len", "12"]


@pytest.fixture(autouse=True)
def fake_on_path(options: Callable[..., Options]) -> None:
    """Worker processes find the fake table, as the fixture `options` arranges."""


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    line = str(exited.value.code)
    assert exited.value.code not in (0, None)
    assert "\n" not in line
    assert capsys.readouterr().out == ""
    return line


def test_parts_of_an_evaluation_merge_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("1/2", "2/2"):
        out = str(tmp_path / f"part-{part[0]}")
        main(["evaluate", *FAKE, "--sequences", "3-6,9", "--shard", part, "--out", out])
    capsys.readouterr()
    main(["merge", str(tmp_path / "part-1"), str(tmp_path / "part-2"), "--out", str(tmp_path / "whole")])
    shown = capsys.readouterr().out
    assert "Avg. Len." in shown
    assert (tmp_path / "whole" / "report.html").is_file()
    lines = (tmp_path / "whole" / "sequences.jsonl").read_text().splitlines()
    assert [json.loads(line)["sequence"] for line in lines] == [3, 4, 5, 6, 9]
    main(["compare", str(tmp_path / "whole"), str(tmp_path / "part-1")])
    assert "no difference beyond chance" in capsys.readouterr().out


def test_a_sweep_draws_success_against_delay_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", *FAKE, "--sequences", "0-3", "--hold", "zero", "--out", str(out)]
    main([*command, "--delays", "3,0"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["0"], ["3"])]
    assert [(row[0], row[1]) for row in rows] == [("0", "4"), ("3", "4")]
    assert all("(" in cell for cell in rows[0][3::2])
    figures = json.loads((out / "sweep.json").read_text())["delays"]
    # Late by three steps, the third action comes in step 9 of 0 to 11.
    assert figures["0"]["avg_seq_len"] == figures["3"]["avg_seq_len"] > 0
    assert figures["0"]["held_steps"] == 0 < figures["3"]["held_steps"]
    assert (out / "sweep.html").is_file()
    assert (out / "delay-03" / "report.html").is_file()
    before = (out / "delay-03" / "sequences.jsonl").read_bytes()
    main([*command, "--delays", "4", "--resume"])
    assert (out / "delay-03" / "sequences.jsonl").read_bytes() == before
    figures = json.loads((out / "sweep.json").read_text())["delays"]
    assert list(figures) == ["0", "3", "4"]
    assert figures["4"]["avg_seq_len"] == 0  # and with four, one step too late
    capsys.readouterr()
    assert "delays: must be control steps" in refused(capsys, *command, "--delays", "0,x")
    assert "delay_steps: must be 0 to 11" in refused(capsys, *command, "--delays", "0,12", "--resume")


def test_lock_step_and_real_time_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["evaluate", *FAKE, "--num-sequences", "2", "--ep-len", "6"]
    main([*run, "--out", str(tmp_path / "lock")])
    main([*run, "--out", str(tmp_path / "timed"), "--realtime", "40", "--inject-delay", "specialist=60"])
    assert "real time at 40 Hz" in capsys.readouterr().out
    page = (tmp_path / "timed" / "report.html").read_text()
    assert "Age of the actions" in page
    assert "+60 ms" in page
    assert "Age of the actions" not in (tmp_path / "lock" / "report.html").read_text()
    main(["compare", str(tmp_path / "lock"), str(tmp_path / "timed")])
    shown = capsys.readouterr().out
    assert "pace: lock-step in lock, real time at 40 Hz, late actions repeated in timed" in shown
    assert "lock: lock-step: 0.0% of steps without a new action" in shown


def test_a_dry_run_counts_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", *FAKE, "--num-sequences", "40", "--out", str(tmp_path / "run"), "--dry-run"])
    shown = capsys.readouterr().out
    assert "40 sequences to run" in shown
    assert "2,400 steps" in shown
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_the_run_would_be_refused_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    dry = ["evaluate", *FAKE, "--num-sequences", "2", "--dry-run"]
    assert "cannot be written" in refused(capsys, *dry, "--out", str(tmp_path / "file" / "run"))
    run = ["--out", str(tmp_path / "run")]
    main(["evaluate", *FAKE, "--num-sequences", "1", "--no-report", *run])
    capsys.readouterr()
    assert "already holds a run" in refused(capsys, *dry, *run)
    assert "seed is 0, not 1" in refused(capsys, *dry, *run, "--resume", "--seed", "1")
    main([*dry, *run, "--resume"])
    assert "1 sequences to run, 1 done" in capsys.readouterr().out


def test_a_sweep_finds_a_folder_that_is_taken_before_its_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", *FAKE, "--num-sequences", "1", "--no-report", "--out", str(tmp_path / "sweep")]
    main([*command, "--delays", "2"])
    capsys.readouterr()
    for dry in ([], ["--dry-run"]):
        assert "delay-02 already holds a run" in refused(capsys, *command, "--delays", "0,2", *dry)
    assert not (tmp_path / "sweep" / "delay-00").exists()


def test_what_can_be_known_before_the_first_sequence_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert "'9-3' must be a number or a range" in refused(capsys, "evaluate", *FAKE, *out, "--sequences", "1,9-3")
    assert "beyond the last sequence, 999" in refused(capsys, "evaluate", *FAKE, *out, "--sequences", "999-1000")
    assert "shard: must be i/n" in refused(capsys, "evaluate", *FAKE, *out, "--shard", "0/4")
    assert "env: must be playtable" in refused(capsys, "evaluate", *out, "--env", "gazebo")
    assert "annotations: " in refused(capsys, "evaluate", *FAKE, *out, "--annotations", str(tmp_path / "none.json"))
    assert "schedule" in refused(capsys, "evaluate", *out, "--schedule", "sometimes")
    assert "inject_delay: 'generalist' must be" in refused(capsys, "evaluate", *out, "--inject-delay", "generalist")
    assert "go with --env calvin" in refused(capsys, "evaluate", *out, "--scene", "D")
    assert "holds no evaluation" in refused(capsys, "compare", str(tmp_path), str(tmp_path))
    nowhere = refused(capsys, "evaluate", *FAKE[2:], *out, "--env", "gazebo:World")
    assert nowhere == "robodual-client: gazebo:World cannot start: ModuleNotFoundError: No module named 'gazebo'"
    assert "policy gazebo:Brain cannot start" in refused(capsys, "evaluate", *out, "--policy", "gazebo:Brain")
    nobody = ["--generalist", "127.0.0.1:9", "--specialist", "127.0.0.1:9"]
    assert "127.0.0.1:9" in refused(capsys, "evaluate", "--env", "fake_table:FakeTable", *nobody, *out)
    replicas = [*nobody[:-1], "127.0.0.1:9,127.0.0.1:10"]
    message = refused(capsys, "evaluate", "--env", "fake_table:FakeTable", *replicas, *out)
    assert "Failed to connect" in message, "each is an address of its own"


def test_a_missing_or_wrong_checkout_is_one_line_before_the_first_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CALVIN_ROOT", raising=False)
    out = tmp_path / "run"
    command = ["evaluate", "--env", "calvin", "--policy", "zero", "--out", str(out)]
    assert "calvin cannot start: no calvin_env checkout given" in refused(capsys, *command)
    wrong = refused(capsys, *command, "--calvin-root", str(tmp_path))
    assert "it should be a checkout of mees/calvin_env" in wrong
    assert not (out / "sequences.jsonl").exists()


@pytest.mark.skipif("CALVIN_ROOT" not in os.environ, reason="CALVIN_ROOT is not set: needs a checkout of calvin_env")
def test_without_a_display_or_egl_calvin_runs_on_the_cpu_and_egl_by_name_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for display in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(display, raising=False)
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", str(tmp_path / "no-driver.json"))
    command = ["evaluate", "--env", "calvin", "--policy", "fake_table:Idle", "--num-sequences", "1", "--ep-len", "3"]
    with pytest.raises(SystemExit) as exited:
        main([*command, "--render", "egl", "--out", str(tmp_path / "egl")])
    assert "calvin cannot start: --render egl: EGL does not work here" in str(exited.value.code)
    assert not (tmp_path / "egl" / "sequences.jsonl").exists()
    main([*command, "--out", str(tmp_path / "auto")])
    assert "80 ms a step on the CPU" in capfd.readouterr().err
    assert (tmp_path / "auto" / "sequences.jsonl").read_text().count("\n") == 1


@pytest.mark.skipif("CALVIN_ROOT" not in os.environ, reason="CALVIN_ROOT is not set: needs a checkout of calvin_env")
def test_a_run_goes_on_with_the_renderer_that_it_began_with_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", str(tmp_path / "no-driver.json"))
    command = ["evaluate", "--env", "calvin", "--policy", "fake_table:Idle", "--ep-len", "2", "--out", str(tmp_path)]
    main([*command, "--num-sequences", "1"])
    main([*command, "--num-sequences", "2", "--render", "cpu", "--scene", "D", "--resume"])
    assert capsys.readouterr().out.count("results.json") == 2
    assert (tmp_path / "sequences.jsonl").read_text().count("\n") == 2
    monkeypatch.setattr(rendering, "choose", lambda render: rendering.Renderer("egl"))  # a machine that has a GPU
    reason = refused(capsys, *command, "--num-sequences", "3", "--resume")
    assert "'render': 'cpu'" in reason
    assert "'render': 'egl'" in reason


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, "evaluate", *FAKE, "--out", str(tmp_path / "file" / "run"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_is_done(tmp_path: Path) -> None:
    import resource

    def fill_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    command = [sys.executable, "-m", "robodual_client.cli", "evaluate", *FAKE, "--num-sequences", "20"]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True, preexec_fn=fill_disk
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "File too large" in ended.stderr.splitlines()[-1]
    assert "--resume" in ended.stderr.splitlines()[-1]
    full = subprocess.run(
        [*command, "--out", str(tmp_path / "other")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert full.returncode == 1
    assert len(full.stderr.splitlines()) == 1
    assert "File too large" in full.stderr
    main(["evaluate", *FAKE, "--num-sequences", "20", "--out", str(tmp_path / "run"), "--resume"])
    assert (tmp_path / "run" / "sequences.jsonl").read_text().count("\n") == 20


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_too_full_for_a_film_ends_the_run_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    film = run / "videos" / "0001.part.gif"
    film.parent.mkdir(parents=True)
    film.symlink_to("/dev/full")
    command = [sys.executable, "-m", "robodual_client.cli", "evaluate", *FAKE, "--num-sequences", "3", "--no-report"]
    command += ["--video", "all", "--video-format", "gif", "--out", str(run)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "is repeated" not in ended.stderr
    assert "No space left on device" in ended.stderr.splitlines()[-1]
    assert "0001.gif" in ended.stderr.splitlines()[-1]
    assert "--resume" in ended.stderr.splitlines()[-1]
    assert not os.path.lexists(film)
    assert (run / "sequences.jsonl").read_text().count("\n") == 1
    main([*command[3:], "--resume"])
    assert len(list(film.parent.glob("*.gif"))) == 3


def test_another_set_of_instructions_is_what_the_policy_is_asked(tmp_path: Path) -> None:
    sentences = {task: [f"please do: {task}", "never asked"] for task in load()}
    file = tmp_path / "enriched.json"
    file.write_text(json.dumps(sentences))
    assert load(file)["open_drawer"] == "please do: open_drawer"
    del sentences["open_drawer"]
    file.write_text(json.dumps(sentences))
    with pytest.raises(ValueError, match="open_drawer"):
        load(file)
    file.write_text(json.dumps({**sentences, "open_drawer": "a sentence"}))
    with pytest.raises(ValueError, match="must be a list of sentences"):
        load(file)


def test_the_validation_sentences_are_complete() -> None:
    assert len(load()) == 34
    assert load()["lift_pink_block_drawer"] == "Take the pink block from the drawer"


def test_the_doctor_shows_what_it_found_and_a_fault_is_a_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CALVIN_ROOT", raising=False)
    with pytest.raises(SystemExit) as exited:
        main(["doctor", "calvin", "--calvin-root", str(tmp_path)])
    assert "marked NO" in str(exited.value.code)
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok") and "Python" in line for line in shown)
    assert any(line.startswith("NO") and "calvin_env" in line for line in shown)


@pytest.mark.skipif("CALVIN_ROOT" not in os.environ, reason="CALVIN_ROOT is not set: needs a checkout of calvin_env")
def test_the_doctor_finds_nothing_wrong_with_the_published_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "calvin"])
    assert "bit for bit" in capsys.readouterr().out


def test_every_flag_of_an_evaluation_is_on_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for command in ("evaluate", "sweep", "doctor", "merge", "compare"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert {flag for flag in flags if flag not in page} == set(), command
        assert command in page


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_says_what_is_kept_and_how_to_go_on(tmp_path: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-m", "robodual_client.cli", "evaluate", *FAKE, "--realtime", "100"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "run" / "sequences.jsonl", 2)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.search(rf"stopped; \d+ sequences are kept in {tmp_path / 'run'}: go on with --resume", stderr)
    assert "Traceback" not in stderr
