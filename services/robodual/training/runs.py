"""The two trainings from their options: models, data and loop put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robodual.facts import CheckpointError, hash_state_dict
from robodual.generalist.engine import GeneralistEngine, load_generalist
from robodual.profiles import PROFILES
from robodual.specialist import checkpoint as specialist_checkpoint
from robodual.specialist.denoiser import ATTENTION_DROPOUT
from robodual.specialist.frames import Preparation
from robodual.specialist.policy import Policy
from robodual.training.conditioner import MODES, Conditioner, Mode
from robodual.training.conditioning_cache import ConditioningCache
from robodual.training.dataset import CalvinDataset, read_enriched
from robodual.training.generalist import GeneralistCollate, GeneralistLearner, Lora
from robodual.training.group import Group, joined
from robodual.training.joint import JointLearner
from robodual.training.loop import Evaluate, Learner, Report, Settings, train
from robodual.training.scene import SceneHead
from robodual.training.specialist import SpecialistBatch, SpecialistCollate, SpecialistLearner, conditioned
from robodual.training.starting_weights import start_generalist, starting_policy, whiten

GUIDANCE_SCALE = 3.0
SURVEYED = 1024  # windows that are looked at for the data's statistics

Progress = Callable[[Report], None]


@dataclass(frozen=True)
class Data:
    """What to train on; names as in the published scripts where they have one."""

    folder: Path  # a data set (training/ in it is taken) or a split
    partial_data: float = 1.0
    enriched: Path | None = None
    image_aug: bool = False
    window_stride: int = 1
    frames: Path | None = None  # a folder of `robodual data cache`

    def open(self, seed: int, sensors: tuple[str, ...], chunk: int, scene: bool = False) -> CalvinDataset:
        split = self.folder / "training"
        return CalvinDataset(
            split if split.is_dir() else self.folder,
            sensors=sensors,
            chunk=chunk,
            seed=seed,
            partial=self.partial_data,
            enriched=None if self.enriched is None else read_enriched(self.enriched),
            augment=self.image_aug,
            stride=self.window_stride,
            frames=self.frames,
            scene=scene,
        )

    def described(self, dataset: CalvinDataset) -> dict[str, Any]:
        """What of it a result depends on."""
        return {
            "windows": len(dataset),
            "partial_data": self.partial_data,
            "enriched": dataset.enriched,
            "image_aug": self.image_aug,
            "window_stride": self.window_stride,
            "frames": None if dataset.frames is None else asdict(dataset.frames.contents)["size"] or "as recorded",
        }


@dataclass(frozen=True)
class Source:
    """Which generalist: a profile's shapes with random weights, or a checkpoint, with LoRA folders merged in."""

    profile: str
    checkpoint: str | None = None
    adapters: tuple[Path, ...] = ()
    device: str = "auto"
    quantisation: str = "none"  # of a base that adapters are trained on, or that conditions a specialist

    def load(self, group: Group, seed: int, dtype: str = "auto") -> GeneralistEngine:
        return load_generalist(
            self.profile,
            checkpoint=self.checkpoint,
            adapters=self.adapters,
            device=str(group.device),
            dtype=dtype,
            seed=seed,
            quantisation=self.quantisation,
            static_cache=False,
        )


@dataclass(frozen=True)
class SpecialistOptions:
    """How the specialist differs from the profile's, what it starts from and what it is conditioned on."""

    with_depth: bool | None = None
    with_gripper: bool | None = None
    with_tactile: bool | None = None
    num_inference_steps: int | None = None
    cond_drop_chance: float = 0.1
    noise_draws: int = 1
    attention_dropout: float = ATTENTION_DROPOUT
    start: Path | None = None  # a specialist to go on from
    vision_weights: Path | None = None
    train_vision: bool = False
    conditioning: Mode = "forced"
    cache_conditioning: Path | None = None
    whiten_inputs: bool = False
    scene_weight: float = 0.0
    min_snr_gamma: float | None = None
    unfreeze: GeneralistOptions | None = None  # trains the generalist too, as it says


@dataclass(frozen=True)
class GeneralistOptions:
    """What of the generalist is trained and saved."""

    use_lora: bool = True
    lora_rank: int = 32
    lora_dropout: float = 0.0
    merged: bool = False
    gradient_checkpointing: bool = False


def train_specialist(
    source: Source,
    data: Data,
    options: SpecialistOptions,
    settings: Settings,
    *,
    resume: bool = False,
    report: Progress = lambda report: None,
    caching: Callable[[int, int], None] = lambda done, of: None,
    evaluate: Evaluate | None = None,
) -> int:
    """Trains a specialist against a generalist, frozen unless `unfreeze`. Returns the steps done; see `loop.train`.

    report: called on the leading process; caching: called with how many spans are cached, of how many.

    Raises:
        CheckpointError, DatasetError, ValueError: one line that says what to change.
    """
    _check(options, settings, source)
    with joined(source.device) as group:
        settings = replace(settings, bf16=_bf16(settings, group))
        dtype = "float32" if options.unfreeze is not None and not options.unfreeze.use_lora else "auto"
        engine = source.load(group, settings.seed, dtype)
        conditioner = Conditioner(engine.model, constrained=engine.constrained, mode=options.conditioning)
        policy = _policy(source.profile, engine.width, options, settings.seed).to(group.device)
        dataset = data.open(settings.seed, policy.config.sensors, chunk=8, scene=options.scene_weight > 0)
        facts = {"generalist": engine.facts.checkpoint, "conditioning": options.conditioning}
        images = engine.model.config.images
        if dataset.frames is not None:
            dataset.frames.check(images.strategy, images.size, policy.config.image_size)
        cache = None
        if options.cache_conditioning is not None:
            cache = ConditioningCache(options.cache_conditioning, dataset)
            look = data.open(settings.seed, ("rgb_static",), chunk=0)
            described = {**facts, "data": f"{len(dataset)} windows of {data.folder.name}", "seed": str(settings.seed)}
            cache.fill(look, conditioner, engine.processor, group, described, progress=caching)
        # Frames are prepared by the data loader's workers, so on the CPU.
        preparation = Preparation(policy.config, images.strategy, torch.device("cpu"), torch.float32)
        collate = SpecialistCollate(
            preparation, engine.processor, settings.seed, options.cond_drop_chance, cache, options.noise_draws
        )
        learner: Learner[SpecialistBatch]
        if options.unfreeze is not None:
            learner = JointLearner(policy, _generalist_learner(engine, source, options.unfreeze, settings.seed))
        else:
            head = None
            if options.whiten_inputs or options.scene_weight:
                proprio, means, scenes = _surveyed(dataset, collate, conditioner, group, settings.seed)
                if options.whiten_inputs and options.start is None:
                    whiten(policy, proprio, means)
                if scenes is not None:
                    latents = policy.model.sensor_latents * policy.config.width
                    head = SceneHead(latents, scenes)
            learner = SpecialistLearner(
                policy,
                conditioner if cache is None else None,
                head,
                options.scene_weight,
                options.min_snr_gamma,
            )
        described_all = {
            **facts,
            **data.described(dataset),
            "specialist": asdict(policy.config),
            **_start(policy, options),
            "cond_drop_chance": options.cond_drop_chance,
            "noise_draws": options.noise_draws,
            "attention_dropout": options.attention_dropout,
            "train_vision": options.train_vision,
            "cached": cache is not None,
            "whiten_inputs": options.whiten_inputs,
            "scene_weight": options.scene_weight,
            "min_snr_gamma": options.min_snr_gamma,
            "unfreeze": None if options.unfreeze is None else asdict(options.unfreeze),
        }
        return train(
            learner.to(group.device), dataset, collate, settings, group,
            described=described_all, resume=resume, report=report, evaluate=evaluate,
        )  # fmt: skip


def _surveyed(
    dataset: CalvinDataset, collate: SpecialistCollate, conditioner: Conditioner, group: Group, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of windows spread over the data, the same on every process: proprioception [N, 7], the mean hidden state of each
    conditioning [N, D], and scene_obs [N, 24] where the data set gives it."""
    chosen = np.random.default_rng(seed).choice(len(dataset), min(SURVEYED, len(dataset)), replace=False)
    proprio, means, scenes = [], [], []
    for begin in range(0, len(chosen), 32):
        batch = collate([dataset[0, int(index)] for index in chosen[begin : begin + 32]]).to(group.device)
        known = conditioned(batch, conditioner)
        kept = known.mask[..., None]
        means.append((known.hidden.float() * kept).sum(dim=1) / kept.sum(dim=1))
        proprio.append(batch.observation.proprio)
        scenes += [] if batch.scene is None else [batch.scene]
    return torch.cat(proprio), torch.cat(means), torch.cat(scenes) if scenes else None


def _check(options: SpecialistOptions, settings: Settings, source: Source) -> None:
    if options.conditioning not in MODES:
        raise ValueError(f"conditioning: expected one of {', '.join(MODES)}, got {options.conditioning!r}")
    if settings.fsdp:
        raise ValueError("fsdp: is for a generalist with all its weights (train generalist --full)")
    if options.unfreeze is not None:
        if options.min_snr_gamma is not None or options.scene_weight or options.whiten_inputs:
            raise ValueError(
                "unfreeze_generalist: min_snr_gamma, scene_weight and whiten_inputs are for a specialist's own training"
            )
        if options.conditioning != "forced" or options.cache_conditioning is not None:
            raise ValueError(
                "unfreeze_generalist: its conditioning changes with every step, so it is forced, not cached"
            )
        _check_generalist(options.unfreeze, settings, source)


def _bf16(settings: Settings, group: Group) -> bool:
    return group.device.type == "cuda" if settings.bf16 is None else settings.bf16


def _policy(profile: str, context_width: int, options: SpecialistOptions, seed: int) -> Policy:
    """The specialist before its first step."""
    flags = {name: getattr(options, name) for name in ("with_depth", "with_gripper", "with_tactile")}
    flags = {name: value for name, value in flags.items() if value is not None}
    config = replace(PROFILES[profile].specialist, context_width=context_width)
    if options.start is not None:
        policy = specialist_checkpoint.load(options.start, config, flags)
    else:
        if options.vision_weights is None and not options.train_vision:
            raise CheckpointError(
                "vision_weights: the colour encoder is not trained, so it needs the weights of timm's "
                "vit_small_patch16_224.dino (a .safetensors file), or train_vision to train it too"
            )
        policy = starting_policy(replace(config, **flags), seed, options.vision_weights)
    policy.config = replace(
        policy.config,
        diffusion_steps=options.num_inference_steps or policy.config.diffusion_steps,
        guidance_scale=GUIDANCE_SCALE if options.cond_drop_chance > 0 else 1.0,
    )
    policy.set_attention_dropout(options.attention_dropout)
    policy.requires_grad_(True)
    policy.vision_encoder.requires_grad_(options.train_vision)
    return policy


def _start(policy: Policy, options: SpecialistOptions) -> dict[str, str | None]:
    """The hashes of the files that a specialist starts from, before its first step."""
    whole, colour = options.start, options.vision_weights if options.start is None else None
    return {
        "starting_specialist": None if whole is None else hash_state_dict(policy),
        "vision_weights": None if colour is None else hash_state_dict(policy.vision_encoder),
    }


def train_generalist(
    source: Source,
    data: Data,
    options: GeneralistOptions,
    settings: Settings,
    *,
    resume: bool = False,
    report: Progress = lambda report: None,
    evaluate: Evaluate | None = None,
) -> int:
    """Fine-tunes a generalist. Returns the steps done; see `loop.train`.

    With LoRA the base is loaded in bfloat16 on CUDA and the adapters are float32; without it all weights are float32.

    Raises:
        CheckpointError, DatasetError, ValueError: one line that says what to change.
    """
    _check_generalist(options, settings, source)
    with joined(source.device) as group:
        settings = replace(settings, bf16=_bf16(settings, group), max_grad_norm=math.inf)
        engine = source.load(group, settings.seed, dtype="auto" if options.use_lora else "float32")
        dataset = data.open(settings.seed, ("rgb_static",), chunk=0)
        images = engine.model.config.images
        if dataset.frames is not None:
            dataset.frames.check(images.strategy, images.size)
        learner = _generalist_learner(engine, source, options, settings.seed).to(group.device)
        described = {
            **data.described(dataset),
            "generalist": engine.facts.checkpoint,
            "use_lora": options.use_lora,
            "lora_rank": options.lora_rank,
            "lora_dropout": options.lora_dropout,
            "quantisation": source.quantisation,
        }
        return train(
            learner, dataset, GeneralistCollate(engine.processor), settings, group,
            described=described, resume=resume, report=report, evaluate=evaluate,
        )  # fmt: skip


def _check_generalist(options: GeneralistOptions, settings: Settings, source: Source) -> None:
    if settings.fsdp and options.use_lora:
        raise ValueError("fsdp: is for all weights (--full); adapters are small enough for every process")
    if source.quantisation != "none" and not options.use_lora:
        raise ValueError("quantisation: quantised weights cannot be trained; train adapters on them (--use_lora)")
    if source.quantisation == "fp8":
        raise ValueError("quantisation: adapters are not trained on fp8; choose none, int8 or nf4")
    if source.quantisation != "none" and options.merged:
        raise ValueError(
            "merged: adapters are merged into whole weights; leave it out here and serve the adapter with --adapter"
        )


def _generalist_learner(
    engine: GeneralistEngine, source: Source, options: GeneralistOptions, seed: int
) -> GeneralistLearner:
    if source.checkpoint is None and not options.use_lora:
        start_generalist(engine.model, seed)
    torch.manual_seed(seed)
    return GeneralistLearner(
        engine.model,
        engine.processor.tokenizer,
        lora=Lora(options.lora_rank, options.lora_dropout) if options.use_lora else None,
        constrained=engine.constrained,
        merged=options.merged,
        gradient_checkpointing=options.gradient_checkpointing,
        quantisation=source.quantisation,
    )
