"""The decoded images of one micro-batch, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dino_dist.data.reading.stream import BadRecord
from dino_dist.data.stores.store_options import StoreCounts


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The n images of one micro-batch of one rank."""

    pixels: Tensor
    """uint8 [total bytes]: RGB images [h, w, 3] one after the other."""
    sizes: Tensor
    """int64 [n, 2]: height and width in px. Stays on the CPU, where the augmenter needs it."""
    sample_ids: Tensor
    """int64 [n], on the CPU: the ids asked for (a stand-in for a bad sample carries the bad one's)."""
    epochs: Tensor
    """int64 [n], on the CPU."""
    repeats: Tensor
    """int64 [n], on the CPU: which repeat of the sample in its epoch."""
    labels: Tensor
    """int64 [n], on the CPU; negative where there is none."""
    step: int
    bad: tuple[BadRecord, ...] = ()
    store: StoreCounts = field(default_factory=StoreCounts)
    """What the rank's loader has asked of stores since it started."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What `describe` said of the images, such as the augmentation parameters."""

    @property
    def num_images(self) -> int:
        """n."""
        return len(self.sizes)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same with pixels and extras on `device`; sizes, ids, epochs and labels stay on the CPU."""
        extra = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.extra.items()}
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking), extra=extra)
