"""The sizes of a backbone as its tensors tell them, and whether the tensors are all of it and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VisionTransformer, ViTShape

HEAD_DIM = 64
"""Width of an attention head in every published DINO ViT."""
_WIDEST_PUBLISHED = 1024
"""Beyond it others have heads of another width: ViT-H of 80, ViT-g of 88."""

_NAMED_AT_MOST = 4
_TELLING = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")


def shape_of(backbone: Mapping[str, Tensor], *, num_heads: int, source: str) -> ViTShape:
    """Width, depth, patch and position grid; `UserError` if tensors that tell them are missing or misshapen."""
    missing = [name for name in _TELLING if name not in backbone]
    if missing:
        raise UserError(f"{source} holds no DINO ViT: {', '.join(missing)} missing; give weights of a ViT backbone")
    cls, positions, patches, fc1 = (backbone[name] for name in _TELLING)
    dimensions = (cls.ndim, positions.ndim, patches.ndim, fc1.ndim)
    if dimensions != (3, 3, 4, 2) or not cls.numel() == cls.shape[-1] > 0 or positions.shape[0] != 1:
        found = ", ".join(f"{name}{list(backbone[name].shape)}" for name in _TELLING)
        raise UserError(f"{source} holds no DINO ViT: {found} have the wrong dimensions")
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
    try:
        return ViTShape(
            embed_dim=embed_dim,
            depth=sum(name.endswith(".norm1.weight") for name in backbone),
            num_heads=num_heads,
            patch_size=patches.shape[-1],
            image_px=patches.shape[-1] * grid,
            mlp_ratio=mlp_ratio,
            in_channels=patches.shape[1],
        )
    except UserError:  # in words about a run's settings, which these sizes are not
        raise UserError(
            f"{source} holds no DINO ViT that {num_heads} attention heads fit: width {embed_dim}, patches "
            f"{list(patches.shape)}; the width must be a multiple of the heads, and every size at least 1"
        ) from None


def heads_of(
    backbone: Mapping[str, Tensor], *, stated: int | None, asked: int | None, assumed: int | None = None, source: str
) -> int:
    """Attention heads, which no tensor tells: as the file states, else as asked, else width / 64 as published.

    `assumed` is for a width that no published size has. `UserError` where file and question differ, or nobody tells.
    """
    if stated is not None and asked is not None and stated != asked:
        raise UserError(f"{source} says it has {stated} attention heads, not {asked}: leave the number out")
    told = stated if stated is not None else asked
    if told is not None:
        return told
    cls_token = backbone.get("cls_token")
    width = HEAD_DIM if cls_token is None or not cls_token.ndim else cls_token.shape[-1]  # `shape_of` refuses those
    if width % HEAD_DIM == 0 and width <= _WIDEST_PUBLISHED:
        return int(width // HEAD_DIM)
    if assumed is not None:
        return assumed
    raise UserError(
        f"{source} does not tell its number of attention heads, and its width {width} is no multiple of {HEAD_DIM} up "
        f"to {_WIDEST_PUBLISHED}: give the number of heads (`dino-dist export --num-heads` writes a file that tells it)"
    )


def backbone_differences(backbone: Mapping[str, Tensor], shape: ViTShape) -> list[str]:
    """What is missing, superfluous or misshapen, each in a few words; empty: all is there."""
    with torch.device("meta"):
        wanted = VisionTransformer(shape, "sdpa").state_dict()
    found = [f"{name} is missing" for name in wanted if name not in backbone]
    for name, tensor in backbone.items():
        if name not in wanted:
            found.append(f"{name} has no place in {shape.depth} blocks")
        elif tensor.shape != wanted[name].shape:
            found.append(f"{name} is {list(tensor.shape)} instead of {list(wanted[name].shape)}")
    return found


def head_on_meta(head: Mapping[str, Tensor], embed_dim: int) -> DinoHead | None:
    """The head that tensors under its names make up, without memory; None if they are not all of one."""
    prototypes = head.get("last_layer.weight_v")
    layers = [tensor for name, tensor in head.items() if _is_mlp_weight(name) and tensor.ndim == 2]
    if prototypes is None or prototypes.ndim != 2 or not prototypes.numel() or not layers:
        return None
    with torch.device("meta"):
        made = DinoHead(
            embed_dim,
            prototypes.shape[0],
            hidden_dim=layers[0].shape[0],
            bottleneck_dim=prototypes.shape[1],
            num_layers=len(layers),
            batch_norm=has_batch_norm(head),
        )
    wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
    return made if wanted == {name: tensor.shape for name, tensor in head.items()} else None


def has_batch_norm(head: Mapping[str, Tensor]) -> bool:
    """Whether a head normalises its hidden layers over the batch."""
    return any(_is_mlp_weight(name) and tensor.ndim == 1 for name, tensor in head.items())


def _is_mlp_weight(name: str) -> bool:
    return name.startswith("mlp.") and name.endswith(".weight")


def in_few_words(items: list[str]) -> str:
    """The first few, and how many more."""
    more = len(items) - _NAMED_AT_MOST
    return "; ".join(items[:_NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else "")
