"""Fine-tunes the generalist on action tokens: LoRA on every linear layer, or all weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from robodual.generalist.checkpoint import save_checkpoint
from robodual.generalist.model import Generalist, build
from robodual.generalist.processor import Processor
from robodual.generalist.tokens import bin_centres
from robodual.training.dataset import Sample
from robodual.training.loop import Learner
from robodual.training.prompting import Prompts, action_tokens, best_tokens, force

ADAPTER, MERGED = "adapter", "generalist"
HEAD = "language_model.lm_head"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685), as the published script sets them: alpha is min(rank, 16)."""

    rank: int = 32
    dropout: float = 0.0


@dataclass(frozen=True)
class GeneralistCollate:
    processor: Processor

    def __call__(self, samples: list[Sample]) -> Prompts:
        return Prompts.collate(samples, self.processor)


class GeneralistLearner(Learner[Prompts]):
    """A generalist with the next-token loss on the 64 tokens of a chunk.

    Args:
        lora: adapters on every linear layer that is run but the output head, or None to train all weights that are
        merged: whether checkpoints also hold the merged weights, as a folder in the published format
        gradient_checkpointing: recompute the Llama's activations in the backward pass, for memory
        quantisation: of the Llama's layers under the adapters (QLoRA, arXiv 2305.14314)
    """

    def __init__(
        self,
        model: Generalist,
        tokenizer: Tokenizer,
        *,
        lora: Lora | None,
        constrained: bool,
        merged: bool = False,
        gradient_checkpointing: bool = False,
        quantisation: str = "none",
    ) -> None:
        super().__init__()
        idle = _idle(model)
        self.tokenizer = tokenizer
        self.constrained = constrained
        self.merged = merged
        self.adapted: Any = None
        if lora is None:
            self.model = model
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith(idle))
        else:
            layers = [
                name
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and name != HEAD and not name.startswith(idle)
            ]
            config = LoraConfig(
                r=lora.rank,
                lora_alpha=min(lora.rank, 16),
                lora_dropout=lora.dropout,
                target_modules=layers,
                init_lora_weights="gaussian",
            )
            # PEFT asks for these before it adapts such layers.
            flags: Any = model
            flags.is_loaded_in_4bit, flags.is_loaded_in_8bit = quantisation == "nf4", quantisation == "int8"
            self.adapted = get_peft_model(model, config)
            self.model = model  # its linear layers are adapted in place
        if gradient_checkpointing:
            llama: Any = self.model.language_model
            # Renamed within Transformers 5.
            enable = getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def forward(self, batch: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
        return self.token_loss(force(self.model, batch).logits, batch.targets)

    def token_loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over logits [B, 64, vocabulary] and targets int64 [B, 64], and what is shown beside it."""
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        with torch.no_grad():
            metrics = self._metrics(logits, targets)
        return loss, metrics

    def _metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Accuracy over the 56 action tokens, and the decoded actions' mean absolute error."""
        ids = self.model.config.tokens
        predicted = action_tokens(best_tokens(logits, self.model, constrained=self.constrained))
        wanted = action_tokens(targets)
        centres = torch.from_numpy(bin_centres(ids.bins)).to(logits.device)

        def actions(tokens: Tensor) -> Tensor:
            return centres[(ids.action_end - tokens - 1).clamp(0, len(centres) - 1)]

        return {
            "action_accuracy": (predicted == wanted).float().mean(),
            "action_l1": (actions(predicted) - actions(wanted)).abs().mean().float(),
        }

    def blocks(self) -> list[nn.Module]:
        """The towers' and the Llama's layers."""
        backbone = self.model.vision_backbone
        towers = (backbone.featurizer, backbone.fused_featurizer)
        llama: Any = self.model.language_model.model
        return [*(block for tower in towers for block in tower.blocks[:-1]), *llama.layers]

    def export(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """`adapter` as PEFT saves it (LoRA); `generalist` in the published format (all weights, or on request)."""
        if self.adapted is not None:
            self.adapted.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
            # Safetensors lets its owner alone read it, and a service may be another user (`tensor_file.write`).
            mode = (folder / ADAPTER / "adapter_config.json").stat().st_mode
            (folder / ADAPTER / "adapter_model.safetensors").chmod(mode)
        if self.adapted is None or self.merged:
            model = self.merge({name.removeprefix("model."): value for name, value in trained.items()})
            save_checkpoint(folder / MERGED, model, self.tokenizer)

    @torch.no_grad()
    def merge(self, trained: Mapping[str, Tensor]) -> Generalist:
        """The model with its adapters in the weights, on the CPU; the one that is trained stays as it is.

        trained: whole values for weights that may be spread over processes
        """
        adapted = {
            f"{name}.weight": module for name, module in self.model.named_modules() if isinstance(module, LoraLinear)
        }
        state = {}
        for name, value in self.model.state_dict().items():
            if ".lora_" in name:
                continue
            plain = name.replace(".base_layer.", ".")
            if plain in adapted:  # one layer's product at a time: all of them in float32 are twice the weights
                merged = value + adapted[plain].get_delta_weight("default").to(value.dtype)
            else:
                merged = trained.get(name, value)
            state[plain] = merged.detach().cpu()
        model = build(self.model.config, attention="sdpa", dtype=self.model.dtype)
        model.load_state_dict(state, assign=True)
        return model


def _idle(model: Generalist) -> tuple[str, ...]:
    """What a checkpoint carries and nothing runs: each tower's last block, final norm and pooling head."""
    towers = {
        "featurizer": model.vision_backbone.featurizer,
        "fused_featurizer": model.vision_backbone.fused_featurizer,
    }
    return tuple(
        f"vision_backbone.{name}.{part}."
        for name, tower in towers.items()
        for part in (f"blocks.{len(tower.blocks) - 1}", "norm", "attn_pool")
    )
