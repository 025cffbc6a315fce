"""Curves over steps as inline SVG: axes, reference lines, the range behind a thinned curve, a readout under the mouse.

The readout needs no script: each strip of the plot shows its own values while the mouse is over it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from dino_dist.report.markup import Markup, element, join
from dino_dist.report.scales import Axis, log_ticks, ticks, value_axis
from dino_dist.report.series import Point
from dino_dist.report.wording import number, step_count

WIDTH: Final = 400
HEIGHT: Final = 204
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 392, 22, 180
_MOST_STRIPS: Final = 90
_MARKED_POINTS: Final = 24
"""A curve of fewer points shows each as a dot."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    hue: int = 1
    """1 to 4: the colours of the style sheet."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A value that the curve is to be read against."""

    label: str
    value: float


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """A plot of one or more curves of one unit."""

    title: str
    lines: Sequence[Line]
    references: Sequence[Reference] = ()
    restarts: Sequence[int] = ()
    """Steps where the run went on after a restart."""
    last_step: float
    show: Callable[[float], str] = number
    log: bool = False
    from_zero: bool = False

    def svg(self) -> Markup:
        """The plot; every curve has a point at least."""
        references = self._near_references()
        lows = [point.low for line in self.lines for point in line.points] + [each.value for each in references]
        highs = [point.high for line in self.lines for point in line.points] + [each.value for each in references]
        log = self.log and min(lows) > 0
        y = value_axis(lows, highs, start_px=_BOTTOM, end_px=_TOP, log=log, from_zero=self.from_zero)
        x = Axis(low=0.0, high=max(1.0, self.last_step), start_px=_LEFT, end_px=_RIGHT)
        return element(
            "svg",
            self._grid(x, y),
            join(self._reference(each, y) for each in references),
            join(self._restart(step, x) for step in self.restarts if 0 < step < self.last_step),
            join(_range(line, x, y) for line in self.lines),
            join(_curve(line, x, y) for line in self.lines),
            self._strips(x, y),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=self._words(),
            class_="chart",
        )

    def _words(self) -> str:
        told = [f"{line.label} {self.show(line.points[-1].mean)}" for line in self.lines]
        return f"{self.title} up to step {self.last_step:g}: at the end {', '.join(told)}"

    def _near_references(self) -> list[Reference]:
        """A reference far off the curve would flatten it."""
        low = min(point.low for line in self.lines for point in line.points)
        high = max(point.high for line in self.lines for point in line.points)
        reach = 1.2 * (high - low) + 1e-9
        return [each for each in self.references if low - reach <= each.value <= high + reach]

    def _grid(self, x: Axis, y: Axis) -> Markup:
        marks = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high, most=4)
        parts: list[Markup] = []
        for value in marks:
            at = f"{y.place(value):.1f}"
            parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=at, y2=at, class_="grid"))
            parts.append(
                element("text", self.show(value).replace(".0%", "%"), x=_LEFT - 7, y=at, dy="0.32em", class_="tick y")
            )
        for value in ticks(0.0, x.high, most=5):
            at = f"{x.place(value):.1f}"
            parts.append(element("text", step_count(value), x=at, y=_BOTTOM + 16, class_="tick x"))
        parts.append(element("text", "step", x=_LEFT - 12, y=_BOTTOM + 16, class_="tick y"))
        parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, class_="base"))
        return join(parts)

    def _reference(self, reference: Reference, y: Axis) -> Markup:
        at = y.place(reference.value)
        above = at > _TOP + 14
        return join(
            [
                element("line", x1=_LEFT, x2=_RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="reference"),
                element("text", reference.label, x=_RIGHT, y=f"{at + (-5 if above else 12):.1f}", class_="tick note"),
            ]
        )

    def _restart(self, step: int, x: Axis) -> Markup:
        at = f"{x.place(step):.1f}"
        return element("line", x1=at, x2=at, y1=_TOP, y2=_BOTTOM, class_="restart")

    def _strips(self, x: Axis, y: Axis) -> Markup:
        steps = sorted({point.step for line in self.lines for point in line.points})
        every = -(-len(steps) // _MOST_STRIPS)
        chosen = [*steps[:-1:every], steps[-1]]
        places = [x.place(step) for step in chosen]
        edges = [_LEFT, *((a + b) / 2 for a, b in pairwise(places)), _RIGHT]
        return join(self._strip(step, edges[number], edges[number + 1], x, y) for number, step in enumerate(chosen))

    def _strip(self, step: float, left: float, right: float, x: Axis, y: Axis) -> Markup:
        at = f"{x.place(step):.1f}"
        words, dots = [f"step {step:,.0f}"], []
        for line in self.lines:
            point = _nearest(line.points, step)
            name = f"{line.label} " if len(self.lines) > 1 else ""
            words.append(f"{name}{self.show(point.mean)}")
            dots.append(
                element(
                    "circle",
                    cx=f"{x.place(point.step):.1f}",
                    cy=f"{y.place(point.mean):.1f}",
                    r=3.5,
                    class_=f"dot h{line.hue}",
                )
            )
        return element(
            "g",
            element("rect", x=f"{left:.1f}", y=_TOP, width=f"{max(0.5, right - left):.1f}", height=_BOTTOM - _TOP),
            element("line", x1=at, x2=at, y1=_TOP, y2=_BOTTOM),
            *dots,
            element("text", "  ".join(words), x=_RIGHT, y=13),
            class_="strip",
        )


def _nearest(points: Sequence[Point], step: float) -> Point:
    at = bisect_left(points, step, key=lambda point: point.step)
    around = points[max(0, at - 1) : at + 1]
    return min(around, key=lambda point: abs(point.step - step))


def _curve(line: Line, x: Axis, y: Axis) -> Markup:
    placed = [(f"{x.place(point.step):.1f}", f"{y.place(point.mean):.1f}") for point in line.points]
    path = "M" + "L".join(f"{a} {b}" for a, b in placed)
    dots = [element("circle", cx=a, cy=b, r=2.6, class_=f"dot h{line.hue}") for a, b in placed]
    return join(
        [element("path", d=path, class_=f"curve h{line.hue}"), *(dots if len(placed) <= _MARKED_POINTS else ())]
    )


def _range(line: Line, x: Axis, y: Axis) -> Markup | None:
    if all(point.low == point.high for point in line.points):
        return None
    top = [f"{x.place(point.step):.1f} {y.place(point.high):.1f}" for point in line.points]
    bottom = [f"{x.place(point.step):.1f} {y.place(point.low):.1f}" for point in reversed(line.points)]
    return element("path", d=f"M{'L'.join([*top, *bottom])}Z", class_=f"range h{line.hue}")


def sparkline(points: Sequence[Point], *, hue: int = 1) -> Markup:
    """A curve without axes, for a figure that stands alone."""
    y = value_axis(
        [point.mean for point in points],
        [point.mean for point in points],
        start_px=24,
        end_px=4,
        log=False,
        from_zero=False,
    )
    x = Axis(low=points[0].step, high=max(points[-1].step, points[0].step + 1), start_px=3, end_px=68)
    line = Line(label="", points=points, hue=hue)
    end = points[-1]
    return element(
        "svg",
        element(
            "path",
            d="M" + "L".join(f"{x.place(p.step):.1f} {y.place(p.mean):.1f}" for p in line.points),
            class_=f"curve h{hue}",
        ),
        element("circle", cx=f"{x.place(end.step):.1f}", cy=f"{y.place(end.mean):.1f}", r=2.6, class_=f"dot h{hue}"),
        viewBox="0 0 72 28",
        class_="spark",
        aria_hidden="true",
    )
