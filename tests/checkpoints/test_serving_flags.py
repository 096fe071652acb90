"""The flags of `robodual serve` that choose weights and how they run reach the engines as they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from robodual import facts
from robodual.cli import app
from robodual.generalist import service as generalist_service
from robodual.generalist.checkpoint import save_checkpoint
from robodual.generalist.engine import load_generalist
from robodual.profiles import shipped
from robodual.specialist import engines
from robodual.specialist import service as specialist_service
from robodual.specialist.engine import load_specialist

SERVICES = {"generalist": generalist_service, "specialist": specialist_service}
# Where each service's engines are loaded, and by which function of its settings.
LOADING = {
    "generalist": (generalist_service, generalist_service._load),
    "specialist": (engines, engines.load),
}


def load_by(function: Any, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the command load its engines by `function`, and do no more."""
    module, load = LOADING[service]
    monkeypatch.setattr(module, f"load_{service}", function)
    monkeypatch.setattr(SERVICES[service], "run", load)


def given(service: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the service's loader is called with."""
    seen: dict[str, Any] = {}
    load_by(lambda profile, **options: seen.update(profile=profile, **options), service, monkeypatch)
    result = CliRunner().invoke(app, ["serve", service, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen


def test_generalist_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--profile", "robodual-7b", "--checkpoint", "openvla/openvla-7b", "--adapter", "b", "--adapter", "a"]
    flags += ["--adapters-apart", "--dtype", "bfloat16", "--attention", "eager", "--quantisation", "nf4", "--free"]
    assert given("generalist", flags, monkeypatch) == {
        "profile": "robodual-7b",
        "checkpoint": "openvla/openvla-7b",
        "adapters": (Path("b"), Path("a")),
        "merge_adapters": False,
        "device": "auto",
        "dtype": "bfloat16",
        "seed": 0,
        "attention": "eager",
        "quantisation": "nf4",
        "constrained": False,
        "speculation": True,
    }


def test_generalist_variables_hold_where_no_flag_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBODUAL_GENERALIST_ADAPTERS", "one, two")
    monkeypatch.setenv("ROBODUAL_GENERALIST_CONSTRAINED", "true")
    monkeypatch.setenv("ROBODUAL_GENERALIST_SPECULATION", "false")
    seen = given("generalist", [], monkeypatch)
    assert seen["speculation"] is False
    assert seen["adapters"] == (Path("one"), Path("two"))
    assert seen["constrained"] is True
    assert given("generalist", ["--adapter", "three"], monkeypatch)["adapters"] == (Path("three"),)
    monkeypatch.delenv("ROBODUAL_GENERALIST_ADAPTERS")
    monkeypatch.delenv("ROBODUAL_GENERALIST_CONSTRAINED")
    seen = given("generalist", [], monkeypatch)
    assert (seen["adapters"], seen["constrained"]) == ((), None)
    assert seen["checkpoint"] == shipped("playtable", "generalist")
    assert seen["checkpoint"].is_dir()
    monkeypatch.setenv("ROBODUAL_PROFILE", "toy")
    assert given("generalist", [], monkeypatch)["checkpoint"] is None


@pytest.mark.parametrize("service", ["generalist", "specialist"])
def test_one_engine_is_loaded_for_each_device(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    load_by(lambda profile, **options: places.append(options["device"]), service, monkeypatch)
    result = CliRunner().invoke(app, ["serve", service, "--devices", "cuda:0,cuda:2"], catch_exceptions=False)
    assert (result.exit_code, places) == (0, ["cuda:0", "cuda:2"])
    result = CliRunner().invoke(app, ["serve", service, "--devices", "cpu,cpu", "--device", "cpu"])
    assert result.exit_code == 2
    assert "leave one out" in result.output


def test_specialist_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--checkpoint", "ema.pt", "--with-tactile", "--no-with-gripper", "--image-strategy", "letterbox"]
    flags += ["--diffusion-steps", "5", "--guidance-scale", "1.5"]
    assert given("specialist", flags, monkeypatch) == {
        "profile": "playtable",
        "checkpoint": Path("ema.pt"),
        "device": "auto",
        "dtype": "auto",
        "seed": 0,
        "strategy": "letterbox",
        "sensors": {"with_gripper": False, "with_tactile": True},
        "diffusion_steps": 5,
        "guidance_scale": 1.5,
    }
    assert given("specialist", [], monkeypatch)["sensors"] == {}


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--diffusion-steps", "0"], "diffusion_steps"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--image-strategy", "stretch"], "image_strategy"),
    ],
)
def test_a_flag_out_of_range_is_one_line_that_names_it(flags: list[str], field: str) -> None:
    result = CliRunner().invoke(app, ["serve", "specialist", *flags])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(field)


def test_chosen_sampling_and_sensors_are_what_the_engine_runs() -> None:
    engine = load_specialist(
        "toy", device="cpu", sensors={"with_gripper": False}, diffusion_steps=3, guidance_scale=1.0
    )
    assert engine.facts.details["diffusion_steps"] == "3"
    assert engine.facts.details["guidance_scale"] == "1"
    assert "rgb_gripper" not in engine.sensors
    with pytest.raises(ValueError, match="diffusion_steps must be 1 to 100"):
        load_specialist("toy", device="cpu", diffusion_steps=101)


def test_device_memory_is_shown_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15_000_000_000)
    assert facts.device_memory(torch.device("cuda:0")) == {"device_memory_bytes": "15000000000"}
    assert facts.device_memory(torch.device("cpu")) == {}


def test_saved_shards_can_be_read_by_the_user_who_serves_them(tmp_path: Path) -> None:
    engine = load_generalist("toy", device="cpu")
    save_checkpoint(tmp_path / "saved", engine.model, engine.processor.tokenizer, shards=3)
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert len(modes) == 1, "shards have the permissions of config.json"


@pytest.mark.parametrize("service", SERVICES)
def test_anyone_is_served_from_other_machines_only_where_that_is_spelled_out(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = CliRunner().invoke(app, ["serve", service, "--host", "0.0.0.0"])
    assert (refused.exit_code, "set tokens" in refused.output) == (2, True)
    assert given(service, ["--host", "0.0.0.0", "--insecure"], monkeypatch)
