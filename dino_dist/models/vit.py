"""The vision transformer of DINO v1 (arXiv:2104.14294) on packed crops of several resolutions.

Letters: N crops of one resolution, P patches of a crop, T tokens of all crops packed, D width of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_dist.errors import UserError
from dino_dist.models.attention import PackedLayout, ResolvedBackend
from dino_dist.models.layers import LAYER_NORM_EPS, Block, PatchEmbed

KEPT_INTERPOLATIONS = 16
"""Position matrices that a model keeps on its device: training uses one or two, evaluation at many sizes more."""
MAX_PATCHES = 2**17
"""Of one picture: a photograph of 12 megapixels has 47,000 of 16 px; attention's time grows with the square."""


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    """What a published architecture name stands for."""

    embed_dim: int
    depth: int
    num_heads: int


VIT_SIZES: Final[Mapping[str, ViTSize]] = MappingProxyType(
    {
        "vit_tiny": ViTSize(embed_dim=192, depth=12, num_heads=3),
        "vit_small": ViTSize(embed_dim=384, depth=12, num_heads=6),
        "vit_base": ViTSize(embed_dim=768, depth=12, num_heads=12),
        "vit_large": ViTSize(embed_dim=1024, depth=24, num_heads=16),
    }
)


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """All sizes of one backbone; `UserError` for sizes that do not fit together."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    """Side of a patch in px."""
    image_px: int
    """Side of the square image whose patches have a learned position each; others are interpolated."""
    mlp_ratio: float = 4.0
    init_std: float = 0.02
    """Standard deviation of the truncated normal that starts linear weights, positions and the CLS token."""
    drop_path: float = 0.0
    """Probability that the last block skips a branch; see `drop_path_rates`."""
    in_channels: int = 3

    def __post_init__(self) -> None:
        if min(self.embed_dim, self.depth, self.num_heads, self.patch_size, self.image_px, self.in_channels) < 1:
            raise UserError(f"{self}: every size must be at least 1")
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"model.embed_dim={self.embed_dim} does not divide into model.num_heads={self.num_heads}: "
                "choose a width that is a multiple of the heads"
            )
        if self.image_px % self.patch_size:
            raise UserError(
                f"images of {self.image_px} px do not divide into patches of model.patch_size={self.patch_size} px: "
                "choose a patch size that divides the crop's side"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise UserError(f"model.drop_path={self.drop_path} is out of range: it must be at least 0 and below 1")

    @property
    def grid(self) -> int:
        """Patches along a side of an image of `image_px`."""
        return self.image_px // self.patch_size

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Each block's probability of skipping a branch: linear from 0 at the first to `drop_path` at the last."""
        steps = max(self.depth - 1, 1)
        return tuple(self.drop_path * block / steps for block in range(self.depth))


@lru_cache(maxsize=KEPT_INTERPOLATIONS)
def position_interpolation(grid: int, rows: int, columns: int) -> Tensor:
    """Matrix [rows * columns, grid * grid], float64, CPU, that resamples learned positions to another patch grid.

    Bicubic (a = -0.75, corners not aligned) with the published rule: the *given* scale (rows + 0.1) / grid, not the
    ratio of the sizes, enters the coordinates. The published code calls the image's first spatial axis `w` and the
    second `h`; the names are swapped, not the axes, so rows scale rows here too, and images need not be square.
    As a constant matrix its backward is a matrix product, thus deterministic; bicubic resampling's is not on CUDA.
    """
    # Kept for later training steps: a tensor made in inference mode could not be saved for backward.
    with torch.inference_mode(False), torch.no_grad():
        basis = torch.eye(grid * grid, dtype=torch.float64, device="cpu").view(1, grid * grid, grid, grid)
        scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
        resampled = F.interpolate(basis, scale_factor=scale, mode="bicubic", align_corners=False)
        if resampled.shape[-2:] != (rows, columns):
            raise UserError(
                f"positions cannot be interpolated from {grid} x {grid} patches to {rows} x {columns} "
                f"(the published rule gives {resampled.shape[-2]} x {resampled.shape[-1]}): use another image size"
            )
        return resampled.flatten(2)[0].t().contiguous()


class VisionTransformer(nn.Module):
    """DINO's ViT without a classifier; parameter names are the published checkpoints'.

    `features` and `last_attention` are entry points beside `forward`: where this module or one that holds it is
    sharded with FSDP2, they must be registered there with `register_fsdp_forward_method`.
    """

    def __init__(self, shape: ViTShape, attention: ResolvedBackend) -> None:
        """May run under `torch.device("meta")`: then `to_empty` and `init_weights` must follow."""
        super().__init__()
        self.shape = shape
        dim = shape.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + shape.grid**2, dim))
        self.patch_embed = PatchEmbed(patch_size=shape.patch_size, in_channels=shape.in_channels, embed_dim=dim)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                num_heads=shape.num_heads,
                mlp_hidden_dim=int(dim * shape.mlp_ratio),
                attention=attention,
            )
            for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self._interpolations: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew from torch's default generator, as published."""
        nn.init.trunc_normal_(self.pos_embed, std=self.shape.init_std)
        nn.init.trunc_normal_(self.cls_token, std=self.shape.init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.shape.init_std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()

    def forward(self, crops: list[Tensor], drop_path: Tensor | None = None) -> Tensor:
        """The normed CLS token of every crop, [sum N, D], in order.

        crops: one [N, C, h, w] a resolution, sides in px, multiples of the patch size (else `UserError`).
        drop_path: [depth, 2, sum N], what multiplies the attention and the MLP branch of each crop in each block:
        0 or 1 / (1 - rate). None drops nothing.
        """
        x_TD, layout = self._embed(crops)
        factors = [None] * (2 * len(self.blocks)) if drop_path is None else _token_factors(drop_path, layout, x_TD)
        for index, block in enumerate(self.blocks):
            x_TD = block(x_TD, layout, factors[2 * index], factors[2 * index + 1])
        cls_tokens = [x_NLD[:, 0] for x_NLD in layout.split(x_TD)]
        normed: Tensor = self.norm(cls_tokens[0] if len(cls_tokens) == 1 else torch.cat(cls_tokens))
        return normed

    def features(self, images: Tensor, num_last_blocks: int = 1) -> list[Tensor]:
        """All normed tokens [N, 1 + P, D] after each of the last blocks, the last one last; images [N, C, h, w]."""
        if not 1 <= num_last_blocks <= len(self.blocks):
            raise UserError(f"num_last_blocks={num_last_blocks} must be between 1 and the {len(self.blocks)} blocks")
        x_TD, layout = self._embed([images])
        outputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x_TD = block(x_TD, layout)
            if len(self.blocks) - index <= num_last_blocks:
                outputs.append(self.norm(x_TD).view(*layout.groups[0], -1))
        return outputs

    def last_attention(self, images: Tensor) -> Tensor:
        """Attention probabilities [N, heads, 1 + P, 1 + P] of the last block; images [N, C, h, w]."""
        x_TD, layout = self._embed([images])
        *earlier, last = self.blocks
        for block in earlier:
            x_TD = block(x_TD, layout)
        probabilities: Tensor = last(x_TD, layout, attention_only=True)
        return probabilities

    def _embed(self, crops: list[Tensor]) -> tuple[Tensor, PackedLayout]:
        """Tokens of all crops with their positions, [T, D], CLS first in each crop."""
        if not crops:
            raise UserError("no crops: give at least one tensor of images")
        runs = [self._embed_run(images) for images in crops]
        layout = PackedLayout(tuple((run.shape[0], run.shape[1]) for run in runs))
        flat = [run.flatten(0, 1) for run in runs]
        return flat[0] if len(flat) == 1 else torch.cat(flat), layout

    def _embed_run(self, images: Tensor) -> Tensor:
        rows, columns = self.patch_embed.grid(*images.shape[-2:])
        patches_NPD = self.patch_embed(images)
        cls_N1D = self.cls_token.expand(patches_NPD.shape[0], -1, -1)
        return torch.cat([cls_N1D, patches_NPD], dim=1) + self._positions(rows, columns)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """[1, 1 + rows * columns, D]; the learned positions as they are on the learned grid."""
        if rows == columns == self.shape.grid:
            return self.pos_embed
        key = (rows, columns, self.pos_embed.dtype, self.pos_embed.device)
        if key not in self._interpolations:
            if len(self._interpolations) == KEPT_INTERPOLATIONS:
                self._interpolations.pop(next(iter(self._interpolations)))
            matrix = position_interpolation(self.shape.grid, rows, columns)
            with torch.inference_mode(False):
                # Kept on the device, so that a later step copies nothing there.
                self._interpolations[key] = matrix.to(dtype=key[2], device=key[3])
        patches_PD = self._interpolations[key] @ self.pos_embed[0, 1:]
        return torch.cat([self.pos_embed[0, :1], patches_PD]).unsqueeze(0)


def _token_factors(drop_path: Tensor, layout: PackedLayout, x_TD: Tensor) -> tuple[Tensor, ...]:
    """[depth, 2, crops] factors -> 2 * depth of [T, 1] in `x_TD`'s dtype, made once and shared by all blocks."""
    factors = drop_path.to(x_TD.dtype).flatten(0, 1)
    if factors.shape[1] != layout.num_crops:
        raise ValueError(f"drop_path has factors for {factors.shape[1]} crops, there are {layout.num_crops}")
    runs = factors.split_with_sizes([num_crops for num_crops, _ in layout.groups], dim=1)
    lengths = [length for _, length in layout.groups]
    tokens = [run.unsqueeze(2).expand(-1, -1, length).flatten(1) for run, length in zip(runs, lengths, strict=True)]
    return torch.cat(tokens, dim=1).unsqueeze(2).unbind(0)
