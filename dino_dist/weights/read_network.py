"""Reading one network from whatever a user names: a run folder, one of its checkpoints, an exported or foreign file."""

from __future__ import annotations

from pathlib import Path

from dino_dist.errors import UserError, reading
from dino_dist.manifest import VerifiedCheckpoint
from dino_dist.weights.model_folder import SAFETENSORS, SAFETENSORS_INDEX, TORCH, is_model_folder
from dino_dist.weights.network_weights import NetworkWeights
from dino_dist.weights.opened import ROLES, OpenedWeights
from dino_dist.weights.run_checkpoint import (
    is_checkpoint_folder,
    is_run_folder,
    newest_checkpoint,
    one_checkpoint,
    read_run_network,
)
from dino_dist.weights.weights_file import ReadOptions, open_model_folder, open_weights_file


def read_network(source: str | Path, *, network: str = "teacher", num_heads: int | None = None) -> NetworkWeights:
    """The network that `source` names, on the CPU; of two, the one that `network` names.

    `source`: a run folder (its newest checkpoint that verifies), one of its checkpoints, an original DINO file, weights
    of timm or Hugging Face (a file or a folder), an export of this project. `num_heads`: attention heads, where the
    file does not tell and the width is not a multiple of 64. `UserError` for what is no network of this architecture,
    in one line.
    """
    return open_weights(source, ReadOptions(num_heads=num_heads)).network(network)


def open_weights(source: str | Path, options: ReadOptions) -> OpenedWeights:
    """Find out what `source` is and which networks it holds; see `read_network`."""
    path = Path(source)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        gone = isinstance(error, FileNotFoundError)
        why = "does not exist" if gone else f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"{path} {why}: give a run folder, one of its checkpoints, or a file of weights") from None
    with reading(str(path)):
        return _opened(path, options)


def _opened(path: Path, options: ReadOptions) -> OpenedWeights:
    if path.is_file():
        return open_weights_file(path, options)
    if is_run_folder(path):
        return _opened_checkpoint(newest_checkpoint(path))
    if is_checkpoint_folder(path):
        return _opened_checkpoint(one_checkpoint(path))
    if is_model_folder(path):
        return open_model_folder(path, options)
    raise UserError(
        f"{path} is neither a run folder nor one of its checkpoints, and has no {SAFETENSORS}, {SAFETENSORS_INDEX} or "
        f"{TORCH}: give one of these, or a file of weights"
    )


def _opened_checkpoint(checkpoint: VerifiedCheckpoint) -> OpenedWeights:
    def read(network: str) -> NetworkWeights:
        return read_run_network(checkpoint, network)

    return OpenedWeights(source=str(checkpoint.path), networks=ROLES, read=read)
