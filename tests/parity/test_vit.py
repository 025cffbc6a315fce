"""The vision transformer and head say what the published method says: golden numbers, slow forms, separate forwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_dist.models.attention import ResolvedBackend
from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VisionTransformer, ViTShape, position_interpolation

GOLDEN = Path(__file__).parents[1] / "golden" / "dino_v1_trajectory_a.npz"
TINY = ViTShape(embed_dim=24, depth=3, num_heads=3, patch_size=4, image_px=16)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max|a - b| / max|b|."""
    assert ours.shape == reference.shape
    return float((ours - reference).detach().abs().max() / reference.detach().abs().max())


def tiny_model(backend: ResolvedBackend = "sdpa", shape: ViTShape = TINY) -> VisionTransformer:
    """Float64, weights far from their small initial scale, so that every branch matters."""
    torch.manual_seed(3)
    model = VisionTransformer(shape, backend).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def crops_of(*sizes: tuple[int, int, int]) -> list[Tensor]:
    """One [N, 3, h, w] of noise for each (N, h, w)."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, 3, h, w, generator=generator, dtype=torch.float64) for n, h, w in sizes]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def golden_model(golden: dict[str, Any], backend: ResolvedBackend) -> nn.ModuleDict:
    config = json.loads(str(golden["meta.json"]))["config"]
    shape = ViTShape(
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        patch_size=config["patch_px"],
        image_px=config["global_px"],
    )
    head = DinoHead(
        config["embed_dim"],
        config["num_prototypes"],
        hidden_dim=config["head_hidden_dim"],
        bottleneck_dim=config["head_bottleneck_dim"],
        norm_last_layer=config["norm_last_layer"],
    )
    model = nn.ModuleDict({"backbone": VisionTransformer(shape, backend), "head": head}).double()
    initial = {k.removeprefix("init/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("init/")}
    model.load_state_dict(initial, strict=True)
    return model


@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
def test_golden_forward(golden: dict[str, Any], backend: ResolvedBackend) -> None:
    model = golden_model(golden, backend)
    global_crops = torch.from_numpy(golden["step0/global_crops"]).flatten(0, 1)
    local_crops = torch.from_numpy(golden["step0/local_crops"]).flatten(0, 1)
    cls_tokens = model["backbone"]([global_crops, local_crops])
    teacher_logits = model["head"](model["backbone"]([global_crops]))
    ours = {
        "student_backbone_cls_global": cls_tokens[: len(global_crops)],
        "student_backbone_cls_local": cls_tokens[len(global_crops) :],
        "last_selfattention_global": model["backbone"].last_attention(global_crops),
        "teacher_logits": teacher_logits,
        "student_logits": model["head"](cls_tokens),
    }
    for name, value in ours.items():
        assert relative_error(value, torch.from_numpy(golden[f"step0/{name}"])) <= 1e-12, name


def test_parameter_order_is_the_published_one(golden: dict[str, Any]) -> None:
    trained = [name for name, p in golden_model(golden, "sdpa").named_parameters() if p.requires_grad]
    assert trained == json.loads(str(golden["meta.json"]))["grad_parameters"]


@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
def test_packed_is_separate_forwards(backend: ResolvedBackend) -> None:
    model = tiny_model(backend)
    crops = crops_of((2, 16, 16), (3, 8, 8), (2, 8, 12))
    weight = torch.linspace(-1, 1, TINY.embed_dim, dtype=torch.float64)

    def gradients(outputs: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((outputs * weight).sum(), list(model.parameters())))

    packed = model(crops)
    separate = torch.cat([model([image[None]]) for run in crops for image in run])
    assert relative_error(packed, separate) <= 1e-12
    for ours, reference in zip(gradients(packed), gradients(separate), strict=True):
        assert relative_error(ours, reference) <= 1e-12


def test_sdpa_is_explicit() -> None:
    crops = crops_of((2, 16, 16), (3, 8, 8))
    results = []
    for backend in ("sdpa", "explicit"):
        model = tiny_model(backend)
        output = model(crops)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))])
    for sdpa, explicit in zip(*results, strict=True):
        assert relative_error(sdpa, explicit) <= 1e-12


def published_positions(pos_embed: Tensor, patch_size: int, first_px: int, second_px: int) -> Tensor:
    """The published rule, resampling the embedding itself; `first_px` is the image's first spatial axis."""
    num_patches, dim = pos_embed.shape[1] - 1, pos_embed.shape[2]
    side = math.isqrt(num_patches)
    scale = tuple((px // patch_size + 0.1) / math.sqrt(num_patches) for px in (first_px, second_px))
    grid = pos_embed[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    patches = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([pos_embed[:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)


@pytest.mark.parametrize(("grid", "rows", "columns"), [(14, 6, 6), (28, 12, 12), (14, 28, 28), (7, 5, 11), (4, 2, 8)])
def test_interpolation_matrix_is_the_published_resampling(grid: int, rows: int, columns: int) -> None:
    pos_embed = torch.randn(1, 1 + grid**2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = published_positions(pos_embed, 8, rows * 8, columns * 8)
    ours = position_interpolation(grid, rows, columns) @ pos_embed[0, 1:]
    assert relative_error(ours, expected[0, 1:]) <= 1e-13


def test_interpolated_positions_enter_tokens_and_gradients() -> None:
    shape = ViTShape(embed_dim=6, depth=1, num_heads=1, patch_size=4, image_px=16)
    model = tiny_model(shape=shape)
    images = crops_of((2, 8, 20))[0]
    tokens, _ = model._embed([images])
    patches = model.patch_embed(images)
    cls_tokens = model.cls_token.expand(2, -1, -1)
    reference = torch.cat([cls_tokens, patches], dim=1) + published_positions(model.pos_embed, 4, 8, 20)
    assert relative_error(tokens, reference.flatten(0, 1)) <= 1e-13
    weight = torch.randn(tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((tokens * weight).sum(), model.pos_embed)
    (expected,) = torch.autograd.grad((reference.flatten(0, 1) * weight).sum(), model.pos_embed)
    assert relative_error(ours, expected) <= 1e-13


def test_features_are_the_normed_tokens_of_the_last_blocks() -> None:
    model = tiny_model()
    (images,) = crops_of((2, 16, 12))
    features = model.features(images, num_last_blocks=TINY.depth)
    x_TD, layout = model._embed([images])
    for block, feature in zip(model.blocks, features, strict=True):
        x_TD = block(x_TD, layout)
        assert relative_error(feature, model.norm(x_TD).view(2, 13, -1)) <= 1e-13
    assert relative_error(model.features(images)[0][:, 0], model([images])) <= 1e-12


def test_drop_path_multiplies_each_crops_branches() -> None:
    model = tiny_model()
    crops = crops_of((2, 16, 16), (3, 8, 8))
    generator = torch.Generator().manual_seed(7)
    factors = torch.rand(TINY.depth, 2, 5, dtype=torch.float64, generator=generator)
    packed = model(crops, drop_path=factors)
    images = [image[None] for run in crops for image in run]
    for index, image in enumerate(images):
        x_TD, layout = model._embed([image])
        for block, (factor_attn, factor_mlp) in zip(model.blocks, factors[:, :, index], strict=True):
            x_TD = x_TD + factor_attn * block.attn(block.norm1(x_TD), layout)
            x_TD = x_TD + factor_mlp * block.mlp(block.norm2(x_TD))
        assert relative_error(packed[index], model.norm(x_TD[0])) <= 1e-12
    assert torch.equal(model(crops, drop_path=torch.ones_like(factors)), model(crops))
    dropped = model(crops, drop_path=torch.zeros_like(factors))
    tokens, layout = model._embed(crops)
    untouched = torch.cat([run[:, 0] for run in layout.split(tokens)])
    assert torch.equal(dropped, model.norm(untouched))
