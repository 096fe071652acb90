"""Generalist checkpoint folders: the round trip, the published shapes, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 (what must be refused is made with it)
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from robodual.facts import CheckpointError
from robodual.generalist import checkpoint
from robodual.generalist.checkpoint import read_checkpoint, save_checkpoint
from robodual.generalist.config import GeneralistConfig
from robodual.generalist.engine import GeneralistEngine, load_generalist
from robodual.generalist.model import build
from robodual.generalist.weights import load_weights

SHARDS = 3
WIDE = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 14, "mlp_ratio": float("inf")}
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def engine() -> GeneralistEngine:
    return load_generalist("toy", device="cpu", seed=5)


@pytest.fixture(scope="module")
def published(engine: GeneralistEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "generalist"
    save_checkpoint(folder, engine.model, engine.processor.tokenizer, shards=SHARDS)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "generalist"))


def test_sharded_folder_gives_back_the_same_engine(engine: GeneralistEngine, published: Path) -> None:
    assert len(list(published.glob("*.safetensors"))) == SHARDS
    assert read_checkpoint(published, constrained=True).config == engine.model.config
    again = load_generalist("toy", checkpoint=published, device="cpu", seed=6)
    assert again.facts == engine.facts
    frame = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    ours, theirs = (which.think([frame], ["lift the red block"])[0] for which in (again, engine))
    np.testing.assert_array_equal(ours.reference_actions, theirs.reference_actions)
    assert torch.equal(ours.hidden_states, theirs.hidden_states)


def test_single_file_is_cast_to_the_asked_dtype(engine: GeneralistEngine, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "single", engine.model, engine.processor.tokenizer)
    half = load_generalist("toy", checkpoint=tmp_path / "single", device="cpu", dtype="bfloat16")
    buffers = sum(buffer.numel() * 4 for buffer in half.model.buffers())
    assert (half.facts.dtype, half.facts.weight_bytes) == ("bfloat16", half.facts.parameters * 2 + buffers)
    head, expected = half.model.language_model.lm_head.weight, engine.model.language_model.lm_head.weight
    assert torch.equal(head, expected.bfloat16())
    # Rotary frequencies lose positions in 16 bits, so they stay in float32 as in the published model.
    assert half.model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_saving_over_a_folder_is_refused(engine: GeneralistEngine, published: Path) -> None:
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_checkpoint(published, engine.model, engine.processor.tokenizer)


def test_published_config_json_describes_the_published_shapes() -> None:
    # What openvla/openvla-7b's config.json holds beyond defaults of Transformers' LlamaConfig.
    config = {
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [224, 224],
        "n_action_bins": 256,
        "norm_stats": {"bridge_orig": {"action": {"q01": [0.0] * 7}}},
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }
    preprocessor = {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, 224, 224], [3, 224, 224]],
        "interpolations": ["bicubic", "bicubic"],
        "means": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
        "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
    }
    expected = GeneralistConfig.published()
    assert GeneralistConfig.from_huggingface(config, preprocessor) == expected
    assert GeneralistConfig.from_huggingface(config) == expected
    assert GeneralistConfig.from_huggingface(expected.to_huggingface(), preprocessor) == expected


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter of openvla/openvla-7b, from the numbers of the parts that it was made of."""

    def tower(name: str, width: int, depth: int, mlp: int, *, prefix: bool, pool: bool) -> dict[str, tuple[int, ...]]:
        # 224 px in patches of 14: 16 x 16 positions; timm's no_embed_class: none for class token and registers.
        shapes: dict[str, tuple[int, ...]] = {
            "pos_embed": (1, 256, width),
            "patch_embed.proj.weight": (width, 3, 14, 14),
            "patch_embed.proj.bias": (width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        }
        if prefix:  # DINOv2 with registers (arXiv 2309.16588): a class token and four registers
            shapes |= {"cls_token": (1, 1, width), "reg_token": (1, 4, width)}
        for block in range(depth):
            part: dict[str, tuple[int, ...]] = {}
            for norm in ("norm1", "norm2"):
                part |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
            part |= {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)}
            part |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
            part |= {"mlp.fc1.weight": (mlp, width), "mlp.fc1.bias": (mlp,)}
            part |= {"mlp.fc2.weight": (width, mlp), "mlp.fc2.bias": (width,)}
            if prefix:  # DINOv2 has LayerScale; OpenVLA renames timm's gamma to scale_factor
                part |= {"ls1.scale_factor": (width,), "ls2.scale_factor": (width,)}
            shapes |= {f"blocks.{block}.{leaf}": shape for leaf, shape in part.items()}
        if pool:  # SigLIP's attention pooling head: one latent, timm's AttentionPoolLatent
            shapes |= {
                "attn_pool.latent": (1, 1, width),
                "attn_pool.q.weight": (width, width),
                "attn_pool.q.bias": (width,),
                "attn_pool.kv.weight": (2 * width, width),
                "attn_pool.kv.bias": (2 * width,),
                "attn_pool.proj.weight": (width, width),
                "attn_pool.proj.bias": (width,),
                "attn_pool.norm.weight": (width,),
                "attn_pool.norm.bias": (width,),
                "attn_pool.mlp.fc1.weight": (mlp, width),
                "attn_pool.mlp.fc1.bias": (mlp,),
                "attn_pool.mlp.fc2.weight": (width, mlp),
                "attn_pool.mlp.fc2.bias": (width,),
            }
        return {f"vision_backbone.{name}.{leaf}": shape for leaf, shape in shapes.items()}

    # ViT-L/14: width 1024, 24 blocks, MLP 4 x (timm vit_large_patch14_reg4_dinov2).
    shapes = tower("featurizer", 1024, 24, 4096, prefix=True, pool=False)
    # So400m/14: width 1152, 27 blocks, MLP 4304 = int(1152 * 3.7362) (timm vit_so400m_patch14_siglip_224).
    shapes |= tower("fused_featurizer", 1152, 27, 4304, prefix=False, pool=True)
    # Projector (OpenVLA's modeling_prismatic.py): 1024 + 1152 = 2176 -> four times that -> Llama's width, twice.
    for layer, (inputs, outputs) in enumerate([(2176, 8704), (8704, 4096), (4096, 4096)], start=1):
        shapes |= {f"projector.fc{layer}.weight": (outputs, inputs), f"projector.fc{layer}.bias": (outputs,)}
    # Llama-2 7B (arXiv 2307.09288, and LlamaConfig's defaults): width 4096, 32 layers, MLP 11008, no biases, every head
    # with keys and values of its own. Vocabulary: 32000, <PAD> and padding to a multiple of 64 give 32064.
    for layer in range(32):
        prefix = f"language_model.model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{which}_proj.weight": (4096, 4096) for which in "qkvo"}
        shapes |= {f"{prefix}.mlp.{which}_proj.weight": (11008, 4096) for which in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (4096, 11008)}
        shapes |= {f"{prefix}.{norm}.weight": (4096,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"language_model.model.embed_tokens.weight": (32064, 4096), "language_model.model.norm.weight": (4096,)}
    shapes |= {"language_model.lm_head.weight": (32064, 4096)}
    return shapes


def test_full_size_model_has_the_published_parameter_names_and_shapes() -> None:
    model = build(GeneralistConfig.published(), attention="sdpa", dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published_shapes()
    # openvla/openvla-7b's model.safetensors.index.json: metadata.total_size, in bfloat16.
    assert sum(value.numel() * value.element_size() for value in model.state_dict().values()) == 15_082_474_368


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / SECOND
    save_file(change(load_file(file)), file)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_one(folder: Path) -> None:
    rewrite(folder, lambda tensors: dict(list(tensors.items())[1:]))


def with_timm_names(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({name.replace("scale_factor", "gamma"): value for name, value in load_file(file).items()}, file)


def with_integers(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: value.to(torch.int8) for name, value in tensors.items()})


def with_pickle_only(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def index_that_points_outside(folder: Path) -> None:
    edit(folder / "model.safetensors.index.json", weight_map={"projector.fc1.weight": "../other.safetensors"})


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda folder: (folder / SECOND).unlink(), f"{SECOND}: missing, though .* download it again"),
    "truncated shard": (
        lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-100]),
        f"{SECOND}: truncated or not safetensors .* download it again",
    ),
    "shard of zeros": (
        lambda folder: (folder / SECOND).write_bytes(bytes(4096)),
        f"{SECOND}: truncated or not safetensors .* download it again",
    ),
    "missing tensor": (without_one, r"is incomplete; download every shard again \(missing: \S+; unexpected: none\)"),
    "timm names": (with_timm_names, r"LayerScale names \(gamma\); convert it .*missing: .*scale_factor.*unexpected: "),
    "quantised": (with_integers, f"{SECOND}: .* is I8, expected .*; take the unquantised checkpoint"),
    "pickles": (with_pickle_only, r"pytorch_model.bin: pickled weights are never loaded, .*save_pretrained"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], "holds neither .*; download"),
    "index outside": (index_that_points_outside, r"index.json: names '\.\./other.safetensors', expected .*; save"),
    "index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "index.json: not an index .*; download it again",
    ),
    "index of numbers": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        "index.json: names 1, expected .*; save",
    ),
    "stretched positions": (
        lambda folder: edit(folder / "config.json", text_config={"rope_parameters": {"rope_type": "linear"}}),
        "config.json: text_config.rope_parameters: expected rope_type 'default', got 'linear'",
    ),
    "other activation": (
        lambda folder: edit(folder / "config.json", text_config={"hidden_act": "gelu"}),
        "config.json: text_config.hidden_act: expected 'silu'",
    ),
    "a number that is text": (
        lambda folder: edit(folder / "config.json", text_config={"rms_norm_eps": "1e-6"}),
        "config.json: rms_norm_eps: expected a positive number, got '1e-6'",
    ),
    "endless width": (
        lambda folder: edit(folder / "config.json", towers=[WIDE] * 2),
        "config.json: .*; give the folder",
    ),
    "tower without width": (
        lambda folder: edit(folder / "config.json", towers=[{}, {}]),
        "/config.json: lacks the field 'embed_dim'; download",
    ),
    "no sizes": (
        lambda folder: edit(folder / "preprocessor_config.json", input_sizes=[]),
        "config.json: .*; give the folder",
    ),
    "other architecture": (
        lambda folder: edit(folder / "config.json", model_type="llava"),
        "config.json: model_type: expected 'openvla', got 'llava'; give the folder of an OpenVLA checkpoint",
    ),
    "other widths": (
        lambda folder: edit(folder / "config.json", n_action_bins="many"),
        "config.json: .*; give the folder",
    ),
    "absurd depth": (
        lambda folder: edit(folder / "config.json", text_config={"num_hidden_layers": 10**9}),
        "config.json: text_config layers: expected a whole number from 1 to 512, got 1000000000",
    ),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: missing; give the folder"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing; save the tok"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json: not a tokenizer .*; download it again",
    ),
    "bad preprocessor": (
        lambda folder: (folder / "preprocessor_config.json").write_text("{}"),
        "preprocessor_config.json: lacks the field 'input_sizes'; download",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG.keys())
def test_unusable_folder_is_refused_in_one_line_that_names_file_and_fix(
    folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_generalist("toy", checkpoint=folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_single_tower_checkpoint_is_named_as_such(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        others = {
            name: value
            for name, value in load_file(file).items()
            if not name.startswith(("vision_backbone.fused_featurizer", "projector.fc3"))
        }
        save_file(others, file)
    with pytest.raises(CheckpointError, match=r"has one vision tower .* only the fused DINOv2"):
        load_generalist("toy", checkpoint=folder, device="cpu")


def test_config_of_another_model_names_every_shape_that_differs(folder: Path, engine: GeneralistEngine) -> None:
    text = engine.model.config.to_huggingface()["text_config"] | {"intermediate_size": 96}
    edit(folder / "config.json", text_config=text)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight is \[64, 128\], expected \[64, 96\]"):
        load_generalist("toy", checkpoint=folder, device="cpu")


def test_deeper_config_lists_all_missing_names(folder: Path, engine: GeneralistEngine) -> None:
    text = engine.model.config.to_huggingface()["text_config"] | {"num_hidden_layers": 3}
    edit(folder / "config.json", text_config=text)
    with pytest.raises(CheckpointError) as caught:
        load_generalist("toy", checkpoint=folder, device="cpu")
    assert str(caught.value).count("language_model.model.layers.2.") == 9


@pytest.mark.parametrize("name", ["nowhere", "model.safetensors"])
def test_path_that_is_no_folder_is_refused(published: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"no such folder|is a file"):
        load_generalist("toy", checkpoint=tmp_path / name, device="cpu")


def test_hub_id_is_downloaded_without_code_or_pickles(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(published)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    assert load_generalist("toy", checkpoint="openvla/openvla-7b", device="cpu").width == 64
    assert asked == {"name": "openvla/openvla-7b", "patterns": ["*.json", "*.safetensors"]}


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand nothing cached")

    monkeypatch.setattr(checkpoint, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"openvla/openvla-7b: neither .* \(no connection\); check the name"):
        load_generalist("toy", checkpoint="openvla/openvla-7b", device="cpu")


def test_weights_load_shard_by_shard_from_the_meta_device(published: Path, engine: GeneralistEngine) -> None:
    model = build(engine.model.config, attention="sdpa", dtype=torch.float32)
    load_weights(model, published, torch.device("cpu"))
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
