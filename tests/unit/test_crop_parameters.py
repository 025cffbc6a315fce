"""Multi-crop parameters: the published distributions, and independence of the batch they are drawn in."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop

from dino_dist.config import AugmentSection
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe, draw
from dino_dist.errors import UserError
from dino_dist.randomness import Purpose, sample_words
from dino_dist.views import view_recipes

GLOBAL, LOCAL = view_recipes(AugmentSection())[1:3]
"""The second global crop and a local one, as published."""
NUM_DRAWS = 20_000


def draw_many(recipes: list[ViewRecipe], height: int, width: int, n: int = NUM_DRAWS) -> NDArray[np.float64]:
    sizes = np.tile(np.array([[height, width]]), (n, 1))
    return draw(recipes, seed=42, epochs=np.zeros(n, dtype=np.int64), sample_ids=np.arange(n), sizes=sizes)


def boxes_of(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows[..., : Column.WIDTH + 1]


def assert_all_plausible(p_values: dict[str, float]) -> None:
    """Holm's correction at 0.01 over all the tests of one group."""
    for rank, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        assert p_value > 0.01 / (len(p_values) - rank), f"{name}: p = {p_value:.2g} among {len(p_values)} tests"


def scalar_box(words: list[int], recipe: ViewRecipe, height: int, width: int) -> tuple[int, int, int, int]:
    """The published RandomResizedCrop, try by try, on the words of one draw."""
    u = [word / 2**32 for word in words]
    low, high = (math.log(value) for value in recipe.ratio)
    for attempt in range(10):
        area = height * width * (recipe.scale[0] + u[attempt] * (recipe.scale[1] - recipe.scale[0]))
        ratio = math.exp(low + u[10 + attempt] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return words[20] * (height - h + 1) >> 32, words[21] * (width - w + 1) >> 32, h, w
    w, h = width, height
    if width / height < recipe.ratio[0]:
        h = round(width / recipe.ratio[0])
    elif width / height > recipe.ratio[1]:
        w = round(height * recipe.ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(375, 500), (300, 900), (200, 1200), (8, 8), (1, 1), (1, 300), (300, 1), (5, 7)])
def test_boxes_equal_the_scalar_algorithm(size: tuple[int, int]) -> None:
    n = 300
    rows = draw_many([GLOBAL, LOCAL], *size, n=n)
    for view, recipe in enumerate((GLOBAL, LOCAL)):
        words = sample_words(42, np.zeros(n, dtype=np.int64), np.arange(n), view, purpose=Purpose.CROP, num_words=33)
        expected = [scalar_box(row, recipe, *size) for row in words.tolist()]
        assert np.array_equal(boxes_of(rows[view]), np.array(expected, dtype=np.float64))


def test_parameters_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    n = 60
    ids, epochs, sizes = rng.integers(0, 2**40, n), rng.integers(0, 3, n), rng.integers(1, 700, (n, 2))
    recipes = [GLOBAL, GLOBAL, LOCAL]
    whole = draw(recipes, seed=3, epochs=epochs, sample_ids=ids, sizes=sizes)
    some = rng.permutation(n)[:17]
    part = draw(recipes, seed=3, epochs=epochs[some], sample_ids=ids[some], sizes=sizes[some])
    assert np.array_equal(whole[:, some], part)
    fewer_views = draw(recipes[:2], seed=3, epochs=epochs, sample_ids=ids, sizes=sizes)
    assert np.array_equal(whole[:2], fewer_views)
    assert not np.array_equal(whole[0], whole[1]), "two views of one recipe must differ"
    assert not np.array_equal(whole, draw(recipes, seed=4, epochs=epochs, sample_ids=ids, sizes=sizes))
    assert not np.array_equal(whole, draw(recipes, seed=3, epochs=epochs + 1, sample_ids=ids, sizes=sizes))


def test_image_size_moves_the_box_only() -> None:
    small, large = draw_many([GLOBAL], 30, 40, n=50), draw_many([GLOBAL], 300, 400, n=50)
    assert np.array_equal(small[..., Column.FLIP :], large[..., Column.FLIP :])
    assert not np.array_equal(boxes_of(small), boxes_of(large))


@pytest.mark.parametrize(("recipe", "size"), [(GLOBAL, (375, 500)), (LOCAL, (500, 375)), (GLOBAL, (300, 900))])
def test_box_marginals_equal_torchvision(recipe: ViewRecipe, size: tuple[int, int]) -> None:
    image = torch.empty(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, list(recipe.scale), list(recipe.ratio)) for _ in range(NUM_DRAWS)]
        )
    ours = boxes_of(draw_many([recipe], *size))[0]
    statistics = {
        "top": (ours[:, 0], theirs[:, 0]),
        "left": (ours[:, 1], theirs[:, 1]),
        "height": (ours[:, 2], theirs[:, 2]),
        "width": (ours[:, 3], theirs[:, 3]),
        "area": (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        "ratio": (ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]),
        "bottom": (ours[:, 0] + ours[:, 2], theirs[:, 0] + theirs[:, 2]),
    }
    assert_all_plausible({name: float(ks_2samp(*pair).pvalue) for name, pair in statistics.items()})


def test_color_marginals() -> None:
    (rows,) = draw_many([GLOBAL], 375, 500)
    on = rows[:, Column.HUE] != 0.0
    blurred = rows[:, Column.BLUR_SIGMA] > 0.0
    gates = {
        "flip": (rows[:, Column.FLIP], 0.5),
        "jitter": (on, 0.8),
        "gray": (rows[:, Column.GRAY], 0.2),
        "blur": (blurred, 0.1),
        "solarize": (rows[:, Column.SOLARIZE], 0.2),
        "jitter and gray": (on * rows[:, Column.GRAY], 0.16),
        "flip and solarize": (rows[:, Column.FLIP] * rows[:, Column.SOLARIZE], 0.1),
    }
    p_values = {name: float(binomtest(int(seen.sum()), NUM_DRAWS, p).pvalue) for name, (seen, p) in gates.items()}
    ranges = {
        "brightness": (rows[on, Column.BRIGHTNESS], 0.6, 0.8),
        "contrast": (rows[on, Column.CONTRAST], 0.6, 0.8),
        "saturation": (rows[on, Column.SATURATION], 0.8, 0.4),
        "hue": (rows[on, Column.HUE], -0.1, 0.2),
        "sigma": (rows[blurred, Column.BLUR_SIGMA], 0.1, 1.9),
    }
    for name, (values, low, width) in ranges.items():
        p_values[name] = float(kstest(values, "uniform", args=(low, width)).pvalue)
    orders, counts = np.unique(rows[:, Column.JITTER_ORDER], return_counts=True)
    assert orders.tolist() == list(range(24))
    p_values["order"] = float(chisquare(counts).pvalue)
    assert_all_plausible(p_values)


def test_panoramas_fall_back_to_the_largest_centered_box() -> None:
    (wide,) = boxes_of(draw_many([GLOBAL], 200, 1200, n=500))
    assert (wide == [0, (1200 - 267) // 2, 200, 267]).all()
    (tall,) = boxes_of(draw_many([GLOBAL], 1200, 200, n=500))
    assert (tall == [(1200 - 267) // 2, 0, 267, 200]).all()
    (mixed,) = boxes_of(draw_many([GLOBAL], 300, 900))
    fell_back = (mixed == [0, 250, 300, 400]).all(axis=1)
    assert 0 < fell_back.sum() < NUM_DRAWS, "at 3 : 1 some draws fit and some do not"


def test_boxes_lie_inside_any_image() -> None:
    rng = np.random.default_rng(5)
    n = 5000
    sizes = np.exp(rng.uniform(0, math.log(5000), (n, 2))).astype(np.int64)
    rows = draw([GLOBAL, LOCAL], seed=1, epochs=np.zeros(n, dtype=np.int64), sample_ids=np.arange(n), sizes=sizes)
    top, left, height, width = np.moveaxis(boxes_of(rows), -1, 0)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()


def test_what_is_gated_off_is_the_identity() -> None:
    off = replace(GLOBAL, flip_p=0.0, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)
    (rows,) = draw_many([off], 375, 500, n=1000)
    assert (rows[:, Column.BRIGHTNESS : Column.SATURATION + 1] == 1.0).all()
    for column in (Column.FLIP, Column.HUE, Column.GRAY, Column.BLUR_SIGMA, Column.SOLARIZE):
        assert (rows[:, column] == 0.0).all()
    always = replace(GLOBAL, flip_p=1.0, jitter_p=1.0, gray_p=1.0, blur_p=1.0, solarize_p=1.0)
    (rows,) = draw_many([always], 375, 500, n=1000)
    for column in (Column.FLIP, Column.GRAY, Column.SOLARIZE):
        assert (rows[:, column] == 1.0).all()
    assert (rows[:, Column.BLUR_SIGMA] >= 0.1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_px": 0}, "size_px=0"),
        ({"flip_p": 1.5}, "flip_p=1.5"),
        ({"scale": (0.5, 0.1)}, "scale="),
        ({"ratio": (0.0, 1.0)}, "ratio="),
        ({"blur_sigma_px": (1.0, math.inf)}, "blur_sigma_px="),
        ({"hue": 0.6}, "hue=0.6"),
        ({"contrast": math.nan}, "contrast=nan"),
    ],
)
def test_impossible_recipes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(GLOBAL, **change)  # type: ignore[arg-type]


def test_a_repeat_of_a_sample_in_its_epoch_has_other_crops() -> None:
    def drawn(*repeats: int) -> NDArray[np.float64]:
        n = len(repeats)
        sizes, zeros = np.tile(np.array([[375, 500]]), (n, 1)), np.zeros(n, dtype=np.int64)
        return draw([GLOBAL], seed=1, epochs=zeros, sample_ids=zeros, sizes=sizes, repeats=np.array(repeats))[0]

    both = drawn(0, 1)
    assert not np.array_equal(boxes_of(both[0]), boxes_of(both[1]))
    assert np.array_equal(drawn(1)[0], both[1])


def test_shared_jitter_is_the_first_views_in_all_views() -> None:
    args = {"seed": 1, "epochs": np.zeros(50, dtype=np.int64), "sample_ids": np.arange(50)}
    sizes = np.tile(np.array([[40, 60]]), (50, 1))
    own = draw([GLOBAL, LOCAL, LOCAL], sizes=sizes, **args)  # type: ignore[arg-type]
    shared = draw([GLOBAL, LOCAL, LOCAL], sizes=sizes, share_jitter=True, **args)  # type: ignore[arg-type]
    colors = slice(Column.JITTER_ORDER, Column.GRAY + 1)
    assert np.array_equal(shared[..., colors], np.broadcast_to(own[:1, :, colors], shared[..., colors].shape))
    others = [column for column in Column if not Column.JITTER_ORDER <= column <= Column.GRAY]
    assert np.array_equal(shared[..., others], own[..., others])


def test_sizes_must_match_the_samples() -> None:
    with pytest.raises(ValueError, match="sizes"):
        draw(
            [GLOBAL],
            seed=0,
            epochs=np.zeros(2, dtype=np.int64),
            sample_ids=np.arange(2),
            sizes=np.ones((3, 2), dtype=np.int64),
        )


def test_parameters_are_pinned() -> None:
    """A resumed run draws again what it drew before the upgrade: these numbers may never change."""
    rows = draw(
        [GLOBAL, LOCAL],
        seed=42,
        epochs=np.array([3]),
        sample_ids=np.array([123_456_789_012]),
        sizes=np.array([[375, 500]]),
    )[:, 0]
    first = [2, 36, 333, 442, 0, 9, 1.2513122346252201, 0.7530253242701291, 0.9013464790768921]
    first += [-0.07520303810015322, 0, 0.8642156550427899, 1]
    second = [120, 172, 214, 284, 1, 0, 0.782356909289956, 0.9178924174979328, 0.8097665367648006]
    second += [-0.08736495259217919, 0, 0, 0]
    assert np.allclose(rows, [first, second], rtol=0, atol=1e-14)
