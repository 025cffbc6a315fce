"""Estimate the useful share of a fleet's time under faults and preemptions, and the best time between checkpoints.

    python tools/goodput.py --save-s 0.5 --commit-s 20 --restart-s 30 --detect-s 60 --nodes 32 --mtbf-days 30 [--json]

Formulas, for faults that come at random (exponential gaps); M is the job's mean time between faults: a node's / nodes.

- Young 1974 (CACM 17(9), 530-531): best interval sqrt(2 d M), d: what a save costs the run.
- Daly 2006 (Future Generation Computer Systems 22(3), 303-312), eq. 37: sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M)
  - d, for d < 2M, else M; and its complete cost function: work T takes T / tau M exp(R / M) (exp((tau + d) / M) - 1)
  of wall time, R: what a restart costs besides the repeated work. T = 1 over that is the goodput.

Added here, and confirmed by the simulation: a save that becomes a checkpoint only c seconds after it was begun (it is
written in the background) loses c seconds more a fault, so R = restart + detection + c; and a preemption that saves
first repeats nothing but costs P = c + restart, so p of them a second leave the share 1 - p P. Two per cent too low
where faults and preemptions come every twenty minutes, since the preemptions' saves are checkpoints too.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a fleet's faults and saves cost; times in seconds."""

    save_s: float
    """A save holds the steps up for this long."""
    commit_s: float
    """From the begin of a save to its commit, most of it in the background."""
    restart_s: float
    """From the start of the job to its first step; waiting in the queue is not in it."""
    detect_s: float
    """From a fault until the job has ended and is queued again."""
    node_mtbf_s: float
    """Mean time between faults of one node."""
    preemptions_per_s: float
    """Of the whole job; each saves first."""
    nodes: int

    @property
    def mtbf_s(self) -> float:
        """Mean time between faults of the job."""
        return self.node_mtbf_s / self.nodes

    @property
    def fault_s(self) -> float:
        """What a fault costs besides the work since the last save was begun."""
        return self.detect_s + self.restart_s + self.commit_s

    @property
    def preemption_s(self) -> float:
        """What a preemption costs."""
        return self.commit_s + self.restart_s


def young_interval_s(save_s: float, mtbf_s: float) -> float:
    """Work between two saves that wastes least, to first order (Young 1974)."""
    return math.sqrt(2 * save_s * mtbf_s)


def daly_interval_s(save_s: float, mtbf_s: float) -> float:
    """Work between two saves that wastes least, to higher order (Daly 2006, eq. 37)."""
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def goodput(costs: Costs, interval_s: float) -> float:
    """Expected share of wall time that becomes work which is not repeated (Daly 2006; preemptions added)."""
    segments = (interval_s + costs.save_s) / costs.mtbf_s
    restart = costs.fault_s / costs.mtbf_s
    if segments + restart > 700:  # exp() ends there: nothing gets done
        return 0.0
    under_faults = interval_s / (costs.mtbf_s * math.exp(restart) * math.expm1(segments))
    return under_faults * max(0.0, 1 - costs.preemptions_per_s * costs.preemption_s)


def simulate(costs: Costs, interval_s: float, *, seed: int, events: int = 20_000) -> float:
    """The share of `goodput`, counted in a simulated run that lives through `events` faults and preemptions."""
    rng = random.Random(seed)
    cycle_s = interval_s + costs.save_s
    wall_s = work_s = 0.0
    for _ in range(events):
        fault_in_s = rng.expovariate(1 / costs.mtbf_s)
        preempted_in_s = rng.expovariate(costs.preemptions_per_s) if costs.preemptions_per_s else math.inf
        ran_s = min(fault_in_s, preempted_in_s)
        wall_s += ran_s
        if fault_in_s < preempted_in_s:
            committed = max(0, math.floor((ran_s - costs.commit_s) / cycle_s))
            work_s += committed * interval_s
            wall_s += _down_s(costs.detect_s + costs.restart_s, costs.mtbf_s, rng)
        else:
            cycles = math.floor(ran_s / cycle_s)
            work_s += cycles * interval_s + min(ran_s - cycles * cycle_s, interval_s)
            wall_s += costs.commit_s + _down_s(costs.restart_s, costs.mtbf_s, rng)
    return work_s / wall_s


def _down_s(needed_s: float, mtbf_s: float, rng: random.Random) -> float:
    """Time until a restart that needs `needed_s` without a fault has got through."""
    spent_s = 0.0
    while (fault_in_s := rng.expovariate(1 / mtbf_s)) < needed_s:
        spent_s += fault_in_s
    return spent_s + needed_s


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One fleet's line of the table."""

    nodes: int
    mtbf_h: float
    young_s: float
    daly_s: float
    goodput: float
    """At Daly's interval."""
    simulated: float
    """The same, counted."""
    interval_s: float | None
    """An interval that was asked for."""
    goodput_at_interval: float | None


def estimate(costs: Costs, *, interval_s: float | None = None, seed: int = 0) -> Estimate:
    """Best interval and goodput of one fleet, and the goodput at an interval that was chosen otherwise."""
    daly_s = daly_interval_s(costs.save_s, costs.mtbf_s)
    return Estimate(
        nodes=costs.nodes,
        mtbf_h=costs.mtbf_s / 3600,
        young_s=young_interval_s(costs.save_s, costs.mtbf_s),
        daly_s=daly_s,
        goodput=goodput(costs, daly_s),
        simulated=simulate(costs, daly_s, seed=seed),
        interval_s=interval_s,
        goodput_at_interval=None if interval_s is None else goodput(costs, interval_s),
    )


def inputs_table(inputs: dict[str, tuple[str, str]]) -> Table:
    """Every input (name: value, where it came from)."""
    table = Table("input", "value", "from", title="goodput: inputs")
    for name, (value, source) in inputs.items():
        table.add_row(name, value, source)
    return table


def estimates_table(estimates: list[Estimate]) -> Table:
    """A line a fleet."""
    table = Table(title="goodput: useful share of wall time, queue wait excluded")
    asked = estimates[0].interval_s
    for name in ("nodes", "job's MTBF, h", "save every: Young, s", "Daly, s", "goodput", "simulated"):
        table.add_column(name, justify="right")
    if asked is not None:
        table.add_column(f"goodput, every {asked:g} s", justify="right")
    for one in estimates:
        cells = [str(one.nodes), f"{one.mtbf_h:.2f}", f"{one.young_s:.1f}", f"{one.daly_s:.1f}"]
        cells += [f"{one.goodput:.2%}", f"{one.simulated:.2%}"]
        cells += [] if one.goodput_at_interval is None else [f"{one.goodput_at_interval:.2%}"]
        table.add_row(*cells)
    return table


def main(
    save_s: Annotated[float, typer.Option(help="A save holds the steps up for this long.", min=1e-6)],
    restart_s: Annotated[float, typer.Option(help="Start of the job to its first step, queue wait excluded.", min=0)],
    commit_s: Annotated[
        float | None, typer.Option(help="Begin of a save to its commit; default: --save-s.", min=0)
    ] = None,
    detect_s: Annotated[float, typer.Option(help="Fault to requeue: a dead rank or the watchdog.", min=0)] = 30.0,
    nodes: Annotated[list[int] | None, typer.Option(help="Fleet sizes; may be repeated.", min=1)] = None,
    mtbf_days: Annotated[float, typer.Option(help="Days between two faults of one node.", min=1e-6)] = 30.0,
    preemptions_per_day: Annotated[float, typer.Option(help="Of the whole job.", min=0)] = 1.0,
    interval_s: Annotated[
        float | None, typer.Option(help="Also the goodput at this time between saves.", min=1e-6)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the simulation.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """The best time between checkpoints, and the useful share of a fleet's time."""
    costs = Costs(
        save_s=save_s,
        commit_s=save_s if commit_s is None else commit_s,
        restart_s=restart_s,
        detect_s=detect_s,
        node_mtbf_s=mtbf_days * DAY_S,
        preemptions_per_s=preemptions_per_day / DAY_S,
        nodes=1,
    )
    estimates = [
        estimate(replace(costs, nodes=size), interval_s=interval_s, seed=seed) for size in nodes or [1, 8, 32, 128]
    ]
    if as_json:
        inputs = {key: value for key, value in asdict(costs).items() if key != "nodes"}
        print(json.dumps({"inputs": inputs | {"seed": seed}, "fleets": [asdict(one) for one in estimates]}))
        return
    told = "command line"
    console = Console()
    console.print(
        inputs_table(
            {
                "save holds up the steps": (f"{costs.save_s:g} s", told),
                "save to commit": (f"{costs.commit_s:g} s", "as long as it holds up" if commit_s is None else told),
                "restart": (f"{costs.restart_s:g} s", told),
                "detection": (f"{costs.detect_s:g} s", "command line or its default"),
                "days between faults of a node": (f"{mtbf_days:g}", "command line or its default: a rate to plan with"),
                "preemptions a day": (f"{preemptions_per_day:g}", "command line or its default: a rate to plan with"),
            }
        )
    )
    console.print(estimates_table(estimates))


if __name__ == "__main__":
    typer.run(main)
