"""The small pair that comes with the package: whole, described by its model card, and good for some tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from robodual.facts import hash_state_dict
from robodual.generalist.engine import load_generalist
from robodual.pair import Options, Pair
from robodual.profiles import PROFILES, WEIGHTS, shipped
from robodual.specialist.engine import load_specialist
from robodual_client.calvin import Options as Evaluation
from robodual_client.calvin import evaluate
from robodual_client.calvin.progress import Silent

FOLDER = WEIGHTS / "playtable"
# Whose first task the pair solved when the card was written, with room for the last bits of another processor.
SEQUENCES = (5, 13, 20, 27, 30, 93)


def test_it_is_of_the_profiles_shapes_and_the_card_names_its_weights() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40e6
    generalist = load_generalist("playtable", checkpoint=shipped("playtable", "generalist"), device="cpu")
    specialist = load_specialist("playtable", checkpoint=shipped("playtable", "specialist"), device="cpu")
    profile = PROFILES["playtable"]
    assert generalist.model.config.language == profile.generalist.language
    assert specialist.policy.config == profile.specialist
    card = (FOLDER / "README.md").read_text()
    for model in (generalist.model, specialist.policy):
        assert hash_state_dict(model) in card
    assert shipped("toy", "generalist") is None


@pytest.mark.slow
def test_it_solves_tasks_through_both_services(tmp_path: Path) -> None:
    with Pair(Options("playtable", device="cpu")) as pair:
        run = Evaluation(tmp_path / "run", policy_options=pair.addresses, numbers=SEQUENCES, workers=2, ep_len=200)
        results = evaluate(run, Silent())
    solved = sum(length > 0 for length in results.lengths())
    assert solved >= len(SEQUENCES) - 2, results.lengths()
