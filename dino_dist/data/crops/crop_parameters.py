"""Multi-crop parameters: where each view is cut and how its colours change, drawn on the CPU in float64.

Semantics are those of DINO (arXiv:2104.14294 and its published transforms): RandomResizedCrop, horizontal flip, colour
jitter, grayscale, blur, solarize, each view drawn on its own. A draw depends on (seed, epoch, sample id, repeat, view,
image size) and on the recipe, never on the batch, the rank or the device: the device only renders (`augment.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from dino_dist.errors import UserError
from dino_dist.randomness import Purpose, Words, below, sample_words, uniform

Floats = NDArray[np.float64]

NUM_JITTER_ORDERS = 24
"""Permutations of (brightness, contrast, saturation, hue), numbered in lexicographic order."""

_TRIES = 10


class Column(IntEnum):
    """Columns of a parameter row. An operation that is gated off has its identity value."""

    TOP = 0
    """First row of the crop box, px."""
    LEFT = 1
    """First column of the crop box, px."""
    HEIGHT = 2
    """Rows of the crop box, px."""
    WIDTH = 3
    """Columns of the crop box, px."""
    FLIP = 4
    """1: mirrored left to right after the resize."""
    JITTER_ORDER = 5
    """Number of the permutation of the four operations that follow."""
    BRIGHTNESS = 6
    """Factor; 1: none."""
    CONTRAST = 7
    """Factor; 1: none."""
    SATURATION = 8
    """Factor; 1: none."""
    HUE = 9
    """Shift in turns; 0: none."""
    GRAY = 10
    """1: grayscale."""
    BLUR_SIGMA = 11
    """Standard deviation of the blur, px of the view; 0: none."""
    SOLARIZE = 12
    """1: bright pixels inverted."""


class _Slot(IntEnum):
    """Words of one draw. Every word has its place whether used or not, so that a new operation shifts no other."""

    AREA = 0
    RATIO = 10
    TOP = 20
    LEFT = 21
    FLIP = 22
    JITTER_GATE = 23
    JITTER_ORDER = 24
    BRIGHTNESS = 25
    CONTRAST = 26
    SATURATION = 27
    HUE = 28
    GRAY_GATE = 29
    BLUR_GATE = 30
    BLUR_SIGMA = 31
    SOLARIZE_GATE = 32


_NUM_WORDS = len(_Slot) + 2 * (_TRIES - 1)


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """The distribution of one view's parameters; defaults live in the config."""

    size_px: int
    """Side of the square view."""
    scale: tuple[float, float]
    """Share of the image's area that the crop covers."""
    ratio: tuple[float, float]
    """Width over height of the crop."""
    flip_p: float
    jitter_p: float
    brightness: float
    """Factor from [max(0, 1 - x), 1 + x]; the same for contrast and saturation."""
    contrast: float
    saturation: float
    hue: float
    """Shift from [-x, x], in turns."""
    gray_p: float
    blur_p: float
    blur_sigma_px: tuple[float, float]
    solarize_p: float

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.size_px < 1:
            raise UserError(f"view size_px={self.size_px} must be at least 1")
        for name in ("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"view {name}={getattr(self, name)} must be a probability from 0 to 1")
        for name in ("scale", "ratio", "blur_sigma_px"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high < float("inf"):
                raise UserError(f"view {name}=({low}, {high}) must be two positive numbers, the smaller first")
        for name, limit in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0.0 <= getattr(self, name) <= limit:
                raise UserError(f"view {name}={getattr(self, name)} must be from 0 to {limit}")


def draw(
    recipes: Sequence[ViewRecipe],
    *,
    seed: int,
    epochs: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    sizes: NDArray[np.int64],
    repeats: int | NDArray[np.int64] = 0,
    share_jitter: bool = False,
) -> Floats:
    """Parameters of every view of every sample: float64 [views, n, len(Column)].

    `epochs`, `sample_ids` and `repeats` (see `randomness.sample_words`) are [n], `sizes` is [n, 2] with the height and
    width of the decoded images in px. `share_jitter`: jitter and grayscale of an image's first view hold for all.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    if sizes.shape != (len(sample_ids), 2) or (sizes < 1).any():
        raise ValueError(f"sizes must be [{len(sample_ids)}, 2] and positive, got shape {sizes.shape}")
    num_views, n = len(recipes), len(sample_ids)
    words = sample_words(
        seed,
        np.tile(epochs, num_views),
        np.tile(sample_ids, num_views),
        np.repeat(np.arange(num_views, dtype=np.int64), n),
        purpose=Purpose.CROP,
        num_words=_NUM_WORDS,
        repeats=np.tile(np.broadcast_to(repeats, (n,)), num_views),
    ).reshape(num_views, n, _NUM_WORDS)
    rows = np.empty((num_views, n, len(Column)))
    _draw_boxes(rows, words, recipes, sizes)
    _draw_colors(rows, words, recipes)
    if share_jitter:
        rows[..., Column.JITTER_ORDER : Column.GRAY + 1] = rows[:1, :, Column.JITTER_ORDER : Column.GRAY + 1]
    return rows


def _draw_boxes(rows: Floats, words: Words, recipes: Sequence[ViewRecipe], sizes: NDArray[np.int64]) -> None:
    """RandomResizedCrop: the first of ten (area, ratio) pairs that fits, else the largest centered legal box."""
    image_height, image_width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    scale_low, scale_high = _interval(recipes, "scale")
    ratio_low, ratio_high = _interval(recipes, "ratio")
    area = _between(words[..., _Slot.AREA : _Slot.AREA + _TRIES], scale_low[..., None], scale_high[..., None])
    area *= (image_height * image_width)[:, None]
    log_ratio = _between(
        words[..., _Slot.RATIO : _Slot.RATIO + _TRIES], np.log(ratio_low)[..., None], np.log(ratio_high)[..., None]
    )
    ratio = np.exp(log_ratio)
    widths = np.rint(np.sqrt(area * ratio))  # rint rounds halves to even, as the published code's round()
    heights = np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= image_width[:, None]) & (heights > 0) & (heights <= image_height[:, None])
    first = fits.argmax(axis=-1)[..., None]
    height = np.take_along_axis(heights, first, axis=-1)[..., 0]
    width = np.take_along_axis(widths, first, axis=-1)[..., 0]

    image_ratio = image_width / image_height
    too_tall, too_wide = image_ratio < ratio_low, image_ratio > ratio_high
    fallback_height = np.where(too_tall, np.rint(image_width / ratio_low), image_height)
    fallback_width = np.where(too_wide, np.rint(image_height * ratio_high), image_width)
    accepted = fits.any(axis=-1)
    # A one-pixel-wide image with an extreme legal ratio may round to nothing: keep one pixel.
    height = np.where(accepted, height, np.maximum(fallback_height, 1.0))
    width = np.where(accepted, width, np.maximum(fallback_width, 1.0))

    spare_height = (image_height - height).astype(np.int64)
    spare_width = (image_width - width).astype(np.int64)
    rows[..., Column.TOP] = np.where(accepted, below(words[..., _Slot.TOP], spare_height + 1), spare_height // 2)
    rows[..., Column.LEFT] = np.where(accepted, below(words[..., _Slot.LEFT], spare_width + 1), spare_width // 2)
    rows[..., Column.HEIGHT] = height
    rows[..., Column.WIDTH] = width


def _draw_colors(rows: Floats, words: Words, recipes: Sequence[ViewRecipe]) -> None:
    def gate(slot: _Slot, name: str) -> NDArray[np.bool_]:
        return uniform(words[..., slot]) < _values(recipes, name)

    orders = np.full((1, 1), NUM_JITTER_ORDERS, dtype=np.int64)
    rows[..., Column.FLIP] = gate(_Slot.FLIP, "flip_p")
    rows[..., Column.JITTER_ORDER] = below(words[..., _Slot.JITTER_ORDER], orders)
    jittered = gate(_Slot.JITTER_GATE, "jitter_p")
    for name in ("brightness", "contrast", "saturation"):
        strength = _values(recipes, name)
        factor = _between(words[..., _Slot[name.upper()]], np.maximum(1.0 - strength, 0.0), 1.0 + strength)
        rows[..., Column[name.upper()]] = np.where(jittered, factor, 1.0)
    hue = _values(recipes, "hue")
    rows[..., Column.HUE] = np.where(jittered, _between(words[..., _Slot.HUE], -hue, hue), 0.0)
    rows[..., Column.GRAY] = gate(_Slot.GRAY_GATE, "gray_p")
    sigma = _between(words[..., _Slot.BLUR_SIGMA], *_interval(recipes, "blur_sigma_px"))
    rows[..., Column.BLUR_SIGMA] = np.where(gate(_Slot.BLUR_GATE, "blur_p"), sigma, 0.0)
    rows[..., Column.SOLARIZE] = gate(_Slot.SOLARIZE_GATE, "solarize_p")


def _between(words: Words, low: Floats, high: Floats) -> Floats:
    return low + uniform(words) * (high - low)


def _values(recipes: Sequence[ViewRecipe], name: str) -> Floats:
    """One field of every recipe, [views, 1], to broadcast over samples."""
    return np.array([[getattr(recipe, name)] for recipe in recipes], dtype=np.float64)


def _interval(recipes: Sequence[ViewRecipe], name: str) -> tuple[Floats, Floats]:
    pairs = np.array([getattr(recipe, name) for recipe in recipes], dtype=np.float64)
    return pairs[:, :1], pairs[:, 1:]
