"""`robodual data`: collect demonstrations, and check a data set."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from robodual.training.annotations import DatasetError
from robodual.training.object_array import ObjectArrayError

data = typer.Typer(help="Demonstrations in CALVIN's format: collect, check and cache them.", no_args_is_help=True)
console = Console()
stderr = Console(stderr=True)

Split = Annotated[Path, typer.Argument(help="A split folder of a CALVIN data set, such as task_D_D/training.")]


def fail(error: Exception) -> typer.Exit:
    """Prints an error as one line; the exit to raise."""
    stderr.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
    return typer.Exit(1)


@data.command()
def check(
    split: Split,
    steps: Annotated[int, typer.Option(help="How many step files to open, evenly spread.", min=1)] = 500,
    every: Annotated[bool, typer.Option("--all", help="Open every step file.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Where to write a contact sheet (PNG).")] = None,
) -> None:
    """Says what a data set holds, what is missing, damaged or left over, and the range of every value."""
    from robodual.training.contact_sheet import contact_sheet
    from robodual.training.examination import Examination, examine

    try:
        with console.status(f"reading {split}"):
            found = examine(split, None if every else steps)
            if sheet is not None and not found.faults:
                contact_sheet(split, found.spans, sheet)
    except (DatasetError, ObjectArrayError) as error:
        raise fail(error) from None

    def ranges(found: Examination) -> Table:
        table = Table("array", "lowest", "highest", "mean", "deviation", box=None)
        for name, values in sorted(found.ranges.items()):
            for index in range(len(values.low)):
                label = name if len(values.low) == 1 else f"{name}[{index}]"
                columns = (values.low[index], values.high[index], values.mean[index], values.deviation[index])
                table.add_row(label, *(f"{value:.4f}" for value in columns))
        return table

    console.print(ranges(found))
    tasks = Table("task", "spans", box=None)
    for task, count in sorted(found.tasks.items()):
        tasks.add_row(task, str(count))
    console.print(tasks)
    console.print(
        f"{found.steps} steps in {found.episodes} episodes, {len(found.spans)} annotated spans of "
        f"{len(found.tasks)} tasks; {found.examined} step files opened"
    )
    for fault in found.faults[:20]:
        console.print(f"[red]{escape(fault)}[/]", soft_wrap=True)
    if len(found.faults) > 20:
        console.print(f"[red]… and {len(found.faults) - 20} more[/]")
    raise typer.Exit(1 if found.faults else 0)


@data.command()
def collect(
    output: Annotated[Path, typer.Argument(help="The split folder to write, such as datasets/playtable/training.")],
    demonstrations: Annotated[int, typer.Option(help="How many; each a chain of tasks.", min=1)] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    noise: Annotated[float, typer.Option(help="Deviation of what is added to executed actions.", min=0)] = 0.0,
    chain: Annotated[int, typer.Option(help="Tasks in a demonstration, one after the other.", min=1, max=5)] = 5,
    workers: Annotated[int, typer.Option(help="Simulator processes; 0: one a CPU.", min=0)] = 0,
    annotations: Annotated[Path | None, typer.Option(help="JSON: task to instructions to draw from.")] = None,
) -> None:
    """Writes demonstrations of the scripted expert on the play table; started again, it goes on where it was."""
    if importlib.util.find_spec("pybullet") is None:
        raise fail(DatasetError("collecting needs the simulator: pip install 'robodual-client[sim]'"))
    from robodual.training import collect as collecting
    from robodual.training.dataset import read_enriched

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    try:
        with bar:
            line = bar.add_task("demonstrations", total=demonstrations)
            found = collecting.collect(
                output,
                demonstrations,
                seed=seed,
                noise=noise,
                chain=chain,
                workers=workers or os.cpu_count() or 1,
                sentences=None if annotations is None else read_enriched(annotations),
                progress=lambda record: bar.update(line, advance=1),
            )
    except DatasetError as error:
        raise fail(error) from None
    table = Table("task", "spans", "failed", box=None)
    for task in sorted(found.tasks.keys() | found.failed.keys()):
        table.add_row(task, str(found.tasks[task]), str(found.failed[task] or ""))
    console.print(table)
    console.print(f"{found.demonstrations} demonstrations, {found.steps} steps in {escape(str(output))}")


@data.command()
def cache(
    split: Split,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    size: Annotated[
        int | None, typer.Option(help="Side of the frames: a model's image size; without it, the cameras'.", min=8)
    ] = None,
    strategy: Annotated[str, typer.Option(help="resize-naive, letterbox or resize-crop.")] = "resize-naive",
    tactile: Annotated[bool, typer.Option("--with_tactile", "--with-tactile", help="The tactile images too.")] = False,
    workers: Annotated[int, typer.Option(help="Processes; 0: one a CPU.", min=0)] = 0,
) -> None:
    """Decodes and resizes every step once, for `robodual train --frames`; started again, it goes on where it was."""
    from robodual.training import frame_cache

    bar = Progress(TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    sensors = frame_cache.SENSORS if tactile else frame_cache.SENSORS[:4]
    try:
        with bar:
            line = bar.add_task("", total=None)
            found = frame_cache.build(
                split,
                output,
                size=size,
                strategy=strategy,  # type: ignore[arg-type]
                sensors=sensors,
                workers=workers or os.cpu_count() or 1,
                progress=lambda done, of: bar.update(line, completed=done, total=of),
            )
    except DatasetError as error:
        raise fail(error) from None
    console.print(f"{found.steps} steps in {escape(str(output))}")
