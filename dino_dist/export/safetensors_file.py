"""This project's own file: one network in one safetensors file, bit for bit, with all that is needed to build it.

Tensors: `backbone.*` as `VisionTransformer.state_dict()`; with the head `head.*` as `DinoHead.state_dict()`, and
`center`. The header's metadata has one key, `dino_dist`, whose value is JSON: format, network, step, epoch, shape (the
fields of `ViTShape`), pixel_mean, pixel_std.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dino_dist.export.verification import tensors_of
from dino_dist.weights.network_weights import NetworkWeights
from dino_dist.weights.weights_file import FORMAT, METADATA_KEY


def metadata(weights: NetworkWeights) -> dict[str, Any]:
    """What the tensors do not tell."""
    return {
        "format": FORMAT,
        "network": weights.network,
        "step": weights.step,
        "epoch": weights.epoch,
        "shape": asdict(weights.shape),
        "pixel_mean": list(weights.pixel_mean),
        "pixel_std": list(weights.pixel_std),
    }


def write_safetensors(weights: NetworkWeights, path: Path, *, with_head: bool) -> None:
    """One network as it is; nothing is copied."""
    save_tensors(tensors_of(weights, with_head=with_head), path, {METADATA_KEY: json.dumps(metadata(weights))})


def save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """A safetensors file; `OSError` if the system refuses it."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)
    except SafetensorError as error:
        raise OSError(str(error)) from error
