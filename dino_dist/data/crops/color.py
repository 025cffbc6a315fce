"""Photometric changes of a batch in which every sample has its own parameters, without a branch on data.

Pictures are float grey levels in [0, 255], laid out [N, H, 3, W] (row, channel, column); parameters are [N]. Meanings
are those of torchvision's operations on float pictures or, with `quantize`, on uint8 pictures: there, levels come in
and go out as whole numbers. Every function returns a new tensor and waits for nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The operations of the jitter, in the order in which permutations of them are numbered."""

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue: torchvision's, which sum to 0.9999."""

MAX_LEVEL = 255.0
SOLARIZE_FROM = 128.0
"""Levels from here on are inverted."""

HUE_TO_UINT8 = 255.999 / 255.0
"""torchvision brings the float picture of its hue back to uint8 as floor(x * 255.999), for x in [0, 1]."""

_CHANNEL = 2


def grayscale(x: Tensor) -> Tensor:
    """Luma of the picture, not rounded, [N, H, 1, W]."""
    red, green, blue = x.chunk(3, dim=_CHANNEL)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def jitter_sequences(active: Sequence[int], device: torch.device) -> Tensor:
    """For each of the 24 orders of the four operations, the `active` ones in that order: int64 [24, len(active)]."""
    orders = itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))
    return torch.tensor([[op for op in order if op in active] for order in orders], device=device)


def jitter(
    x: Tensor,
    order: Tensor,
    factors: Tensor,
    sequences: Tensor,
    active: Sequence[int],
    *,
    inside: Tensor | None = None,
    quantize: bool = False,
) -> Tensor:
    """Brightness, contrast, saturation and hue of each sample in its own order, clamped to [0, 255] after each.

    `order` [N] int64 picks a row of `sequences` (see `jitter_sequences`); `factors` [N, 4], in the order of the
    constants above. A factor of 1 (hue: 0) changes nothing at all. `inside` bool [N, H, 1, W] marks the pixels of
    padded pictures that exist (None: all): contrast's mean is over these. `quantize` truncates after each operation.
    """
    slots = sequences[order]
    # Scaled so that the mean over all pixels of share * gray is the mean of gray over those inside.
    share = None if inside is None else inside / inside.to(x.dtype).mean(dim=(1, 2, 3), keepdim=True)
    for slot in range(slots.shape[1]):
        op = slots[:, slot : slot + 1]
        factor = per_sample(factors.gather(1, op)[:, 0])
        op = per_sample(op[:, 0])
        # All but hue are x -> f x + (1 - f) base. Where hue has its turn f = 1 leaves x as it is.
        blend = torch.where(op == HUE, 1.0, factor)
        base = _blend_base(x, op, active, share, quantize)
        changed = (x * blend).add_((1.0 - blend) * base).clamp_(0.0, MAX_LEVEL)
        if quantize:
            changed = changed.floor_()
        if HUE in active:
            turned = shift_hue(x, factor)
            turned = (turned * HUE_TO_UINT8).floor_() if quantize else turned
            changed = torch.where((op == HUE) & (factor != 0.0), turned, changed)
        x = changed
    return x


def _blend_base(x: Tensor, op: Tensor, active: Sequence[int], share: Tensor | None, quantize: bool) -> Tensor:
    """What each sample is blended with: black, the mean luma of the whole picture, or its own luma."""
    base = torch.zeros_like(op, dtype=x.dtype)
    if CONTRAST in active or SATURATION in active:
        gray = grayscale(x)
        gray = gray.floor_() if quantize else gray
        if CONTRAST in active:
            weighted = gray if share is None else gray * share
            # In two steps: a sum over everything at once is split among threads when N is 1.
            mean = weighted.mean(dim=3, keepdim=True).mean(dim=1, keepdim=True)
            base = torch.where(op == CONTRAST, mean, base)
        if SATURATION in active:
            base = torch.where(op == SATURATION, gray, base)
    return base


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by `turns` in [-1/2, 1/2], which broadcasts.

    With v the largest channel, c the range and h the hue in sixths of a turn, counted from -3 to 3 around red, HSV's
    way back is v - c * clamp(| |h + n| - 3 | - 1, 0, 1) for n = 3, 1, -1 (red, green, blue): v times saturation is c.
    """
    red, green, blue = x.chunk(3, dim=_CHANNEL)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    unit = torch.where(chroma == 0.0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / unit,
        torch.where(value == green, (blue - red) / unit + 2.0, (red - green) / unit - 2.0),
    )
    sixths = sixths + 6.0 * turns
    # After half a turn |h| is up to 6 and |h + 3| up to 9, too far for the formula; | |h| - 3 | is the same angle.
    channels = [(sixths.abs() - 3.0).abs_(), (sixths + 1.0).abs_(), (sixths - 1.0).abs_()]
    raised = torch.cat(channels, dim=_CHANNEL).sub_(3.0).abs_().sub_(1.0).clamp_(0.0, 1.0)
    return (value - chroma * raised).clamp_(0.0, MAX_LEVEL)


def to_gray(x: Tensor, chosen: Tensor, *, quantize: bool = False) -> Tensor:
    """The luma in all channels of the samples where `chosen` [N] bool holds."""
    gray = grayscale(x)
    gray = gray.floor_() if quantize else gray
    return torch.where(per_sample(chosen), gray, x)


def solarize(x: Tensor, chosen: Tensor) -> Tensor:
    """255 - x where x >= 128, in the samples where `chosen` [N] bool holds."""
    return torch.where(per_sample(chosen) & (x >= SOLARIZE_FROM), MAX_LEVEL - x, x)


def normalize(x: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels [N, H, 3, W] to contiguous [N, 3, H, W] in `dtype`: (x - mean) / std, in float32 until the end.

    `mean` and `std` in levels (255 times those of [0, 1]), [1, 3, 1, 1] on the device of x.
    """
    normalized = (x.permute(0, 2, 1, 3) - mean).div_(std)
    # `to` ignores the memory format when the dtype stays; together they copy once.
    return normalized.to(dtype, memory_format=torch.contiguous_format).contiguous()


def per_sample(values: Tensor) -> Tensor:
    """[N] to [N, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)
