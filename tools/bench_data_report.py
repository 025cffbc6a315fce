"""What a bench of data pipelines found: medians of each contender, ratios of two, as a table or as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from bench_data_process import Round
from rich.console import Console
from rich.table import Table

PUBLISHED, TORCHVISION, KORNIA = "published", "torchvision_v2", "kornia"
DECODE_ONLY, RENDER_CPU, RENDER_CUDA = "decode_only", "render_cpu", "render_cuda"

TITLES = {
    PUBLISHED: "PIL, published",
    TORCHVISION: "torchvision v2",
    KORNIA: "kornia",
    DECODE_ONLY: "decode only",
    RENDER_CPU: "render on CPU",
    RENDER_CUDA: "render on CUDA",
}
NOTES = {
    PUBLISHED: "Pillow pictures through torchvision's v1 transforms, crop by crop; operators do not show Pillow's work",
    TORCHVISION: "its v2 transforms on uint8 tensors, crop by crop; the blur has 9 taps, whatever the preset's",
    KORNIA: "on float batches; other pixels: crops not antialiased, one jitter order a batch, a blur of 9 taps",
    DECODE_ONLY: "dino_dist: all that the CPU does for a rank with a GPU: reading, decoding, drawing the crops",
    RENDER_CPU: "dino_dist: the same and the views in float32, by a rank for each core",
    RENDER_CUDA: "dino_dist: the same and the views in float32 on the GPU; operators are about its launches",
}
FIGURES = (
    "CPU ms: of all its processes, an image. Memory: of all its processes, at its peak (RSS, shared pages counted in "
    "each) and after a round (PSS, counted once). Operators: torch's, of one batch."
)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Numerator over denominator, of two contenders, in each round."""

    what: str
    numerator: str
    denominator: str
    figure: str
    """A property of `Round`."""


RATIOS = (
    Ratio(
        what="CPU time an image: published / decode only",
        numerator=PUBLISHED,
        denominator=DECODE_ONLY,
        figure="core_s_per_image",
    ),
    Ratio(
        what="images/s: render on CPU / published", numerator=RENDER_CPU, denominator=PUBLISHED, figure="images_per_s"
    ),
    Ratio(
        what="images/s: render on CPU / torchvision v2",
        numerator=RENDER_CPU,
        denominator=TORCHVISION,
        figure="images_per_s",
    ),
    Ratio(
        what="CPU time an image: published / render on CPU",
        numerator=PUBLISHED,
        denominator=RENDER_CPU,
        figure="core_s_per_image",
    ),
    Ratio(
        what="CPU time an image: torchvision v2 / render on CPU",
        numerator=TORCHVISION,
        denominator=RENDER_CPU,
        figure="core_s_per_image",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one contender, or why nothing was."""

    rounds: tuple[Round, ...] = ()
    operators_per_batch: int | None = None
    not_measured: str | None = None
    crashed: bool = False
    """Not measured because its process failed, which is a fault."""


def summary(result: Result, crops_per_image: int | None) -> dict[str, Any]:
    """Medians over the rounds, as they go into the table and the JSON; `crops_per_image` None: it makes none."""
    if result.not_measured is not None:
        return {"not_measured": result.not_measured, "crashed": result.crashed}
    images_per_s = statistics.median(measured.images_per_s for measured in result.rounds)
    return {
        "images_per_s": images_per_s,
        "core_s_per_image": statistics.median(measured.core_s_per_image for measured in result.rounds),
        "crops_per_s": None if crops_per_image is None else images_per_s * crops_per_image,
        "peak_rss_mib": max(measured.peak_rss_bytes for measured in result.rounds) / 2**20,
        "pss_mib": statistics.median(measured.pss_bytes for measured in result.rounds) / 2**20,
        "operators_per_batch": result.operators_per_batch,
        "rounds": [asdict(measured) for measured in result.rounds],
    }


def ratios(results: dict[str, Result]) -> list[dict[str, Any]]:
    """Each of `RATIOS` whose two contenders were measured: median, lowest and highest over the rounds."""
    rows = []
    for ratio in RATIOS:
        above, below = (results.get(name, Result()).rounds for name in (ratio.numerator, ratio.denominator))
        values = [
            getattr(first, ratio.figure) / getattr(second, ratio.figure)
            for first, second in zip(above, below, strict=False)
            if getattr(second, ratio.figure) > 0  # a round of a moment may use less CPU time than the clock shows
        ]
        if values:
            rows.append(
                {
                    **asdict(ratio),
                    "median": statistics.median(values),
                    "lowest": min(values),
                    "highest": max(values),
                }
            )
    return rows


def show(document: dict[str, Any]) -> None:
    """The document for a person."""
    settings, console = document["settings"], Console()
    console.print(
        f"{settings['images']} images of {settings['mean_bytes_per_image'] / 1000:.0f} KB, {settings['preset']} with "
        f"{settings['crops_per_image']} crops, batches of {settings['batch_size']}, {settings['cores']} cores, medians "
        f"of {settings['rounds']} rounds; {document['machine']['cpu']}, load {document['machine']['load_1min']:.1f}"
    )
    table = Table()
    for heading in ("pipeline", "images/s", "CPU ms", "crops/s", "RSS MiB", "PSS MiB", "operators"):
        table.add_column(heading, justify="left" if heading == "pipeline" else "right", no_wrap=True)
    for name, row in document["contenders"].items():
        table.add_row(TITLES[name], *_cells(row))
    console.print(table)
    for name, row in document["contenders"].items():
        reason = f"not measured: {row['not_measured']}" if "not_measured" in row else NOTES[name]
        console.print(f"{TITLES[name]}: {reason}", highlight=False, markup=False)
    console.print(FIGURES, highlight=False)
    compared = Table("ratio", "median", "lowest", "highest")
    for ratio in document["ratios"]:
        compared.add_row(ratio["what"], *(f"{ratio[key]:.2f}" for key in ("median", "lowest", "highest")))
    console.print(compared)


def _cells(row: dict[str, Any]) -> list[str]:
    if "not_measured" in row:
        return ["-"] * 6
    return [
        f"{row['images_per_s']:.1f}",
        f"{1000 * row['core_s_per_image']:.2f}",
        "-" if row["crops_per_s"] is None else f"{row['crops_per_s']:.0f}",
        f"{row['peak_rss_mib']:.0f}",
        f"{row['pss_mib']:.0f}",
        str(row["operators_per_batch"]),
    ]
