"""One network as it lies in a checkpoint: its sizes and its tensors under this project's names, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dino_dist.models.attention import AttentionBackend, choose_backend
from dino_dist.models.vit import VisionTransformer, ViTShape


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkWeights:
    """A backbone, and what the file holds beside it."""

    source: str
    """Where it was read from, for messages and reports."""
    network: str
    """`teacher` or `student`; `only` where the file holds one network and does not say which."""
    step: int | None = None
    """Steps done when it was written, if known."""
    epoch: int | None = None
    """Whole passes over the data set then, if known."""
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from pixels in [0, 1] before the network, one a channel; ImageNet's where the file does not tell."""
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides them after that."""
    shape: ViTShape
    """Sizes of the backbone; `image_px` belongs to its learned positions."""
    backbone: Mapping[str, Tensor]
    """As `VisionTransformer.state_dict()`."""
    head: Mapping[str, Tensor] = field(default_factory=dict)
    """As `DinoHead.state_dict()`; empty: none."""
    center_1K: Tensor | None = None
    left_out: tuple[str, ...] = ()
    """Names in the file that no part of this project's network has, such as a classifier's."""
    notes: tuple[str, ...] = ()
    """What the user should know about it, a sentence each."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone: what it is to compute in."""
        return self.backbone["cls_token"].dtype


def build_backbone(
    weights: NetworkWeights, device: torch.device, attention: AttentionBackend = "auto"
) -> VisionTransformer:
    """The backbone with these weights, without gradients; it computes in the weights' type, fp32 at least."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    head_dim = weights.shape.embed_dim // weights.shape.num_heads
    backend = choose_backend(attention, device, dtype=dtype, head_dim=head_dim).name
    with torch.device("meta"):
        backbone = VisionTransformer(weights.shape, backend)
    backbone.load_state_dict({name: tensor.to(device, dtype) for name, tensor in weights.backbone.items()}, assign=True)
    return backbone.requires_grad_(False).eval()
