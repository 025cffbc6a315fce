"""The sizes of a backbone as its tensors tell them, and whether the tensors are all of it and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.models.vit import VisionTransformer, ViTShape

HEAD_DIM = 64
"""Width of an attention head in every published DINO ViT."""

_NAMED_AT_MOST = 4
_TELLING = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")


def shape_of(backbone: Mapping[str, Tensor], *, num_heads: int, source: str) -> ViTShape:
    """Width, depth, patch and position grid; `UserError` if tensors that tell them are missing or misshapen."""
    missing = [name for name in _TELLING if name not in backbone]
    if missing:
        raise UserError(f"{source} holds no DINO ViT: {', '.join(missing)} missing; give weights of a ViT backbone")
    cls, positions, patches, fc1 = (backbone[name] for name in _TELLING)
    if (cls.ndim, positions.ndim, patches.ndim, fc1.ndim) != (3, 3, 4, 2) or not cls.shape[-1]:
        found = ", ".join(f"{name}{list(backbone[name].shape)}" for name in _TELLING)
        raise UserError(f"{source} holds no DINO ViT: {found} have the wrong number of dimensions")
    embed_dim = cls.shape[-1]
    grid = math.isqrt(max(positions.shape[1] - 1, 0))
    if not grid or 1 + grid**2 != positions.shape[1]:
        raise UserError(
            f"{source}: pos_embed{list(positions.shape)} is not one position for the class token and a square of "
            "patches: give weights of a ViT with a class token, trained on square images"
        )
    mlp_ratio = fc1.shape[0] / embed_dim
    if int(embed_dim * mlp_ratio) != fc1.shape[0]:
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)  # rounding must not cost the MLP a column
    return ViTShape(
        embed_dim=embed_dim,
        depth=sum(name.endswith(".norm1.weight") for name in backbone),
        num_heads=num_heads,
        patch_size=patches.shape[-1],
        image_px=patches.shape[-1] * grid,
        mlp_ratio=mlp_ratio,
        in_channels=patches.shape[1],
    )


def heads_of(backbone: Mapping[str, Tensor], *, stated: int | None, asked: int | None, source: str) -> int:
    """Attention heads, which no tensor tells: as the file states, else as asked, else width / 64 as published.

    `UserError` where file and question differ, or nobody tells and the width is no multiple of 64.
    """
    if stated is not None and asked is not None and stated != asked:
        raise UserError(f"{source} says it has {stated} attention heads, not {asked}: leave the number out")
    told = stated if stated is not None else asked
    if told is not None:
        return told
    width = backbone["cls_token"].shape[-1] if "cls_token" in backbone else HEAD_DIM
    if width % HEAD_DIM:
        raise UserError(
            f"{source} does not tell its number of attention heads, and its width {width} is no multiple of "
            f"{HEAD_DIM}: give the number of heads"
        )
    return int(width // HEAD_DIM)


def backbone_differences(backbone: Mapping[str, Tensor], shape: ViTShape) -> list[str]:
    """What is missing, superfluous, misshapen or no floating-point number, each in a few words; empty: all is there."""
    with torch.device("meta"):
        wanted = VisionTransformer(shape, "sdpa").state_dict()
    found = [f"{name} is missing" for name in wanted if name not in backbone]
    for name, tensor in backbone.items():
        if name not in wanted:
            found.append(f"{name} has no place in {shape.depth} blocks")
        elif tensor.shape != wanted[name].shape:
            found.append(f"{name} is {list(tensor.shape)} instead of {list(wanted[name].shape)}")
        elif not tensor.is_floating_point():
            found.append(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}")
    return found


def in_few_words(items: list[str]) -> str:
    """The first few, and how many more."""
    more = len(items) - _NAMED_AT_MOST
    return "; ".join(items[:_NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else "")
