"""The parts of a vision transformer that are not attention: patch embedding, MLP, and the pre-norm block.

Letters: N crops of one resolution, P patches of a crop, T tokens of all crops packed, D width of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_dist.errors import UserError
from dino_dist.models.attention import Attention, PackedLayout, ResolvedBackend

LAYER_NORM_EPS = 1e-6
"""The published models' value; torch's default is 1e-5."""


class PatchEmbed(nn.Module):
    """A linear map of each square patch, as a convolution whose stride is its kernel."""

    def __init__(self, *, patch_size: int, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Rows and columns of patches; `UserError` where patches do not tile the image."""
        if height_px % self.patch_size or width_px % self.patch_size or not height_px or not width_px:
            raise UserError(
                f"a {height_px} x {width_px} px image does not divide into patches of {self.patch_size} px: "
                f"use sides that are multiples of {self.patch_size} or another model.patch_size"
            )
        return height_px // self.patch_size, width_px // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, h, w] in px -> [N, P, D], patches in row-major order."""
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """One pre-norm transformer block; the unit of sharding, compiling and activation checkpointing."""

    def __init__(self, *, dim: int, num_heads: int, mlp_hidden_dim: int, attention: ResolvedBackend) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, attention)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_hidden_dim)

    def forward(
        self,
        x_TD: Tensor,
        layout: PackedLayout,
        factor_attn: Tensor | None = None,
        factor_mlp: Tensor | None = None,
        *,
        attention_only: bool = False,
    ) -> Tensor:
        """[T, D] -> [T, D]; the factors [T, 1] multiply each token's branch (drop path), None leaves it as it is.

        `attention_only` stops at the attention probabilities [N, H, L, L] of the layout's single run instead. It is
        part of `forward` because sharding, checkpointing and compiling all hook into `forward`, and only there.
        """
        normed_TD = self.norm1(x_TD)
        if attention_only:
            return self.attn.probabilities(normed_TD, layout)
        x_TD = _add_branch(x_TD, self.attn(normed_TD, layout), factor_attn)
        return _add_branch(x_TD, self.mlp(self.norm2(x_TD)), factor_mlp)


def _add_branch(x_TD: Tensor, branch_TD: Tensor, factor: Tensor | None) -> Tensor:
    return x_TD + branch_TD if factor is None else torch.addcmul(x_TD, branch_TD, factor)
