"""The two Gaussian blurs of DINO's recipes, as banded matrices that every sample has its own of.

`box3` is PIL's ImageFilter.GaussianBlur without its roundings (DINO v1), `taps9` torchvision's GaussianBlur with nine
taps (DINOv2, DINOv3). A blur of one axis is a matrix that is zero except near its diagonal, and whose rows are all
alike except near the border: it is found on a small picture, laid out along the diagonal, multiplied block by block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_dist.data.crops.render_rules import BlurKind
from dino_dist.errors import UserError

Number = TypeVar("Number", float, Tensor)

TAPS_REACH = 4
"""Pixels on either side of the center of nine taps."""

BLOCK = 32
"""Output rows of one product, unless asked otherwise."""


@dataclass(frozen=True, kw_only=True)
class BlurPlan:
    """Constants of the blur of views of one side, from `make_plan`."""

    kind: BlurKind
    side_px: int
    reach_px: int
    """An output pixel depends on no source pixel further away."""
    shifts: Tensor
    """How a line of the small picture is shifted by -m..m with the kind's border: 0/1 matrices [2m+1, s, s]."""
    distances: Tensor
    """|-m..m|, float32 [2m+1]."""
    entries: Tensor
    """For each entry of the blocks [B, R, R + 2 reach], its place in the small matrix [s, s], flat; s * s: zero."""


def make_plan(
    kind: BlurKind, side_px: int, sigma_max_px: float, device: torch.device, *, block_px: int = BLOCK
) -> BlurPlan:
    """The plan for square views of `side_px` and blurs up to `sigma_max_px`, in blocks of `block_px` rows.

    taps9 mirrors four pixels at each border without repeating the border itself, which needs more than four: UserError.
    """
    if kind == "taps9":
        if side_px <= TAPS_REACH:
            raise UserError(
                f"view size_px={side_px} is too small for the taps9 blur, which mirrors {TAPS_REACH} pixels at the "
                f"border: take views of at least {TAPS_REACH + 1} px, blur box3, or a blur probability of 0"
            )
        step = reach = TAPS_REACH
    else:
        step = math.floor(box_radius(sigma_max_px)) + 1
        reach = 3 * step
    small = min(side_px, 2 * reach + 1)
    return BlurPlan(
        kind=kind,
        side_px=side_px,
        reach_px=reach,
        shifts=_shifts(kind, small, step).to(device),
        distances=torch.arange(-step, step + 1, dtype=torch.float32).abs_().to(device),
        entries=_entries(side_px, small, reach, block_px).to(device),
    )


def blur(x: Tensor, sigma: Tensor, plan: BlurPlan) -> Tensor:
    """Blur both axes of [N, S, 3, S] by `sigma` [N] px each; 0 leaves a sample exactly as it is. Not rounded."""
    num, side, reach = x.shape[0], plan.side_px, plan.reach_px
    blocks = band_blocks(sigma, plan)
    num_blocks, block = blocks.shape[1:3]
    spare = num_blocks * block - side
    padded = F.pad(x.reshape(num, side, 3 * side), (0, 0, reach, reach + spare))
    rows = padded.unfold(1, block + 2 * reach, block).transpose(2, 3)
    rows = torch.matmul(blocks, rows).reshape(num, num_blocks * block, 3 * side)[:, :side]
    padded = F.pad(rows.reshape(num, 3 * side, side), (reach, reach + spare))
    columns = padded.unfold(2, block + 2 * reach, block).transpose(1, 2)
    columns = torch.matmul(columns, blocks.transpose(2, 3)).transpose(1, 2)
    both = columns.reshape(num, 3 * side, num_blocks * block)[..., :side].reshape(x.shape)
    return torch.where(sigma.view(-1, 1, 1, 1) > 0.0, both, x)


def box_radius(sigma: Number) -> Number:
    """Radius, with its fraction, of the box whose three-fold application has standard deviation `sigma` (px).

    An "extended box" weighs its 2l+1 inner pixels 1 and the two next to them a; its radius is l + a. Solved for the
    variance of one pass, sigma^2 / 3 (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", 2011; PIL's ImageFilter.GaussianBlur is this filter). 0 for sigma 0.
    """
    variance = sigma * sigma / 3.0
    inner: Number = ((12.0 * variance + 1.0) ** 0.5 - 1.0) // 2.0
    edge = (2.0 * inner + 1.0) * (inner * (inner + 1.0) - 3.0 * variance) / (6.0 * (variance - (inner + 1.0) ** 2.0))
    radius: Number = inner + edge
    return radius


def tap_weights(sigma: Tensor, distances: Tensor, kind: BlurKind) -> Tensor:
    """Weights of one pass, [N, len(distances)], which sum to 1: a box (box3) or the sampled normal curve (taps9)."""
    sigma = sigma.unsqueeze(-1)
    if kind == "box3":
        radius = box_radius(sigma)
        return (radius + 1.0 - distances).clamp(0.0, 1.0) / (2.0 * radius + 1.0)
    # Where nothing is blurred any width will do: the result is not taken.
    width = torch.where(sigma > 0.0, sigma, 1.0)
    return torch.softmax(-0.5 * (distances / width).square(), dim=-1)


def small_matrix(sigma: Tensor, plan: BlurPlan) -> Tensor:
    """The whole blur of a line of the small picture, [N, s, s].

    A box repeats the border anew at each of its three passes, so one wide kernel would be wrong near it: the pass is a
    matrix and is applied three times.
    """
    num, small = sigma.shape[0], plan.shifts.shape[-1]
    weights = tap_weights(sigma, plan.distances, plan.kind)
    one_pass = torch.zeros((num, small, small), dtype=weights.dtype, device=weights.device)
    for index, shift in enumerate(plan.shifts.unbind(0)):
        one_pass = one_pass + weights[:, index].view(-1, 1, 1) * shift
    return one_pass if plan.kind == "taps9" else torch.bmm(torch.bmm(one_pass, one_pass), one_pass)


def band_blocks(sigma: Tensor, plan: BlurPlan) -> Tensor:
    """[N, B, R, R + 2 reach]: block b turns source rows b R - reach ... (b + 1) R + reach into output rows b R ..."""
    flat = F.pad(small_matrix(sigma, plan).flatten(1), (0, 1))
    return flat[:, plan.entries]


def _shifts(kind: BlurKind, side: int, step: int) -> Tensor:
    """Shifts by -step..step: the border pixel repeats (box3), or the picture mirrors about it (taps9)."""
    source = torch.arange(side)
    wanted = source.unsqueeze(-1) + torch.arange(-step, step + 1).view(-1, 1, 1)
    last = side - 1
    wanted = wanted.clamp(0, last) if kind == "box3" else last - (last - wanted.abs()).abs()
    return (wanted == source).float()


def _entries(side: int, small: int, reach: int, block: int) -> Tensor:
    """Where in the small matrix each entry of the blocks is found.

    The first `reach` rows of the small matrix are the first of any matrix, its last are the last, and its middle row is
    every row between, moved along the diagonal.
    """
    num_blocks = -(-side // block)
    row = torch.arange(num_blocks * block).view(num_blocks, block, 1)
    column = torch.arange(block + 2 * reach) + block * torch.arange(num_blocks).view(-1, 1, 1) - reach
    moved = (row - reach).clamp(0, side - small)
    small_row, small_column = row - moved, column - moved
    there = (row < side) & (small_column >= 0) & (small_column < small)
    return torch.where(there, small_row.clamp(0, small - 1) * small + small_column, small * small)
