"""Crop boxes, gates and factors have torchvision's distributions.

Two-sample tests of 200,000 draws against 100,000 or 200,000 of torchvision's own, fixed seeds, Holm's correction at
0.01 within each group. That they can fail is tested as well: samplers with one mistake each must be told from the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2_contingency, chisquare, ks_2samp, kstest
from torchvision.transforms import ColorJitter, RandomResizedCrop, v2

from dino_dist.config import AugmentSection
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe, draw
from dino_dist.views import view_recipes

pytestmark = pytest.mark.slow

Floats = NDArray[np.float64]
PValues = dict[str, float]

LEVEL = 0.01
NUM_DRAWS = 200_000

GLOBAL, LOCAL = view_recipes(AugmentSection())[1:3]
"""The second global crop and a local one, as published."""
RECIPES = {"global": GLOBAL, "local": LOCAL}

PHOTOGRAPH, TINY, PANORAMA, STRIP, TOWER = (375, 500), (7, 5), (300, 900), (200, 1200), (1200, 200)
"""(height, width). Of a panorama some global boxes fit, of a strip none does: all are the fallback box."""

CASES = [("global", PHOTOGRAPH), ("local", PHOTOGRAPH), ("global", TINY), ("global", PANORAMA), ("local", STRIP)]


@cache
def torchvision_boxes(view: str, size: tuple[int, int], n: int | None = None) -> Floats:
    """(top, left, height, width) of n draws of torchvision, which is slow: half as many where that tells enough."""
    n = n or (NUM_DRAWS // 2 if size in (TINY, PANORAMA, STRIP) else NUM_DRAWS)
    recipe, image = RECIPES[view], torch.empty(3, *size)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(len(view) + size[0])
        boxes = [RandomResizedCrop.get_params(image, list(recipe.scale), list(recipe.ratio)) for _ in range(n)]
    return np.array(boxes, dtype=np.float64)


@cache
def our_rows(view: str, size: tuple[int, int], n: int = NUM_DRAWS) -> Floats:
    (rows,) = draw_many([RECIPES[view]], size=size, n=n)
    return rows


def draw_many(recipes: list[ViewRecipe], *, size: tuple[int, int], n: int) -> Floats:
    none = np.zeros(n, dtype=np.int64)
    return draw(recipes, seed=1, epochs=none, sample_ids=np.arange(n), sizes=np.tile(np.array([size]), (n, 1)))


def our_boxes(view: str, size: tuple[int, int], n: int = NUM_DRAWS) -> Floats:
    return our_rows(view, size, n)[:, : Column.WIDTH + 1]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Another RandomResizedCrop, many draws at once, in which one thing at a time may be wrong."""

    tries: int = 10
    log_uniform: bool = True
    whole_image_allowed: bool = True
    rounded: Callable[[Floats], Floats] = np.rint
    last_offset_allowed: bool = True
    fallback_centered: bool = True

    def boxes(self, view: str, size: tuple[int, int], n: int) -> Floats:
        recipe, (height, width) = RECIPES[view], size
        rng = np.random.default_rng(7)
        area = height * width * rng.uniform(*recipe.scale, (n, self.tries))
        low, high = recipe.ratio
        if self.log_uniform:
            ratio = np.exp(rng.uniform(math.log(low), math.log(high), (n, self.tries)))
        else:
            ratio = rng.uniform(low, high, (n, self.tries))
        w, h = self.rounded(np.sqrt(area * ratio)), self.rounded(np.sqrt(area / ratio))
        most = 0 if self.whole_image_allowed else 1
        fits = (w > 0) & (w <= width - most) & (h > 0) & (h <= height - most)
        first = fits.argmax(axis=1)
        w, h = w[np.arange(n), first], h[np.arange(n), first]
        choices = 1 if self.last_offset_allowed else 0
        top = np.floor(rng.random(n) * np.maximum(height - h + choices, 1))
        left = np.floor(rng.random(n) * np.maximum(width - w + choices, 1))
        fallback = fallback_box(recipe, size)
        if not self.fallback_centered:
            fallback = (0, 0, *fallback[2:])
        return np.where(fits.any(axis=1)[:, None], np.stack([top, left, h, w], axis=1), np.array(fallback))


def fallback_box(recipe: ViewRecipe, size: tuple[int, int]) -> tuple[int, int, int, int]:
    height, width = size
    w = min(width, round(height * recipe.ratio[1]))
    h = min(height, round(width / recipe.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def rejected(p_values: PValues) -> list[str]:
    """Names of the tests that Holm's procedure rejects at `LEVEL`, with their p."""
    found = []
    for rank, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p_value > LEVEL / (len(p_values) - rank):
            break
        found.append(f"{name}: p = {p_value:.2g} among {len(p_values)} tests")
    return found


def same_categories(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> float:
    """p of two samples of category numbers coming from one distribution; rare categories count as one."""
    stop = int(max(ours.max(), theirs.max())) + 1
    table = np.stack([np.bincount(ours, minlength=stop), np.bincount(theirs, minlength=stop)])
    rare = table.sum(axis=0) < 20
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    return 1.0 if table.shape[1] < 2 else float(chi2_contingency(table, correction=False).pvalue)


def eighths(values: Floats, like: Floats) -> NDArray[np.int64]:
    """Numbers 0..7 of the bin of each value, between the octiles of `like`."""
    edges = np.unique(np.quantile(like, np.arange(1, 8) / 8))
    return np.searchsorted(edges, values, side="right")


def box_tests(ours: Floats, theirs: Floats, size: tuple[int, int], recipe: ViewRecipe) -> PValues:
    """p of each statistic of two samples of boxes of one image size."""
    sides = np.array(size, dtype=np.float64)
    p_values: PValues = {}
    if sides.prod() < 400:
        places = (int(size[0]) + 1, int(size[1]) + 1) * 2
        both = [np.ravel_multi_index(tuple(boxes.astype(np.int64).T), places) for boxes in (ours, theirs)]
        p_values["box"] = same_categories(*both)
    else:
        pairs = quantities(ours, theirs, sides)
        for name, (one, other) in pairs.items():
            p_values[name] = float(ks_2samp(one, other, method="asymp").pvalue)
        for first, second in (("area", "log ratio"), ("height", "top"), ("width", "left"), ("top", "left")):
            joint = [
                eighths(pairs[first][i], pairs[first][1]) * 8 + eighths(pairs[second][i], pairs[second][1])
                for i in range(2)
            ]
            p_values[f"{first} and {second}"] = same_categories(*joint)
    fallback = np.array(fallback_box(recipe, size))
    marks = {
        "fallback": lambda boxes: (boxes == fallback).all(axis=1),
        "full height": lambda boxes: boxes[:, 2] == sides[0],
        "full width": lambda boxes: boxes[:, 3] == sides[1],
        "at the far end": lambda boxes: (boxes[:, :2] + boxes[:, 2:] == sides).any(axis=1),
    }
    for name, mark in marks.items():
        p_values[name] = same_categories(mark(ours).astype(np.int64), mark(theirs).astype(np.int64))
    return p_values


def quantities(ours: Floats, theirs: Floats, sides: Floats) -> dict[str, tuple[Floats, Floats]]:
    """Continuous or nearly so: the area's share, the logarithm of the ratio, sides and offsets in parts of the most."""

    def of(boxes: Floats) -> dict[str, Floats]:
        offsets = boxes[:, :2] / np.maximum(sides - boxes[:, 2:], 1.0)
        return {
            "area": boxes[:, 2:].prod(axis=1) / sides.prod(),
            "log ratio": np.log(boxes[:, 3] / boxes[:, 2]),
            "height": boxes[:, 2] / sides[0],
            "width": boxes[:, 3] / sides[1],
            "top": offsets[:, 0],
            "left": offsets[:, 1],
            "bottom": boxes[:, 0] + boxes[:, 2],
            "right": boxes[:, 1] + boxes[:, 3],
        }

    return {name: (one, other) for (name, one), other in zip(of(ours).items(), of(theirs).values(), strict=True)}


@pytest.mark.parametrize(("view", "size"), CASES)
def test_boxes(view: str, size: tuple[int, int]) -> None:
    p_values = box_tests(our_boxes(view, size), torchvision_boxes(view, size), size, RECIPES[view])
    assert not rejected(p_values)


@pytest.mark.parametrize("case", [("global", PANORAMA), ("local", STRIP)])
def test_some_boxes_of_panoramas_are_the_fallback(case: tuple[str, tuple[int, int]]) -> None:
    """Their share is among `box_tests`; here, that there is something to compare."""
    fallback = np.array(fallback_box(RECIPES[case[0]], case[1]))
    shares = [(boxes(*case) == fallback).all(axis=1).mean() for boxes in (our_boxes, torchvision_boxes)]
    assert all(0.001 < share < 0.99 for share in shares), shares


@pytest.mark.parametrize("size", [STRIP, TOWER])
def test_where_nothing_fits_all_boxes_are_the_fallback(size: tuple[int, int]) -> None:
    for boxes in (our_boxes("global", size), torchvision_boxes("global", size, 2_000)):
        assert (boxes == np.array(fallback_box(GLOBAL, size))).all()


MISTAKES = {
    "whole image refused, small": (Sampler(whole_image_allowed=False), CASES[2]),
    "whole image refused": (Sampler(whole_image_allowed=False), CASES[0]),
    "ratio uniform": (Sampler(log_uniform=False), CASES[1]),
    "sides rounded down, small": (Sampler(rounded=np.floor), CASES[2]),
    "last offset left out": (Sampler(last_offset_allowed=False), CASES[2]),
    "last offset left out, large": (Sampler(last_offset_allowed=False), CASES[0]),
    "nine tries": (Sampler(tries=9), CASES[3]),
    "fallback in the corner": (Sampler(fallback_centered=False), CASES[3]),
    "eleven tries, local": (Sampler(tries=11), CASES[4]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_box_sampler_are_found(mistake: str) -> None:
    sampler, (view, size) = MISTAKES[mistake]
    theirs = torchvision_boxes(view, size)
    assert rejected(box_tests(sampler.boxes(view, size, NUM_DRAWS), theirs, size, RECIPES[view]))


@pytest.mark.parametrize(("view", "size"), CASES)
def test_a_sampler_without_mistakes_passes(view: str, size: tuple[int, int]) -> None:
    """So the mistakes above are found for what they are."""
    boxes = Sampler().boxes(view, size, NUM_DRAWS)
    assert not rejected(box_tests(boxes, torchvision_boxes(view, size), size, RECIPES[view]))


@cache
def torchvision_jitter() -> tuple[Floats, NDArray[np.int64]]:
    """Factors [n, 4] and numbers of the orders [n] of torchvision's ColorJitter."""
    jitter = ColorJitter(GLOBAL.brightness, GLOBAL.contrast, GLOBAL.saturation, GLOBAL.hue)
    numbers = {order: number for number, order in enumerate(itertools.permutations(range(4)))}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(3)
        drawn = [
            ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            for _ in range(NUM_DRAWS)
        ]
    factors = np.array([row[1:] for row in drawn], dtype=np.float64)
    return factors, np.array([numbers[tuple(row[0].tolist())] for row in drawn])


@cache
def torchvision_sigmas() -> Floats:
    blur = v2.GaussianBlur(9, GLOBAL.blur_sigma_px)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return np.array([blur.make_params([])["sigma"][0] for _ in range(NUM_DRAWS)])


def color_tests(rows: Floats, recipe: ViewRecipe) -> PValues:
    """p of each gate against its probability, of each factor against torchvision's and against the range."""
    on, blurred = rows[:, Column.HUE] != 0.0, rows[:, Column.BLUR_SIGMA] > 0.0
    gates = {
        "flip": (rows[:, Column.FLIP], recipe.flip_p),
        "jitter": (on, recipe.jitter_p),
        "gray": (rows[:, Column.GRAY], recipe.gray_p),
        "blur": (blurred, recipe.blur_p),
        "solarize": (rows[:, Column.SOLARIZE], recipe.solarize_p),
    }
    p_values = {name: float(binomtest(int(seen.sum()), len(rows), p).pvalue) for name, (seen, p) in gates.items()}
    factors, orders = torchvision_jitter()
    names = ("brightness", "contrast", "saturation", "hue")
    for theirs, name in zip(factors.T, names, strict=True):
        ours = rows[on, Column[name.upper()]]
        strength = getattr(recipe, name)
        low = -strength if name == "hue" else 1.0 - strength
        p_values[f"{name} as torchvision's"] = float(ks_2samp(ours, theirs).pvalue)
        p_values[f"{name} in its range"] = float(kstest(ours, "uniform", args=(low, 2 * strength)).pvalue)
    sigmas = rows[blurred, Column.BLUR_SIGMA]
    p_values["sigma as torchvision's"] = float(ks_2samp(sigmas, torchvision_sigmas()).pvalue)
    p_values["sigma in its range"] = float(kstest(sigmas, "uniform", args=(0.1, 1.9)).pvalue)
    ours_orders = rows[:, Column.JITTER_ORDER].astype(np.int64)
    p_values["order as torchvision's"] = same_categories(ours_orders, orders)
    p_values["24 orders alike"] = float(chisquare(np.bincount(ours_orders, minlength=24)).pvalue)
    return p_values


@pytest.mark.parametrize("view", RECIPES)
def test_gates_and_factors(view: str) -> None:
    assert not rejected(color_tests(our_rows(view, PHOTOGRAPH), RECIPES[view]))


@pytest.mark.parametrize(
    "change",
    [
        {"flip_p": 0.49},
        {"jitter_p": 0.79},
        {"gray_p": 0.21},
        {"blur_p": 0.9},
        {"solarize_p": 0.0},
        {"brightness": 0.39},
        {"contrast": 0.41},
        {"saturation": 0.4},
        {"hue": 0.098},
        {"blur_sigma_px": (0.15, 2.0)},
        {"blur_sigma_px": (0.1, 2.1)},
    ],
)
def test_mistakes_in_gates_and_factors_are_found(change: dict[str, float]) -> None:
    (rows,) = draw_many([replace(GLOBAL, **change)], size=PHOTOGRAPH, n=NUM_DRAWS)  # type: ignore[arg-type]
    assert rejected(color_tests(rows, GLOBAL))


def test_a_missing_order_is_found() -> None:
    rows = our_rows("global", PHOTOGRAPH).copy()
    rows[rows[:, Column.JITTER_ORDER] == 23, Column.JITTER_ORDER] = 0
    found = rejected(color_tests(rows, GLOBAL))
    assert {name.split(":")[0] for name in found} == {"order as torchvision's", "24 orders alike"}
