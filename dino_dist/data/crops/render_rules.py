"""What all views of a run share when they are rendered: normalisation, blur, roundings, DINOv3's two options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from dino_dist.errors import UserError

BlurKind = Literal["box3", "taps9"]
Quantize = Literal["uint8"]


@dataclass(frozen=True, kw_only=True)
class RenderRules:
    """How views are rendered, apart from what `crop_parameters` draws for each."""

    mean: tuple[float, float, float]
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float]
    """Divides after the mean is subtracted."""
    blur: BlurKind = "box3"
    """box3: PIL's GaussianBlur without its roundings (DINO v1); taps9: torchvision's with 9 taps (DINOv2, DINOv3)."""
    quantize: Quantize | None = None
    """uint8: round wherever torchvision's operations on uint8 pictures round on that device (its resize rounds after
    each axis on a CPU, once on CUDA); None: float throughout."""
    jitter_before_crop: bool = False
    """Colour jitter and grayscale once on the whole image, with the parameters of its first view, before any crop."""
    plain_views: int = 0
    """So many leading views are also rendered as they are cut, before anything is done to a crop's colours, for a
    teacher that sees no jitter; a jitter of the whole image is in them."""

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        if any(value <= 0 for value in self.std):
            raise UserError(f"data.std={self.std} must be three positive numbers")
        if self.plain_views < 0:
            raise UserError(f"plain_views={self.plain_views} must not be negative")


class Rendered(NamedTuple):
    """The views of a batch of n images, normalised."""

    views: list[Tensor]
    """One [views * n, 3, S, S] per side, crop-major: all of the side's first view, then its second..."""
    plain: Tensor | None
    """The first `plain_views` views as they are cut and mirrored; [plain_views * n, 3, S, S]."""
