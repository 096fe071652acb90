"""The command line: `robodual-client evaluate | merge | compare | sweep | doctor`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Callable, Sequence

from robodual_client.calvin import EvaluationError, evaluate, flags
from robodual_client.calvin.comparison import compare
from robodual_client.calvin.estimate import estimate
from robodual_client.calvin.results import RESULTS, SEQUENCES, Results, load, merge

INTERRUPTED = 130
NO_REPORT = "no report: install the extra with pip install 'robodual-client[report]'"


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 0, with 2 for a command line that is wrong, with 1 for an evaluation that cannot start or go on, and
    with 130 after Ctrl-C or SIGTERM."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing that is finished is lost
    try:
        command(options)
    except (EvaluationError, ValueError, OSError) as error:
        raise SystemExit(f"robodual-client: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="robodual-client", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    evaluating = commands.add_parser("evaluate", help="run CALVIN's five-task sequences")
    flags.add(evaluating)
    evaluating.set_defaults(command=_evaluate)

    merging = commands.add_parser("merge", help="join the parts of one evaluation")
    merging.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="folders of --shard or interrupted runs")
    merging.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the whole")
    merging.set_defaults(command=_merge)

    comparing = commands.add_parser("compare", help="put two runs side by side, with confidence intervals")
    comparing.add_argument("a", type=Path, metavar="A", help="folder of a run")
    comparing.add_argument("b", type=Path, metavar="B", help="folder of another")
    comparing.set_defaults(command=_compare)

    sweeping = commands.add_parser("sweep", help="evaluate at several delays, and draw success against delay")
    flags.add(sweeping, sweep=True)
    sweeping.set_defaults(command=_sweep)

    examining = commands.add_parser("doctor", help="why is it 0 %%? look at simulator, observations and actions")
    examining.add_argument("simulator", nargs="?", choices=["calvin"], default="calvin", help="(calvin)")
    examining.add_argument("--calvin-root", type=Path, metavar="DIR", help="checkout of calvin_env (CALVIN_ROOT)")
    examining.add_argument("--render", default="auto", metavar="HOW", help="auto, egl or cpu (auto)")
    examining.add_argument("--traces", type=Path, metavar="DIR", help="recorded runs, trace_*.npz (the client's own)")
    examining.add_argument("--services", action="store_true", help="also look at the actions that the services give")
    flags.add_services(examining.add_argument_group("services (with --services; a token is read from ROBODUAL_TOKEN)"))
    examining.set_defaults(command=_doctor)
    return parser


def _evaluate(given: argparse.Namespace) -> None:
    options = flags.options(given)
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
    a, b = (given.a.name, given.b.name) if given.a.name != given.b.name else (str(given.a), str(given.b))
    print(compare(load(given.a), load(given.b)).table(a, b))


def _sweep(given: argparse.Namespace) -> None:
    from robodual_client.calvin import sweep

    options, delays = flags.options(given), sweep.parse_delays(given.delays)
    if given.dry_run:
        print(f"{len(sweep.plan(options, delays))} evaluations, each:\n{estimate(options)}")
        return
    try:
        runs = sweep.sweep(options, delays, lambda line: print(line, file=sys.stderr))
    except KeyboardInterrupt:
        print(f"stopped; what is finished is kept in {options.out}: go on with --resume", file=sys.stderr)
        raise
    print(sweep.table(runs))
    print(f"results: {options.out / sweep.SWEEP}")
    if not given.no_report:
        try:
            from robodual_client.calvin import report as page
        except ImportError:
            print(NO_REPORT, file=sys.stderr)
            return
        for delay, run in runs.items():
            page.write(run, sweep.folder_of(options.out, delay))
        print(f"report:  {sweep.write_page(runs, options.out)}")


def _doctor(given: argparse.Namespace) -> None:
    from robodual_client.calvin import doctor, policies

    served = policies.arguments(**flags.services(given)) if given.services else None
    findings = doctor.check(doctor.Options(given.calvin_root, given.render, given.traces, served))
    width = max(len(finding.subject) for finding in findings)
    marks = {"ok": "ok", "note": "--", "fault": "NO"}
    for finding in findings:
        print(f"{marks[finding.state]:<3} {finding.subject:<{width}}  {finding.found}")
        if finding.remedy:
            print(f"{'':<{width + 6}}-> {finding.remedy}")
    faults = sum(finding.state == "fault" for finding in findings)
    if faults:
        raise EvaluationError(f"doctor: {faults} fault{'s' if faults > 1 else ''}, marked NO")


def _show(results: Results, folder: Path, *, report: bool) -> None:
    print(results.table())
    if results.protocol.get("pace"):
        print(results.lateness())
    print(f"results: {folder / RESULTS}")
    if report:
        try:
            from robodual_client.calvin import report as page
        except ImportError:
            print(NO_REPORT, file=sys.stderr)
            return
        print(f"report:  {page.write(results, folder)}")


if __name__ == "__main__":
    main()
