"""Tensors in and out of a checkpoint folder: safetensors shards through torch.distributed.checkpoint, no pickle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from dino_dist.errors import UserError
from dino_dist.manifest import TENSOR_SUFFIX, FileRecord, TensorSpec, VerifiedCheckpoint, record_file

_NAMED_AT_MOST = 5


def start_write(
    folder: Path, tensors: Mapping[str, Tensor], *, group: dist.ProcessGroup | None, stager: DefaultStager
) -> Future[Any]:
    """Copy the tensors through `stager` (they may change at return), then write this rank's part in the background.

    Collective over `group`; None: this process alone. The future raises `CheckpointException` if any rank fails.
    """
    upload = async_save(
        {name: _contiguous(tensor) for name, tensor in tensors.items()},
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        process_group=group,
        async_stager=stager,
        no_dist=group is None,
    )
    assert isinstance(upload, Future)  # a stager that stages before it returns
    return upload


def written_by(folder: Path, rank: int) -> dict[str, FileRecord]:
    """The tensor files that a rank wrote, hashed as they read back; a rank without a part wrote none."""
    own = sorted(folder.glob(f"shard-{rank + 1:05d}-*{TENSOR_SUFFIX}"))
    return {path.name: record_file(path) for path in own}


def load_tensors(
    checkpoint: VerifiedCheckpoint,
    tensors: Mapping[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    subset: bool = False,
) -> None:
    """Fill `tensors` in place from a verified checkpoint; on all ranks of `group`, or in this process alone if None.

    `subset` accepts a checkpoint that holds more than is asked for (an evaluation wants the teacher only). Every other
    difference of names, global shapes or types is a `UserError`: the reader itself would cast and ignore silently.
    """
    saved, wanted = checkpoint.manifest.tensors, {name: spec_of(tensor) for name, tensor in tensors.items()}
    differences = _differences(saved, wanted)
    if not subset:
        differences += [f"{name} is in it but not in the model" for name in _wanted_by_none(saved, wanted, group)]
    if differences:
        more = len(differences) - _NAMED_AT_MOST
        raise UserError(
            f"{checkpoint.path} does not fit this model: {'; '.join(differences[:_NAMED_AT_MOST])}"
            f"{f'; and {more} more' if more > 0 else ''}: use the config it was written with"
        )
    with torch.no_grad(), warnings.catch_warnings():
        # Loading in one process is what was asked for; torch finds it worth a warning.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(checkpoint.path)),
            process_group=group,
            no_dist=group is None,
        )


def _wanted_by_none(
    saved: dict[str, TensorSpec], wanted: dict[str, TensorSpec], group: dist.ProcessGroup | None
) -> list[str]:
    """Names of the checkpoint that no rank asks for; a rank alone may hold a tensor (fairscale's sharded optimizer)."""
    unwanted = saved.keys() - wanted.keys()
    if group is not None:
        everybody: list[set[str]] = [set()] * dist.get_world_size(group)
        dist.all_gather_object(everybody, unwanted, group=group)
        unwanted = set.intersection(*everybody)
    return sorted(unwanted)


def _differences(saved: dict[str, TensorSpec], wanted: dict[str, TensorSpec]) -> list[str]:
    found = [f"{name} is missing from it" for name in sorted(wanted.keys() - saved.keys())]
    for name in sorted(wanted.keys() & saved.keys()):
        ours, theirs = wanted[name], saved[name]
        if ours != theirs:
            found.append(f"{name} is {theirs.dtype}{list(theirs.shape)} in it, {ours.dtype}{list(ours.shape)} here")
    return found


def spec_of(tensor: Tensor) -> TensorSpec:
    """Type and global shape."""
    return TensorSpec(dtype=str(tensor.dtype), shape=tuple(tensor.shape))


def _contiguous(tensor: Tensor) -> Tensor:
    # safetensors holds contiguous tensors only; nearly all are, and then nothing is copied here.
    tensor = tensor.detach()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor if local.is_contiguous() else tensor.contiguous()


def one_line(error: BaseException) -> str:
    """The cause in one line; torch's collected errors come with the traceback of each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items(), key=lambda item: item[0])[0]
        return f"rank {rank}: {one_line(cause)}"
    return " ".join(f"{type(error).__name__}: {error}".split())
