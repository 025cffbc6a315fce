"""One image at a time, its crops as uint8 pictures, rounded wherever torchvision rounds: `quantize="uint8"` on the CPU.

The operations are torchvision's own on uint8 tensors [3, S, S]. Two are not: a blur that it does not have (box3: one
rounding at the end), and the mean of contrast, whose sum of floats would depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops import blur
from dino_dist.data.crops.color import BRIGHTNESS, CONTRAST, HUE, MAX_LEVEL, SATURATION, SOLARIZE_FROM
from dino_dist.data.crops.color_cpu import JITTER_ORDERS, luma
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe
from dino_dist.data.crops.float_pictures import Row
from dino_dist.data.crops.render_rules import BlurKind


class Uint8Pictures:
    """Equal to torchvision's operations on uint8 pictures; the methods are those of `FloatPictures`."""

    def __init__(self, recipes: Sequence[ViewRecipe], blur_kind: BlurKind) -> None:
        self._recipes = recipes
        self._plans = {
            view.size_px: blur.make_plan(blur_kind, view.size_px, view.blur_sigma_px[1], torch.device("cpu"))
            for view in sorted(recipes, key=lambda view: view.blur_sigma_px[1])
            if view.blur_p > 0.0
        }
        self._rows: Sequence[Row] = ()
        self._source = torch.empty(0)

    def open(self, image_HWC: Tensor, rows: Sequence[Row]) -> None:
        """Take an image, uint8 [H, W, 3], and the parameters of all its views."""
        self._rows = rows
        self._source = image_HWC.permute(2, 0, 1)

    def recolor_image(self, row: Row) -> None:
        """Jitter and grayscale of the whole image; later crops are cut from the result."""
        self._source = self.recolor(self._source, row)

    def crop(self, view: int) -> Tensor:
        """Cut, resize and mirror."""
        top, left, height, width, mirrored = (int(value) for value in self._rows[view][: Column.FLIP + 1])
        side = self._recipes[view].size_px
        cut = self._source[:, top : top + height, left : left + width]
        if (height, width) != (side, side):
            cut = F.interpolate(cut.unsqueeze(0), size=(side, side), mode="bicubic", antialias=True)[0]
        return cut.flip(2) if mirrored else cut

    def recolor(self, picture: Tensor, row: Row) -> Tensor:
        """Jitter, each operation truncated, and grayscale of one picture."""
        for op in JITTER_ORDERS[int(row[Column.JITTER_ORDER])]:
            factor = row[Column.BRIGHTNESS + op]
            if factor != (0.0 if op == HUE else 1.0):
                picture = _adjusted(picture, op, factor)
        if row[Column.GRAY]:
            picture = tv.rgb_to_grayscale(picture, num_output_channels=3)
        return picture

    def blur(self, picture: Tensor, view: int) -> Tensor:
        """The blur of one view, if it has one, rounded to the nearest level."""
        sigma_px = self._rows[view][Column.BLUR_SIGMA]
        if sigma_px == 0.0:
            return picture
        plan = self._plans[picture.shape[1]]
        if plan.kind == "taps9":
            blurred: Tensor = tv.gaussian_blur(picture, [2 * blur.TAPS_REACH + 1] * 2, [sigma_px] * 2)
            return blurred
        levels = picture.permute(1, 0, 2).float().unsqueeze(0)
        return blur.blur(levels, torch.tensor([sigma_px]), plan)[0].permute(1, 0, 2).round_().to(torch.uint8)

    def solarize(self, picture: Tensor) -> Tensor:
        """Invert the bright levels."""
        solarized: Tensor = tv.solarize(picture, SOLARIZE_FROM)
        return solarized


def _adjusted(x: Tensor, op: int, factor: float) -> Tensor:
    if op == CONTRAST:
        gray = luma(x, torch.empty(x.shape[1:])).long()  # rounded down
        mean = gray.sum() / gray.numel()
        return x.mul(factor).add_(mean, alpha=1.0 - factor).clamp_(0.0, MAX_LEVEL).to(torch.uint8)
    adjust = {BRIGHTNESS: tv.adjust_brightness, SATURATION: tv.adjust_saturation, HUE: tv.adjust_hue}[op]
    adjusted: Tensor = adjust(x, factor)
    return adjusted
