"""Random weights in the published layouts, at toy widths, written here and not by the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from robodual.generalist.config import GeneralistConfig
from robodual.generalist.model import build
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.policy import Policy

WIDTH = 64  # of the hidden states, as the toy specialist reads them
SHARDS = 3
# The towers of the recorded parity case, whose parameter names are those of the published network.
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "parity" / "generalist_tiny.json").read_text())
CONFIG: dict[str, Any] = {
    "architectures": ["OpenVLAForActionPrediction"],
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    "model_type": "openvla",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "n_action_bins": 256,
    "norm_stats": {},
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": RECORDED["layers"],
        "num_attention_heads": 4,
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": RECORDED["vocab_size"],
    },
    "towers": RECORDED["towers"],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}
PREPROCESSOR = {
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
    "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
    "tvf_do_letterbox": False,
    "use_fused_vision_backbone": True,
}
STATISTICS = {"calvin": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [False] * 7}, "num_transitions": 1}}


def generalist_shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build(GeneralistConfig.from_huggingface(CONFIG), attention="sdpa", dtype=torch.bfloat16)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def write_generalist(folder: Path, seed: int = 0) -> Path:
    """A folder as on the hub: sharded bfloat16 weights with an index, tokenizer, statistics, code that must not run."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    state = {name: _draw(name, shape, generator) for name, shape in generalist_shapes().items()}
    names = list(state)
    placed = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    total = sum(value.numel() * 2 for value in state.values())
    files = {
        "config.json": CONFIG,
        "preprocessor_config.json": PREPROCESSOR,
        "dataset_statistics.json": STATISTICS,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000},
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "legacy": False},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>"},
        "added_tokens.json": {"<PAD>": 32000},
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": placed},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    _tokenizer().save(str(folder / "tokenizer.json"))
    for name in ("configuration_prismatic.py", "modeling_prismatic.py", "processing_prismatic.py"):
        (folder / name).write_text("raise SystemExit('code of a checkpoint was run')\n")
    return folder


def write_adapter(folder: Path, seed: int, *, alpha: float = 16) -> Path:
    """A LoRA folder as PEFT saves it (names and files of peft 0.11), on two layers of the Llama and the projector."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    shapes = generalist_shapes()
    tensors = {}
    for leaf in ("q_proj", "down_proj", "fc2"):
        for name, shape in shapes.items():
            if name.endswith(f"{leaf}.weight") and not name.startswith("vision_backbone"):
                prefix = f"base_model.model.{name.removesuffix('.weight')}"
                for half, size in (("lora_A", (4, shape[1])), ("lora_B", (shape[0], 4))):
                    values = generator.normal(0, 0.2, size).astype(np.float32)
                    tensors[f"{prefix}.{half}.weight"] = torch.from_numpy(values)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": "openvla/openvla-7b",
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "down_proj", "fc2"],
        "task_type": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_specialist(path: Path, seed: int = 0, config: SpecialistConfig | None = None) -> Path:
    """The EMA wrapper's state dict, as RoboDual's training saves it; `online_model.` holds other values."""
    state = Policy(config or SpecialistConfig.toy()).initialize(seed).state_dict()
    content = {"initted": torch.tensor(True), "step": torch.tensor(50_000)}
    content |= {f"online_model.{name}": torch.zeros_like(value) for name, value in state.items()}
    content |= {f"ema_model.{name}": value for name, value in state.items()}
    torch.save(content, path)
    return path


def _draw(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Values with which activations stay of order one and the answer depends on the frame and the words."""
    values = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        values = 0.1 * values + (0 if name.endswith("bias") else 1)
    elif "embed_tokens" in name:
        values *= 0.05
    else:
        values *= (1.6 if "_proj" in name else 0.8) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values).to(torch.bfloat16)


def _tokenizer() -> Tokenizer:
    """Llama's tokenizer.json in small: BPE with byte fallback, "▁" for a space at its own id 29871, BOS in front."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    letters = [chr(code) for code in range(33, 127)]
    vocabulary |= {letter: 29872 + place for place, letter in enumerate(letters)} | {"▁": 29871}
    taken = set(vocabulary.values())
    vocabulary |= {f"word{token}": token for token in range(32000) if token not in taken}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken("<PAD>", normalized=False)])
    return tokenizer
