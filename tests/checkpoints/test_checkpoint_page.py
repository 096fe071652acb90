"""docs/checkpoints.md: its commands exist with the options it gives them, and it quotes the refusals as they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from robodual.cli import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
COMMANDS = [line for line in BLOCKS.splitlines() if line.startswith("robodual ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_parses(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    command.make_context("robodual", arguments)


def test_the_page_has_commands_of_each_kind() -> None:
    for start in ("inspect", "convert", "serve generalist", "serve specialist", "up"):
        assert any(line.startswith(f"robodual {start} ") for line in COMMANDS), start


def test_quoted_refusals_are_in_the_sources() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "services" / "robodual").rglob("*.py"))
    # Strings of the sources run over lines, and have fields in them.
    text = re.sub(r'"\s*\n?\s*f?"', "", sources)
    rows = PAGE.split("| the line says |")[1].split("\n\n")[0].splitlines()[2:]
    for row in rows:
        for quote in re.findall(r"`([^`]+)`", row.split("|")[1]):
            words = max(re.split(r"…|: |; |\d|\bmodel-|'|tactile", quote), key=len).strip()
            assert words in text, quote
