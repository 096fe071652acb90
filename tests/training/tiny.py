"""A profile smaller than `toy`, for trainings of seconds, and options to train it with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from robodual.generalist.config import GeneralistConfig, ImageConfig, LanguageConfig, TowerConfig
from robodual.profiles import PROFILES, Profile
from robodual.specialist.config import SpecialistConfig
from robodual.training.loop import Settings
from robodual.training.runs import Data, Source, SpecialistOptions

_TOY = GeneralistConfig.toy()
_TOWER = TowerConfig(16, 2, 2, 32, patch=28, image_size=56, registers=1, layer_scale=True)

TINY = Profile(
    replace(
        _TOY,
        towers=(_TOWER, replace(_TOWER, class_token=False, registers=0, layer_scale=False, attention_pool=True)),
        language=LanguageConfig(580, 32, 64, 2, 2, 2, positions=512),
        images=ImageConfig(size=56),
    ),
    replace(SpecialistConfig.toy(), context_width=32, image_size=32, vision_blocks=1, width=32, blocks=1, heads=2),
)

PROFILES["tiny"] = TINY
SOURCE = Source("tiny", device="cpu")
SPECIALIST = SpecialistOptions(train_vision=True)


def settings(output: Path, max_steps: int, **values: Any) -> Settings:
    return Settings(output, max_steps, **({"batch_size": 4, "learning_rate": 1e-3, "log_steps": 1} | values))


def data(folder: Path, **values: Any) -> Data:
    return Data(folder, **values)
