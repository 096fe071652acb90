"""The generalist against the published OpenVLA implementation, at toy widths: shared recorded cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from parity_cases import Case, cases, draw, fill_state_dict, state_dict_shapes

from robodual.generalist.config import GeneralistConfig, ImageConfig, LanguageConfig, TokenConfig, TowerConfig
from robodual.generalist.decoding import decode
from robodual.generalist.model import Generalist

CASES = cases("generalist")
TOLERANCE = 1e-4


def generalist_config(case: dict[str, Any]) -> GeneralistConfig:
    dino, siglip = (TowerConfig.from_timm(options) for options in case["towers"])
    language = LanguageConfig(
        vocabulary=case["vocab_size"],
        width=case["hidden"],
        mlp_width=case["inter"],
        layers=case["layers"],
        heads=case["heads"],
        key_value_heads=case["heads"],
    )
    return GeneralistConfig((dino, siglip), language, TokenConfig(), ImageConfig())


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case: Case) -> Generalist:
    model = Generalist(generalist_config(case.config)).eval()
    fill_state_dict(model)
    model.language_model.lm_head.weight.data *= case.config["lm_head_scale"]
    return model


@pytest.fixture(scope="module")
def pixels(case: Case) -> torch.Tensor:
    return torch.from_numpy(draw(f"{case.short}/pixel_values", (1, 6, 224, 224)))


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=TOLERANCE)


def test_vision_features_and_projection_match_the_published_ones(
    case: Case, model: Generalist, pixels: torch.Tensor
) -> None:
    patches = model.vision_backbone(pixels)
    assert patches.shape[1] == case.config["num_patches"] == model.config.patches
    close(patches[0, :2], case.recorded["patches_first"])
    close(patches[0].mean(dim=0), case.recorded["patches_mean"])
    close(model.projector(patches)[0, :2], case.recorded["projected_first"])


def test_prefill_logits_match_the_published_ones(case: Case, model: Generalist, pixels: torch.Tensor) -> None:
    embeddings, _ = model.embed(model.see(pixels), [torch.from_numpy(case.recorded["input_ids"][0])])
    logits = model.language_model(inputs_embeds=embeddings, logits_to_keep=1).logits
    close(logits[0, -1], case.recorded["prefill_last_logits"])


def test_greedy_tokens_and_hidden_states_match_the_published_ones(
    case: Case, model: Generalist, pixels: torch.Tensor
) -> None:
    decoded = decode(model, pixels, [torch.from_numpy(case.recorded["input_ids"][0])], constrained=False)
    assert decoded.tokens[0].tolist() == case.recorded["generated_ids"].tolist()
    close(decoded.hidden[0], case.recorded["hidden_states"])


def test_parameter_count_matches_the_published_one(case: Case, model: Generalist) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == case.config["params"]


@pytest.mark.skipif(not any(case.name == "generalist_tiny" for case in CASES), reason="no generalist_tiny case")
def test_parameter_names_and_shapes_are_the_published_ones() -> None:
    tiny = next(case for case in CASES if case.name == "generalist_tiny")
    with torch.device("meta"):
        state = Generalist(generalist_config(tiny.config)).state_dict()
    ours = {name: (list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state.items()}
    assert ours == state_dict_shapes("generalist")
