"""Attention maps and features are those of timm's model with the same weights, at the trained size and at others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dino_dist.models.vit import VisionTransformer, ViTShape, position_interpolation
from dino_dist.pictures.sight import look

timm = pytest.importorskip("timm", reason="timm is not installed (extra: dev)")

BOUND = 1e-5


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max|a - b| / max|b|."""
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())


def peaked(model: Any) -> dict[str, Tensor]:
    """Random weights, scaled so that attention is far from even: a wrong key would show."""
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(value.shape, generator=generator) * 0.07 for name, value in model.state_dict().items()}
    return {name: value + 1.0 if "norm" in name and "weight" in name else value for name, value in weights.items()}


def timm_probabilities(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What timm multiplies the values of its last block with, and its normed tokens."""
    last = model.blocks[-1].attn
    last.fused_attn = False
    caught: list[Tensor] = []
    handle = last.attn_drop.register_forward_hook(lambda module, inputs, output: caught.append(output))
    tokens = model.forward_features(images)
    handle.remove()
    return caught[0], tokens


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("vit_small_patch16_224.dino", {"patch_size": 16, "embed_dim": 384, "num_heads": 6}, (224, 224)),
        ("vit_small_patch16_224.dino", {"patch_size": 16, "embed_dim": 384, "num_heads": 6}, (160, 288)),
        ("vit_small_patch8_224.dino", {"patch_size": 8, "embed_dim": 384, "num_heads": 6}, (224, 224)),
        ("vit_base_patch16_224.dino", {"patch_size": 16, "embed_dim": 768, "num_heads": 12}, (224, 224)),
    ],
)
@torch.no_grad()
def test_equal_to_timm(name: str, shape: dict[str, int], size: tuple[int, int]) -> None:
    published = timm.create_model(name, pretrained=False)
    weights = peaked(published)
    ours = VisionTransformer(ViTShape(depth=12, image_px=224, **shape), "sdpa").eval()
    ours.load_state_dict(weights)
    # timm resamples positions by another rule: it gets them at the wanted size.
    reference = timm.create_model(name, pretrained=False, img_size=size).eval()
    positions = weights["pos_embed"]
    if size != (224, 224):
        grid = 224 // shape["patch_size"]
        matrix = position_interpolation(grid, size[0] // shape["patch_size"], size[1] // shape["patch_size"]).float()
        positions = torch.cat([positions[:, :1], (matrix @ positions[0, 1:]).unsqueeze(0)], dim=1)
    reference.load_state_dict(weights | {"pos_embed": positions})
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(7))

    sight = look(ours, images)
    probabilities, tokens = timm_probabilities(reference, images)

    rows = probabilities[:, :, 0, 1:].reshape(sight.attention_NHhw.shape)
    assert rows.amax((-2, -1)).mean() > 5 * rows.mean(), "attention is too even for this test to say much"
    assert relative_error(sight.attention_NHhw, rows) <= BOUND
    assert relative_error(sight.patches_NhwD.flatten(1, 2), tokens[:, 1:]) <= BOUND
    assert relative_error(sight.cls_ND, tokens[:, 0]) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_the_explicit_attention_matrix(dtype: torch.dtype) -> None:
    model = VisionTransformer(ViTShape(embed_dim=24, depth=3, num_heads=3, patch_size=4, image_px=16), "explicit")
    model.load_state_dict(peaked(model))
    model = model.to(dtype).eval()
    images = torch.randn(2, 3, 20, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    sight = look(model, images)
    with torch.no_grad():
        expected = model.last_attention(images)[:, :, 0, 1:].view(2, 3, 5, 3)
        tokens = model.features(images)[-1]
    torch.testing.assert_close(sight.attention_NHhw, expected)
    torch.testing.assert_close(sight.cls_ND, tokens[:, 0], rtol=0, atol=0)
    assert sight.attention_NHhw.dtype == dtype
    assert not sight.attention_NHhw.requires_grad
    assert not model.blocks[-1].attn._forward_pre_hooks
