"""The named pairs of models that the services can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from robodual.generalist.config import GeneralistConfig, TokenConfig
from robodual.generalist.tokenizer import byte_tokenizer, word_tokenizer
from robodual.specialist.config import SpecialistConfig


@dataclass(frozen=True)
class Profile:
    generalist: GeneralistConfig
    specialist: SpecialistConfig
    tokenizer: Callable[[TokenConfig], Tokenizer] = byte_tokenizer  # of a generalist without a checkpoint


PROFILES = {
    "robodual-7b": Profile(GeneralistConfig.published(), SpecialistConfig.published()),
    "playtable": Profile(GeneralistConfig.playtable(), SpecialistConfig.playtable(), word_tokenizer),
    "toy": Profile(GeneralistConfig.toy(), SpecialistConfig.toy()),
}

WEIGHTS = Path(__file__).parent / "weights"
FILES = {"generalist": "generalist", "specialist": "specialist.safetensors"}


def shipped(profile: str, half: str) -> Path | None:
    """The weights of a profile's generalist or specialist that come with this package, or None: the play table's."""
    path = WEIGHTS / profile / FILES[half]
    return path if path.exists() else None
