"""The named pairs of models that the services can run."""

from __future__ import annotations

from dataclasses import dataclass

from robodual.generalist.config import GeneralistConfig
from robodual.specialist.config import SpecialistConfig


@dataclass(frozen=True)
class Profile:
    generalist: GeneralistConfig
    specialist: SpecialistConfig


PROFILES = {
    "robodual-7b": Profile(GeneralistConfig.published(), SpecialistConfig.published()),
    "toy": Profile(GeneralistConfig.toy(), SpecialistConfig.toy()),
}
