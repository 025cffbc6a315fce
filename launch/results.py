"""What commands have in common: settings as arguments, and a result as a table for people or as JSON alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as in train.batch_size=64.")
]


def say(line: str) -> None:
    """One line on stderr, whatever it quotes: a name in a file may hold line breaks and commands to a terminal."""
    print(_printable(line), file=sys.stderr)


def say_notes(notes: Iterable[str]) -> None:
    """What a user should know about a network, on stderr."""
    for note in notes:
        say(f"note: {note}")


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """One row a key, text as it is: what looks like markup in a name is none."""
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False)  # a path is shown to its end
    for key, value in result.items():
        lines = (f"{value:.4f}" if isinstance(value, float) else str(value)).split("\n")
        table.add_row(Text(_printable(key)), Text("\n".join(map(_printable, lines))))
    Console().print(table)


def _printable(line: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
