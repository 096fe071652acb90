"""Shapes and facts of a generalist: two vision towers, a Llama, a tokenizer, an image processor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robodual.images import STRATEGIES, Strategy

# Above any published model; keeps a hostile config.json from asking for a network of a billion layers.
MAX_DEPTH = 512
MAX_WIDTH = 1 << 18

# What OpenVLA's config.json names its towers by, in timm's terms (timm 0.9.16, models/vision_transformer.py).
PUBLISHED_TOWERS: dict[str, dict[str, Any]] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {
        "patch_size": 14,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "reg_tokens": 4,
        "no_embed_class": True,
        "init_values": 1e-5,
        "mlp_ratio": 4.0,
    },
    "vit_so400m_patch14_siglip_224": {
        "patch_size": 14,
        "embed_dim": 1152,
        "depth": 27,
        "num_heads": 16,
        "class_token": False,
        "global_pool": "map",
        "mlp_ratio": 3.7362,
    },
}


def _bounded(name: str, value: int, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ValueError(f"{name}: expected a whole number from 1 to {limit}, got {value!r}")
    return value


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return value


@dataclass(frozen=True)
class TowerConfig:
    """One vision transformer."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    image_size: int = 224
    class_token: bool = True
    registers: int = 0
    # Whether class token and registers have position embeddings too (timm's `no_embed_class: false`).
    prefix_positions: bool = False
    layer_scale: bool = False
    # SigLIP's pooling head: part of the checkpoint, never run.
    attention_pool: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "heads", "mlp_width", "patch", "image_size"):
            _bounded(f"tower {name}", getattr(self, name), MAX_WIDTH)
        _bounded("tower depth", self.depth, MAX_DEPTH)
        if self.depth < 2:
            raise ValueError("tower depth: expected at least 2, since features come from the second-to-last block")
        if self.width % self.heads or self.image_size % self.patch:
            raise ValueError(
                f"tower: width {self.width} must be a multiple of heads {self.heads}, "
                f"and image size {self.image_size} of patch {self.patch}"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def prefix_tokens(self) -> int:
        return int(self.class_token) + self.registers

    @classmethod
    def from_timm(cls, options: Mapping[str, Any], image_size: int = 224) -> TowerConfig:
        """From the keyword arguments of timm's VisionTransformer.

        Raises ValueError for an option that changes the network in a way that is not built here.
        """
        known = {
            "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "reg_tokens", "no_embed_class",
            "init_values", "class_token", "global_pool", "img_size",
        }  # fmt: skip
        if unknown := sorted(set(options) - known):
            raise ValueError(f"towers: options {unknown} are not supported, expected some of {sorted(known)}")
        class_token = bool(options.get("class_token", True))
        return cls(
            width=options["embed_dim"],
            depth=options["depth"],
            heads=options["num_heads"],
            mlp_width=int(options["embed_dim"] * options.get("mlp_ratio", 4.0)),
            patch=options["patch_size"],
            image_size=options.get("img_size", image_size),
            class_token=class_token,
            registers=options.get("reg_tokens", 0),
            prefix_positions=class_token and not options.get("no_embed_class", False),
            layer_scale=options.get("init_values") is not None,
            attention_pool=options.get("global_pool") == "map",
        )

    def to_timm(self) -> dict[str, Any]:
        """The inverse of `from_timm`, as written into the config.json of our own checkpoints."""
        options: dict[str, Any] = {
            "patch_size": self.patch,
            "img_size": self.image_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            # Half a unit above, since timm rounds the product down.
            "mlp_ratio": (self.mlp_width + 0.5) / self.width,
            "class_token": self.class_token,
            "reg_tokens": self.registers,
            "no_embed_class": not self.prefix_positions,
        }
        if self.layer_scale:
            options["init_values"] = 1e-5
        if self.attention_pool:
            options["global_pool"] = "map"
        return options


@dataclass(frozen=True)
class LanguageConfig:
    """The Llama, in Transformers' terms; the defaults are those of its LlamaConfig, which published files rely on."""

    vocabulary: int = 32064
    width: int = 4096
    mlp_width: int = 11008
    layers: int = 32
    heads: int = 32
    key_value_heads: int = 32
    rms_epsilon: float = 1e-6
    rope_base: float = 10000.0
    positions: int = 2048

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "mlp_width", "heads", "key_value_heads", "positions"):
            _bounded(f"text_config {name}", getattr(self, name), MAX_WIDTH)
        _bounded("text_config layers", self.layers, MAX_DEPTH)
        if self.width % self.heads or self.heads % self.key_value_heads:
            raise ValueError(
                f"text_config: hidden size {self.width} must be a multiple of the heads {self.heads}, "
                f"and those of the key-value heads {self.key_value_heads}"
            )


@dataclass(frozen=True)
class TokenConfig:
    """Token ids. Action tokens are the `bins` ids below `action_end`: Llama-2's 31744..31999."""

    bos: int = 1
    eos: int = 2
    pad: int = 32000
    separator: int = 29871
    action_end: int = 32000
    bins: int = 256

    @property
    def action_start(self) -> int:
        return self.action_end - self.bins


@dataclass(frozen=True)
class ImageConfig:
    """How a frame becomes the towers' input; one mean and deviation (of RGB in [0, 1]) per tower."""

    strategy: Strategy = "resize-naive"
    size: int = 224
    means: tuple[tuple[float, float, float], ...] = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
    deviations: tuple[tuple[float, float, float], ...] = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"image_resize_strategy: expected one of {STRATEGIES}, got {self.strategy!r}")
        if not len(self.means) == len(self.deviations) == 2:
            raise ValueError("means, stds: expected two of each, one for each tower")
        if any(not value > 0 for deviation in self.deviations for value in deviation):
            raise ValueError(f"stds: expected numbers above 0, got {self.deviations}")
        _bounded("input_sizes", self.size, 4096)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> ImageConfig:
        """From a published preprocessor_config.json."""

        def triples(name: str) -> tuple[tuple[float, float, float], ...]:
            rows: Sequence[Sequence[float]] = config[name]
            return tuple((float(red), float(green), float(blue)) for red, green, blue in rows)

        if any(name != "bicubic" for name in config.get("interpolations", [])):
            raise ValueError(f"interpolations: expected 'bicubic' for each tower, got {config['interpolations']}")
        sizes = config["input_sizes"]
        size = sizes[0][-1]
        if list(map(list, sizes)) != [[3, size, size]] * 2:
            raise ValueError(f"input_sizes: expected the same [3, S, S] for two towers, got {sizes}")
        return cls(config["image_resize_strategy"], size, triples("means"), triples("stds"))

    def to_huggingface(self) -> dict[str, Any]:
        """The fields of a published preprocessor_config.json."""
        return {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": self.strategy,
            "input_sizes": [[3, self.size, self.size]] * 2,
            "interpolations": ["bicubic"] * 2,
            "means": [list(mean) for mean in self.means],
            "stds": [list(deviation) for deviation in self.deviations],
            "use_fused_vision_backbone": True,
        }


@dataclass(frozen=True)
class GeneralistConfig:
    """A whole generalist. `constrained` is whether its decoding is restricted to the layout of 8 x 7 actions."""

    towers: tuple[TowerConfig, TowerConfig]
    language: LanguageConfig
    tokens: TokenConfig
    images: ImageConfig
    constrained: bool = False

    def __post_init__(self) -> None:
        tokens, vocabulary = self.tokens, self.language.vocabulary
        if self.towers[0].patch != self.towers[1].patch:
            raise ValueError("towers: expected the same patch_size in both, since their features are concatenated")
        for tower in self.towers:
            if tower.image_size != self.images.size:
                raise ValueError(
                    f"image_sizes: a tower expects {tower.image_size}, the image processor gives {self.images.size}"
                )
        if not 0 < tokens.action_start < tokens.action_end <= vocabulary:
            raise ValueError(
                f"vocab_size: {vocabulary} has no room for {tokens.bins} action tokens below id {tokens.action_end}"
            )
        for name in ("bos", "eos", "pad", "separator"):
            if not 0 <= getattr(tokens, name) < vocabulary:
                raise ValueError(f"{name} token: expected an id below vocab_size {vocabulary}")

    @property
    def patches(self) -> int:
        """Image tokens of one frame."""
        return self.towers[0].patches

    @classmethod
    def published(cls) -> GeneralistConfig:
        """OpenVLA-7B (arXiv 2406.09246): DINOv2 ViT-L/14 with registers, SigLIP So400m/14, Llama-2 7B."""
        dino, siglip = (TowerConfig.from_timm(options) for options in PUBLISHED_TOWERS.values())
        return cls((dino, siglip), LanguageConfig(), TokenConfig(), ImageConfig())

    @classmethod
    def toy(cls) -> GeneralistConfig:
        """The same architecture at test widths, with a byte-level tokenizer.

        Random weights seldom emit the layout of 8 x 7 actions, hence constrained decoding.
        """
        dino = TowerConfig(64, 3, 4, 128, patch=28, registers=4, layer_scale=True)
        siglip = TowerConfig(64, 3, 4, 128, patch=28, class_token=False, attention_pool=True)
        language = LanguageConfig(
            vocabulary=580, width=64, mlp_width=128, layers=2, heads=4, key_value_heads=4, positions=4096
        )
        tokens = TokenConfig(bos=1, eos=2, pad=0, separator=3, action_end=516)
        return cls((dino, siglip), language, tokens, ImageConfig(), constrained=True)

    @classmethod
    def playtable(cls) -> GeneralistConfig:
        """The same architecture, small enough to train on a CPU; its tokenizer knows words (`word_tokenizer`)."""
        dino = TowerConfig(96, 3, 3, 384, patch=16, image_size=96, registers=4, layer_scale=True)
        siglip = TowerConfig(96, 3, 3, 384, patch=16, image_size=96, class_token=False)
        language = LanguageConfig(
            vocabulary=1024, width=160, mlp_width=448, layers=3, heads=5, key_value_heads=5, positions=1024
        )
        tokens = TokenConfig(bos=1, eos=2, pad=0, separator=3, action_end=960)
        return cls((dino, siglip), language, tokens, ImageConfig(size=96), constrained=True)

    @classmethod
    def from_huggingface(
        cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None, constrained: bool = False
    ) -> GeneralistConfig:
        """From a published folder's config.json (`model_type` openvla) and preprocessor_config.json.

        Without the latter, frames are normalised as published. Beyond the published fields, `towers` (two
        dictionaries in timm's terms) replaces `timm_model_ids`, and `separator_token_id` the published 29871.
        Raises ValueError that names the field.
        """
        if config.get("model_type") != "openvla":
            raise ValueError(f"model_type: expected 'openvla', got {config.get('model_type')!r}")
        if config.get("arch_specifier", "no-align+fused-gelu-mlp") != "no-align+fused-gelu-mlp":
            raise ValueError(f"arch_specifier: expected 'no-align+fused-gelu-mlp', got {config['arch_specifier']!r}")
        if any(config.get("timm_override_act_layers", [])):
            raise ValueError("timm_override_act_layers: expected null for each tower (exact GELU)")
        sizes = config.get("image_sizes", [224, 224])
        described = config.get("towers") or [_published_tower(name) for name in config.get("timm_model_ids", [])]
        if len(described) != 2 or len(sizes) != 2:
            raise ValueError("timm_model_ids, image_sizes: expected two of each (a fused DINOv2 + SigLIP backbone)")
        dino, siglip = (TowerConfig.from_timm(options, size) for options, size in zip(described, sizes))
        text = config.get("text_config", {})
        language = _language_from_huggingface(text)
        tokens = TokenConfig(
            bos=text.get("bos_token_id", TokenConfig.bos),
            eos=text.get("eos_token_id", TokenConfig.eos),
            pad=config.get("pad_token_id", TokenConfig.pad),
            separator=config.get("separator_token_id", TokenConfig.separator),
            action_end=language.vocabulary - config.get("pad_to_multiple_of", 64),
            bins=config.get("n_action_bins", TokenConfig.bins),
        )
        if preprocessor is None:
            images = ImageConfig(config.get("image_resize_strategy", "resize-naive"), dino.image_size)
        else:
            images = ImageConfig.from_huggingface(preprocessor)
        return cls((dino, siglip), language, tokens, images, constrained)

    def to_huggingface(self) -> dict[str, Any]:
        """The config.json that `from_huggingface` reads back; published fields first."""
        language = self.language
        published = {TowerConfig.from_timm(options): name for name, options in PUBLISHED_TOWERS.items()}
        towers: dict[str, Any]
        if all(tower in published for tower in self.towers):
            towers = {
                "vision_backbone_id": "dinosiglip-vit-so-224px",
                "timm_model_ids": [published[tower] for tower in self.towers],
                "timm_override_act_layers": [None, None],
            }
        else:
            towers = {"towers": [tower.to_timm() for tower in self.towers]}
        return {
            "architectures": ["OpenVLAForActionPrediction"],
            "model_type": "openvla",
            "arch_specifier": "no-align+fused-gelu-mlp",
            "use_fused_vision_backbone": True,
            "image_resize_strategy": self.images.strategy,
            "image_sizes": [tower.image_size for tower in self.towers],
            "n_action_bins": self.tokens.bins,
            "pad_token_id": self.tokens.pad,
            "pad_to_multiple_of": language.vocabulary - self.tokens.action_end,
            "text_config": {
                "model_type": "llama",
                "vocab_size": language.vocabulary,
                "hidden_size": language.width,
                "intermediate_size": language.mlp_width,
                "num_hidden_layers": language.layers,
                "num_attention_heads": language.heads,
                "num_key_value_heads": language.key_value_heads,
                "rms_norm_eps": language.rms_epsilon,
                "rope_theta": language.rope_base,
                "max_position_embeddings": language.positions,
                "bos_token_id": self.tokens.bos,
                "eos_token_id": self.tokens.eos,
                "pad_token_id": self.tokens.pad,
            },
            **towers,
            "separator_token_id": self.tokens.separator,
        }


def _published_tower(name: str) -> dict[str, Any]:
    if name not in PUBLISHED_TOWERS:
        raise ValueError(f"timm_model_ids: expected some of {list(PUBLISHED_TOWERS)}, got {name!r}")
    return PUBLISHED_TOWERS[name]


def _language_from_huggingface(text: Mapping[str, Any]) -> LanguageConfig:
    if text.get("model_type", "llama") != "llama":
        raise ValueError(f"text_config.model_type: expected 'llama', got {text['model_type']!r}")
    rope = text.get("rope_parameters") or {}  # how Transformers 5 spells it
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"text_config.rope_parameters: expected rope_type 'default', got {rope['rope_type']!r}")
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"text_config.hidden_act: expected 'silu', got {text['hidden_act']!r}")
    if text.get("rope_scaling") or text.get("attention_bias") or text.get("mlp_bias"):
        raise ValueError("text_config: rope_scaling, attention_bias and mlp_bias are not supported")
    default = LanguageConfig()
    heads = text.get("num_attention_heads", default.heads)
    return LanguageConfig(
        vocabulary=text.get("vocab_size", default.vocabulary),
        width=text.get("hidden_size", default.width),
        mlp_width=text.get("intermediate_size", default.mlp_width),
        layers=text.get("num_hidden_layers", default.layers),
        heads=heads,
        key_value_heads=text.get("num_key_value_heads") or heads,
        rms_epsilon=_positive("rms_norm_eps", text.get("rms_norm_eps", default.rms_epsilon)),
        rope_base=_positive("rope_theta", text.get("rope_theta") or rope.get("rope_theta", default.rope_base)),
        positions=text.get("max_position_embeddings", default.positions),
    )
