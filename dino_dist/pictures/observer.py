"""A network ready to look: its weights as they were read, and how its pictures are sized and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dino_dist.config import DataSection
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.errors import UserError
from dino_dist.inputs import decode_rules
from dino_dist.models.vit import VisionTransformer
from dino_dist.pictures.neighbors import EvalView
from dino_dist.pictures.sight import Sight, default_short_px, look, seen_size
from dino_dist.weights.network_weights import NetworkWeights, build_backbone
from dino_dist.weights.read_network import read_network

_PUBLISHED_VIEW = (256, 224)
"""Short side and crop of evaluation for a network trained at the second; others in proportion."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Observer:
    """Looks at pictures of any size."""

    weights: NetworkWeights
    backbone: VisionTransformer
    short_px: int
    """Short side that pictures are resized to; 0: as they are."""
    eval_view: EvalView
    rules: DecodeRules
    """Limits of files; photographs are turned as their EXIF orientation asks, as every viewer shows them."""

    def seen_size(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """Height and width as the network gets them; `UserError` for a picture that is too small or too large."""
        return seen_size(size_px, short_px=self.short_px, patch_size=self.backbone.shape.patch_size)

    def look(self, pictures: Sequence[Tensor]) -> Sight:
        """At pictures [3, height, width] in [0, 1] of one size; on the CPU again."""
        token = self.backbone.cls_token
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.eval_view.mean, self.eval_view.std))
        images = ((torch.stack(list(pictures)) - mean) / std).to(token.device, token.dtype)
        sight = look(self.backbone, images)
        if not bool(torch.isfinite(sight.attention_NHhw).all()):
            raise UserError(
                f"the attention of {self.weights.source} is not finite: the network has diverged, "
                "take an earlier checkpoint"
            )
        return Sight(
            attention_NHhw=sight.attention_NHhw.cpu(), patches_NhwD=sight.patches_NhwD.cpu(), cls_ND=sight.cls_ND.cpu()
        )


def open_observer(
    checkpoint: Path, *, network: str, size_px: int | None, device: Literal["auto", "cpu", "cuda"] = "auto"
) -> Observer:
    """`size_px`: None: 480 for a network trained at 224 px, others in proportion. `UserError` as `read_network`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here; choose cpu")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    weights = read_network(checkpoint, network=network)
    if weights.shape.in_channels != 3:
        raise UserError(f"{checkpoint} takes images of {weights.shape.in_channels} channels; pictures have 3")
    mean, std = _three(weights.pixel_mean), _three(weights.pixel_std)
    trained_px = weights.shape.image_px
    resize_px, crop_px = _PUBLISHED_VIEW
    return Observer(
        weights=weights,
        backbone=build_backbone(weights, place),
        short_px=default_short_px(trained_px) if size_px is None else size_px,
        eval_view=EvalView(resize_px=round(trained_px * resize_px / crop_px), crop_px=trained_px, mean=mean, std=std),
        rules=replace(decode_rules(DataSection()), exif_transpose=True),
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
