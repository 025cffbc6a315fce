"""Named alarms: which logged rows mean that a run has collapsed, diverged or starves, and what to do about it.

Pure logic on the rows of metrics.jsonl, on any machine, during a run or after it. Published runs that ended at ln K:
https://github.com/facebookresearch/dino/issues/246, /61, /273; one-hot collapse: /43.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

Row = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One alarm as it is raised: print `line`."""

    name: str
    step: int
    message: str
    """What is seen, its value, what was expected."""
    remedy: str
    """What to do."""

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"ALARM {self.name} at step {self.step}: {self.message}. {self.remedy}"


class WatchState(TypedDict):
    """JSON-able state of a `CollapseWatch`."""

    last_step: int
    skipped_steps: int
    bad_since: dict[str, int]
    active: list[str]


@dataclass(frozen=True, kw_only=True)
class AlarmLimits:
    """Where healthy ends. Fractions of ln K unless said otherwise; wide enough that a healthy run never meets them."""

    window_steps: int = 50
    """A condition must hold this long without a break, and until this long after the warm-up."""
    loss_band: float = 0.003
    """A loss within this of ln K is at ln K."""
    uniform_entropy: float = 0.99
    """A teacher entropy above this is uniform."""
    uniform_information: float = 0.002
    """A loss at ln K counts only while assignments tell less than this about the sample."""
    one_hot_entropy: float = 0.1
    """A teacher entropy below this is one-hot ..."""
    one_hot_prototypes: float = 4.0
    """... and a collapse if the perplexity of all assignments together is below this count."""
    few_prototypes: float = 0.002
    """Perplexity of the assignments, as a fraction of K, below which most of the head is dead."""
    starving_share: float = 0.5
    """Share of the wall time that training may wait for data."""


class CollapseWatch:
    """Watches logged rows; each alarm is returned once when it begins and again only after it has cleared.

    Keys read (all optional; a missing or null one changes nothing): `loss teacher_entropy prototype_perplexity
    data_wait teacher_drift grad_norm skipped_steps non_finite` (`skipped_steps` counts from the start of the run).
    `warmup_steps` is the longest of the warm-ups (learning rate, teacher temperature, frozen last layer). Rows at least
    every 100 steps and a collapse that is there at the end of the warm-up give an alarm within 200 steps after it.
    """

    def __init__(self, *, num_prototypes: int, warmup_steps: int, limits: AlarmLimits | None = None) -> None:
        self.num_prototypes = num_prototypes
        self.warmup_steps = warmup_steps
        self.limits = limits or AlarmLimits()
        self._ln_k = math.log(num_prototypes)
        self._last_step = 0
        self._skipped_steps = 0
        self._bad_since: dict[str, int] = {}
        self._active: list[str] = []

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the alarms that have been raised and have not cleared."""
        return tuple(self._active)

    def observe(self, row: Row) -> list[Alarm]:
        """The alarms that begin with this row. Rows come in the order of their `step` (an int, always there)."""
        step = row["step"]
        if not isinstance(step, int):
            raise ValueError(f"a logged row needs an int under 'step', got {step!r}")
        checks = {**self._immediate(row), **self._lasting(row)}
        raised = [
            Alarm(name=name, step=step, message=check, remedy=_REMEDIES[name])
            for name, check in checks.items()
            if self._begins(name, check, step)
        ]
        self._last_step = step
        return raised

    def state_dict(self) -> WatchState:
        """What a resumed run needs to go on as if it had never stopped."""
        return {
            "last_step": self._last_step,
            "skipped_steps": self._skipped_steps,
            "bad_since": dict(self._bad_since),
            "active": list(self._active),
        }

    def load_state_dict(self, state: WatchState) -> None:
        """Take up a saved state."""
        self._last_step = state["last_step"]
        self._skipped_steps = state["skipped_steps"]
        self._bad_since = dict(state["bad_since"])
        self._active = list(state["active"])

    def _begins(self, name: str, message: str, step: int) -> bool:
        """Book-keeping of one condition (`message` is empty where all is well); True when its alarm is to be raised."""
        if not message:
            self._bad_since.pop(name, None)
            if name in self._active:
                self._active.remove(name)
            return False
        # The first bad row speaks for the steps since the row before it.
        since = self._bad_since.setdefault(name, self._last_step)
        if name in self._active:
            return False
        if name not in _IMMEDIATE:
            window_steps = self.limits.window_steps
            settled = step >= self.warmup_steps + window_steps if name in _AFTER_WARMUP else True
            if not settled or step - since < window_steps:
                return False
        self._active.append(name)
        return True

    def _immediate(self, row: Row) -> dict[str, str]:
        checks: dict[str, str] = {}
        # A logged row holds null for a number that was not finite, and its name in the list `non_finite`.
        listed = row.get("non_finite")
        named = listed if isinstance(listed, list) else []
        bad = [name for name in ("loss", "grad_norm") if name in named or not math.isfinite(_number(row, name, 0.0))]
        skipped = int(_number(row, "skipped_steps", self._skipped_steps))
        if bad:
            checks["non_finite"] = f"{' and '.join(bad)} is not finite, expected a number"
        elif skipped > self._skipped_steps:
            new = skipped - self._skipped_steps
            checks["non_finite"] = f"{new} steps were skipped for a non-finite loss or gradient, expected 0"
        elif "loss" in row:
            checks["non_finite"] = ""
        self._skipped_steps = max(skipped, self._skipped_steps)
        drift = _number(row, "teacher_drift")
        if not math.isnan(drift):
            checks["teacher_drift"] = (
                f"the teacher differs by {drift:.3g} between replicas, expected 0" if drift else ""
            )
        return checks

    def _lasting(self, row: Row) -> dict[str, str]:
        loss, entropy = _number(row, "loss"), _number(row, "teacher_entropy")
        prototypes, data_wait = _number(row, "prototype_perplexity"), _number(row, "data_wait")
        checks: dict[str, str] = {}
        if not (math.isnan(loss) and math.isnan(entropy)):
            checks["uniform_collapse"] = self._uniform(loss, entropy, prototypes)
        if not (math.isnan(entropy) or math.isnan(prototypes)):
            checks["one_hot_collapse"] = self._one_hot(entropy, prototypes)
        if not math.isnan(prototypes):
            checks["few_prototypes"] = self._few(prototypes) if not checks.get("one_hot_collapse") else ""
        if not math.isnan(data_wait):
            share = self.limits.starving_share
            seen = f"training waits for data {data_wait:.0%} of the time, expected less than {share:.0%}"
            checks["starving"] = seen if data_wait > share else ""
        return checks

    def _uniform(self, loss: float, entropy: float, prototypes: float) -> str:
        """Two ways to see it: the targets are uniform, or the loss sits at ln K and the targets tell nothing."""
        limits, ln_k = self.limits, self._ln_k
        if entropy >= limits.uniform_entropy * ln_k:
            return f"teacher entropy {entropy:.4f} is that of uniform targets (ln {self.num_prototypes} = {ln_k:.4f})"
        # Information of a target about its sample: H(mean target) - mean H(target). A collapsed teacher gives every
        # sample the same target, so it is 0; a learning run passes ln K with more.
        information = math.log(prototypes) - entropy if prototypes > 0 else math.nan
        informative = information > limits.uniform_information * ln_k
        if abs(loss - ln_k) <= limits.loss_band * ln_k and not informative:
            return f"the loss stays at {loss:.4f}, which is ln {self.num_prototypes} = {ln_k:.4f}: nothing is learned"
        return ""

    def _one_hot(self, entropy: float, prototypes: float) -> str:
        limits = self.limits
        # Sharp targets alone are healthy (a teacher temperature of 0.04 makes them); the same one for all is not.
        if entropy <= limits.one_hot_entropy * self._ln_k and prototypes <= limits.one_hot_prototypes:
            return (
                f"teacher entropy {entropy:.4f} with {prototypes:.1f} prototypes in use of {self.num_prototypes}: "
                f"every image gets the same target (expected more than {limits.one_hot_prototypes:.0f} in use)"
            )
        return ""

    def _few(self, prototypes: float) -> str:
        least = max(self.limits.few_prototypes * self.num_prototypes, self.limits.one_hot_prototypes)
        if prototypes >= least:
            return ""
        return f"{prototypes:.1f} prototypes in use of {self.num_prototypes}, expected at least {least:.0f}"


_IMMEDIATE = frozenset({"non_finite", "teacher_drift"})
_AFTER_WARMUP = frozenset({"uniform_collapse", "one_hot_collapse", "few_prototypes"})
_REMEDIES: Mapping[str, str] = {
    "uniform_collapse": (
        "Lower the teacher temperature (its warm-up too), check that the center's momentum is below 1, "
        "try a batch norm in the head or a lower learning rate, and start again from an earlier checkpoint"
    ),
    "one_hot_collapse": (
        "Check that centering is on and its momentum is at most 0.9, raise the teacher temperature or lengthen its "
        "warm-up, and start again from an earlier checkpoint"
    ),
    "few_prototypes": "Use fewer prototypes, a higher teacher temperature or a larger batch; watch the k-NN accuracy",
    "non_finite": "See the ledger for the sample ids; use bf16 or fp32, a lower learning rate or stronger clipping",
    "starving": "Raise data.num_workers, move the shards to faster storage or resize the images when building shards",
    "teacher_drift": "A replica computed something else: look for a faulty GPU or node; replica 0 was taken",
}


def _number(row: Row, name: str, missing: float = math.nan) -> float:
    """The value under `name`, or `missing` where it is absent or null."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else missing
