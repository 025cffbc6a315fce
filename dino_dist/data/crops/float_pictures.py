"""One image at a time, its crops as float pictures, and the operations of a view on them: the CPU's exact path.

A picture is grey levels float32 [3, S, S]. Pictures live in memory that the next one of their side takes over, and
operations work in place: at any time there is one image and one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_dist.data.crops import color_cpu
from dino_dist.data.crops.bands import BLOCK, Bands, BicubicPlanner, Scratch, multiply_both, padded_px
from dino_dist.data.crops.blur_cpu import BlurMatrices
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe
from dino_dist.data.crops.render_rules import BlurKind

Row = Sequence[float]
"""The parameters of one view, in the order of `crop_parameters.Column`."""


class _Side:
    """What pictures of one side need: memory, and the constants of their blur."""

    def __init__(self, side_px: int, views: Sequence[ViewRecipe], kind: BlurKind) -> None:
        sigmas = [view.blur_sigma_px[1] for view in views if view.blur_p > 0.0]
        self.side_px = side_px
        self.blurs = BlurMatrices(kind, side_px, max(sigmas)) if sigmas else None
        pitch = padded_px(side_px)
        count = 3 * side_px * pitch
        margin = 0 if self.blurs is None else (self.blurs.reach_px + BLOCK) * pitch
        self.padded = torch.zeros(2 * margin + count)[margin : margin + count].view(3, side_px, pitch)
        self.picture = self.padded[:, :, :side_px]
        self.planes = color_cpu.Planes(*torch.empty(color_cpu.NUM_PLANES, side_px, side_px).unbind(0))


class _Cut(NamedTuple):
    """Where a view is cut, and how it is resized and blurred."""

    side: _Side
    top: int
    left: int
    height: int
    width: int
    mirrored: bool
    vertical: Bands
    horizontal: Bands
    blur: Bands | None


class FloatPictures:
    """Float throughout, equal to torchvision's operations on float pictures."""

    def __init__(self, recipes: Sequence[ViewRecipe], blur_kind: BlurKind) -> None:
        self._sides = {
            side_px: _Side(side_px, [view for view in recipes if view.size_px == side_px], blur_kind)
            for side_px in {view.size_px for view in recipes}
        }
        self._views = [self._sides[view.size_px] for view in recipes]
        self._outputs = np.repeat([float(view.size_px) for view in recipes], 2)
        self._planner = BicubicPlanner([side.side_px for side in self._views for _ in range(2)])
        cpu = torch.device("cpu")
        self._rows, self._blocks, self._image, self._planes = (Scratch(cpu) for _ in range(4))
        self._source = torch.empty(0)
        self._margin = (0, 0)
        self._cuts: list[_Cut] = []

    def open(self, image_HWC: Tensor, rows: Sequence[Row]) -> None:
        """Take an image, uint8 [H, W, 3], and the parameters of all its views."""
        height, width, _ = image_HWC.shape
        self._cuts = self._plan_cuts(rows)
        before = max(0, -min(cut.top + cut.vertical.first for cut in self._cuts))
        after = max(0, max(cut.top + cut.vertical.end for cut in self._cuts) - height)
        self._margin = before * width, after * width
        self._source = self._planes_in(self._image, height, width)
        self._source.copy_(image_HWC.permute(2, 0, 1))

    def recolor_image(self, row: Row) -> None:
        """Jitter and grayscale of the whole image; later crops are cut from the result."""
        _, height, width = self._source.shape
        memory = self._planes.take(color_cpu.NUM_PLANES * height * width)
        self._recolor(self._source, row, color_cpu.Planes(*memory.view(-1, height, width).unbind(0)))

    def crop(self, view: int) -> Tensor:
        """Cut, resize and mirror."""
        cut = self._cuts[view]
        planes = self._source[:, cut.top : cut.top + cut.height, cut.left : cut.left + cut.width]
        side = cut.side
        multiply_both(cut.vertical, cut.horizontal, planes, rows=self._rows, blocks=self._blocks, out=side.padded)
        if cut.mirrored:
            side.picture.copy_(side.picture.flip(2))
        return side.picture

    def recolor(self, picture: Tensor, row: Row) -> Tensor:
        """Jitter and grayscale of one view."""
        self._recolor(picture, row, self._sides[picture.shape[1]].planes)
        return picture

    def blur(self, picture: Tensor, view: int) -> Tensor:
        """The blur of one view, if it has one."""
        cut = self._cuts[view]
        if cut.blur is not None:
            padded = cut.side.padded
            multiply_both(cut.blur, cut.blur, padded, rows=self._rows, blocks=self._blocks, out=padded)
        return picture

    def solarize(self, picture: Tensor) -> Tensor:
        """Invert the bright levels."""
        color_cpu.solarize_(picture, self._sides[picture.shape[1]].planes)
        return picture

    def _plan_cuts(self, rows: Sequence[Row]) -> list[_Cut]:
        lengths = np.array([row[Column.HEIGHT : Column.WIDTH + 1] for row in rows], dtype=np.float64).reshape(-1)
        matrices = self._planner(lengths, lengths / self._outputs, np.zeros_like(lengths))
        cuts = []
        for row, side, vertical, horizontal in zip(rows, self._views, matrices[::2], matrices[1::2], strict=True):
            top, left, height, width, mirrored = (int(value) for value in row[: Column.FLIP + 1])
            sigma = row[Column.BLUR_SIGMA]
            blurred = side.blurs(sigma) if side.blurs is not None and sigma > 0.0 else None
            cuts.append(_Cut(side, top, left, height, width, bool(mirrored), vertical, horizontal, blurred))
        return cuts

    def _planes_in(self, scratch: Scratch, height: int, width: int) -> Tensor:
        """The image's planes [3, H, W], with the margins around them that windows may reach into."""
        before, after = self._margin
        count = 3 * height * width
        return scratch.take(before + count + after)[before : before + count].view(3, height, width)

    @staticmethod
    def _recolor(x: Tensor, row: Row, planes: color_cpu.Planes) -> None:
        color_cpu.jitter_(x, int(row[Column.JITTER_ORDER]), row[Column.BRIGHTNESS : Column.HUE + 1], planes)
        if row[Column.GRAY]:
            color_cpu.to_gray_(x, planes)
