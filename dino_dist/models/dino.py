"""The network of DINO: a backbone whose class token the head turns into prototype logits."""

from __future__ import annotations

from torch import Tensor, nn

from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VisionTransformer


class DinoNetwork(nn.Module):
    """g = h o f of arXiv:2104.14294, section 3.1; student and teacher are two of these."""

    def __init__(self, backbone: VisionTransformer, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor], drop_path: Tensor | None = None) -> Tensor:
        """Logits [sum N, K] of all crops, one tensor [N, 3, h, w] a resolution, in one packed pass.

        `drop_path`: factors [depth, 2, sum N] for the two branches of every block and crop, or None.
        """
        logits: Tensor = self.head(self.backbone(crops, drop_path))
        return logits

    def features(self, images: Tensor, num_last_blocks: int = 1) -> list[Tensor]:
        """Normed tokens [N, 1 + P, D] of the last blocks (see `VisionTransformer.features`)."""
        return self.backbone.features(images, num_last_blocks)

    def last_attention(self, images: Tensor) -> Tensor:
        """Attention probabilities [N, heads, 1 + P, 1 + P] of the last block."""
        return self.backbone.last_attention(images)
