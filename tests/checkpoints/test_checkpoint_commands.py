"""`robodual inspect` and `robodual convert`: what they say is what would be served, and nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import WIDTH, generalist_shapes, write_specialist
from typer.testing import CliRunner, Result

from robodual.cli import app
from robodual.facts import hash_state_dict
from robodual.generalist.engine import load_generalist
from robodual.generalist.model import Generalist
from robodual.inspection import inspect
from robodual.specialist import checkpoint
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.engine import load_specialist

TOY = SpecialistConfig.toy()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [(), ("adapter", "second")])
def test_inspect_gives_the_hash_and_counts_of_the_engine(published: Path, dtype: str, adapted: tuple[str, ...]) -> None:
    adapters = [published / name for name in adapted]
    facts = load_generalist(
        "toy", checkpoint=published / "generalist", adapters=adapters, device="cpu", dtype=dtype
    ).facts
    found = inspect(published / "generalist", dtype=dtype, adapters=adapters)
    assert (found.checkpoint, found.parameters) == (facts.checkpoint, facts.parameters)
    assert found.details["adapters"] == facts.details["adapters"]


def test_a_generalist_is_described_without_building_it(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded into a network")

    monkeypatch.setattr(Generalist, "load_state_dict", forbidden)
    found = inspect(published / "generalist", hashed=False)
    sizes = {name: torch.Size(shape).numel() for name, shape in generalist_shapes().items()}
    assert found.kind == "generalist"
    assert found.checkpoint is None
    assert found.parameters == sum(found.parts.values()) == sum(sizes.values())
    assert found.parts["projector"] == sum(size for name, size in sizes.items() if name.startswith("projector"))
    assert set(found.parts) == {
        "vision_backbone.featurizer",
        "vision_backbone.fused_featurizer",
        "projector",
        "language_model",
    }
    assert found.dtypes == {"bfloat16": found.parameters}
    assert found.image_strategy == "resize-naive"
    assert found.details["hidden_size"] == str(WIDTH)
    assert found.details["shards"] == "3"
    assert "actions 31744 to 31999, separator 29871" in (found.tokenizer or "")


def test_an_adapter_names_its_rank_and_base(published: Path) -> None:
    found = inspect(published / "second")
    assert found.kind == "adapter"
    assert "rank 4, scale 2" in found.architecture
    assert found.details == {"adapts": "7 weights (down_proj, fc2, q_proj)", "base_model": "openvla/openvla-7b"}
    assert found.checkpoint != inspect(published / "adapter").checkpoint


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_both_forms_of_a_specialist_have_the_hash_that_is_served(published: Path, tmp_path: Path, dtype: str) -> None:
    ours = tmp_path / "specialist.safetensors"
    assert run("convert", published / "specialist.pt", ours).exit_code == 0
    for path in (published / "specialist.pt", ours):
        engine = load_specialist("toy", checkpoint=path, device="cpu", dtype=dtype)
        found = inspect(path, dtype=dtype)
        assert (found.checkpoint, found.parameters) == (engine.facts.checkpoint, engine.facts.parameters)
        assert found.sensors == engine.sensors
        assert found.details["context_width"] == str(engine.width)


def test_sensors_and_profile_of_a_published_file_follow_from_its_names(tmp_path: Path) -> None:
    config = replace(TOY, with_gripper=False, with_tactile=True)
    found = inspect(write_specialist(tmp_path / "other.pt", config=config))
    assert found.sensors == ("rgb_static", "depth_static", "rgb_tactile", "proprio")
    assert found.details["profile"] == "toy"
    assert found.kind == "specialist (published EMA)"


def test_inspect_prints_lines_for_people_and_json_for_programs(published: Path) -> None:
    path = published / "specialist.pt"
    lines = run("inspect", path).stdout
    found = inspect(path)
    assert f"{found.parameters:,}" in lines
    assert str(found.checkpoint) in lines
    parsed = json.loads(run("inspect", path, "--json", "--no-hash").stdout)
    assert parsed["checkpoint"] is None
    assert parsed["parameters"] == found.parameters
    assert tuple(parsed["sensors"]) == found.sensors


def test_convert_says_in_one_line_what_it_verified(published: Path, tmp_path: Path) -> None:
    published_again, ours = tmp_path / "again.pt", tmp_path / "ours.safetensors"
    first, second = run("convert", published / "specialist.pt", ours), run("convert", ours, published_again)
    expected = hash_state_dict(checkpoint.load(published / "specialist.pt", TOY))
    for result, target in ((first, ours), (second, published_again)):
        assert result.exit_code == 0
        (line,) = result.stdout.splitlines()
        assert str(target) in line
        assert expected in line
        assert hash_state_dict(checkpoint.load(target, TOY)) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pt", "ours.safetensors"]
    assert ours.stat().st_mode == published_again.stat().st_mode  # readable by the user who serves it


def test_convert_takes_sensors_from_the_names_and_shapes_from_a_named_profile(tmp_path: Path) -> None:
    source = write_specialist(tmp_path / "a.pt", config=replace(TOY, with_tactile=True))
    result = run("convert", source, tmp_path / "b.safetensors", "--profile", "toy")
    assert result.exit_code == 0, result.stderr
    assert checkpoint.load(tmp_path / "b.safetensors", TOY).config == replace(TOY, with_tactile=True)
    assert "choose the profile" in refused("convert", source, tmp_path / "c.safetensors", "--profile", "robodual-7b")
    assert "expected one of" in refused("convert", source, tmp_path / "c.safetensors", "--profile", "none")


def test_convert_never_overwrites_and_leaves_nothing_half_written(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "kept.safetensors"
    target.write_bytes(b"mine")
    assert "exists already" in refused("convert", published / "specialist.pt", target)
    assert target.read_bytes() == b"mine"
    assert "must end in" in refused("convert", published / "specialist.pt", tmp_path / "specialist.bin")
    assert "serve generalist" in refused("convert", published / "generalist", tmp_path / "a.safetensors")

    def altered(path: Path, *options: object) -> object:
        policy = whole(path, *options)
        if path.name.startswith("."):
            with torch.no_grad():
                policy.model.x_embedder.bias[0] += 1
        return policy

    whole = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", altered)
    assert "reads back differently" in refused("convert", published / "specialist.pt", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_a_file_of_unknown_shapes_lists_what_differs(tmp_path: Path) -> None:
    path = write_specialist(tmp_path / "wide.pt", config=replace(TOY, width=64))
    line = refused("inspect", path)
    assert "choose the profile" in line
    assert "model.x_embedder.weight" in line


def test_what_loading_refuses_inspect_refuses(published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published / "generalist", tmp_path / "generalist"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: missing" in refused("inspect", folder)
    assert "no such file or folder" in refused("inspect", tmp_path / "nowhere")
    assert "adapters: " in refused("inspect", published / "specialist.pt", "--adapter", published / "adapter")
    assert "dtype: expected" in refused("inspect", published / "generalist", "--dtype", "int8")
    (tmp_path / "adapter").mkdir()
    shutil.copy(published / "adapter" / "adapter_config.json", tmp_path / "adapter")
    assert "adapter_model.safetensors: missing" in refused("inspect", tmp_path / "adapter")
