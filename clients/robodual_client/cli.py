"""The command line: `robodual-client evaluate | merge | compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

from robodual_client.calvin import EvaluationError, Options, evaluate
from robodual_client.calvin.annotations import VALIDATION
from robodual_client.calvin.comparison import compare
from robodual_client.calvin.estimate import estimate
from robodual_client.calvin.options import ENVIRONMENTS, POLICIES, VIDEO, parse_numbers, shard
from robodual_client.calvin.results import RESULTS, SEQUENCES, Results, load, merge
from robodual_client.calvin.rollout import EPISODE_STEPS
from robodual_client.calvin.sequences import published

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 0, with 2 for a command line that is wrong, with 1 for an evaluation that cannot start or go on, and
    with 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except (EvaluationError, ValueError) as error:
        raise SystemExit(f"robodual-client: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="robodual-client", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    add_evaluate(commands.add_parser("evaluate", help="run CALVIN's five-task sequences"))

    merging = commands.add_parser("merge", help="join the parts of one evaluation")
    merging.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="folders of --shard or interrupted runs")
    merging.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the whole")
    merging.set_defaults(command=_merge)

    comparing = commands.add_parser("compare", help="put two runs side by side, with confidence intervals")
    comparing.add_argument("a", type=Path, metavar="A", help="folder of a run")
    comparing.add_argument("b", type=Path, metavar="B", help="folder of another")
    comparing.set_defaults(command=_compare)
    return parser


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `evaluate`, and the command itself."""
    what = parser.add_argument_group("what")
    what.add_argument("--env", default="playtable", help=f"{', '.join(ENVIRONMENTS)}, or module:callable (playtable)")
    what.add_argument("--policy", default="services", help=f"{', '.join(POLICIES)}, or module:callable (services)")
    what.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    what.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    what.add_argument("--dry-run", action="store_true", help="count and estimate, run nothing")

    which = parser.add_argument_group("sequences")
    chosen = which.add_mutually_exclusive_group()
    chosen.add_argument("--num-sequences", type=int, metavar="N", help="the first N of the published 1000 (1000)")
    chosen.add_argument("--sequences", metavar="LIST", help="numbers and ranges, as 0-99,250")
    which.add_argument("--shard", metavar="I/N", help="the I-th of N shares of them, for N machines; then merge")
    which.add_argument("--ep-len", type=int, default=EPISODE_STEPS, metavar="N", help="steps a task may take (360)")
    which.add_argument("--seed", type=int, default=0, help="of the policy's noise (0)")
    which.add_argument("--annotations", type=Path, default=VALIDATION, metavar="FILE", help="JSON: task -> sentences")

    services = parser.add_argument_group("services (--policy services; a token is read from ROBODUAL_TOKEN)")
    services.add_argument("--generalist", default="127.0.0.1:50051", metavar="ADDRESS", help="(127.0.0.1:50051)")
    services.add_argument("--specialist", default="127.0.0.1:50052", metavar="ADDRESS", help="(127.0.0.1:50052)")
    services.add_argument("--schedule", default="published", help="published, every-N or async (published)")
    services.add_argument("--tls", action="store_true", help="connect with TLS")
    services.add_argument("--tls-ca", metavar="FILE", help="PEM file of who signed the services' certificates")

    simulator = parser.add_argument_group("simulator")
    simulator.add_argument("--workers", type=int, default=1, metavar="N", help="simulator processes (1)")
    simulator.add_argument("--calvin-root", metavar="DIR", help="checkout of calvin_env (CALVIN_ROOT)")
    simulator.add_argument("--scene", metavar="A-D", help="CALVIN's scene (D)")
    simulator.add_argument("--render", metavar="HOW", help="CALVIN's renderer: auto, egl or cpu (auto)")

    seeing = parser.add_argument_group("seeing (extra `report`)")
    seeing.add_argument("--video", choices=VIDEO, default="none", help="which sequences to film (none)")
    seeing.add_argument("--no-report", action="store_true", help="write no report.html")
    parser.set_defaults(command=_evaluate)


def options_of(given: argparse.Namespace) -> Options:
    """The evaluation that the flags ask for. Raises EvaluationError for flags that make no sense."""
    if given.sequences is not None:
        numbers = parse_numbers(given.sequences)
    else:
        count = len(published()) if given.num_sequences is None else given.num_sequences
        if not 1 <= count <= len(published()):
            raise EvaluationError(f"num_sequences: must lie in 1-{len(published())}, got {count}")
        numbers = tuple(range(count))
    if given.shard is not None:
        numbers = shard(numbers, given.shard)
    simulator = {"root": given.calvin_root, "scene": given.scene, "render": given.render}
    env_options = {name: value for name, value in simulator.items() if value is not None}
    if env_options and given.env != "calvin":
        raise EvaluationError("--calvin-root, --scene and --render go with --env calvin")
    policy_options: dict[str, Any] = {}
    if given.policy == "services":
        policy_options = {"generalist": given.generalist, "specialist": given.specialist, "schedule": given.schedule}
        if given.tls or given.tls_ca:
            policy_options["tls"] = {"ca": given.tls_ca} if given.tls_ca else True
    return Options(
        out=given.out,
        env=given.env,
        env_options=env_options,
        policy=given.policy,
        policy_options=policy_options,
        numbers=numbers,
        seed=given.seed,
        ep_len=given.ep_len,
        annotations=given.annotations,
        workers=given.workers,
        video=given.video,
        resume=given.resume,
    )


def _evaluate(given: argparse.Namespace) -> None:
    options = options_of(given)
    if given.dry_run:
        print(estimate(options))
        return
    try:
        results = evaluate(options)
    except KeyboardInterrupt:
        done = len(load(options.out).sequences) if (options.out / SEQUENCES).exists() else 0
        print(f"stopped; {done} sequences are kept in {options.out}: go on with --resume", file=sys.stderr)
        raise
    _show(results, options.out, report=not given.no_report)


def _merge(given: argparse.Namespace) -> None:
    _show(merge(given.runs, given.out), given.out, report=True)


def _compare(given: argparse.Namespace) -> None:
    print(compare(load(given.a), load(given.b)).table(given.a.name, given.b.name))


def _show(results: Results, folder: Path, *, report: bool) -> None:
    print(results.table())
    print(f"results: {folder / RESULTS}")
    if report:
        try:
            from robodual_client.calvin import report as page
        except ImportError:
            print("no report: install the extra with pip install 'robodual-client[report]'", file=sys.stderr)
            return
        print(f"report:  {page.write(results, folder)}")


if __name__ == "__main__":
    main()
