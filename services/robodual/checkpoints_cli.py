"""The commands that look at checkpoints and rewrite them: `robodual inspect`, `robodual convert`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from robodual.inspection import Inspection

app = typer.Typer()
console = Console()
stderr = Console(stderr=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A generalist's or adapter's folder, a specialist's file.")],
    dtype: Annotated[str, typer.Option(help="Of the served weights, for the hash; auto is what serve takes.")] = "auto",
    adapters: Annotated[
        list[Path] | None, typer.Option("--adapter", help="A LoRA folder merged for the hash; several in order.")
    ] = None,
    hashed: Annotated[bool, typer.Option("--hash/--no-hash", help="Whether to read the values for the hash.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Says what a checkpoint is: architecture, parameters, dtypes, hash, tokenizer, image strategy, sensors."""
    from robodual import inspection

    try:
        with stderr.status(f"reading {escape(str(path))}"):
            found = inspection.inspect(path, dtype=dtype, adapters=adapters or (), hashed=hashed)
    except ValueError as error:  # CheckpointError is one
        _fail(error)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        console.print("\n".join(_lines(found)), highlight=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A specialist: published EMA .pt, or our .safetensors.")],
    target: Annotated[Path, typer.Argument(help="The file to write; its ending says the form.")],
    profile: Annotated[
        str | None, typer.Option(help="Shapes of a .pt, which carries none; by default the profile that fits.")
    ] = None,
) -> None:
    """Rewrites a specialist's checkpoint in the other form, reads it back, and compares every bit."""
    from robodual.facts import CheckpointError
    from robodual.inspection import fitting
    from robodual.profiles import PROFILES
    from robodual.specialist import checkpoint

    try:
        if profile is not None and profile not in PROFILES:
            raise CheckpointError(f"profile: expected one of {', '.join(PROFILES)}, not {profile!r}")
        with stderr.status(f"reading {escape(str(source))}") as status:
            config, state = checkpoint.read(source)
            sensors = None
            if config is None:
                if profile is None:
                    _, config = fitting(source, state)
                else:
                    config, sensors = PROFILES[profile].specialist, checkpoint.flags(state)
            values = sum(value.numel() for value in state.values())
            del state
            status.update(f"writing {escape(str(target))}, then reading it back")
            digest = checkpoint.convert(source, target, config, sensors)
    except (CheckpointError, OSError) as error:
        _fail(error)
    console.print(
        f"{target}: {values:,} values, the same as in {source} bit for bit; hash {digest}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _fail(error: Exception) -> None:
    stderr.print(f"[red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
    raise typer.Exit(1) from None


def _lines(found: Inspection) -> Iterator[str]:
    rows = {
        "path": found.path,
        "kind": found.kind,
        "architecture": found.architecture,
        "parameters": f"{found.parameters:,}",
        **{f"  {name}": f"{count:,}" for name, count in found.parts.items()},
        "stored as": ", ".join(f"{name} ({count:,} values)" for name, count in found.dtypes.items()),
        "hash": f"{found.checkpoint} (served in {found.served_dtype})" if found.checkpoint else "not computed",
        "tokenizer": found.tokenizer,
        "image strategy": found.image_strategy,
        "sensors": ", ".join(found.sensors),
        **{name.replace("_", " "): text for name, text in found.details.items()},
    }
    width = max(map(len, rows)) + 2
    for name, text in rows.items():
        if text:
            yield f"[bold]{name:<{width}}[/]{escape(text)}"
