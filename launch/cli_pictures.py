"""Looking at a network and at a run: `dino-dist attention`, `dino-dist report`."""

from __future__ import annotations

import typer

pictures_app = typer.Typer()
