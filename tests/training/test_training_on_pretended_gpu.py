"""What one step of training computes at published size on a GPU that is pretended: devices, types and shapes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pretended
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from robodual.generalist.model import Generalist, build, place_rotary
from robodual.profiles import PROFILES
from robodual.specialist.policy import Observation, Policy
from robodual.training import conditioner, joint
from robodual.training.average import Average
from robodual.training.conditioner import Conditioner, Conditioning
from robodual.training.generalist import GeneralistLearner, Lora
from robodual.training.joint import JointLearner
from robodual.training.loop import Learner
from robodual.training.prompting import Prompts
from robodual.training.scene import SceneHead
from robodual.training.specialist import SpecialistBatch, SpecialistLearner

pytestmark = pretended.needed

BATCH, DRAWS = 3, 2
SENSORS = 5  # blocks of latents: the static camera's two frames, the gripper's, and both depths
PUBLISHED = PROFILES["robodual-7b"]
# Of the generalist's many layers that are alike, two.
GENERALIST = replace(
    PUBLISHED.generalist,
    language=replace(PUBLISHED.generalist.language, layers=2),
    towers=tuple(replace(tower, depth=3) for tower in PUBLISHED.generalist.towers),
)
TOKENIZER = Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')  # for saving, which nobody does


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens become actions on the host, which takes their values."""
    for module in (conditioner, joint):
        monkeypatch.setattr(
            module, "chunks", lambda tokens, ids: torch.empty((len(tokens), 8, 7), device=tokens.device)
        )


def prompts() -> Prompts:
    words = [torch.ones(length, dtype=torch.int64) for length in (20, 24, 20)]
    return Prompts(torch.empty(BATCH, 6, 224, 224), words, torch.ones(BATCH, 64, dtype=torch.int64))


def batch(*, cached: bool = False, scene: bool = False) -> SpecialistBatch:
    size = PUBLISHED.specialist.image_size
    states, counted = torch.empty(BATCH, 90, 4096, dtype=torch.bfloat16), torch.ones(BATCH, 90, dtype=torch.bool)
    return SpecialistBatch(
        Observation(
            rgb_static=torch.empty(BATCH, 3, size, size),
            rgb_static_previous=torch.empty(BATCH, 3, size, size),
            proprio=torch.empty(BATCH, 7),
            depth_static=torch.empty(BATCH, 200, 200),
            rgb_gripper=torch.empty(BATCH, 3, size, size),
            depth_gripper=torch.empty(BATCH, 84, 84),
            rgb_tactile=None,
        ),
        actions=torch.empty(BATCH, 8, 7),
        noise=torch.empty(BATCH * DRAWS, 8, 7),
        timesteps=torch.ones(BATCH * DRAWS, dtype=torch.int64),
        keep=torch.ones(BATCH * DRAWS),
        left=torch.ones(BATCH, dtype=torch.int64),
        prompts=None if cached else prompts(),
        conditioning=Conditioning(states, counted, torch.empty(BATCH, 8, 7)) if cached else None,
        scene=torch.empty(BATCH, 24) if scene else None,
    ).to(pretended.DEVICE)


def policy() -> Policy:
    with torch.device("meta"):
        return Policy(PUBLISHED.specialist)


def generalist(dtype: torch.dtype = torch.bfloat16) -> Generalist:
    return build(GENERALIST, attention="sdpa", dtype=dtype)


def placed(learner: nn.Module, model: Generalist | None = None) -> None:
    pretended.place(learner)
    if model is not None:
        pretended.place(model)
        place_rotary(model, pretended.DEVICE)
    learner.train()


def check(learner: Learner, given: SpecialistBatch | Prompts, *, autocast: bool) -> None:
    with pretended.autocast() if autocast else nullcontext():
        loss, shown = learner(given)
    for value in (loss, *shown.values()):
        assert (value.dim(), value.device) == (0, pretended.DEVICE)
    assert (loss.requires_grad, loss.dtype) == (True, torch.float32)
    trained = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    reached = leaves(loss)
    assert [name for name, value in trained.items() if id(value) not in reached] == []
    if learner.averaged:
        Average(trained).update(trained, 1)


def leaves(loss: Tensor) -> set[int]:
    """The identities of what the gradients of a loss reach."""
    found, waiting, seen = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [Lora(), Lora(dropout=0.1), None])
def test_generalist(lora: Lora | None, autocast: bool) -> None:
    model = generalist()
    learner = GeneralistLearner(model, TOKENIZER, lora=lora, constrained=True, gradient_checkpointing=True)
    with pretended.gpu():
        placed(learner, model)
        check(learner, prompts().to(pretended.DEVICE), autocast=autocast)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("ahead", ["cached", "forced", "scene"])
def test_specialist(ahead: str, autocast: bool) -> None:
    model = generalist() if ahead == "forced" else None
    learner = SpecialistLearner(policy(), None, min_snr_gamma=0.05 if ahead == "scene" else None)
    with pretended.gpu():
        if ahead == "scene":
            config = learner.policy.config
            learner.scene_head = SceneHead(SENSORS * config.latents * config.width, torch.zeros(9, 24))
        placed(learner, model)
        if model is not None:
            learner.conditioner = Conditioner(model, constrained=True)
        check(learner, batch(cached=model is None, scene=ahead == "scene"), autocast=autocast)


@pytest.mark.parametrize("autocast", [False, True])
def test_both_at_once(autocast: bool) -> None:
    model = generalist()
    learner = JointLearner(policy(), GeneralistLearner(model, TOKENIZER, lora=Lora(), constrained=True))
    with pretended.gpu():
        placed(learner, model)
        check(learner, batch(), autocast=autocast)
