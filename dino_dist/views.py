"""From a batch of decoded images to the views of a step: which crops the config asks for, drawn in the data workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.config import AugmentSection, Config
from dino_dist.data.crops.augment import MultiCropRenderer
from dino_dist.data.crops.crop_parameters import ViewRecipe, draw
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.data.loading.batch import Batch
from dino_dist.data.order.order import StreamIds
from dino_dist.randomness import drop_path_uniforms
from dino_dist.step import Views

Ids = NDArray[np.int64]


def view_recipes(augment: AugmentSection) -> list[ViewRecipe]:
    """Two global views, blurred and solarized differently, then the local ones (published order and defaults)."""

    def recipe(size_px: int, scale: tuple[float, float], blur_p: float, solarize_p: float) -> ViewRecipe:
        return ViewRecipe(
            size_px=size_px,
            scale=scale,
            ratio=augment.aspect_ratio,
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


def render_rules(config: Config) -> RenderRules:
    """What all views share, as the config has it."""
    augment, data = config.augment, config.data
    return RenderRules(
        mean=data.mean,
        std=data.std,
        blur=augment.blur_filter,
        quantize=None if augment.quantize == "none" else augment.quantize,
        jitter_before_crop=augment.share_jitter,
        plain_views=0 if augment.teacher_sees_colors else 2,
    )


@dataclass(frozen=True, kw_only=True)
class ViewDescription:
    """Draws everything random about a batch's views; runs in the data workers, so it is small and picklable."""

    recipes: tuple[ViewRecipe, ...]
    seed: int
    share_jitter: bool
    """Jitter and grayscale are those of an image's first view in all its views."""
    drop_path_rates: tuple[float, ...]
    """Each block's probability that the student skips a branch."""

    def __call__(self, ids: StreamIds, sizes: Ids) -> dict[str, Tensor]:
        """`crops` [views, n, columns] (see `crop_parameters`) and, if any rate is positive, `drop_path` factors
        [depth, 2, views * n]: 0 with a block's rate p, else 1 / (1 - p).
        """
        crops = draw(
            self.recipes,
            seed=self.seed,
            epochs=ids.epochs,
            sample_ids=ids.sample_ids,
            repeats=ids.repeats,
            sizes=sizes,
            share_jitter=self.share_jitter,
        )
        described = {"crops": torch.from_numpy(crops.astype(np.float32))}
        if any(self.drop_path_rates):
            depth = len(self.drop_path_rates)
            rates = np.array(self.drop_path_rates)[:, None, None, None]
            uniforms_VNL2 = np.stack(
                [
                    drop_path_uniforms(self.seed, ids.epochs, ids.sample_ids, view, depth, repeats=ids.repeats)
                    for view in range(len(self.recipes))
                ]
            )
            factors = (uniforms_VNL2.transpose(2, 3, 0, 1) >= rates) / (1.0 - rates)
            described["drop_path"] = torch.from_numpy(factors.reshape(depth, 2, -1).astype(np.float32))
        return described


class ViewRenderer:
    """Renders a batch on the device into the views of a step."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        augment = config.augment
        self._num_local = augment.local_crops
        self._same_side = augment.local_px == augment.global_px
        self._renderer = MultiCropRenderer(
            view_recipes(augment), rules=render_rules(config), device=device, dtype=dtype, compile=config.train.compile
        )

    def __call__(self, batch: Batch) -> Views:
        """The views of a micro-batch that is on the device."""
        crops, plain = self._renderer(batch.pixels, batch.sizes, batch.extra["crops"])
        if self._same_side and self._num_local:  # one tensor of one side: the first two views are the global ones
            split = 2 * batch.num_images
            crops = [crops[0][:split], crops[0][split:]]
        return Views(
            global_crops=crops[0],
            local_crops=crops[1] if self._num_local else None,
            drop_path=batch.extra.get("drop_path"),
            plain_global_crops=plain,
        )
