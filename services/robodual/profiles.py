"""The named pairs of models that the services can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
