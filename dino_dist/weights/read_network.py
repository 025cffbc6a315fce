"""Reading one network from whatever a user names: a run folder, one of its checkpoints, an exported or foreign file."""

from __future__ import annotations

from pathlib import Path

from dino_dist.errors import UserError
from dino_dist.weights.network_weights import NetworkWeights
from dino_dist.weights.run_checkpoint import (
    is_checkpoint_folder,
    is_run_folder,
    newest_checkpoint,
    one_checkpoint,
    read_run_network,
)


def read_network(source: str | Path, *, network: str = "teacher", num_heads: int | None = None) -> NetworkWeights:
    """The network that `source` names, on the CPU; of two, the one that `network` names.

    A run folder means its newest checkpoint that verifies. `num_heads`: attention heads, where the file does not tell
    and the width is not a multiple of 64. `UserError` for what is no network of this architecture, in one line.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, one of its checkpoints, or a file of weights")
    if is_run_folder(path):
        return read_run_network(newest_checkpoint(path), network)
    if is_checkpoint_folder(path):
        return read_run_network(one_checkpoint(path), network)
    raise UserError(f"{path} is neither a run folder nor one of its checkpoints")
