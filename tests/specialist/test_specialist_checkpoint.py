"""Specialist checkpoints: what was saved is what runs, and a file that cannot be used says why in one line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from robodual.facts import CheckpointError, hash_state_dict
from robodual.specialist import checkpoint
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.engine import load_specialist
from robodual.specialist.policy import Policy

TOY = SpecialistConfig.toy()


@pytest.fixture
def policy() -> Policy:
    return Policy(TOY).initialize(7)


def write_published(policy: Policy, path: Path, **extra: object) -> None:
    """The layout that RoboDual's training writes: the EMA wrapper's state dict."""
    state = policy.state_dict()
    content = {"initted": torch.tensor(True), "step": torch.tensor(50_000)}
    content |= {f"online_model.{name}": torch.zeros_like(value) for name, value in state.items()}
    content |= {f"ema_model.{name}": value for name, value in state.items()}
    torch.save({**content, **extra}, path)


def message(path: Path, config: SpecialistConfig = TOY, sensors: dict[str, bool] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, config, sensors)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_published_checkpoint_gives_the_averaged_weights(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "fast_system_state_dict_ema-50000.pt"
    write_published(policy, path)
    engine = load_specialist("toy", checkpoint=path, device="cpu")
    assert engine.facts.checkpoint == hash_state_dict(policy)
    assert not any(parameter.requires_grad for parameter in engine.policy.vision_encoder.parameters())


def test_half_precision_weights_are_widened(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    write_published(policy.to(torch.bfloat16), path)
    loaded = checkpoint.load(path, TOY)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(loaded.model.x_embedder.weight, policy.model.x_embedder.weight.float(), atol=0, rtol=0)


def test_ours_carries_its_configuration(tmp_path: Path) -> None:
    config = replace(TOY, with_tactile=True, diffusion_steps=5, guidance_scale=1.5, blocks=1)
    path = tmp_path / "specialist.safetensors"
    checkpoint.save(Policy(config).initialize(1), path)
    assert checkpoint.load(path, TOY).config == config
    assert load_specialist("robodual-7b", checkpoint=path, device="cpu").sensors == config.sensors


def test_conversion_there_and_back_keeps_every_bit(policy: Policy, tmp_path: Path) -> None:
    published, ours, again = (tmp_path / name for name in ("a.pt", "b.safetensors", "c.pt"))
    write_published(policy, published)
    expected = hash_state_dict(policy)
    assert checkpoint.convert(published, ours, TOY) == expected
    assert checkpoint.convert(ours, again, SpecialistConfig.published()) == expected
    assert hash_state_dict(checkpoint.load(again, TOY)) == expected
    names = set(torch.load(again, weights_only=True))  # noqa: TID251 (weights only)
    assert names == set(torch.load(published, weights_only=True))  # noqa: TID251 (weights only)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.safetensors", "c.pt"]


@pytest.mark.parametrize(
    ("trained", "loaded", "reason", "name", "kind"),
    [
        (replace(TOY, with_tactile=True), {}, "set with_tactile to true", "tactile_encoder.cls_token", "unexpected"),
        (TOY, {"with_tactile": True}, "set with_tactile to false", "model.tactile_adapter.latents", "missing"),
        (TOY, {"with_gripper": False}, "set with_gripper to true", "model.gripper_depth_adapter.latents", "unexpected"),
        (
            replace(TOY, with_gripper=False, with_depth=False),
            {"with_gripper": False},
            "set with_depth to false",
            "depth_encoder.cls_token",
            "missing",
        ),
    ],
)
def test_names_that_do_not_fit_are_listed_with_the_flag_that_explains_them(
    tmp_path: Path, trained: SpecialistConfig, loaded: dict[str, bool], reason: str, name: str, kind: str
) -> None:
    path = tmp_path / "trained.pt"
    write_published(Policy(trained).initialize(0), path)
    text = message(path, TOY, loaded)
    assert reason in text
    listed = text.split(f"{kind}: ")[1].split("; ")[0].split(", ")
    with torch.device("meta"):
        expected, found = (set(Policy(c).state_dict()) for c in (replace(TOY, **loaded), trained))
    assert name in listed
    assert set(listed) == (found - expected if kind == "unexpected" else expected - found)


def test_flags_are_read_from_the_names(tmp_path: Path) -> None:
    for depth, gripper, tactile in [(True, True, False), (True, False, True), (False, False, False)]:
        config = replace(TOY, with_depth=depth, with_gripper=gripper, with_tactile=tactile)
        with torch.device("meta"):
            names = Policy(config).state_dict()
        assert checkpoint.flags(names) == {"with_depth": depth, "with_gripper": gripper, "with_tactile": tactile}


def test_gripper_without_depth_is_refused(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_published(policy, path)
    assert "with_depth" in message(path, TOY, {"with_depth": False})


def test_other_architectures_are_named(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_published(policy, path)
    assert "choose the profile" in message(path, SpecialistConfig.published())
    write_published(policy, path, **{"ema_model.model.hist_act_embed.weight": torch.zeros(32, 7)})
    assert "action history" in message(path)
    write_published(policy, path, **{"ema_model.vision_encoder.model.embeddings": torch.zeros(1)})
    assert "Theia" in message(path)
    torch.save(policy.state_dict(), path)
    assert "ema_model." in message(path)


def test_broken_files_say_what_to_do(policy: Policy, tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "absent.pt")
    other = tmp_path / "specialist.bin"
    other.write_bytes(b"")
    assert "must end in" in message(other)
    for path, write in ((tmp_path / "a.pt", write_published), (tmp_path / "a.safetensors", checkpoint.save)):
        write(policy, path)
        whole = path.read_bytes()
        for broken in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], b"\xff" * 5000, b"GIF89a" + whole):
            path.write_bytes(broken)
            text = message(path)
            assert "corrupt" in text


def test_a_configuration_nested_without_end_is_refused(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(policy.state_dict(), path, {"format": checkpoint.FORMAT, "config": "[" * 200_000})
    assert "bad configuration in its metadata" in message(path)


def test_values_that_are_not_plain_are_refused(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    name, value = next((name, value) for name, value in policy.state_dict().items() if value.ndim == 2)
    for odd in (value.detach().to_sparse(), value.to("meta")):
        write_published(policy, path, **{f"ema_model.{name}": odd})
        assert f"holds no plain values of {name}" in message(path)


def test_weights_under_two_names_are_converted(policy: Policy, tmp_path: Path) -> None:
    state = policy.state_dict()
    shapes: dict[torch.Size, str] = {}
    one, other = next(
        (first, name) for name, value in state.items() if (first := shapes.setdefault(value.shape, name)) != name
    )
    write_published(policy, tmp_path / "a.pt", **{f"ema_model.{name}": state[one] for name in (one, other)})
    checkpoint.convert(tmp_path / "a.pt", tmp_path / "a.safetensors", TOY)
    found = checkpoint.load(tmp_path / "a.safetensors", TOY).state_dict()
    assert torch.equal(found[one], found[other])


def test_a_target_in_no_folder_is_refused(policy: Policy, tmp_path: Path) -> None:
    write_published(policy, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="missing: no such folder; make it first"):
        checkpoint.convert(tmp_path / "a.pt", tmp_path / "missing" / "b.pt", TOY)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_in_a_pickle_are_never_executed(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    torch.save({"ema_model.x": Harmful()}, path, _use_new_zipfile_serialization=zipped)
    assert "never executed" in message(path)
    assert not Path("executed").exists()
    torch.save({"ema_model.x": torch.zeros(1), "config": {"steps": 3}}, path)
    assert "not a state dict" in message(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 1 << 40}, "width"),
        ({"blocks": 10_000_000}, "blocks"),
        ({"heads": 0}, "heads"),
        ({"with_depth": "yes"}, "with_depth"),
        ({"guidance_scale": None}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"diffusion_steps": 101}, "diffusion_steps"),
        ({"command": "rm"}, "exactly the fields"),
        ({"vision_width": 50}, "vision_width"),
    ],
)
def test_a_configuration_is_checked_before_anything_is_built(
    policy: Policy, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    path = tmp_path / "a.safetensors"
    config = json.dumps({**asdict(TOY), **change})
    safetensors.torch.save_file(policy.state_dict(), path, {"format": checkpoint.FORMAT, "config": config})
    assert reason in message(path)


def test_safetensors_of_another_model_are_refused(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00003.safetensors"
    safetensors.torch.save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, path)
    assert "no specialist of ours" in message(path)
    safetensors.torch.save_file({}, path, {"format": checkpoint.FORMAT, "config": "{"})
    assert "configuration" in message(path)
