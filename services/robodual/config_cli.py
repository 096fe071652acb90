"""`robodual config`: what a service would run with, and where each setting comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from robodual.serving.provenance import shown, sources
from robodual.serving.settings import SERVICES, Settings

config = typer.Typer(help="What the services are told, and by what.", no_args_is_help=True)
console = Console()
stderr = Console(stderr=True)

S = TypeVar("S", bound=Settings)

Config = Annotated[
    Path | None, typer.Option(help="TOML with the tables shared, generalist and specialist; ROBODUAL_CONFIG.")
]


class Service(str, Enum):
    generalist = "generalist"
    specialist = "specialist"


@config.command()
def show(
    service: Annotated[Service | None, typer.Argument(help="Without it, both.")] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Shows every setting's value and where it comes from, secrets masked."""
    given = {} if config is None else {"config": config}
    effective: dict[str, dict[str, dict[str, Any]]] = {}
    for name, kind in SERVICES.items():
        if service in (None, name):
            chosen = settings(kind, given)
            origin = sources(kind, given)
            effective[name] = {each: {"value": value, "source": origin[each]} for each, value in shown(chosen).items()}
    if as_json:
        print(json.dumps(effective, indent=2))
        return
    for name, values in effective.items():
        table = Table(name, Column("value", overflow="fold"), Column("from", overflow="fold"), box=None)
        for setting, entry in values.items():
            value = entry["value"]
            text = value if isinstance(value, str) else json.dumps(value)
            table.add_row(setting, escape(text), escape(entry["source"]))
        console.print(table)


def settings(kind: type[S], given: Mapping[str, Any]) -> S:
    """What the command line has `given`, over environment, file and defaults.

    Raises:
        typer.Exit: with one line per setting that is wrong.
    """
    chosen = {name: value for name, value in given.items() if value not in (None, ())}
    try:
        return kind(**chosen)
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"])) or "settings"
            origin = f" ({sources(kind, chosen)[name]})" if name in kind.model_fields else ""
            said = fault["msg"].removeprefix("Value error, ")
            stderr.print(f"[red]{name}[/]{escape(origin)}: {escape(said)}", soft_wrap=True)
        raise typer.Exit(2) from None
