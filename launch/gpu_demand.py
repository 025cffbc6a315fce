"""How many images a second one GPU trains on: an estimate from a model's arithmetic, until somebody has measured it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_dist.config import AugmentSection, HeadSection
from dino_dist.errors import UserError
from dino_dist.models.vit import VIT_SIZES

MODELS = (
    ("ViT-S/16", "vit_small", 16),
    ("ViT-B/16", "vit_base", 16),
    ("ViT-B/8", "vit_base", 8),
    ("ViT-L/16", "vit_large", 16),
)
"""Name, architecture and side of a patch in px."""


@dataclass(frozen=True, kw_only=True)
class GpuAssumption:
    """What a GPU is taken to do. The defaults are an H100 SXM's bf16 peak without sparsity, and a good use of it."""

    peak_tflops: float = 989.0
    """10^12 floating-point operations a second that its maker states for the type that is trained in."""
    utilization: float = 0.4
    """Share of the peak that training reaches."""

    def __post_init__(self) -> None:
        if self.peak_tflops <= 0:
            raise UserError(f"peak_tflops={self.peak_tflops:g} must be above 0")
        if not 0 < self.utilization <= 1:
            raise UserError(f"utilization={self.utilization:g} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class GpuDemand:
    """Images a second that one GPU asks for."""

    model: str
    gflop_per_image: float | None
    """None: not computed, the rate was given."""
    images_per_s: float
    basis: Literal["estimate", "given"]


def estimated_demands(augment: AugmentSection, head: HeadSection, gpu: GpuAssumption) -> list[GpuDemand]:
    """For each of `MODELS`: peak * utilization / operations an image."""
    demands = []
    for name, arch, patch_size in MODELS:
        flop = training_flop_per_image(arch, patch_size, augment, head)
        demands.append(
            GpuDemand(
                model=name,
                gflop_per_image=flop / 1e9,
                images_per_s=gpu.peak_tflops * 1e12 * gpu.utilization / flop,
                basis="estimate",
            )
        )
    return demands


def given_demand(images_per_s: float) -> GpuDemand:
    """What somebody has measured; `UserError` unless it is above 0."""
    if not 0 < images_per_s < float("inf"):
        raise UserError(f"images_per_s={images_per_s:g} must be above 0: the images a second that one GPU trains on")
    return GpuDemand(model="yours", gflop_per_image=None, images_per_s=images_per_s, basis="given")


def training_flop_per_image(arch: str, patch_size: int, augment: AugmentSection, head: HeadSection) -> float:
    """Operations of one image in one step: 3 * (forward of all its views) + 1 * (forward of the two global ones).

    The student runs forward and, at twice the cost, backward; the teacher runs forward on the global views alone. With
    N = (side / patch)^2 + 1 tokens of width D, the forward pass of one view is, a multiplication and an addition
    counted as two,

        depth * (24 N D^2 + 4 N^2 D)            blocks: qkv 6, projection 2, MLP 16; attention
        + 6 p^2 (N - 1) D                       patch embedding of 3 channels
        + 2 (D h + (layers - 2) h^2 + h b + b K)  head on the CLS token (one layer: D b + b K)

    Norms, activations, losses and the optimizer are left out, as is usual for figures of utilization.
    """
    views = [(augment.global_px, 2), (augment.local_px, augment.local_crops)]
    all_views = sum(count * _forward_flop(arch, patch_size, side_px, head) for side_px, count in views)
    return 3.0 * all_views + 2.0 * _forward_flop(arch, patch_size, augment.global_px, head)


def _forward_flop(arch: str, patch_size: int, side_px: int, head: HeadSection) -> float:
    size = VIT_SIZES[arch]
    width, patches = size.embed_dim, (side_px // patch_size) ** 2
    tokens = patches + 1
    blocks = size.depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    embedding = 6 * patch_size**2 * patches * width
    hidden, bottleneck = head.hidden_dim, head.bottleneck_dim
    if head.num_layers == 1:
        mlp = width * bottleneck
    else:
        mlp = width * hidden + (head.num_layers - 2) * hidden**2 + hidden * bottleneck
    return float(blocks + embedding + 2 * (mlp + bottleneck * head.num_prototypes))
