"""The published multi-crop pipelines by name: probabilities and ranges, each with its source.

Sizes and the number of local crops belong to a recipe, not to a preset. Operations and their order are the same in all
three papers: crop, flip, jitter, grayscale, blur, solarize, normalise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dino_dist.config import AugmentSection

_OF_THE_RECIPE = ("preset", "global_px", "local_px", "local_crops", "quantize")

_DINO_V1 = {item.name: item.default for item in fields(AugmentSection) if item.name not in _OF_THE_RECIPE}

# Crop scales and blur: the released configuration and augmentation code of DINOv2 (arXiv:2304.07193).
_DINOV2 = {**_DINO_V1, "global_scale": (0.32, 1.0), "local_scale": (0.05, 0.32), "blur_filter": "taps9"}

AUGMENT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # arXiv:2104.14294, appendix E, and its released code.
    "dino_v1": _DINO_V1,
    # What the released models were trained with: the code's blur takes a probability p and applies it with 1 - p, so
    # its 1.0, 0.1 and 0.5 became these (dinov3 issue 286; dinov2 pull request 411).
    "dinov2_as_trained": {**_DINOV2, "blur_global_1_p": 0.0, "blur_global_2_p": 0.9, "blur_local_p": 0.5},
    # What that code reads as, and what the paper says it takes over from DINO.
    "dinov2_as_intended": {**_DINOV2, "blur_global_1_p": 1.0, "blur_global_2_p": 0.1, "blur_local_p": 0.5},
    # The released configurations of the DINOv3 7B models (arXiv:2508.10104): no flips; its code inherits the blur of
    # DINOv2 as trained. Its options share_color_jitter and teacher_no_color_jitter are `share_jitter` and
    # `teacher_sees_colors` here, and are left to whoever asks for them.
    "dinov3": {**_DINOV2, "flip_p": 0.0, "blur_global_1_p": 0.0, "blur_global_2_p": 0.9, "blur_local_p": 0.5},
}
"""For each `augment.preset`, the fields that it sets."""
