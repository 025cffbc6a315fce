"""Photometric changes of a batch in which every sample has its own parameters, without a branch on data.

Pictures are float in [0, 1], laid out [N, S, 3, S] (row, channel, column); parameters are [N]. Meanings are those of
torchvision's float operations, and of PIL's Gaussian blur. Every function returns a new tensor and waits for nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The operations of the jitter, in the order in which permutations of them are numbered."""

_CHANNEL = 2
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's, which sum to 0.9999
_SOLARIZE_FROM = 128 / 255


def grayscale(x: Tensor) -> Tensor:
    """Luma of the picture, [N, S, 1, S]."""
    red, green, blue = x.chunk(3, dim=_CHANNEL)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def jitter_sequences(active: Sequence[int], device: torch.device) -> Tensor:
    """For each of the 24 orders of the four operations, the `active` ones in that order: int64 [24, len(active)]."""
    orders = itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))
    return torch.tensor([[op for op in order if op in active] for order in orders], device=device)


def jitter(x: Tensor, order: Tensor, factors: Tensor, sequences: Tensor, active: Sequence[int]) -> Tensor:
    """Brightness, contrast, saturation and hue of each sample in its own order, clamped to [0, 1] after each.

    `order` [N] int64 picks a row of `sequences` (see `jitter_sequences`); `factors` [N, 4], in the order of the
    constants above. A factor of 1 (hue: 0) changes nothing at all.
    """
    slots = sequences[order]
    for slot in range(slots.shape[1]):
        op = slots[:, slot : slot + 1]
        factor = _per_sample(factors.gather(1, op)[:, 0])
        op = _per_sample(op[:, 0])
        # All but hue are x -> f x + (1 - f) base. Where hue has its turn f = 1 leaves x as it is.
        blend = torch.where(op == HUE, 1.0, factor)
        changed = (x * blend).add_((1.0 - blend) * _blend_base(x, op, active)).clamp_(0.0, 1.0)
        if HUE in active:
            changed = torch.where((op == HUE) & (factor != 0.0), shift_hue(x, factor), changed)
        x = changed
    return x


def _blend_base(x: Tensor, op: Tensor, active: Sequence[int]) -> Tensor:
    """What each sample is blended with: black, the mean luma of the whole crop, or its own luma."""
    base = torch.zeros_like(op, dtype=x.dtype)
    if CONTRAST in active or SATURATION in active:
        gray = grayscale(x)
        base = torch.where(op == CONTRAST, gray.mean(dim=(1, 2, 3), keepdim=True), base)
        if SATURATION in active:
            base = torch.where(op == SATURATION, gray, base)
    return base


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by `turns`, which broadcasts.

    With v the largest channel and c the range, HSV's way back is v - c * clamp(min(k, 4 - k), 0, 1) where
    k = (n + 6 hue) mod 6 for n = 5, 3, 1 (red, green, blue), because value times saturation is c.
    """
    red, green, blue = x.chunk(3, dim=_CHANNEL)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    unit = torch.where(chroma == 0.0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / unit,
        torch.where(value == green, (blue - red) / unit + 2.0, (red - green) / unit + 4.0),
    )
    phase = torch.arange(5, 0, -2, dtype=x.dtype, device=x.device).view(1, 1, 3, 1)
    k = torch.remainder(sixths + 6.0 * turns + phase, 6.0)
    return (value - chroma * torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0)).clamp_(0.0, 1.0)


def to_gray(x: Tensor, chosen: Tensor) -> Tensor:
    """The luma in all channels of the samples where `chosen` [N] bool holds."""
    return torch.where(_per_sample(chosen), grayscale(x), x)


def solarize(x: Tensor, chosen: Tensor) -> Tensor:
    """1 - x where x >= 128/255, in the samples where `chosen` [N] bool holds."""
    return torch.where(_per_sample(chosen) & (x >= _SOLARIZE_FROM), 1.0 - x, x)


def box_shifts(side_px: int, sigma_max_px: float, device: torch.device) -> Tensor:
    """Shifts by -m..m px that repeat the border pixel, as 0/1 matrices [2m+1, S, S]; m reaches the widest box."""
    half_width = math.floor(float(box_radius(torch.tensor(sigma_max_px, dtype=torch.float64)))) + 1
    source = torch.arange(side_px, device=device)
    shift = torch.arange(-half_width, half_width + 1, device=device).view(-1, 1)
    return ((source + shift).clamp_(0, side_px - 1).unsqueeze(-1) == source).float()


def box_radius(sigma: Tensor) -> Tensor:
    """Radius, with its fraction, of the box whose three-fold application has standard deviation `sigma` (px).

    An "extended box" weighs its 2l+1 inner pixels 1 and the two next to them a; its radius is l + a. Solved for the
    variance of one pass, sigma^2 / 3 (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", 2011; PIL's ImageFilter.GaussianBlur is this filter). 0 for sigma 0.
    """
    variance = sigma * sigma / 3.0
    inner = torch.floor((torch.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    edge = (2.0 * inner + 1.0) * (inner * (inner + 1.0) - 3.0 * variance) / (6.0 * (variance - (inner + 1.0).square()))
    return inner + edge


def blur(x: Tensor, sigma: Tensor, shifts: Tensor) -> Tensor:
    """PIL's Gaussian blur without its roundings: three extended boxes an axis, the border repeated before each.

    `sigma` [N] in px, 0 leaves a sample exactly as it is; `shifts` from `box_shifts`. Since the border is repeated at
    every pass, one wide kernel would be wrong near it: the pass is a matrix and is applied three times.
    """
    num, side = x.shape[0], x.shape[1]
    half_width = shifts.shape[0] // 2
    radius = box_radius(sigma)
    one_pass = torch.zeros((num, side, side), dtype=x.dtype, device=x.device)
    for index, shift in enumerate(shifts.unbind(0)):
        weight = (radius + 1.0 - abs(index - half_width)).clamp(0.0, 1.0) / (2.0 * radius + 1.0)
        one_pass.addcmul_(shift, weight.view(-1, 1, 1))
    three = torch.bmm(torch.bmm(one_pass, one_pass), one_pass)
    rows = torch.bmm(three, x.reshape(num, side, 3 * side))
    both = torch.bmm(rows.view(num, side * 3, side), three.transpose(1, 2)).view_as(x)
    return torch.where(_per_sample(sigma) > 0.0, both, x)


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
