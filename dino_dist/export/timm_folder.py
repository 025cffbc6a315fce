"""A folder that `timm.create_model("local-dir:PATH", pretrained=True)` loads: config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_dist.export.architecture import published_name
from dino_dist.export.safetensors_file import save_tensors
from dino_dist.export.verification import Outputs
from dino_dist.models.vit import ViTShape
from dino_dist.weights.network_weights import NetworkWeights

CROP_SHARE = 0.875
"""Side of the evaluation's center crop over the short side that images are resized to: 224 / 256."""


def write_timm(weights: NetworkWeights, folder: Path) -> None:
    """timm's names are those of the published checkpoints, and ours."""
    save_tensors(dict(weights.backbone), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(weights), indent=2) + "\n")


def timm_config(weights: NetworkWeights) -> dict[str, Any]:
    """Every size is given, so that `architecture` is only the family's name where no published one fits."""
    shape = weights.shape
    return {
        "architecture": _architecture(shape),
        "num_classes": 0,
        "num_features": shape.embed_dim,
        "global_pool": "token",
        "model_args": {
            "img_size": shape.image_px,
            "patch_size": shape.patch_size,
            "in_chans": shape.in_channels,
            "embed_dim": shape.embed_dim,
            "depth": shape.depth,
            "num_heads": shape.num_heads,
            "mlp_ratio": shape.mlp_ratio,
            "num_classes": 0,
            "global_pool": "token",
        },
        "pretrained_cfg": {
            "tag": "dino_dist",
            "input_size": [shape.in_channels, shape.image_px, shape.image_px],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": list(weights.pixel_mean),
            "std": list(weights.pixel_std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def open_timm(folder: Path) -> Callable[[Tensor], Outputs]:
    """What timm's own model makes of the folder."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    @torch.no_grad()
    def forward(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)
        return {"cls": model.forward_head(tokens), "patches": tokens[:, 1:]}

    return forward


def _architecture(shape: ViTShape) -> str:
    import timm

    architecture = f"{published_name(shape)}_patch{shape.patch_size}_224"
    return architecture if timm.is_model(architecture) else "vit_base_patch16_224"
