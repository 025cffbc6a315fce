"""Random views of labelled images, on which the published linear classifiers are trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.config import DataSection
from dino_dist.data.crops.augment import MultiCropRenderer
from dino_dist.data.crops.crop_parameters import ViewRecipe, draw
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.data.order.order import StreamIds


@dataclass(frozen=True, kw_only=True)
class RandomCrops:
    """The random view of an image that published linear classifiers are trained on: a resized crop, and a flip.

    Resized bicubically, as DINOv2's are; those of DINO are resized bilinearly.
    Draws it in the data workers, so it is small and picklable; a function of seed, epoch and sample id.
    """

    crop_px: int
    seed: int
    epoch: int

    @property
    def recipe(self) -> ViewRecipe:
        """Area from 0.08 to 1, as torchvision has it; colours stay."""
        return ViewRecipe(
            size_px=self.crop_px,
            scale=(0.08, 1.0),
            ratio=(3 / 4, 4 / 3),
            flip_p=0.5,
            jitter_p=0.0,
            brightness=0.0,
            contrast=0.0,
            saturation=0.0,
            hue=0.0,
            gray_p=0.0,
            blur_p=0.0,
            blur_sigma_px=(0.1, 2.0),
            solarize_p=0.0,
        )

    def __call__(self, ids: StreamIds, sizes: NDArray[np.int64]) -> dict[str, Tensor]:
        """`crops` [1, n, columns] (see `crop_parameters`)."""
        epochs = np.full_like(ids.epochs, self.epoch)
        crops = draw([self.recipe], seed=self.seed, epochs=epochs, sample_ids=ids.sample_ids, sizes=sizes)
        return {"crops": torch.from_numpy(crops.astype(np.float32))}

    def renderer(self, data: DataSection, device: torch.device, dtype: torch.dtype) -> MultiCropRenderer:
        """What turns the drawn numbers into normalised images."""
        rules = RenderRules(mean=data.mean, std=data.std)
        return MultiCropRenderer([self.recipe], rules=rules, device=device, dtype=dtype)
