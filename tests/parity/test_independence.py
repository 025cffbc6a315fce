"""Nothing random about a crop depends on anything else: other operations, views, samples, epochs, repeats or seeds.

Chi-square tests of independence over 200,000 draws, fixed seeds, Holm's correction at 0.01 within each group. That they
can fail is tested as well, with two values in a hundred tied together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2_contingency

from dino_dist.config import AugmentSection
from dino_dist.data.crops.crop_parameters import Column, draw
from dino_dist.views import view_recipes

pytestmark = pytest.mark.slow

Categories = NDArray[np.int64]
"""Numbers from 0 on, [n]."""

LEVEL = 0.01
NUM_DRAWS = 200_000

GATED = replace(view_recipes(AugmentSection())[2], jitter_p=0.5, gray_p=0.5, blur_p=0.5, solarize_p=0.5)
"""Each gate open half of the time, which tells most; boxes that always fit, as area and ratio depend where not."""
ON = replace(GATED, jitter_p=1.0, blur_p=1.0)
"""Every factor shows."""


def rejected(p_values: dict[str, float]) -> list[str]:
    """Names of the tests that Holm's procedure rejects at `LEVEL`, with their p."""
    found = []
    for rank, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p_value > LEVEL / (len(p_values) - rank):
            break
        found.append(f"{name}: p = {p_value:.2g} among {len(p_values)} tests")
    return found


def independent(one: Categories, other: Categories) -> float:
    """p of two columns of category numbers being independent."""
    table = np.bincount(one * (int(other.max()) + 1) + other, minlength=(int(one.max()) + 1) * (int(other.max()) + 1))
    table = table.reshape(int(one.max()) + 1, -1)
    table = table[table.any(axis=1)][:, table.any(axis=0)]
    return float(chi2_contingency(table, correction=False).pvalue)


def eighths(values: NDArray[np.float64]) -> Categories:
    """Numbers 0..7 of the bin of each value, between the octiles."""
    edges = np.unique(np.quantile(values, np.arange(1, 8) / 8))
    return np.searchsorted(edges, values, side="right")


HUGE = (7500, 10_000)
"""Rounding to whole pixels, which ties offsets to sides a little, does not show on images of this size."""


@cache
def slots(num_views: int = 4, seed: int = 1, epoch: int = 0, repeat: int = 0) -> list[dict[str, Categories]]:
    """The category of everything random in each of up to four views, [n], of boxes that always fit.

    Two views with all operations on, so that every factor shows, and two in which they are gated.
    """
    views = draw(
        [ON, ON, GATED, GATED][:num_views],
        seed=seed,
        epochs=np.full(NUM_DRAWS, epoch),
        sample_ids=np.arange(NUM_DRAWS),
        sizes=np.tile(np.array([HUGE]), (NUM_DRAWS, 1)),
        repeats=np.full(NUM_DRAWS, repeat),
    )
    found = []
    for rows in views:
        top, left, height, width = rows[:, : Column.WIDTH + 1].T
        columns = {
            "area": eighths(height * width),
            "ratio": eighths(width / height),
            "top": eighths(top / (HUGE[0] - height)),
            "left": eighths(left / (HUGE[1] - width)),
            "flip": rows[:, Column.FLIP].astype(np.int64),
            "order": rows[:, Column.JITTER_ORDER].astype(np.int64),
            "jitter": (rows[:, Column.HUE] != 0.0).astype(np.int64),
            "gray": rows[:, Column.GRAY].astype(np.int64),
            "blur": (rows[:, Column.BLUR_SIGMA] > 0.0).astype(np.int64),
            "solarize": rows[:, Column.SOLARIZE].astype(np.int64),
        }
        for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "BLUR_SIGMA"):
            if columns["blur" if name == "BLUR_SIGMA" else "jitter"].all():
                columns[name.lower()] = eighths(rows[:, Column[name]])
        found.append({name: column for name, column in columns.items() if column.any() and np.ptp(column)})
    return found


def dependence_tests(
    pairs: Iterable[tuple[str, Categories, str, Categories]],
) -> dict[str, float]:
    return {f"{first} and {second}": independent(one, other) for first, one, second, other in pairs}


def test_slots_of_a_view_are_independent() -> None:
    all_on, _, gated, _ = slots()
    assert len(all_on) == 13
    assert {"jitter", "blur"} <= gated.keys()
    for view in (all_on, gated):
        pairs = ((a, view[a], b, view[b]) for a, b in itertools.combinations(view, 2))
        assert not rejected(dependence_tests(pairs))


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 2), (2, 3)])
def test_views_are_independent(one: int, other: int) -> None:
    first, second = slots()[one], slots()[other]
    pairs = ((a, first[a], b, second[b]) for a, b in itertools.product(first, second))
    assert not rejected(dependence_tests(pairs))


def test_samples_epochs_replicas_and_seeds_are_independent() -> None:
    here = slots()[0]
    others = {
        "epoch": slots(1, epoch=1)[0],
        "repeat": slots(1, repeat=1)[0],
        "seed": slots(1, seed=2)[0],
        "neighbour": {name: np.roll(column, 1) for name, column in here.items()},
    }
    pairs = ((a, here[a], f"{a} of another {what}", there[a]) for what, there in others.items() for a in here)
    assert not rejected(dependence_tests(pairs))


def test_a_little_dependence_is_found() -> None:
    """Two values in a hundred taken over from another view, or one gate tied to another."""
    first, second = slots()[0], slots()[1]
    copied = np.arange(NUM_DRAWS) % 50 == 0
    for name in ("area", "top", "order", "hue"):
        tied = {**second, name: np.where(copied, first[name], second[name])}
        pairs = ((a, first[a], b, tied[b]) for a, b in itertools.product(first, tied))
        assert [text.split(":")[0] for text in rejected(dependence_tests(pairs))] == [f"{name} and {name}"]
    tied_gray = np.where(copied, first["flip"], first["gray"])
    assert rejected(dependence_tests([("flip", first["flip"], "gray", tied_gray)]))
