"""The command line of RoboDual Serve: a dual-system robot policy as a pair of services."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robodual import checkpoints_cli
from robodual.config_cli import Config, config, settings
from robodual.pair import Options, Pair, PairError
from robodual.training.data_cli import data
from robodual.training.train_cli import train

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
serve = typer.Typer(help="Runs one service until it is told to stop.", no_args_is_help=True)
app.add_typer(serve, name="serve")
app.add_typer(checkpoints_cli.app)
app.add_typer(train, name="train")
app.add_typer(data, name="data")
app.add_typer(config, name="config")
console = Console()
stderr = Console(stderr=True)

PROFILE_HELP = "robodual-7b, playtable (comes with trained weights), or toy (seeded random weights at test widths)."
FREE_PORT_HELP = "0 chooses a free one."
DEVICE_HELP = "auto, cpu, cuda or cuda:N."

Profile = Annotated[str | None, typer.Option(help=PROFILE_HELP)]
Device = Annotated[str | None, typer.Option(help=DEVICE_HELP)]
Devices = Annotated[
    str | None, typer.Option(help="Instead of --device: one engine on each, behind the one port (cuda:0,cuda:1).")
]
Port = Annotated[int | None, typer.Option(help="gRPC port; 0 chooses a free one.")]
HttpPort = Annotated[int | None, typer.Option(help="Port of /healthz, /readyz, /metrics and /info.")]
Host = Annotated[str | None, typer.Option(help="Address to bind; others than loopback need a token.")]
Insecure = Annotated[bool | None, typer.Option("--insecure", help="Serves anyone at --host, without a token.")]
RedisUrl = Annotated[str | None, typer.Option(help="redis://, rediss:// or unix://; ROBODUAL_REDIS_URL.")]
WITHOUT = "without it, the profile's own, or seeded random ones."
Checkpoint = Annotated[Path | None, typer.Option(help=f"Weights; {WITHOUT}")]
Folder = Annotated[str | None, typer.Option(help=f"Weights: a folder or a hub id; {WITHOUT}")]
Sensor = Annotated[bool | None, typer.Option(help="Where it is to differ from the checkpoint or the profile.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")]


@serve.command()
def generalist(
    context: typer.Context,
    profile: Profile = None,
    checkpoint: Folder = None,
    adapters: Annotated[
        list[Path] | None, typer.Option("--adapter", help="A LoRA folder, merged at load; several in order.")
    ] = None,
    merge_adapters: Annotated[
        bool | None,
        typer.Option("--merge-adapters/--adapters-apart", help="Apart suits quantised weights; merged is faster."),
    ] = None,
    device: Device = None,
    devices: Devices = None,
    dtype: Dtype = None,
    attention: Annotated[str | None, typer.Option(help="auto, sdpa, flash_attention_2 or eager.")] = None,
    quantisation: Annotated[str | None, typer.Option(help="none or fp8; on CUDA also int8 or nf4.")] = None,
    constrained: Annotated[
        bool | None,
        typer.Option("--constrained/--free", help="Whether decoding keeps to 8 x 7 actions; else the profile says."),
    ] = None,
    host: Host = None,
    port: Port = None,
    http_port: HttpPort = None,
    redis_url: RedisUrl = None,
    config: Config = None,
    insecure: Insecure = None,
) -> None:
    """Serves the vision-language-action model. Every other setting: --config or ROBODUAL_* (docs/deployment.md)."""
    from robodual.generalist.service import run
    from robodual.serving.settings import GeneralistSettings

    run(settings(GeneralistSettings, context.params))


@serve.command()
def specialist(
    context: typer.Context,
    profile: Profile = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    devices: Devices = None,
    dtype: Dtype = None,
    image_strategy: Annotated[
        str | None, typer.Option(help="resize-naive, letterbox or resize-crop, as in training.")
    ] = None,
    with_depth: Sensor = None,
    with_gripper: Sensor = None,
    with_tactile: Sensor = None,
    diffusion_steps: Annotated[int | None, typer.Option(help="DDIM steps of an answer; published: 10.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1: no guidance; published: 3.")] = None,
    only: Annotated[
        str | None, typer.Option(help="generalist or specialist: one half alone, to see what each contributes.")
    ] = None,
    host: Host = None,
    port: Port = None,
    http_port: HttpPort = None,
    redis_url: RedisUrl = None,
    config: Config = None,
    insecure: Insecure = None,
) -> None:
    """Serves the diffusion transformer. Every other setting: --config or ROBODUAL_* (docs/deployment.md)."""
    from robodual.serving.settings import SpecialistSettings
    from robodual.specialist.service import run

    run(settings(SpecialistSettings, context.params))


@app.command()
def up(
    profile: Annotated[str, typer.Option(help=PROFILE_HELP)] = "playtable",
    generalist_checkpoint: Checkpoint = None,
    specialist_checkpoint: Checkpoint = None,
    device: Device = None,
    devices: Devices = None,
    redis_url: RedisUrl = None,
    generalist_port: Annotated[int, typer.Option(help=FREE_PORT_HELP)] = 50051,
    specialist_port: Annotated[int, typer.Option(help=FREE_PORT_HELP)] = 50052,
    generalist_http_port: Annotated[int, typer.Option(help=FREE_PORT_HELP)] = 8051,
    specialist_http_port: Annotated[int, typer.Option(help=FREE_PORT_HELP)] = 8052,
) -> None:
    """Starts Redis and both services in one terminal, and stops them all on Ctrl-C."""
    checkpoints = {"generalist": generalist_checkpoint, "specialist": specialist_checkpoint}
    options = Options(
        profile=profile,
        redis_url=redis_url or os.environ.get("ROBODUAL_REDIS_URL"),
        ports={"generalist": generalist_port, "specialist": specialist_port},
        http_ports={"generalist": generalist_http_port, "specialist": specialist_http_port},
        checkpoints={name: path for name, path in checkpoints.items() if path is not None},
        device=device,
        devices=devices,
    )
    with _pair(options, _print_line) as pair:
        console.print(_pair_table(pair))
        console.print(
            f"What the robots do: http://{pair.host('specialist')}:{pair.http_ports['specialist']}/operator/",
            soft_wrap=True,
        )
        command = "robodual evaluate --num-sequences 5 --out runs/first"
        if (generalist_port, specialist_port) != (50051, 50052):
            command += "".join(f" --{name} {address}" for name, address in pair.addresses.items())
        console.print(f"Ctrl-C stops them. In another terminal: [bold]{command}[/]", soft_wrap=True)
        while True:
            pair.check()
            time.sleep(0.5)


def _print_line(service: str, line: str) -> None:
    colour = {"generalist": "magenta", "specialist": "cyan"}[service]
    console.print(f"[{colour}]{service:>10}[/] {escape(line)}", highlight=False, soft_wrap=True)


def _writer(file: TextIO) -> Callable[[str, str], None]:
    return lambda service, line: print(service, line, file=file, flush=True)


@contextmanager
def _pair(options: Options, log: Callable[[str, str], None]) -> Iterator[Pair]:
    """A started pair, stopped on any exit: the end of the block, an error, Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pair = Pair(options, log)
    try:
        with console.status(f"starting Redis, generalist and specialist ({options.profile})"):
            pair.start()
        yield pair
    except PairError as error:
        stderr.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        pair.stop()


def _pair_table(pair: Pair) -> Table:
    table = Table("process", "gRPC", "HTTP", box=None)
    for name, address in pair.addresses.items():
        table.add_row(name, address, f"http://127.0.0.1:{pair.http_ports[name]}/info")
    table.add_row("redis", "its own" if pair.options.redis_url is None else "as given", "")
    return table


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(context: typer.Context) -> None:
    """Runs CALVIN's five-task sequences: robodual-client's evaluate, and its merge, compare and sweep."""
    from robodual_client.cli import main

    subcommand = context.args[:1] in (["merge"], ["compare"], ["sweep"])
    main(context.args if subcommand else ["evaluate", *context.args])


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, name: Annotated[str, typer.Argument()] = "--help") -> None:
    """Runs a benchmark of the source checkout, with its own arguments: robodual bench specialist --help."""
    from robodual import bench

    benchmarks = bench.found()
    if not benchmarks:
        stderr.print(f"[red]bench[/]: {escape(bench.MISSING)}", soft_wrap=True)
        raise typer.Exit(2)
    if name == "--help":
        table = Table("robodual bench", "", box=None)
        for each, purpose in benchmarks.items():
            table.add_row(each, escape(purpose))
        console.print(table)
        raise typer.Exit
    if name not in benchmarks:
        stderr.print(f"[red]bench[/]: expected one of {', '.join(benchmarks)}, got {escape(name)}", soft_wrap=True)
        raise typer.Exit(2)
    bench.become(name, context.args)


@app.command()
def demo(
    sequences: Annotated[int, typer.Option(min=1, max=1000, help="How many five-task sequences.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Simulator processes.")] = 2,
    profile: Annotated[str, typer.Option(help=PROFILE_HELP)] = "playtable",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default a new one under runs/.")] = None,
) -> None:
    """Redis, both services and a simulator on this machine: five-task sequences, the table, a report with videos."""
    from robodual.demo import run
    from robodual_client.calvin import EvaluationError

    folder = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    shown = []
    try:
        if (folder / "pair").exists():
            raise EvaluationError(f"--out: {folder} already holds a demo; choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"--out: {error}; choose another folder") from error
        with (folder / "services.log").open("a") as log, _pair(Options(profile=profile), _writer(log)) as pair:
            console.print(_pair_table(pair))
            console.rule(f"{sequences} sequences through both services ({profile})")
            through = run(sequences, workers, folder / "pair", "services", pair.addresses)
            shown.append((f"the pair ({profile})", *through))
        console.rule("the same by the scripted expert, without services")
        shown.append(("scripted expert", *run(sequences, workers, folder / "expert", "expert")))
    except EvaluationError as error:
        stderr.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    for name, results, page in shown:
        console.rule(name)
        console.print(results.table(), highlight=False)
        console.print(f"report: [bold]{escape(str(page))}[/]", soft_wrap=True)
    if profile == "toy":
        console.print("\nThe toy pair has random weights: it shows the plumbing, and solves nothing.")


@app.command()
def doctor(
    redis_url: Annotated[str | None, typer.Option(envvar="ROBODUAL_REDIS_URL", help="Also looks at this one.")] = None,
    generalist: Annotated[str, typer.Option(help="Its host:port.")] = "127.0.0.1:50051",
    specialist: Annotated[str, typer.Option(help="Its host:port.")] = "127.0.0.1:50052",
    tls: Annotated[bool, typer.Option("--tls", help="Asks the services over TLS.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(help="PEM: who signed their certificates.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM: to show them, where they ask for one.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM: its key.")] = None,
) -> None:
    """Says what is installed, whether Redis and both services answer, and what to do about what does not."""
    from robodual.doctor import examine
    from robodual_client import Tls

    secured = Tls(tls_ca, tls_certificate, tls_key) if tls or tls_ca or tls_certificate or tls_key else None
    token = os.environ.get("ROBODUAL_TOKEN") or None
    try:
        findings = asyncio.run(examine(redis_url, generalist, specialist, token, secured))
    except ValueError as error:
        stderr.print(escape(str(error)))
        raise typer.Exit(2) from error
    table = Table("", "what", "found", "to do", box=None)
    marks = {"ok": "[green]ok[/]", "note": "[yellow]--[/]", "fault": "[red]no[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.subject, escape(finding.found), escape(finding.remedy))
    console.print(table)
    raise typer.Exit(1 if any(finding.state == "fault" for finding in findings) else 0)


def main() -> None:
    app()
