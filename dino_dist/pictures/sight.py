"""How a network sees pictures of any size: the CLS token's attention and all features, in one pass.

Letters: N pictures, H heads, h x w patches, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_dist.data.reading.decode import Pixels
from dino_dist.errors import UserError
from dino_dist.models.attention import Attention
from dino_dist.models.layers import Block
from dino_dist.models.vit import MAX_PATCHES, VisionTransformer

_PUBLISHED_PX = (480, 224)
"""Short side of a picture when its attention is looked at, for a network of the second size (published code)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """What a network makes of N pictures of one size; on its device."""

    attention_NHhw: Tensor
    """From the CLS token of the last block to each patch; fp32 at least. A map sums to 1 less what CLS gives itself."""
    patches_NhwD: Tensor
    """Normed features of the last block."""
    cls_ND: Tensor
    """The normed class token."""


@torch.no_grad()
def look(backbone: VisionTransformer, images: Tensor) -> Sight:
    """One forward pass of normalised images [N, 3, height, width] whose sides are multiples of the patch.

    Of the last attention only the row of the CLS token is computed, so that memory grows with the patches, not with
    their square.
    """
    rows, columns = backbone.patch_embed.grid(*images.shape[-2:])
    attention = _last_attention(backbone)
    with _inputs_of(attention) as caught:
        tokens_NLD = backbone.features(images)[-1]
    num_images, length, dim = tokens_NLD.shape
    # The order of the rows of qkv is query, key, value; within each, head by head.
    weight, bias = attention.qkv.weight, attention.qkv.bias
    normed_NLD = caught[0].view(num_images, length, dim)
    num_heads = backbone.shape.num_heads
    query = F.linear(normed_NLD[:, 0], weight[:dim], bias[:dim]).view(num_images, num_heads, 1, -1)
    key = F.linear(normed_NLD, weight[dim : 2 * dim], bias[dim : 2 * dim])
    key_NHLd = key.view(num_images, length, num_heads, -1).transpose(1, 2)
    scores = (query @ key_NHLd.transpose(-2, -1)).squeeze(2) * query.shape[-1] ** -0.5
    attention_NHL = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return Sight(
        attention_NHhw=attention_NHL[:, :, 1:].reshape(num_images, num_heads, rows, columns),
        patches_NhwD=tokens_NLD[:, 1:].reshape(num_images, rows, columns, dim),
        cls_ND=tokens_NLD[:, 0],
    )


def _last_attention(backbone: VisionTransformer) -> Attention:
    last = backbone.blocks[-1]
    assert isinstance(last, Block)
    return last.attn


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        handle.remove()


def default_short_px(trained_px: int) -> int:
    """Short side of pictures for a network trained on crops of this side: 480 px for 224, others in proportion."""
    looked_at, trained = _PUBLISHED_PX
    return round(trained_px * looked_at / trained)


def seen_size(size_px: tuple[int, int], *, short_px: int, patch_size: int) -> tuple[int, int]:
    """Height and width that the network gets: short side to `short_px` (0: as it is), then down to whole patches.

    `UserError` for a picture smaller than a patch, and for one that would be more than `MAX_PATCHES`.
    """
    if min(size_px) < patch_size:
        raise UserError(
            f"{size_px[1]} x {size_px[0]} px is less than one patch of {patch_size} x {patch_size} px: "
            "give a larger picture"
        )
    scale = short_px / min(size_px) if short_px else 1.0
    if scale * min(size_px) < patch_size:
        raise UserError(f"--size-px {short_px} is less than one patch of {patch_size} px: give at least {patch_size}")
    height, width = (int(side * scale + 1e-6) // patch_size * patch_size for side in size_px)
    patches = height * width // patch_size**2
    if patches > MAX_PATCHES:
        raise UserError(
            f"{size_px[1]} x {size_px[0]} px would be looked at as {width} x {height} px, {patches} patches; "
            f"at most {MAX_PATCHES}: give a smaller --size-px"
        )
    return height, width


def resize_picture(pixels: Pixels, size_px: tuple[int, int]) -> Tensor:
    """RGB uint8 [H, W, 3] -> [3, height, width] in [0, 1], fp32; the same pixels where the size is the same."""
    picture = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255.0)
    if tuple(picture.shape[1:]) == size_px:
        return picture
    resized = F.interpolate(picture[None], size=size_px, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp_(0.0, 1.0)
