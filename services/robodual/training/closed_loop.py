"""What a checkpoint does in the simulator: the curve that matters, beside the loss."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from robodual.facts import CheckpointError
from robodual.pair import Options, Pair, PairError
from robodual_client.calvin import EvaluationError, evaluate
from robodual_client.calvin import Options as Evaluation
from robodual_client.calvin.progress import Silent
from robodual_client.calvin.rollout import EPISODE_STEPS
from robodual_client.calvin.sequences import published


@dataclass(frozen=True)
class ClosedLoop:
    """Evaluates checkpoints on the play table, through a pair of services of their own.

    The sequences are the last of the published 1000, so that the first ones stay unseen by whoever picks a checkpoint.

    profile, device: of both services; where no weights are given, the profile's own
    generalist, adapters, specialist: names inside the checkpoint's folder, or else paths (or a hub id) as they are
    only: one half alone, as `robodual serve specialist --only` has it
    quantisation: of the generalist; adapters that were trained on it stay beside it
    sequences, ep_len: how many, and the steps that each of their tasks may take
    """

    profile: str
    device: str = "auto"
    generalist: str | None = None
    adapters: tuple[str, ...] = ()
    specialist: str | None = None
    only: str | None = None
    quantisation: str = "none"
    sequences: int = 10
    ep_len: int = EPISODE_STEPS
    workers: int = 1

    def __call__(self, checkpoint: Path) -> dict[str, float]:
        """`average_length` (0 to 5) and `first_task` (0 to 1).

        Raises:
            CheckpointError: if the services do not start with the checkpoint, or the simulator is missing.
        """

        def place(name: str) -> Path:
            inside = checkpoint / name
            return inside if inside.exists() else Path(name)

        halves = {"generalist": self.generalist, "specialist": self.specialist}
        settings = {"ROBODUAL_SPECIALIST_ONLY": self.only} if self.only else {}
        adapters = [place(name) for name in self.adapters]
        if adapters:
            settings["ROBODUAL_GENERALIST_ADAPTERS"] = ",".join(map(str, adapters))
        if self.quantisation != "none":
            trained = any(folder.is_relative_to(checkpoint) for folder in adapters)
            settings["ROBODUAL_GENERALIST_QUANTISATION"] = self.quantisation
            settings["ROBODUAL_GENERALIST_MERGE_ADAPTERS"] = str(not trained).lower()
        options = Options(
            profile=self.profile,
            checkpoints={half: place(name) for half, name in halves.items() if name is not None},
            device=self.device,
            settings=settings,
        )
        last = len(published())
        try:
            with tempfile.TemporaryDirectory() as folder, Pair(options) as pair:
                run = Evaluation(
                    Path(folder) / "run",
                    policy_options=pair.addresses,
                    numbers=tuple(range(last - self.sequences, last)),
                    ep_len=self.ep_len,
                    workers=self.workers,
                )
                results = evaluate(run, Silent())
        except (PairError, EvaluationError) as error:
            raise CheckpointError(f"eval_every: {error}") from error
        return {"average_length": results.average_length, "first_task": results.chain_rates()[0]}
