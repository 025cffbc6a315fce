"""Photometric changes of one float picture in place, as fast as a CPU core can: only what is asked for is computed.

The counterpart of `color` (same meanings, to 1e-6): parameters are numbers of the host, so an operation that is not
asked for costs nothing, and constants are folded by what the parameters are. Pictures are grey levels [3, H, W] whose
rows are contiguous. Nothing here depends on the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_dist.data.crops.color import BRIGHTNESS, CONTRAST, HUE, LUMA, MAX_LEVEL, SATURATION, SOLARIZE_FROM

JITTER_ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
"""As `crop_parameters` numbers them."""

_TINY_LEVEL = 1e-12
"""Stands for a range of 0 where it divides 0."""


class Planes(NamedTuple):
    """Working memory of a picture's size: six [H, W]."""

    value: Tensor
    chroma: Tensor
    sixths: Tensor
    share: Tensor
    wave: Tensor
    base: Tensor


NUM_PLANES = len(Planes._fields)


def jitter_(x: Tensor, order: int, factors: Sequence[float], planes: Planes) -> None:
    """Brightness, contrast, saturation, hue in the order of that number; a factor of 1 (hue: 0) is left out."""
    for op in JITTER_ORDERS[order]:
        factor = factors[op]
        if op == HUE:
            if factor != 0.0:
                shift_hue_(x, factor, planes)
        elif factor != 1.0:
            _blend_(x, op, factor, planes)


def _blend_(x: Tensor, op: int, factor: float, planes: Planes) -> None:
    """x -> f x + (1 - f) base, with black, the picture's mean luma, or each pixel's luma as the base."""
    if op == BRIGHTNESS:
        x.mul_(factor)
    elif op == CONTRAST:
        torch.add(mean_luma(x).mul_(1.0 - factor), x, alpha=factor, out=x)
    else:
        torch.lerp(luma(x, planes.wave), x, factor, out=x)
    if factor > 1.0:  # below, the result lies between two levels
        x.clamp_(0.0, MAX_LEVEL)


def luma(x: Tensor, out: Tensor) -> Tensor:
    """Into `out` [H, W]."""
    red, green, blue = x.unbind(0)
    return torch.mul(red, LUMA[0], out=out).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def mean_luma(x: Tensor) -> Tensor:
    """Of the whole picture: the luma of its mean color. Row by row first: a sum over all is split among threads."""
    red, green, blue = x.mean(dim=2).mean(dim=1).unbind(0)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def shift_hue_(x: Tensor, turns: float, planes: Planes) -> None:
    """Turn the hue by `turns` in [-1/2, 1/2].

    With v the largest channel, c the range and h the hue in sixths of a turn from -3 to 3 around red, the way back is
    v - c * clamp(| |h + n| - 3 | - 1, 0, 1) for n = 3, 1, -1 (red, green, blue). The way there needs no case for the
    largest channel: with d = (v - red) / c and e = (green - blue) / c, |h| = 3 d + |e| (1 - 2 d), and h has e's sign
    (where red is the middle channel |e| is 1, where it is the largest or the smallest d is 0 or 1).
    """
    red, green, blue = x.unbind(0)
    value, chroma, sixths, share, wave, base = planes
    torch.maximum(torch.maximum(red, green, out=value), blue, out=value)
    torch.minimum(torch.minimum(red, green, out=chroma), blue, out=chroma)
    torch.sub(value, chroma, out=chroma)
    torch.clamp(chroma, min=_TINY_LEVEL, out=base).reciprocal_()
    torch.sub(green, blue, out=sixths).mul_(base)
    torch.sub(value, red, out=share).mul_(base)
    torch.abs(sixths, out=wave)
    torch.mul(share, wave, out=base)
    wave.add_(share, alpha=3.0).sub_(base, alpha=2.0)
    torch.copysign(wave, sixths, out=sixths)

    torch.add(value, chroma, out=base)  # v - c (k - 1), k the wave between 1 and 2
    torch.sub(value, chroma, alpha=2.0, out=value)  # v - c (2 - k)
    turned = 6.0 * turns
    for plane, shift in ((red, turned), (green, turned + 1.0), (blue, turned - 1.0)):
        torch.add(sixths, shift, out=wave).abs_()
        is_red = plane is red
        # |h| < 3 before the turn: within one more sixth the inner or the outer fold changes nothing.
        folded = abs(shift) > 1.0
        if folded:
            wave.sub_(3.0).abs_()
        wave.clamp_(1.0, 2.0)
        if is_red != folded:
            torch.addcmul(base, chroma, wave, value=-1.0, out=plane)
        else:
            torch.addcmul(value, chroma, wave, out=plane)
    x.clamp_(0.0, MAX_LEVEL)


def to_gray_(x: Tensor, planes: Planes) -> None:
    """The luma in all three channels."""
    x.copy_(luma(x, planes.wave))


def solarize_(x: Tensor, planes: Planes) -> None:
    """255 - x where x >= 128."""
    for plane in x.unbind(0):
        bright = torch.ge(plane, SOLARIZE_FROM, out=planes.wave)  # 0 or 1
        plane.sub_(bright, alpha=MAX_LEVEL).abs_()
