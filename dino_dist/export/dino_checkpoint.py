"""The checkpoint of DINO's original code: a `.pth` that it resumes from and that its evaluations read.

Student and teacher with their heads, and the center; tensors as they are. `args` is a plain dict, not the original's
`argparse.Namespace`, so that `torch.load(weights_only=True)` reads the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_dist.export.architecture import published_name
from dino_dist.weights.network_weights import NetworkWeights
from dino_dist.weights.shapes import has_batch_norm


def write_dino(networks: Sequence[NetworkWeights], path: Path) -> None:
    """Each network under its role; one whose role is not known is a teacher, the one that users of such files take."""
    checkpoint: dict[str, Any] = {}
    for weights in networks:
        role = "student" if weights.network == "student" else "teacher"
        checkpoint[role] = original_names(weights, role)
        if weights.center_1K is not None:
            checkpoint["dino_loss"] = {"center": _own_storage(weights.center_1K)}
        if weights.epoch is not None:
            checkpoint["epoch"] = weights.epoch
        checkpoint["args"] = _args(weights)
    try:
        with open(path, "wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # of torch's zip writer, whatever the file said
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def original_names(weights: NetworkWeights, role: str) -> dict[str, Tensor]:
    """The student is wrapped for data parallelism there, and so is a teacher with batch norms; others are bare."""
    prefix = "module." if role == "student" or has_batch_norm(weights.head) else ""
    tensors = {f"{prefix}backbone.{name}": _own_storage(tensor) for name, tensor in weights.backbone.items()}
    for name, tensor in weights.head.items():
        tensors[f"{prefix}head.{name}"] = _own_storage(tensor)
        if _is_batch_norm(name, tensor):
            # The original's batch norms have running statistics, which nothing reads: as they start.
            stem = f"{prefix}head.{name.removesuffix('weight')}"
            tensors[f"{stem}running_mean"] = torch.zeros_like(tensor)
            tensors[f"{stem}running_var"] = torch.ones_like(tensor)
            tensors[f"{stem}num_batches_tracked"] = torch.tensor(0)
    return tensors


def _is_batch_norm(name: str, tensor: Tensor) -> bool:
    return name.startswith("mlp.") and name.endswith(".weight") and tensor.ndim == 1


def _args(weights: NetworkWeights) -> dict[str, Any]:
    shape = weights.shape
    args = {
        "arch": published_name(shape),
        "patch_size": shape.patch_size,
        "embed_dim": shape.embed_dim,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
    }
    if weights.head:
        args |= {
            "out_dim": weights.head["last_layer.weight_v"].shape[0],
            "use_bn_in_head": has_batch_norm(weights.head),
        }
    return args


def _own_storage(tensor: Tensor) -> Tensor:
    """torch.save writes whole storages, so a view would take its neighbours along."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
