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

# Of facebookresearch/dino (arXiv:2104.14294, appendix E): `global_scale` and `local_scale` are the defaults of
# main_dino.py's arguments; `flip_p`, `jitter_p`, `brightness`, `contrast`, `saturation`, `hue`, `gray_p`, the three
# probabilities of blur and `solarize_global_2_p` stand in its DataAugmentationDINO; `blur_sigma_px` and Pillow's filter
# (`blur_filter`) in GaussianBlur of its utils.py. `aspect_ratio` is torchvision's default, which none of the three
# replaces. `share_jitter` and `teacher_sees_colors` are off and on: DINO knows no other way.
_DINO_V1 = {item.name: item.default for item in fields(AugmentSection) if item.name not in _OF_THE_RECIPE}

# Of facebookresearch/dinov2 (arXiv:2304.07193): scales from dinov2/configs/ssl_default_config.yaml; the filter, of 9
# taps and the same range of sigma, from GaussianBlur of dinov2/data/transforms.py. Flip, jitter, grayscale and
# solarization in dinov2/data/augmentations.py are those of DINO.
_DINOV2 = {**_DINO_V1, "global_scale": (0.32, 1.0), "local_scale": (0.05, 0.32), "blur_filter": "taps9"}

AUGMENT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dino_v1": _DINO_V1,
    # What the released models were trained with: GaussianBlur of dinov2/data/transforms.py takes a probability p and
    # applies it with 1 - p, so the 1.0, 0.1 and 0.5 of dinov2/data/augmentations.py became these (dinov3 issue 286;
    # dinov2 pull request 411).
    "dinov2_as_trained": {**_DINOV2, "blur_global_1_p": 0.0, "blur_global_2_p": 0.9, "blur_local_p": 0.5},
    # What that code reads as, and what the paper says it takes over from DINO.
    "dinov2_as_intended": {**_DINOV2, "blur_global_1_p": 1.0, "blur_global_2_p": 0.1, "blur_local_p": 0.5},
    # Of facebookresearch/dinov3 (arXiv:2508.10104): scales and no flips (`horizontal_flips`) from
    # dinov3/configs/train/dinov3_vit7b16_pretrain.yaml; jitter, grayscale and solarization in
    # dinov3/data/augmentations.py are those of DINO, the blur in dinov3/data/transforms.py is DINOv2's as trained.
    # Its options share_color_jitter and teacher_no_color_jitter are `share_jitter` and `teacher_sees_colors` here, and
    # are left to whoever asks for them.
    "dinov3": {**_DINOV2, "flip_p": 0.0, "blur_global_1_p": 0.0, "blur_global_2_p": 0.9, "blur_local_p": 0.5},
}
"""For each `augment.preset`, the fields that it sets."""
