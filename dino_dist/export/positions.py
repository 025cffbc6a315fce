"""A network for another image size: its learned positions resampled once, by the rule that training uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from dino_dist.errors import UserError
from dino_dist.models.vit import position_interpolation
from dino_dist.weights.network_weights import NetworkWeights

MAX_GRID: Final = 128
"""Patches along a side; the check of an export has to run the network at its size."""


def at_image_size(weights: NetworkWeights, image_px: int) -> NetworkWeights:
    """The same features for images of `image_px` x `image_px`, without resampling; other tensors are shared.

    The positions are then in the type that the network computes in, fp32 at least. `UserError` for a size that is no
    multiple of the patch, or over `MAX_GRID` patches.
    """
    shape = weights.shape
    if image_px == shape.image_px:
        return weights
    largest_px = MAX_GRID * shape.patch_size
    if not shape.patch_size <= image_px <= largest_px or image_px % shape.patch_size:
        raise UserError(
            f"--image-px {image_px} must be a multiple of the patch's {shape.patch_size} px, up to {largest_px} px"
        )
    rows = image_px // shape.patch_size
    pos_embed = weights.backbone["pos_embed"].to(torch.promote_types(weights.dtype, torch.float32))
    matrix = position_interpolation(shape.grid, rows, rows).to(pos_embed.dtype)
    resampled = torch.cat([pos_embed[:, :1], (matrix @ pos_embed[0, 1:]).unsqueeze(0)], dim=1)
    return replace(
        weights,
        shape=replace(shape, image_px=image_px),
        backbone={**weights.backbone, "pos_embed": resampled},
    )
