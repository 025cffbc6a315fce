"""Sizes that the network gets: short side as asked for, whole patches, nothing enlarged or cut unsaid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_dist.errors import UserError
from dino_dist.pictures.sight import MAX_PATCHES, default_short_px, resize_picture, seen_size


@pytest.mark.parametrize(
    ("size", "short", "patch", "seen"),
    [
        ((480, 640), 480, 16, (480, 640)),
        ((333, 500), 480, 16, (480, 720)),
        ((500, 333), 480, 8, (720, 480)),
        ((333, 500), 0, 8, (328, 496)),
        ((8, 8), 0, 8, (8, 8)),
        ((1200, 9), 0, 8, (1200, 8)),
        ((600, 400), 100, 16, (144, 96)),
    ],
)
def test_size(size: tuple[int, int], short: int, patch: int, seen: tuple[int, int]) -> None:
    assert seen_size(size, short_px=short, patch_size=patch) == seen


@pytest.mark.parametrize(
    ("size", "short", "words"),
    [
        ((1, 1), 480, "1 x 1 px is less than one patch of 8 x 8 px"),
        ((7, 100), 0, "100 x 7 px is less than one patch"),
        ((100, 100), 4, "--size-px 4"),
        ((8, 60000), 480, f"at most {MAX_PATCHES}: give a smaller --size-px"),
    ],
)
def test_refused_size(size: tuple[int, int], short: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        seen_size(size, short_px=short, patch_size=8)


def test_a_network_trained_on_small_pictures_looks_at_small_ones() -> None:
    assert default_short_px(224) == 480
    assert default_short_px(28) == 60


def test_a_picture_of_the_right_size_stays_as_it_is_and_others_keep_their_range() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    same = resize_picture(pixels, (24, 16))
    assert torch.equal(same.permute(1, 2, 0).mul(255).round().byte(), torch.from_numpy(pixels))
    other = resize_picture(pixels, (40, 8))
    assert other.shape == (3, 40, 8)
    assert 0.0 <= float(other.min())
    assert float(other.max()) <= 1.0
