from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import imageio_ffmpeg
import pytest
from fake_table import FakeTable

from robodual_client.calvin import EvaluationError, Options, Results, evaluate
from robodual_client.calvin.report import write
from robodual_client.calvin.sequences import published
from robodual_client.calvin.video import HOLD, Video


def described(path: Path) -> str:
    return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True).stderr


def frames(path: Path) -> int:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "null", "-"]
    return int(re.findall(r"frame=\s*(\d+)", subprocess.run(command, capture_output=True, text=True).stderr)[-1])


def test_a_film_shows_every_step_in_what_browsers_play(tmp_path: Path) -> None:
    env = FakeTable()
    obs = env.reset(*published()[0].observations())
    path = tmp_path / "videos" / "0000.mp4"
    with Video(path, tasks=5, ep_len=10) as video:
        for subtask, success in enumerate((True, False)):
            video.start(obs, subtask, "push the sliding door to the left side " * (1 + subtask))
            for step in range(10):
                video.step(obs, step, step)
            video.finish(success)
    assert "h264" in described(path)
    assert "yuv420p" in described(path)
    assert frames(path) == 2 * (1 + 10 + HOLD)
    assert path.stat().st_size < 60_000
    assert sorted(file.name for file in path.parent.iterdir()) == ["0000.jpg", "0000.mp4"]


def test_a_film_may_be_a_gif(options: Callable[..., Options], tmp_path: Path) -> None:
    results = evaluate(options(numbers=(0,), video="all", video_format="gif", ep_len=40, policy_options={"skill": 0.0}))
    assert results.sequences[0].video == "videos/0000.gif"
    path = tmp_path / "run" / "videos" / "0000.gif"
    assert path.read_bytes().startswith(b"GIF89a")
    assert frames(path) == pytest.approx((41 + HOLD) / 3, abs=2)  # ten a second of thirty
    assert all(
        (tmp_path / "run" / link).is_file() for link in Links(write(results, tmp_path / "run").read_text()).found
    )


def test_a_film_that_is_cut_short_leaves_nothing(tmp_path: Path) -> None:
    obs = FakeTable().reset(*published()[0].observations())

    def interrupted() -> None:
        with Video(tmp_path / "0000.mp4", tasks=5, ep_len=10) as video:
            video.start(obs, 0, "open the drawer")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_film_of_one_camera_and_of_an_instruction_in_two_lines(tmp_path: Path) -> None:
    obs = FakeTable().reset(*published()[0].observations())
    del obs["rgb_obs"]["rgb_gripper"]
    with Video(tmp_path / "0000.mp4", tasks=5, ep_len=10) as video:
        video.start(obs, 0, "open\nthe drawer")
        video.step(obs, 0, None)
        video.finish(True)
    assert frames(tmp_path / "0000.mp4") == 2 + HOLD


def test_without_ffmpeg_a_filmed_run_does_not_start(
    options: Callable[..., Options], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(EvaluationError, match=r"video: IMAGEIO_FFMPEG_EXE is .*ffmpeg, which is no program"):
        evaluate(options(numbers=(0,), video="failures"))
    assert not (tmp_path / "run").exists()


class Links(HTMLParser):
    """Everything that a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("href", "src", "poster", "data")]


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    folder = tmp_path_factory.mktemp("filmed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        chosen = {"env": "fake_table:FakeTable", "policy": "fake_table:Scripted", "ep_len": 12}
        skilled = {"skill": 0.95}
        options = Options(out=folder, numbers=tuple(range(8)), video="failures", policy_options=skilled, **chosen)
        return evaluate(options), folder


def test_only_failures_are_filmed_where_only_they_are_asked_for(filmed: tuple[Results, Path]) -> None:
    results, folder = filmed
    failed = {f"{number:04d}" for number, record in results.sequences.items() if record.solved < 5}
    assert 0 < len(failed) < 8
    assert {file.name for file in (folder / "videos").iterdir()} == {
        f"{name}.{kind}" for name in failed for kind in ("mp4", "jpg")
    }


def test_the_report_stands_alone_and_lists_failures_first(filmed: tuple[Results, Path]) -> None:
    results, folder = filmed
    page = write(results, folder).read_text()
    links = Links(page).found
    assert links
    assert all((folder / link).is_file() for link in links)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    outcomes = re.findall(r'data-outcome="(\w+)"', page)
    assert outcomes == sorted(outcomes)
    assert outcomes.count("failed") == sum(record.solved < 5 for record in results.sequences.values())
    assert f"<td>{results.average_length:.2f}</td>" in page
    for task, (success, attempts) in results.task_counts().items():
        assert task.replace("_", " ") in page
        assert f"{success}/{attempts}" in page


def test_names_in_the_report_cannot_carry_markup(options: Callable[..., Options], tmp_path: Path) -> None:
    results = evaluate(options(numbers=(0,)))
    results.provenance[-1]["machine"] = "<script>alert(1)</script>"
    assert "<script>alert" not in write(results, tmp_path).read_text()
