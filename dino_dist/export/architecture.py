"""The published name of a backbone's size, where it has one."""

from __future__ import annotations

from dino_dist.models.vit import VIT_SIZES, ViTShape


def published_name(shape: ViTShape) -> str | None:
    """`vit_tiny` to `vit_large` by width, depth, heads and MLP; None: a size of the user's own."""
    sizes = (shape.embed_dim, shape.depth, shape.num_heads)
    for name, size in VIT_SIZES.items():
        if sizes == (size.embed_dim, size.depth, size.num_heads) and shape.mlp_ratio == 4.0:
            return name
    return None
