"""The picture of a learning proof: accuracy over images seen, a line a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training."""

    name: str
    """`system` or `plain`."""
    seed: int
    knn_top1: dict[int, float]
    """By images seen."""
    images_per_s: float
    """Of training alone."""
    seconds: float
    """Training and judgements together, of all starts."""

    @property
    def last(self) -> float:
        """After all images."""
        return self.knn_top1[max(self.knn_top1)]


STYLES = {"system": ("#1f6feb", "-", "o"), "plain": ("#d1571b", "--", "s")}


def draw_curves(
    curves: Sequence[Curve], path: Path, *, start: float | None = None, levels: Mapping[str, float] | None = None
) -> None:
    """Write a PNG: every curve, from `start` (k-NN of a random network), and a dotted line a level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (color, line, marker) in STYLES.items():
        of_name = [curve for curve in curves if curve.name == name]
        for curve in of_name:
            points = ({} if start is None else {0: start}) | curve.knn_top1
            seeds = ", ".join(str(each.seed) for each in of_name)
            label = f"{name}, seed {seeds}" if curve is of_name[0] else None
            seen = sorted(points)
            accuracy = [100 * points[images] for images in seen]
            axes.plot(seen, accuracy, color=color, linestyle=line, marker=marker, markersize=4, alpha=0.85, label=label)
    for name, level in (levels or {}).items():
        axes.axhline(100 * level, color="#57606a", linestyle=":", linewidth=1.2)
        axes.annotate(
            f"{name} {100 * level:.1f}",
            (1.0, 100 * level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color="#57606a",
        )
    axes.margins(y=0.08)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    axes.set_xlabel("images seen")
    axes.set_ylabel("k-NN top-1 of the teacher, %")
    axes.grid(color="#d0d7de", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    figure.savefig(path)
