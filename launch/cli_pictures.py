"""Looking at a network: `dino-dist attention`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.results import AsJson, print_result, say_notes

if TYPE_CHECKING:
    from dino_dist.pictures.attend import Progress

pictures_app = typer.Typer()

_LISTED = 20
"""Pictures whose sizes are printed one by one; summary.json has all."""


@pictures_app.command()
def attention(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, one of its checkpoints, or a file of weights.")],
    media: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|VIDEO|FOLDER...", help="What to look at; folders with all below.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the pictures.")],
    network: Annotated[str, typer.Option(help="teacher or student.")] = "teacher",
    size_px: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Short side that pictures are resized to; 0: as they are. Default: 480 for a network trained at 224 "
            "px, others in proportion. Sides are then rounded down to whole patches.",
        ),
    ] = None,
    mass: Annotated[float, typer.Option(help="Share of the attention that a mask keeps.")] = 0.6,
    smooth: Annotated[bool, typer.Option("--smooth", help="Draw maps smoothly, not a square a patch.")] = False,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Compare with masks of the same names (.png, .bmp, .tif): not black is object; 255 in a palette "
            "does not count, as in PASCAL VOC. Jaccard index of each picture's best head, as in the paper."
        ),
    ] = None,
    pca: Annotated[
        bool, typer.Option("--pca", help="Color patches by the three main components of all pictures' features.")
    ] = False,
    pca_foreground: Annotated[
        float | None,
        typer.Option(help="With colors: black below this level (0 to 1, try 0.5) of the first component."),
    ] = None,
    neighbors: Annotated[
        str | None, typer.Option(help="Show the most alike images of a folder, a list of files, or tar shards.")
    ] = None,
    num_neighbors: Annotated[int, typer.Option(min=1, help="Of each image.")] = 8,
    frames: Annotated[bool, typer.Option("--frames", help="Each folder is one video, its images the frames.")] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show where the class token of the last layer attends in images and videos: maps of each head, overlays, masks.

    Videos need the extra `video` (PyAV); sound is left out. A folder `out/NAME` for each picture, and summary.json.
    """
    from dino_dist.pictures.attend import AttentionRequest, attend

    request = AttentionRequest(
        checkpoint=checkpoint,
        media=media,
        out=out,
        network=network,
        size_px=size_px,
        mass=mass,
        smooth=smooth,
        masks=masks,
        pca=pca,
        pca_foreground=pca_foreground,
        neighbors=neighbors,
        num_neighbors=num_neighbors,
        frames=frames,
        device=device,
    )
    with _progress_on_stderr() as progress:
        summary = attend(request, progress)
    say_notes(summary["notes"])
    print_result(summary if as_json else _for_people(summary), as_json)


def _for_people(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with a line a picture, up to a point."""
    looked, left_out = summary["looked_at"], summary["left_out"]
    result = {key: value for key, value in summary.items() if key not in ("looked_at", "left_out", "notes")}
    result |= {f"{row['folder']}/": _sizes(row) for row in looked[:_LISTED]}
    if len(looked) > _LISTED:
        result["..."] = f"{len(looked) - _LISTED} more in summary.json"
    if left_out:
        result["left out"] = "\n".join(row["why"] for row in left_out[:_LISTED])
    return result


def _sizes(row: dict[str, Any]) -> str:
    seen = f"{row['seen_width_px']} x {row['seen_height_px']} px"
    own = f"{row['width_px']} x {row['height_px']} px"
    return f"{Path(row['file']).name}: {seen if seen == own else f'{own}, looked at as {seen}'}"


@contextmanager
def _progress_on_stderr() -> Iterator[Progress]:
    """A bar for each thing that begins; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:

        def begin(what: str, total: int | None) -> Callable[[], None]:
            task = bars.add_task(what, total=total)
            return lambda: bars.advance(task)

        yield begin
