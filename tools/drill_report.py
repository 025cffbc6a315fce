"""The tables of the fault drill: a line a kind of fault, trials of signal to commit, and the goodput to expect."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from drill_job import TIMEOUT_S
from drill_run import Reference, Struck
from goodput import DAY_S, Costs, Estimate, estimate, estimates_table, inputs_table
from rich.console import Console
from rich.table import Table

FLEETS = (1, 8, 32, 128)
NODE_MTBF_DAYS = 30.0
PREEMPTIONS_PER_DAY = 1.0
WIDTH = 150


def _console() -> Console:
    """Wide enough for the table, wherever it goes."""
    console = Console(markup=False, highlight=False)
    return console if console.width >= WIDTH else Console(markup=False, highlight=False, width=WIDTH)


def _median_and_max(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} / {max(values):.2f}" if values else "-"


def _all(struck: list[Struck], value: Callable[[Struck], float | None]) -> list[float]:
    return [number for one in struck if (number := value(one)) is not None]


def summary(struck: list[Struck]) -> dict[str, Any]:
    """Counts over all faults."""
    runs = {one.run for one in struck}
    lost = {one.run for one in struck if "RUN LOST" in one.problem}
    return {
        "injected": len([one for one in struck if one.fault != "none"]),
        "runs": len(runs),
        "runs_lost": len(lost),
        "wrong_resumes": sum("WRONG RESUME" in one.problem for one in struck),
        "losses_differ": sum(one.equal is False or "DIFFER" in one.problem for one in struck),
        "problems": sum(bool(one.problem) for one in struck),
    }


def show_faults(struck: list[Struck], counts: dict[str, Any]) -> None:
    """The table of the drill."""
    if not struck:
        return
    table = Table(title="fault drill: median / maximum of seconds and steps", show_lines=True)
    for name in ("fault", "times", "detected by", "to commit, s", "to the end, s", "to next step, s", "steps lost"):
        table.add_column(name, ratio=1 if name == "detected by" else None, no_wrap=name != "detected by")
    table.add_column("equal", no_wrap=True)
    for kind in dict.fromkeys(one.fault for one in struck):
        these = [one for one in struck if one.fault == kind]
        told = Counter(one.detected_by[:200] for one in these)
        table.add_row(
            kind,
            str(len(these)),
            told.most_common(1)[0][0],
            _median_and_max(_all(these, lambda one: one.commit_s)),
            _median_and_max(_all(these, lambda one: one.ended_s)),
            _median_and_max(_all(these, lambda one: one.next_step_s)),
            _median_and_max([float(one.steps_lost) for one in these]),
            f"{sum(one.equal is True for one in these)} of {len(these)}",
        )
    console = _console()
    console.print(table)
    console.print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts.items()))
    for one in struck:
        if one.problem:
            console.print(f"run {one.run}: {one.line()}")


def show_trials(struck: list[Struck]) -> None:
    """Minimum, median and maximum of signal to commit."""
    values = _all(struck, lambda one: one.commit_s)
    if values:
        lost = max(one.steps_lost for one in struck)
        _console().print(
            f"signal to committed checkpoint, {len(values)} trials: min {min(values):.2f} s, median "
            f"{statistics.median(values):.2f} s, max {max(values):.2f} s; steps lost at most {lost}"
        )


def costs(truth: Reference, struck: list[Struck]) -> Costs:
    """What the drill measured, for one node of a fleet."""
    restarts = _all(struck, lambda one: one.next_step_s) or [truth.first_step_s]
    hard = [one for one in struck if one.commit_s is None]
    return Costs(
        save_s=statistics.median(truth.saves_s),
        commit_s=statistics.median(truth.saves_s),
        restart_s=statistics.median(restarts),
        detect_s=max(_all(hard, lambda one: one.ended_s), default=0.0),
        node_mtbf_s=NODE_MTBF_DAYS * DAY_S,
        preemptions_per_s=PREEMPTIONS_PER_DAY / DAY_S,
        nodes=1,
    )


def estimates(one_node: Costs) -> list[Estimate]:
    """Fleets of nodes that each cost what was measured."""
    return [estimate(replace(one_node, nodes=size)) for size in FLEETS]


def show_goodput(measured: Costs) -> None:
    """Inputs and estimate, with where each input came from."""
    console = _console()
    console.print(
        inputs_table(
            {
                "save": (f"{measured.save_s:.2f} s", "median of the reference run's saves, as if the steps waited"),
                "save to commit": (f"{measured.commit_s:.2f} s", "the same"),
                "restart": (f"{measured.restart_s:.2f} s", "median of start to first step in this drill"),
                "detection": (f"{measured.detect_s:.2f} s", f"longest fault to the end, time-out {TIMEOUT_S:g} s"),
                "days between faults of a node": (f"{NODE_MTBF_DAYS:g}", "assumed"),
                "preemptions a day": (f"{PREEMPTIONS_PER_DAY:g}", "assumed"),
            }
        )
    )
    console.print(estimates_table(estimates(measured)))
    console.print("The costs are this small job's on this machine: for a real model give its own to tools/goodput.py.")
