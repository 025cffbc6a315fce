"""Multi-crop: renders the views that `crop_parameters.draw` describes, on whatever device the images are.

Nothing random happens here. On the CPU the views are computed one by one, and only what each asks for; elsewhere whole
batches are products of fixed shapes, which nobody waits for. Both agree within rounding (where
every step rounds to uint8, as far as torchvision on the two devices does). Where products are float32,
torch's float32 matmul precision must stay at "highest" (its default): TF32 shifts pixels by up to a quarter of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_dist.data.crops.buckets import bucket_of
from dino_dist.data.crops.crop_parameters import ViewRecipe
from dino_dist.data.crops.eval_view import resize_for_eval
from dino_dist.data.crops.render_cpu import CpuRenderer
from dino_dist.data.crops.render_products import ProductRenderer
from dino_dist.data.crops.render_rules import Rendered, RenderRules

__all__ = ["MultiCropRenderer", "Rendered", "resize_for_eval"]

_USUAL_SIZES_PX = ((256, 256), (375, 500))
"""Height and width; each stands for a bucket."""


class MultiCropRenderer:
    """The renderer that is fastest on a device."""

    def __init__(
        self,
        recipes: Sequence[ViewRecipe],
        *,
        rules: RenderRules,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        """Views come out in `dtype` on `device`. UserError for recipes that cannot be rendered by these rules.

        `compile` fuses what runs on an accelerator; photographs' usual sizes are compiled here, others when they come.
        """
        self.device = device
        self._render: CpuRenderer | ProductRenderer
        if device.type == "cpu":
            self._render = CpuRenderer(recipes, rules=rules, dtype=dtype)
        else:
            products = ProductRenderer(recipes, rules=rules, device=device, dtype=dtype, compile=compile)
            if compile:
                products.warm_up([bucket_of(*size_px) for size_px in _USUAL_SIZES_PX])
            self._render = products

    def __call__(self, pixels: Tensor, sizes: Tensor, params: Tensor) -> Rendered:
        """The views of n images.

        `pixels` uint8 [bytes] on the renderer's device, images [H, W, 3] one after the other; `sizes` int [n, 2] (H, W)
        on the CPU; `params` float [views, n, columns] as drawn (pinned or already on the device, else the copy waits),
        used in float32. Consecutive recipes of one side share a tensor: two globals and L locals give [2n, ...] and
        [L * n, ...].
        """
        return self._render(pixels, sizes, params)
