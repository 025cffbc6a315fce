"""Alarms fire by name and in time on what has collapsed, and stay silent on what is healthy."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator

import pytest

from dino_dist.alarms import Alarm, CollapseWatch

K = 1024
LN_K = math.log(K)
Row = dict[str, object]


def watch(warmup_steps: int = 100) -> CollapseWatch:
    return CollapseWatch(num_prototypes=K, warmup_steps=warmup_steps)


def series(steps: int, every: int, make: Callable[[int], dict[str, float]]) -> Iterator[Row]:
    for step in range(every, steps + 1, every):
        yield {"step": step, **make(step)}


def raised(collapse_watch: CollapseWatch, rows: Iterator[Row]) -> list[Alarm]:
    return [alarm for row in rows for alarm in collapse_watch.observe(row)]


def healthy(noise: random.Random) -> Callable[[int], dict[str, float]]:
    """What a small run looks like (K = 1,024, batch 64): from ln K to sharper targets and fewer prototypes."""

    def row(step: int) -> dict[str, float]:
        done = min(step / 1000, 1.0)
        entropy = 5.5 - 4.5 * done + noise.gauss(0.0, 0.1)
        return {
            "loss": max(LN_K - 4.5 * done, entropy) + noise.gauss(0.0, 0.1),
            "teacher_entropy": max(entropy, 0.2),
            "prototype_perplexity": 800.0 * (1 - done) + 60.0,
            "data_wait": noise.random() * 0.3,
            "grad_norm": 2.0,
            "teacher_drift": 0.0,
            "skipped_steps": 0,
        }

    return row


UNIFORM = {"loss": LN_K + 0.001, "teacher_entropy": LN_K - 0.002, "prototype_perplexity": 1023.9}
ONE_HOT = {"loss": 0.05, "teacher_entropy": 0.02, "prototype_perplexity": 1.1}


@pytest.mark.parametrize("every", [1, 10, 50, 100])
def test_no_alarm_in_a_healthy_run(every: int) -> None:
    assert raised(watch(), series(2000, every, healthy(random.Random(every)))) == []


@pytest.mark.parametrize("every", [1, 7, 50, 100])
@pytest.mark.parametrize("warmup_steps", [0, 60, 1000])
@pytest.mark.parametrize(("name", "row"), [("uniform_collapse", UNIFORM), ("one_hot_collapse", ONE_HOT)])
def test_forced_collapse_is_named_once_within_200_steps_after_the_warmup(
    name: str, row: dict[str, float], warmup_steps: int, every: int
) -> None:
    alarms = raised(watch(warmup_steps), series(warmup_steps + 1000, every, lambda _: row))
    assert [alarm.name for alarm in alarms] == [name]
    assert warmup_steps < alarms[0].step <= warmup_steps + 200


def test_collapse_that_begins_after_a_healthy_phase_is_named() -> None:
    noise = random.Random(0)

    def row(step: int) -> dict[str, float]:
        return healthy(noise)(step) if step < 1500 else {**healthy(noise)(step), **ONE_HOT}

    alarms = raised(watch(), series(2000, 10, row))
    assert [alarm.name for alarm in alarms] == ["one_hot_collapse"]
    assert 1500 < alarms[0].step <= 1700


def test_a_loss_at_ln_k_alone_is_enough_when_nothing_else_is_logged() -> None:
    assert [a.name for a in raised(watch(), series(400, 10, lambda _: {"loss": LN_K}))] == ["uniform_collapse"]


def test_a_learning_run_may_pass_ln_k() -> None:
    """The student is still ignorant, but the targets differ from image to image."""
    row = {"loss": LN_K, "teacher_entropy": 5.0, "prototype_perplexity": 700.0}
    assert raised(watch(), series(400, 10, lambda _: row)) == []


def test_sharp_targets_over_many_prototypes_are_healthy() -> None:
    row = {"loss": 0.5, "teacher_entropy": 0.05, "prototype_perplexity": 60.0}
    assert raised(watch(), series(400, 10, lambda _: row)) == []


def test_few_prototypes_is_told_apart_from_one_hot() -> None:
    row = {"loss": 1.2, "teacher_entropy": 1.0, "prototype_perplexity": 3.5}
    assert [a.name for a in raised(watch(), series(400, 10, lambda _: row))] == ["few_prototypes"]


@pytest.mark.parametrize(
    "row", [{"loss": math.nan}, {"loss": 3.0, "grad_norm": math.inf}, {"loss": None, "non_finite": ["loss"]}]
)
def test_a_bad_number_is_named_at_once_even_in_the_warmup(row: Row) -> None:
    alarms = watch().observe({"step": 1, **row})
    assert [alarm.name for alarm in alarms] == ["non_finite"]


def test_skipped_steps_alarm_when_they_grow() -> None:
    collapse_watch = watch()
    rows = [(10, 0), (20, 2), (30, 3), (40, 3), (50, 4)]
    steps = [a.step for s, n in rows for a in collapse_watch.observe({"step": s, "loss": 3.0, "skipped_steps": n})]
    assert steps == [20, 50]


def test_drift_between_replicas_is_named_at_once() -> None:
    alarms = watch().observe({"step": 100, "teacher_drift": 1e-7})
    assert [alarm.name for alarm in alarms] == ["teacher_drift"]


def test_starving_needs_a_lasting_wait_and_fires_again_after_it_cleared() -> None:
    collapse_watch = watch()

    def row(step: int) -> dict[str, float]:
        return {"data_wait": 0.9 if step <= 200 or step > 400 else 0.05}

    assert [(a.name, a.step) for a in raised(collapse_watch, series(600, 10, row))] == [
        ("starving", 50),
        ("starving", 450),
    ]
    single = raised(watch(), series(600, 10, lambda step: {"data_wait": 0.9 if step % 40 == 0 else 0.1}))
    assert single == []


def test_rows_of_an_evaluation_alone_change_nothing() -> None:
    collapse_watch = watch(0)
    for step in range(10, 50, 10):
        collapse_watch.observe({"step": step, **ONE_HOT})
        collapse_watch.observe({"step": step, "knn_top1": 0.1, "loss": None})
    assert [a.name for a in collapse_watch.observe({"step": 50, **ONE_HOT})] == ["one_hot_collapse"]


@pytest.mark.parametrize("stop_after", [30, 90, 150, 160, 500])
def test_a_resumed_watch_says_what_an_uninterrupted_one_says(stop_after: int) -> None:
    noise = [healthy(random.Random(5))(step) for step in range(0, 1001)]

    def row(step: int) -> dict[str, float]:
        return {**noise[step], **(UNIFORM if step < 600 else {}), "skipped_steps": step // 300}

    whole = raised(watch(), series(1000, 10, row))
    first, second = watch(), watch()
    resumed: list[Alarm] = []
    for logged in series(1000, 10, row):
        before_stop = int(str(logged["step"])) <= stop_after
        resumed += (first if before_stop else second).observe(logged)
        if logged["step"] == stop_after:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert len(whole) > 1
    assert resumed == whole


def test_the_line_tells_value_expectation_and_remedy() -> None:
    (alarm,) = raised(watch(0), series(100, 10, lambda _: ONE_HOT))
    assert "\n" not in alarm.line
    for part in ("one_hot_collapse", "step 50", "0.0200", "1.1 prototypes", "of 1024", "expected", "centering"):
        assert part in alarm.line
