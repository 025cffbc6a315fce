"""The device side of multi-crop: renders the views that `crop_parameters.draw` describes, and evaluation's plain view.

One code for CPU and CUDA. Nothing random happens here, nothing waits for the device, and shapes follow from the image
sizes (known on the host) alone. Products are float32; keep torch's float32 matmul precision at "highest" (its default),
since TF32 shifts pixels by up to a quarter of a grey level.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_dist.data import color
from dino_dist.data.crop_parameters import Column, ViewRecipe
from dino_dist.data.resample import AxisRows, crop_resize
from dino_dist.errors import UserError

_JITTER_FIELDS = ("brightness", "contrast", "saturation", "hue")  # numbered as in `color`


@dataclass(frozen=True)
class _Group:
    """Consecutive views of one side: which stages any of them needs, and the constants of those stages."""

    first_view: int
    num_views: int
    side_px: int
    jitter_ops: tuple[int, ...]
    jitter_sequences: Tensor
    gray: bool
    blur_shifts: Tensor | None
    solarize: bool


class MultiCropRenderer:
    """Renders all views of a batch: crop and resize image by image, then colours for all views of one side at once.

    A stage whose probability (or strength) is 0 in every view of a side is left out, by the recipe, not by the data.
    """

    def __init__(
        self,
        recipes: Sequence[ViewRecipe],
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`mean` and `std` of RGB in [0, 1]; views come out in `dtype` on `device`."""
        if not recipes:
            raise UserError("multi-crop needs at least one view, got none")
        self.device = device
        self._dtype = dtype
        self._mean, self._std = _channel_constants(mean, std, device)
        self._groups = _make_groups(recipes, device)
        self._row_view = torch.cat(
            [torch.full((recipe.size_px,), view, device=device) for view, recipe in enumerate(recipes)]
        )
        self._row_output = torch.cat([torch.arange(recipe.size_px, device=device).float() for recipe in recipes])
        self._row_side = torch.cat([torch.full((r.size_px,), float(r.size_px), device=device) for r in recipes])
        self._num_views = len(recipes)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, sizes: Tensor, params: Tensor) -> list[Tensor]:
        """Views as one [views * n, 3, S, S] per side, crop-major: all of the side's first view, then its second...

        `pixels` uint8 [bytes] on the renderer's device, images [H, W, 3] one after the other; `sizes` int [n, 2] (H, W)
        on the CPU; `params` float [views, n, columns] as drawn (pinned or already on the device, else the copy waits).
        Consecutive recipes of one side share a tensor: two globals and L locals give [2n, ...] and [L * n, ...].
        """
        image_sizes = _host_sizes(sizes)
        if params.shape != (self._num_views, len(image_sizes), len(Column)):
            expected = (self._num_views, len(image_sizes), len(Column))
            raise ValueError(f"params must have shape {expected}, got {tuple(params.shape)}")
        with torch.autocast(self.device.type, enabled=False):
            device_params = params.to(self.device, torch.float32, non_blocking=True)
            vertical, horizontal = self._axes(device_params)
            shapes = [(group.num_views, group.side_px) for group in self._groups]
            resized = crop_resize(pixels, image_sizes, vertical, horizontal, shapes)
            return [
                self._finish(group, levels, device_params) for group, levels in zip(self._groups, resized, strict=True)
            ]

    def _axes(self, params: Tensor) -> tuple[AxisRows, AxisRows]:
        rows = params.transpose(0, 1)[:, self._row_view]
        output = self._row_output.expand(rows.shape[:2])
        mirrored = torch.where(rows[..., Column.FLIP] > 0.5, self._row_side - 1.0 - output, output)
        height, width = rows[..., Column.HEIGHT], rows[..., Column.WIDTH]
        vertical = AxisRows(start=rows[..., Column.TOP], length=height, scale=height / self._row_side, output=output)
        horizontal = AxisRows(start=rows[..., Column.LEFT], length=width, scale=width / self._row_side, output=mirrored)
        return vertical, horizontal

    def _finish(self, group: _Group, levels: Tensor, params: Tensor) -> Tensor:
        """Grey levels [views, n, S, 3, S] to normalised views [views * n, 3, S, S]."""
        x = levels.flatten(0, 1).div_(255.0)
        rows = params[group.first_view : group.first_view + group.num_views].flatten(0, 1)
        if group.jitter_ops:
            order = rows[:, Column.JITTER_ORDER].long()
            factors = rows[:, Column.BRIGHTNESS : Column.HUE + 1]
            x = color.jitter(x, order, factors, group.jitter_sequences, group.jitter_ops)
        if group.gray:
            x = color.to_gray(x, rows[:, Column.GRAY] > 0.5)
        if group.blur_shifts is not None:
            x = color.blur(x, rows[:, Column.BLUR_SIGMA], group.blur_shifts)
        if group.solarize:
            x = color.solarize(x, rows[:, Column.SOLARIZE] > 0.5)
        return _normalize(x, self._mean, self._std, self._dtype)


@torch.no_grad()
def resize_for_eval(
    pixels: Tensor,
    sizes: Tensor,
    *,
    resize_px: int,
    crop_px: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The view of evaluation: short side to `resize_px` (bicubic, antialiased), center crop, normalise; [n, 3, C, C].

    `pixels` and `sizes` as for the renderer; the result is on the pixels' device. Sizes and the crop's place round as
    torchvision's Resize and CenterCrop do. Waits for the device: not for the training step.
    """
    if not 1 <= crop_px <= resize_px:
        raise UserError(f"evaluation crop_px={crop_px} must be from 1 to resize_px={resize_px}")
    device, image_sizes = pixels.device, _host_sizes(sizes)
    place = torch.tensor(
        [
            [_eval_axis(height, min(height, width), resize_px, crop_px) for height, width in image_sizes],
            [_eval_axis(width, min(height, width), resize_px, crop_px) for height, width in image_sizes],
        ],
        device=device,
    ).view(2, len(image_sizes), 3, 1)
    window = torch.arange(crop_px, device=device).float()
    vertical, horizontal = (
        AxisRows(
            start=torch.zeros_like(axis[:, 0]).expand(-1, crop_px),
            length=axis[:, 0].expand(-1, crop_px),
            scale=axis[:, 1].expand(-1, crop_px),
            output=axis[:, 2] + window,
        )
        for axis in place
    )
    with torch.autocast(device.type, enabled=False):
        (levels,) = crop_resize(pixels, image_sizes, vertical, horizontal, [(1, crop_px)])
        return _normalize(levels[0].div_(255.0), *_channel_constants(mean, std, device), dtype)


def _eval_axis(length: int, short: int, resize_px: int, crop_px: int) -> tuple[float, float, float]:
    """Of one axis: source pixels, source pixels per output pixel, first output pixel inside the center crop."""
    resized = resize_px if length == short else int(resize_px * length / short)
    return float(length), length / resized, float(round((resized - crop_px) / 2.0))


def _make_groups(recipes: Sequence[ViewRecipe], device: torch.device) -> tuple[_Group, ...]:
    groups = []
    first_view = 0
    for side_px, members in itertools.groupby(recipes, key=lambda recipe: recipe.size_px):
        views = list(members)
        jittered = [view for view in views if view.jitter_p > 0]
        ops = tuple(op for op, name in enumerate(_JITTER_FIELDS) if any(getattr(view, name) > 0 for view in jittered))
        sigmas = [view.blur_sigma_px[1] for view in views if view.blur_p > 0]
        groups.append(
            _Group(
                first_view=first_view,
                num_views=len(views),
                side_px=side_px,
                jitter_ops=ops,
                jitter_sequences=color.jitter_sequences(ops, device),
                gray=any(view.gray_p > 0 for view in views),
                blur_shifts=color.box_shifts(side_px, max(sigmas), device) if sigmas else None,
                solarize=any(view.solarize_p > 0 for view in views),
            )
        )
        first_view += len(views)
    return tuple(groups)


def _host_sizes(sizes: Tensor) -> list[tuple[int, int]]:
    if sizes.device.type != "cpu" or sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes must be [n, 2] on the CPU, got {tuple(sizes.shape)} on {sizes.device}")
    return [(height, width) for height, width in sizes.tolist()]


def _channel_constants(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    if any(value <= 0 for value in std):
        raise UserError(f"data.std={std} must be three positive numbers")
    return torch.tensor(mean, device=device).view(1, 3, 1, 1), torch.tensor(std, device=device).view(1, 3, 1, 1)


def _normalize(x: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, S, 3, S] in [0, 1] to contiguous, normalised [N, 3, S, S]."""
    normalized = (x.permute(0, 2, 1, 3) - mean).div_(std)
    # `to` ignores the memory format when the dtype stays; together they copy once.
    return normalized.to(dtype, memory_format=torch.contiguous_format).contiguous()
