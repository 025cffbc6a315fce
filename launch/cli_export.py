"""Taking a network elsewhere: `dino-dist export`."""

from __future__ import annotations

import typer

export_app = typer.Typer()
