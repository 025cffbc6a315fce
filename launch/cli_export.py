"""Taking a network elsewhere: `dino-dist export`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from dino_dist.exit_codes import TERMINATED
from launch.results import AsJson, print_result, say_notes

export_app = typer.Typer()


@export_app.command("export")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, one of its checkpoints, or a file of weights.")],
    to: Annotated[str, typer.Option("--to", help="safetensors, timm, hf, onnx or torch (the original DINO's .pth).")],
    out: Annotated[Path, typer.Option("--out", help="A new file; for timm and hf a new or empty folder.")],
    network: Annotated[str | None, typer.Option(help="teacher or student; default: teacher, for torch both.")] = None,
    with_head: Annotated[
        bool, typer.Option("--with-head", help="The projection head and the center too; torch always has them.")
    ] = False,
    image_px: Annotated[
        int | None, typer.Option(help="Side of the images; positions are resampled to it. Default: as trained.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, where a file of weights does not tell.", min=1)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a network for timm, transformers, ONNX, the original DINO, or as one safetensors file.

    What is written is first loaded by the library that it is for; it gets its name only if the features are the same.
    """
    from dino_dist.export.exporter import ExportRequest, export_network

    # By itself SIGTERM ends a process at once, which would leave a half-written export beside `out`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    request = ExportRequest(
        source=checkpoint,
        to=to,
        out=out,
        network=network,
        with_head=with_head,
        image_px=image_px,
        num_heads=num_heads,
    )
    result = export_network(request).as_json()
    say_notes(result["notes"])
    if not as_json:
        del result["notes"]
        result["relative_difference"] = f"{result['relative_difference']:.1e}"
    print_result(result, as_json)
