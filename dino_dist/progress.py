"""What a person sees while a run goes on: one Rich line on a terminal, plain lines in a log file. On stderr."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Value = float | int | None


class Progress:
    """Step, loss, images a second, time left and the share of time spent waiting for data, from the logged rows.

    On a terminal: one line, redrawn at each `update`. Elsewhere (a Slurm log): the first, every `plain_every`-th and
    the last row as a line. `console` decides which; rank 0 makes one, the others none.
    """

    def __init__(
        self, *, total_steps: int, start_step: int = 0, plain_every: int = 10, console: Console | None = None
    ) -> None:
        self._total_steps = total_steps
        self._plain_every = plain_every
        self._console = console or Console(stderr=True)
        self._rows = 0
        self._bar: RichProgress | None = None
        if self._console.is_terminal:
            # No refresh thread: a data worker forked while it holds the console's lock would wait for ever.
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,
                speed_estimate_period=600.0,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, text="")

    def update(self, step: int, row: Mapping[str, Value]) -> None:
        """Show one logged row; keys that are absent are left out."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=describe(row), refresh=True)
        elif self._rows % self._plain_every == 0 or step >= self._total_steps:
            left = _time_left(step, self._total_steps, row.get("step_s"))
            self.say(f"step {step}/{self._total_steps}  {describe(row)}{left}")
        self._rows += 1

    def say(self, line: str) -> None:
        """Print one line (an alarm, a saved checkpoint) above the progress line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(row: Mapping[str, Value]) -> str:
    """`loss 6.3217  412.3 images/s  data wait 3%`, as far as the row knows."""
    parts: list[str] = []
    if (loss := row.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (images_per_s := row.get("images_per_s")) is not None:
        parts.append(f"{images_per_s:.1f} images/s")
    if (data_wait := row.get("data_wait")) is not None:
        parts.append(f"data wait {data_wait:.0%}")
    parts += [f"{name} {value:.4f}" for name, value in row.items() if name.startswith("knn_") and value is not None]
    return "  ".join(parts)


def _time_left(step: int, total_steps: int, step_s: Value) -> str:
    if step_s is None or not math.isfinite(step_s):
        return ""
    minutes = round((total_steps - step) * step_s / 60.0)
    return f"  left {minutes // 60}:{minutes % 60:02d} h"
