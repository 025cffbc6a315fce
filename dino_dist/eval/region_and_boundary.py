"""How well a mask fits: region similarity J and contour accuracy F (Perazzi et al., CVPR 2016; as DAVIS 2017 counts).

Letters: M pairs of masks, h x w px. Masks are bool, true inside the object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BOUND_TH = 0.008
"""How far apart two boundary pixels may be and still match, as a share of the frame's diagonal."""
_DECAY_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class OverTime:
    """What the values of one object in a video's frames amount to."""

    mean: float
    recall: float
    """Share of frames above 0.5."""
    decay: float
    """Mean of the first quarter of the frames minus that of the last; below 0, it gets better."""


def region_similarity(found_Mhw: Tensor, true_Mhw: Tensor, void_Mhw: Tensor | None = None) -> Tensor:
    """J = |found & true| / |found | true| of each pair, float64 [M] on the CPU; 1 where both are empty.

    Pixels of `void_Mhw` count in neither mask.
    """
    found_Mhw, true_Mhw = _without_void(found_Mhw, void_Mhw), _without_void(true_Mhw, void_Mhw)
    both = (found_Mhw & true_Mhw).sum((-2, -1)).double()
    either = (found_Mhw | true_Mhw).sum((-2, -1)).double()
    return torch.where(either > 0, both / either.clamp_min(1), 1.0).cpu()


def boundary_similarity(
    found_Mhw: Tensor, true_Mhw: Tensor, void_Mhw: Tensor | None = None, *, bound_th: float = BOUND_TH
) -> Tensor:
    """F = 2 P R / (P + R) of each pair's boundaries, float64 [M] on the CPU.

    P is the share of the found boundary's pixels that lie within ceil(bound_th * diagonal) px of a pixel of the true
    boundary, R the share of the true one's near the found one. A pair with one boundary missing has F = 0, with both
    missing F = 1. Pixels of `void_Mhw` are outside both masks.
    """
    found_edge = boundary(_without_void(found_Mhw, void_Mhw))
    true_edge = boundary(_without_void(true_Mhw, void_Mhw))
    radius_px = math.ceil(bound_th * math.hypot(*found_Mhw.shape[-2:]))
    num_found, num_true = (edge.sum((-2, -1)).double() for edge in (found_edge, true_edge))
    near_true = (found_edge & _within(true_edge, radius_px)).sum((-2, -1)).double()
    near_found = (true_edge & _within(found_edge, radius_px)).sum((-2, -1)).double()
    # Nothing claimed is nothing wrong: an empty boundary has precision (or recall) 1.
    precision = torch.where(num_found > 0, near_true / num_found.clamp_min(1), 1.0)
    recall = torch.where(num_true > 0, near_found / num_true.clamp_min(1), 1.0)
    total = precision + recall
    return torch.where(total > 0, 2 * precision * recall / total.clamp_min(1e-300), 0.0).cpu()


def boundary(mask_Mhw: Tensor) -> Tensor:
    """Pixels that differ from their right, lower or lower right neighbour; bool [M, h, w].

    The line is one pixel wide and lies half a pixel towards the origin; the frame's own border is no boundary.
    """
    padded = F.pad(mask_Mhw.float(), (0, 1, 0, 1), mode="replicate").bool()
    here, right, below, diagonal = padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (here ^ right) | (here ^ below) | (here ^ diagonal)


def over_time(values: Sequence[float]) -> OverTime:
    """Mean, recall and decay of one object's values in the judged frames, in order; `ValueError` if there is none.

    Quarters share their outermost frames, as the benchmark's do.
    """
    if not values:
        raise ValueError("no frame to judge")
    series = torch.tensor(values, dtype=torch.float64)
    last = len(values) - 1
    # The small term rounds a half up, as published, where Python would round it to the even number.
    bounds = [round(part * last / _DECAY_PARTS + 1 + 1e-10) - 1 for part in range(_DECAY_PARTS + 1)]
    first, final = series[bounds[0] : bounds[1] + 1], series[bounds[-2] : bounds[-1] + 1]
    return OverTime(
        mean=float(series.mean()),
        recall=float((series > 0.5).double().mean()),
        decay=float(first.mean() - final.mean()),
    )


def _without_void(mask: Tensor, void: Tensor | None) -> Tensor:
    return mask if void is None else mask & ~void


def _within(edge_Mhw: Tensor, radius_px: int) -> Tensor:
    """Whether a pixel's distance to the nearest true one is at most `radius_px`."""
    offsets = torch.arange(-radius_px, radius_px + 1, device=edge_Mhw.device)
    disk = (offsets.unsqueeze(1) ** 2 + offsets**2 <= radius_px**2).float()
    # Counts of ones: exact in any precision that a product of ones is.
    counts = F.conv2d(edge_Mhw.unsqueeze(1).float(), disk[None, None], padding=radius_px)
    return counts.squeeze(1) > 0.5
