"""A folder that transformers loads as a `ViTModel` (`AutoModel`, `AutoImageProcessor`).

Names are those that transformers 4 writes, which later versions rename while loading. `pooler_output` is the class
token itself, through an identity pooler: without one in the file, transformers would start a random one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_dist.export.safetensors_file import save_tensors
from dino_dist.export.timm_folder import CROP_SHARE
from dino_dist.export.verification import Outputs
from dino_dist.models.layers import LAYER_NORM_EPS
from dino_dist.weights.network_weights import NetworkWeights

_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BICUBIC = 3
"""Pillow's number, which transformers uses."""


def write_hf(weights: NetworkWeights, folder: Path) -> None:
    """fp32 is expected; queries, keys and values are views of ours."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.backbone.items():
        tensors |= _renamed(name, tensor)
    dim = weights.shape.embed_dim
    tensors |= {"pooler.dense.weight": torch.eye(dim), "pooler.dense.bias": torch.zeros(dim)}
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    for file, content in (("config.json", hf_config(weights)), ("preprocessor_config.json", hf_processor(weights))):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def hf_config(weights: NetworkWeights) -> dict[str, Any]:
    """Fields of `ViTConfig`."""
    shape = weights.shape
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": weights.backbone["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": shape.init_std,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": shape.image_px,
        "patch_size": shape.patch_size,
        "num_channels": shape.in_channels,
        "qkv_bias": True,
        "encoder_stride": shape.patch_size,
        "pooler_act": "linear",
        "torch_dtype": "float32",
    }


def hf_processor(weights: NetworkWeights) -> dict[str, Any]:
    """The evaluation's view: short side resized, center crop, normalised."""
    crop_px = weights.shape.image_px
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(crop_px / CROP_SHARE)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": crop_px, "width": crop_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(weights.pixel_mean),
        "image_std": list(weights.pixel_std),
    }


def open_hf(folder: Path) -> Callable[[Tensor], Outputs]:
    """What transformers' own model makes of the folder; without a network."""
    from transformers import ViTModel

    with _no_progress_bar():
        model = ViTModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.no_grad()
    def forward(images: Tensor) -> Outputs:
        result = model(pixel_values=images)
        return {"cls": result.pooler_output, "patches": result.last_hidden_state[:, 1:]}

    return forward


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not name.startswith("blocks."):
        stem, _, leaf = name.rpartition(".")
        return {f"{_OUTSIDE[stem]}.{leaf}" if stem in _OUTSIDE else _OUTSIDE[name]: tensor}
    _, index, rest = name.split(".", 2)
    stem, _, leaf = rest.rpartition(".")
    layer = f"encoder.layer.{index}"
    if stem != "attn.qkv":
        return {f"{layer}.{_IN_BLOCK[stem]}.{leaf}": tensor}
    parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    return {f"{layer}.attention.attention.{part}.{leaf}": third for part, third in parts}
