"""`robodual train`: the generalist and the specialist. Flags may be spelt with _, as in the published scripts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from robodual.training.data_cli import fail

train = typer.Typer(help="Trains the generalist or the specialist (docs/training.md).", no_args_is_help=True)
console = Console()
# PEFT imports bitsandbytes where it is installed, which warns of a CPU kernel that no training here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def option(*names: str, **settings: Any) -> Any:
    """A flag in both spellings: --batch_size and --batch-size."""
    spellings = [spelling for name in names for spelling in {name: None, name.replace("_", "-"): None}]
    return typer.Option(*spellings, **settings)


DataFolder = Annotated[Path, typer.Argument(help="A data set in CALVIN's format, or one split of it.")]
Output = Annotated[Path, option("--output", help="Where checkpoints and logs go.")]
Profile = Annotated[str, option("--profile", help="Model shapes: robodual-7b, playtable or toy.")]
Device = Annotated[str, option("--device", help="auto, cpu, cuda or cuda:N.")]
Generalist = Annotated[
    str | None, option("--generalist", help="Its checkpoint: a folder or hub id. Without it, random weights.")
]
Adapter = Annotated[list[Path] | None, option("--adapter", help="LoRA folder to merge into it; may be repeated.")]
BatchSize = Annotated[int, option("--batch_size", help="Samples of one process in one pass.", min=1)]
Accumulation = Annotated[int, option("--grad_accumulation_steps", help="Passes before an optimiser step.", min=1)]
LearningRate = Annotated[float, option("--learning_rate", min=0.0)]
MaxSteps = Annotated[int, option("--max_steps", help="Optimiser steps.", min=1)]
SaveSteps = Annotated[int, option("--save_steps", help="Steps between checkpoints.", min=1)]
LogSteps = Annotated[int, option("--log_steps", help="Steps between reports.", min=1)]
Keep = Annotated[int, option("--keep", help="How many checkpoints to keep.", min=1)]
Warmup = Annotated[int, option("--warmup_steps", help="Steps in which the rate rises to its peak.", min=0)]
Cosine = Annotated[float, option("--cosine_cycles", help="Of the rate after it; 0: constant; 0.5: down to 0.", min=0.0)]
Seed = Annotated[int, option("--seed", min=0)]
Workers = Annotated[int, option("--num_workers", help="Processes that read data.", min=0)]
Partial = Annotated[float, option("--partial_data", help="Fraction of the annotations (published: 0.05, 0.1).")]
Enriched = Annotated[Path | None, option("--enriched", help="JSON: task to further instructions.")]
Augment = Annotated[bool, option("--image_aug", help="Augment the images (published: never read).")]
Stride = Annotated[int, option("--window_stride", help="Steps between windows' starts (published: 1).", min=1)]
Frames = Annotated[Path | None, option("--frames", help="A folder of `robodual data cache` to read the steps from.")]
Bf16 = Annotated[bool | None, option("--bf16/--fp32", help="Autocast; without either, bf16 on CUDA.")]
Quantisation = Annotated[
    str,
    option("--quantisation", help="Of the frozen base: none, or on CUDA int8 or nf4; fp8 where it only conditions."),
]
UseLora = Annotated[bool, option("--use_lora/--full", help="Low-rank adapters, or all weights.")]
LoraRank = Annotated[int, option("--lora_rank", min=1)]
LoraDropout = Annotated[float, option("--lora_dropout", min=0.0, max=1.0)]
Checkpointing = Annotated[bool, option("--gradient_checkpointing", help="Less memory, about a third slower.")]
Merged = Annotated[bool, option("--merged", help="Save the merged weights too, as a folder in the published format.")]
EvalEvery = Annotated[
    int, option("--eval_every", help="Steps between closed-loop evaluations on the play table; 0: none.", min=0)
]
EvalSequences = Annotated[int, option("--eval_sequences", help="Five-task sequences of each.", min=1, max=1000)]
Wandb = Annotated[str | None, option("--wandb", help="Report to this Weights & Biases project too.")]
Resume = Annotated[bool, option("--resume", help="Go on from the newest checkpoint in the output.")]


@train.command()
def specialist(
    data: DataFolder,
    output: Output = Path("runs/specialist"),
    profile: Profile = "robodual-7b",
    generalist: Generalist = None,
    adapter: Adapter = None,
    device: Device = "auto",
    batch_size: BatchSize = 8,
    grad_accumulation_steps: Accumulation = 1,
    learning_rate: LearningRate = 1e-4,
    weight_decay: Annotated[float, option("--weight_decay", min=0.0)] = 1e-3,
    warmup_steps: Warmup = 1000,
    cosine_cycles: Cosine = 0.4,
    max_steps: MaxSteps = 100_000,
    save_steps: SaveSteps = 10_000,
    log_steps: LogSteps = 10,
    keep: Keep = 3,
    num_inference_steps: Annotated[
        int | None, option("--num_inference_steps", help="Denoising steps in service; the profile's without it.", min=1)
    ] = None,
    cond_drop_chance: Annotated[
        float, option("--cond_drop_chance", help="Of the conditioning vector; 0: no guidance.", min=0.0, max=1.0)
    ] = 0.1,
    noise_draws: Annotated[
        int, option("--noise_draws", help="Noisy chunks that each observation is looked at with (published: 1).", min=1)
    ] = 1,
    attention_dropout: Annotated[
        float, option("--attention_dropout", help="Of the denoiser (published: 0.1).", min=0.0, max=0.9)
    ] = 0.1,
    with_depth: Annotated[bool | None, option("--with_depth/--without_depth")] = None,
    with_gripper: Annotated[bool | None, option("--with_gripper/--without_gripper")] = None,
    with_tactile: Annotated[bool | None, option("--with_tactile/--without_tactile")] = None,
    start: Annotated[Path | None, option("--specialist", help="A specialist's checkpoint to go on from.")] = None,
    vision_weights: Annotated[
        Path | None, option("--vision_weights", help="DINO ViT-S/16 as safetensors (timm's names).")
    ] = None,
    train_vision: Annotated[bool, option("--train_vision", help="Train the colour encoder too.")] = False,
    conditioning: Annotated[
        str, option("--conditioning", help="forced: from demonstrated actions, as published; generated: as in service.")
    ] = "forced",
    cache_conditioning: Annotated[
        Path | None, option("--cache_conditioning", help="Compute conditionings once, into this folder.")
    ] = None,
    unfreeze_generalist: Annotated[
        bool, option("--unfreeze_generalist", help="Train the generalist too, on the sum of both losses.")
    ] = False,
    use_lora: UseLora = True,
    lora_rank: LoraRank = 32,
    lora_dropout: LoraDropout = 0.0,
    merged: Merged = False,
    gradient_checkpointing: Checkpointing = False,
    quantisation: Quantisation = "none",
    eval_every: EvalEvery = 0,
    eval_sequences: EvalSequences = 10,
    wandb: Wandb = None,
    whiten_inputs: Annotated[
        bool, option("--whiten_inputs", help="Start with first layers that fit the data's scale.")
    ] = False,
    scene_weight: Annotated[
        float, option("--scene_weight", help="Of an auxiliary loss: reading the scene off the sensors.", min=0.0)
    ] = 0.0,
    min_snr_gamma: Annotated[
        float | None, option("--min_snr_gamma", help="Weighs the noisiest timesteps more (published: none).", min=1e-3)
    ] = None,
    partial_data: Partial = 1.0,
    enriched: Enriched = None,
    image_aug: Augment = False,
    window_stride: Stride = 1,
    frames: Frames = None,
    bf16: Bf16 = None,
    seed: Seed = 0,
    num_workers: Workers = 4,
    resume: Resume = False,
) -> None:
    """Trains the specialist against a frozen generalist. Under torchrun, on every process that it starts."""
    from robodual.training.closed_loop import ClosedLoop
    from robodual.training.generalist import ADAPTER, MERGED
    from robodual.training.loop import Settings
    from robodual.training.runs import Data, GeneralistOptions, Source, SpecialistOptions, train_specialist
    from robodual.training.specialist import WEIGHTS

    settings = Settings(
        output, max_steps, batch_size, learning_rate, grad_accumulation_steps, weight_decay,
        warmup_steps=warmup_steps, cosine_cycles=cosine_cycles, save_steps=save_steps, keep=keep, seed=seed,
        num_workers=num_workers, log_steps=log_steps, bf16=bf16, eval_every=eval_every,
    )  # fmt: skip
    unfreeze = GeneralistOptions(use_lora, lora_rank, lora_dropout, merged, gradient_checkpointing)
    options = SpecialistOptions(
        with_depth, with_gripper, with_tactile, num_inference_steps, cond_drop_chance, noise_draws, attention_dropout,
        start, vision_weights, train_vision, conditioning, cache_conditioning,  # type: ignore[arg-type]
        whiten_inputs, scene_weight, min_snr_gamma, unfreeze if unfreeze_generalist else None,
    )  # fmt: skip
    source = Source(profile, generalist, tuple(adapter or ()), device, quantisation)
    joint = unfreeze_generalist and (merged or not use_lora)
    adapters = tuple(map(str, adapter or ())) + ((ADAPTER,) if unfreeze_generalist and not joint else ())
    loop = ClosedLoop(
        profile, device, MERGED if joint else generalist, () if joint else adapters, WEIGHTS,
        quantisation=quantisation, sequences=eval_sequences,
    )  # fmt: skip
    _run(
        output,
        max_steps,
        lambda **callbacks: train_specialist(
            source,
            Data(data, partial_data, enriched, image_aug, window_stride, frames),
            options,
            settings,
            resume=resume,
            evaluate=loop,
            **callbacks,
        ),
        wandb,
        caching=True,
    )


@train.command()
def generalist(
    data: DataFolder,
    output: Output = Path("runs/generalist"),
    profile: Profile = "robodual-7b",
    generalist: Generalist = None,
    adapter: Adapter = None,
    device: Device = "auto",
    batch_size: BatchSize = 16,
    grad_accumulation_steps: Accumulation = 4,
    learning_rate: LearningRate = 2e-5,
    warmup_steps: Warmup = 0,
    cosine_cycles: Cosine = 0.0,
    max_steps: MaxSteps = 100_000,
    save_steps: SaveSteps = 5_000,
    log_steps: LogSteps = 10,
    keep: Keep = 3,
    use_lora: UseLora = True,
    lora_rank: LoraRank = 32,
    lora_dropout: LoraDropout = 0.0,
    merged: Merged = False,
    gradient_checkpointing: Checkpointing = False,
    quantisation: Quantisation = "none",
    fsdp: Annotated[
        bool, option("--fsdp", help="With --full: weights and optimiser state spread over the processes.")
    ] = False,
    eval_every: EvalEvery = 0,
    eval_sequences: EvalSequences = 10,
    wandb: Wandb = None,
    partial_data: Partial = 1.0,
    enriched: Enriched = None,
    image_aug: Augment = False,
    window_stride: Stride = 1,
    frames: Frames = None,
    bf16: Bf16 = None,
    seed: Seed = 0,
    num_workers: Workers = 4,
    resume: Resume = False,
) -> None:
    """Fine-tunes the generalist on action tokens. Under torchrun, on every process that it starts."""
    from robodual.training.closed_loop import ClosedLoop
    from robodual.training.generalist import ADAPTER, MERGED
    from robodual.training.loop import Settings
    from robodual.training.runs import Data, GeneralistOptions, Source, train_generalist

    settings = Settings(
        output, max_steps, batch_size, learning_rate, grad_accumulation_steps, warmup_steps=warmup_steps,
        cosine_cycles=cosine_cycles, save_steps=save_steps, keep=keep, seed=seed, num_workers=num_workers,
        log_steps=log_steps, bf16=bf16, eval_every=eval_every, fsdp=fsdp,
    )  # fmt: skip
    options = GeneralistOptions(use_lora, lora_rank, lora_dropout, merged, gradient_checkpointing)
    source = Source(profile, generalist, tuple(adapter or ()), device, quantisation)
    whole = merged or not use_lora
    adapters = () if whole else (*map(str, adapter or ()), ADAPTER)
    loop = ClosedLoop(
        profile, device, MERGED if whole else generalist, adapters, only="generalist",
        quantisation=quantisation, sequences=eval_sequences,
    )  # fmt: skip
    _run(
        output,
        max_steps,
        lambda **callbacks: train_generalist(
            source,
            Data(data, partial_data, enriched, image_aug, window_stride, frames),
            options,
            settings,
            resume=resume,
            evaluate=loop,
            **callbacks,
        ),
        wandb,
    )


def _run(
    output: Path, max_steps: int, training: Callable[..., int], wandb: str | None, *, caching: bool = False
) -> None:
    """Runs a training with its display; what is wrong becomes one line and exit status 1."""
    from robodual.training.display import shown

    leads = os.environ.get("RANK", "0") == "0"
    try:
        if leads:
            with shown(output, max_steps, console, wandb) as display:
                callbacks = {"caching": display.caching} if caching else {}
                steps = training(report=display, **callbacks)
        else:
            steps = training()
    except ValueError as error:  # of settings, data (DatasetError) and checkpoints (CheckpointError)
        raise fail(error) from None
    if leads:
        done = "trained" if steps == max_steps else "stopped"
        console.print(f"{done} at step {steps}; checkpoints are in {escape(str(output / 'checkpoints'))}")
