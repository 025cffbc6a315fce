"""Products with matrices that are zero except near a diagonal: antialiased bicubic resizing, and blurs, of one picture.

A matrix of one axis is cut into blocks of rows; a block multiplies only its window of the source, and the windows of a
matrix move in equal steps, so that one axis of a picture is one batched product without a copy. A window may reach over
the border: its weights are zero there, and what it meets must only be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.data.crops.color import MAX_LEVEL

BLOCK = 16
"""Rows of one block. Fewer multiply fewer zeros, more cost fewer calls; 16 was fastest of 8 to 32."""

_KEPT_ELEMENTS = 2**25
"""Memory for more than this many numbers (128 MiB), which only huge images need, is given back."""

_REACH = 2.0
"""The bicubic kernel is zero from here on, in pixels of the coarser picture."""

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bands:
    """One matrix: block b turns source pixels first + b step ... + K into output pixels 16 b ... 16 b + 15."""

    weights: Tensor
    """float32 [B, 16, K]; rows past the last output pixel hold anything finite."""
    first: int
    """Source pixel of the first window; may be negative."""
    step: int

    @property
    def end(self) -> int:
        """One past the last source pixel of the last window; may be past the source."""
        num_blocks, _, width = self.weights.shape
        return self.first + (num_blocks - 1) * self.step + width


def padded_px(side_px: int) -> int:
    """Output pixels of whole blocks."""
    return -(-side_px // BLOCK) * BLOCK


class BicubicPlanner:
    """Makes matrices that resize lines to fixed numbers of outputs, all in one go since each is small."""

    def __init__(self, num_outputs: Sequence[int]) -> None:
        """One matrix for each of `num_outputs`."""
        num_blocks = np.array([padded_px(count) // BLOCK for count in num_outputs])
        self._num_rows = num_blocks * BLOCK
        self._num_blocks = num_blocks
        self._matrix_of_block = np.repeat(np.arange(len(num_outputs)), num_blocks)
        self._matrix_of_row = np.repeat(self._matrix_of_block, BLOCK)
        self._first_block = np.cumsum(num_blocks) - num_blocks
        self._block = np.arange(num_blocks.sum()) - self._first_block[self._matrix_of_block]
        self._row = np.arange(self._num_rows.sum()) - (self._first_block * BLOCK)[self._matrix_of_row]
        self._output = np.minimum(self._row, np.array(num_outputs)[self._matrix_of_row] - 1.0)

    def __call__(self, lengths: Floats, scales: Floats, first_outputs: Floats) -> list[Bands]:
        """Matrices for lines of `lengths` px, `scales` source pixels per output pixel, outputs from `first_outputs` on.

        Antialiasing, kernel (a = -1/2) and the renormalised borders are those of PIL and of torch's
        `interpolate(mode="bicubic", antialias=True)`: the weight of source pixel p is
        f((p + 1/2 - (output + 1/2) * scale) / max(scale, 1)), divided by the sum of the weights inside the line.
        """
        matrix, stretches = self._matrix_of_row, np.maximum(scales, 1.0)
        center = (self._output + (first_outputs + 0.5)[matrix]) * scales[matrix] - 0.5
        first = np.floor(center - (_REACH * stretches - 1.0)[matrix])
        taps = np.ceil(2.0 * _REACH * stretches).astype(np.int64)
        # From the first tap on float32 is exact enough: the position in the line is out of it.
        tap = np.arange(taps.max(), dtype=np.float32)[:, None]
        weights = _bicubic((tap + (first - center).astype(np.float32)) / stretches.astype(np.float32)[matrix])
        weights[(tap < (-first).astype(np.float32)) | (tap >= (lengths[matrix] - first).astype(np.float32))] = 0.0
        # Summed tap by tap, so that taps which another matrix adds at the end change no bit.
        weights /= weights.sum(axis=0)
        return self._laid_out(weights, first.astype(np.int64), taps)

    def _laid_out(self, weights: Singles, starts: Ints, taps: Ints) -> list[Bands]:
        """Taps [T, rows] that begin at `starts` [rows], of which each matrix uses its first `taps`, in blocks."""
        of_block, of_row = self._matrix_of_block, self._matrix_of_row
        heads, tails = starts[::BLOCK], starts[BLOCK - 1 :: BLOCK]
        last_block = self._first_block + self._num_blocks - 1
        span = heads[last_block] - heads[self._first_block]
        step = np.rint(span / np.maximum(self._num_blocks - 1, 1)).astype(np.int64)
        moved = step[of_block] * self._block
        first = np.minimum.reduceat(heads - moved, self._first_block)
        windows = first[of_block] + moved
        width = np.maximum.reduceat(tails - windows, self._first_block) + taps
        counts = width * self._num_rows
        place = (np.cumsum(counts) - counts)[of_row] + self._row * width[of_row] + starts - np.repeat(windows, BLOCK)
        tap = np.arange(len(weights))[:, None]
        used = tap < taps[of_row]
        flat = np.zeros(counts.sum(), dtype=np.float32)
        flat[(place + tap)[used]] = weights[used]
        matrices = torch.split(torch.from_numpy(flat), counts.tolist())
        sizes = zip(matrices, self._num_blocks.tolist(), first.tolist(), step.tolist(), strict=True)
        return [
            Bands(weights=matrix.view(num_blocks, BLOCK, -1), first=first_px, step=step_px)
            for matrix, num_blocks, first_px, step_px in sizes
        ]


def _bicubic(x: Singles) -> Singles:
    """1.5 |x|^3 - 2.5 |x|^2 + 1 up to 1, then -0.5 |x|^3 + 2.5 |x|^2 - 4 |x| + 2 up to 2, written around 2 and 1."""
    zero = np.float32(0.0)
    from_two: Singles = np.maximum(np.float32(_REACH) - np.abs(x), zero)
    over_one: Singles = from_two - np.float32(1.0)
    from_one: Singles = np.maximum(over_one, zero)
    far = np.float32(0.5) * from_two * from_two * over_one
    return far + from_one * from_one * (np.float32(1.0) - np.float32(2.0) * from_one)


def multiply_rows(bands: Bands, source: Tensor, out: Tensor) -> None:
    """out = matrix @ source for [rows, m] whose rows are contiguous; `out` holds the rows of whole blocks.

    The windows' rows must lie in the storage of `source`, also those before its first and after its last row.
    """
    num_blocks, _, width = bands.weights.shape
    pitch, row_px = source.stride(0), source.shape[1]
    offset = source.storage_offset() + bands.first * pitch
    windows = source.as_strided((num_blocks, width, row_px), (bands.step * pitch, pitch, 1), offset)
    torch.bmm(bands.weights, windows, out=out.view(num_blocks, BLOCK, row_px))


def multiply_columns(bands: Bands, source: Tensor, out: Tensor) -> None:
    """out = source @ matrix.T in blocks of columns: `out` [B, n, 16] from `source` [n, columns], rows contiguous.

    The windows must lie in the storage of `source`, also where they begin before its first or end after its last pixel.
    """
    num_blocks, _, width = bands.weights.shape
    num_rows, pitch = source.shape[0], source.stride(0)
    offset = source.storage_offset() + bands.first
    windows = source.as_strided((num_blocks, num_rows, width), (bands.step, pitch, 1), offset)
    torch.bmm(windows, bands.weights.transpose(1, 2), out=out)


class Scratch:
    """Memory that is used again for every picture, and holds nothing but finite numbers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.zeros(0, device=device)

    def take(self, count: int) -> Tensor:
        """A flat float32 tensor of `count`, with what was there before; good until the next one is taken."""
        if count > _KEPT_ELEMENTS:
            return torch.zeros(count, device=self._device)
        if self._memory.numel() < count:
            self._memory = torch.zeros(count, device=self._device)
        return self._memory[:count]


def multiply_both(
    vertical: Bands, horizontal: Bands, planes: Tensor, *, rows: Scratch, blocks: Scratch, out: Tensor
) -> None:
    """Both axes of `planes` [C, height, width], whose rows are contiguous, into the contiguous `out` [C, S, S'].

    S' is S rounded up to whole blocks; columns past S come out as anything finite. The result is cut to [0, 255], where
    bicubic kernels overshoot. `planes` lies in a storage that holds all windows of the vertical matrix (see
    `multiply_rows`).
    """
    num_channels, side, pitch = out.shape
    width = planes.shape[2]
    num_blocks = pitch // BLOCK
    margin = max(0, -horizontal.first, horizontal.end - width)
    count = num_channels * pitch * width
    between = rows.take(count + 2 * margin)[margin : margin + count].view(num_channels, pitch, width)
    for plane, target in zip(planes.unbind(0), between.unbind(0), strict=True):
        multiply_rows(vertical, plane, target)
    columns = blocks.take(num_blocks * num_channels * pitch * BLOCK).view(num_blocks, num_channels * pitch, BLOCK)
    multiply_columns(horizontal, between.view(num_channels * pitch, width), columns)
    picture = columns.view(num_blocks, num_channels, pitch, BLOCK)[:, :, :side].permute(1, 2, 0, 3)
    torch.clamp(picture, 0.0, MAX_LEVEL, out=out.view(num_channels, side, num_blocks, BLOCK))
