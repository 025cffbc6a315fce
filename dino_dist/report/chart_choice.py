"""Which keys of metrics.jsonl are drawn together, in which group, how, and against what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dino_dist.config import Config
from dino_dist.report.line_chart import Line, LineChart, Reference
from dino_dist.report.series import Series
from dino_dist.report.wording import number, percent

_JUDGED: Final = ("knn_", "linear_")
_MOST_OTHERS: Final = 60


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chart to draw where one of its keys was logged."""

    title: str
    keys: tuple[tuple[str, str], ...]
    """Key and name of each curve."""
    says: str
    """One line for a reader who does not know it."""
    show: Callable[[float], str] = number
    log: bool = False
    from_zero: bool = False
    against: tuple[str, ...] = ()
    """Names of references, see `references`."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A chart with its words."""

    choice: Choice
    chart: LineChart


LEARNING: Final = (
    Choice(title="Loss", keys=(("loss", "loss"),), says="Cross-entropy of student and teacher", against=("ln K",)),
    Choice(
        title="KL divergence",
        keys=(("kl", "KL"),),
        says="Loss less the teacher's entropy",
        from_zero=True,
    ),
    Choice(
        title="Teacher entropy",
        keys=(("teacher_entropy", "entropy"),),
        says="0: one-hot targets, ln K: uniform ones; both ends are collapses",
        against=("ln K",),
    ),
    Choice(
        title="Prototypes in use",
        keys=(("prototype_perplexity", "perplexity"), ("live_prototypes", "alive")),
        says="Perplexity; alive: above 1% of a fair share",
        from_zero=True,
        against=("K",),
    ),
    Choice(title="Gradient norm", keys=(("grad_norm", "norm"),), says="Before clipping, all parameters", log=True),
    Choice(title="Center norm", keys=(("center_norm", "norm"),), says="Stops growing in a healthy run", from_zero=True),
    Choice(
        title="Most used prototype",
        keys=(("top_share", "share"),),
        says="Its share of the running assignments",
        show=percent,
        from_zero=True,
    ),
)
SCHEDULES: Final = (
    Choice(title="Learning rate", keys=(("lr", "lr"),), says="Warm-up, then cosine", from_zero=True),
    Choice(title="Weight decay", keys=(("weight_decay", "weight decay"),), says="Cosine"),
    Choice(title="Teacher momentum", keys=(("momentum", "momentum"),), says="Share of the old teacher a step keeps"),
    Choice(title="Teacher temperature", keys=(("teacher_temp", "temperature"),), says="Sharpens the targets"),
)
SPEED: Final = (
    Choice(title="Images a second", keys=(("images_per_s", "images/s"),), says="All ranks together", from_zero=True),
    Choice(
        title="Waiting for data",
        keys=(("data_wait", "share"),),
        says="Share of the wall time between two rows",
        show=percent,
        from_zero=True,
    ),
    Choice(title="Seconds a step", keys=(("step_s", "seconds"),), says="Mean between two rows", from_zero=True),
    Choice(
        title="Memory",
        keys=(("peak_memory_gib", "device peak"), ("host_memory_gib", "host")),
        says="GiB, of rank 0",
        from_zero=True,
    ),
    Choice(title="Seconds a save", keys=(("save_s", "seconds"),), says="Mostly in the background", from_zero=True),
)
NOT_DRAWN: Final = ("images_seen", "epoch", "skipped_steps", "bad_samples", "teacher_drift")
"""Said in figures and checks instead."""


def references(config: Config | None) -> dict[str, Reference]:
    """What a reader compares with; nothing where the number of prototypes is unknown."""
    if config is None:
        return {}
    prototypes = config.head.num_prototypes
    ln_k = math.log(prototypes)
    return {
        "ln K": Reference(label=f"ln K = {ln_k:.3f}", value=ln_k),
        "K": Reference(label=f"K = {prototypes:,}", value=prototypes),
    }


def judged(series: Mapping[str, Series]) -> list[Choice]:
    """The accuracies: one chart a kind of judge, one curve a setting."""
    chosen = []
    for prefix, title in zip(_JUDGED, ("k-NN accuracy", "Linear accuracy"), strict=True):
        keys = sorted((key for key in series if key.startswith(prefix)), key=_natural)
        exact = [key for key in keys if key != "knn_top1"] or keys
        if exact:
            named = tuple((key, key.removeprefix(prefix).replace("top1_k", "k=")) for key in exact[:4])
            chosen.append(
                Choice(title=title, keys=named, says="Top-1 of the teacher's features on labelled images", show=percent)
            )
    return chosen


def others(series: Mapping[str, Series]) -> list[Choice]:
    """What else was logged, each on its own."""
    named = {key for choice in (*LEARNING, *SCHEDULES, *SPEED) for key, _ in choice.keys} | {*NOT_DRAWN}
    left = [key for key in sorted(series) if key not in named and not key.startswith(_JUDGED)]
    return [Choice(title=key, keys=((key, key),), says="") for key in left[:_MOST_OTHERS]]


def drawn(
    choices: Sequence[Choice],
    series: Mapping[str, Series],
    *,
    config: Config | None,
    restarts: Sequence[int],
    last_step: int,
) -> list[Drawn]:
    """The charts of those `choices` of which something was logged."""
    known = references(config)
    found = []
    for choice in choices:
        logged = [(key, name) for key, name in choice.keys if key in series]
        lines = [
            Line(label=name, points=series[key].points(), hue=1 + place % 4) for place, (key, name) in enumerate(logged)
        ]
        if lines:
            chart = LineChart(
                title=choice.title,
                lines=lines,
                references=[known[name] for name in choice.against if name in known],
                restarts=restarts,
                last_step=last_step,
                show=choice.show,
                log=choice.log,
                from_zero=choice.from_zero,
            )
            found.append(Drawn(choice=choice, chart=chart))
    return found


def _natural(key: str) -> tuple[str, int]:
    """k5 before k10."""
    head = key.rstrip("0123456789")
    return head, int(key[len(head) :] or 0)
