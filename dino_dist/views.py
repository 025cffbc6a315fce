"""From a batch of decoded images to the views of a step: which crops the config asks for, drawn in the data workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.config import AugmentSection, Config
from dino_dist.data.augment import MultiCropRenderer
from dino_dist.data.crop_parameters import ViewRecipe, draw
from dino_dist.data.loader import Batch
from dino_dist.randomness import drop_path_uniforms
from dino_dist.step import Views

_RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop; torchvision's default, which the published code keeps."""

Ids = NDArray[np.int64]


def view_recipes(augment: AugmentSection) -> list[ViewRecipe]:
    """Two global views, blurred and solarized differently, then the local ones (published order and defaults)."""

    def recipe(size_px: int, scale: tuple[float, float], blur_p: float, solarize_p: float) -> ViewRecipe:
        return ViewRecipe(
            size_px=size_px,
            scale=scale,
            ratio=_RATIO,
            flip_p=augment.flip_p,
            jitter_p=augment.jitter_p,
            brightness=augment.brightness,
            contrast=augment.contrast,
            saturation=augment.saturation,
            hue=augment.hue,
            gray_p=augment.gray_p,
            blur_p=blur_p,
            blur_sigma_px=augment.blur_sigma_px,
            solarize_p=solarize_p,
        )

    first = recipe(augment.global_px, augment.global_scale, augment.blur_global_1_p, 0.0)
    second = recipe(augment.global_px, augment.global_scale, augment.blur_global_2_p, augment.solarize_global_2_p)
    local = recipe(augment.local_px, augment.local_scale, augment.blur_local_p, 0.0)
    return [first, second, *[local] * augment.local_crops]


@dataclass(frozen=True, kw_only=True)
class ViewDescription:
    """Draws everything random about a batch's views; runs in the data workers, so it is small and picklable."""

    recipes: tuple[ViewRecipe, ...]
    seed: int
    drop_path_rates: tuple[float, ...]
    """Each block's probability that the student skips a branch."""

    def __call__(self, sample_ids: Ids, epochs: Ids, sizes: Ids) -> dict[str, Tensor]:
        """`crops` [views, n, columns] (see `crop_parameters`) and, if any rate is positive, `drop_path` factors
        [depth, 2, views * n]: 0 with a block's rate p, else 1 / (1 - p).
        """
        crops = draw(self.recipes, seed=self.seed, epochs=epochs, sample_ids=sample_ids, sizes=sizes)
        described = {"crops": torch.from_numpy(crops.astype(np.float32))}
        if any(self.drop_path_rates):
            depth = len(self.drop_path_rates)
            rates = np.array(self.drop_path_rates)[:, None, None, None]
            uniforms_VNL2 = np.stack(
                [drop_path_uniforms(self.seed, epochs, sample_ids, v, depth) for v in range(len(self.recipes))]
            )
            factors = (uniforms_VNL2.transpose(2, 3, 0, 1) >= rates) / (1.0 - rates)
            described["drop_path"] = torch.from_numpy(factors.reshape(depth, 2, -1).astype(np.float32))
        return described


class ViewRenderer:
    """Renders a batch on the device into the views of a step."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        recipes = view_recipes(config.augment)
        self._num_local = config.augment.local_crops
        self._same_side = config.augment.local_px == config.augment.global_px
        self._device = device
        self._renderer = MultiCropRenderer(
            recipes, mean=config.data.mean, std=config.data.std, device=device, dtype=dtype
        )

    def __call__(self, batch: Batch) -> Views:
        """The views of a micro-batch; the copy to the device waits for nothing if the batch is pinned."""
        batch = batch.to(self._device, non_blocking=True)
        crops = self._renderer(batch.pixels, batch.sizes, batch.extra["crops"])
        if self._same_side and self._num_local:  # one tensor of one side: the first two views are the global ones
            split = 2 * batch.num_images
            crops = [crops[0][:split], crops[0][split:]]
        return Views(
            global_crops=crops[0],
            local_crops=crops[1] if self._num_local else None,
            drop_path=batch.extra.get("drop_path"),
        )
