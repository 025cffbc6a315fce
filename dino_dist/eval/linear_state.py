"""Where a sweep of linear classifiers stands, one small safetensors file a group: what a killed sweep goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dino_dist.errors import UserError
from dino_dist.eval.linear import Group

_NAMED_DIGITS = 12
"""Of the fingerprint, in a file's name; the file holds all of it."""


def state_path(folder: Path, group: Group, fingerprint: str) -> Path:
    """The file of a group; sweeps of other networks or settings have others beside it."""
    return folder / f"linear-{group.columns.name}-{fingerprint[:_NAMED_DIGITS]}.safetensors"


def save_group(folder: Path, group: Group, fingerprint: str, beside: Mapping[str, Any]) -> None:
    """Write the group's state; it appears whole or not at all. `fingerprint`: all that the result depends on.

    `beside`: plain values that are kept with it. `UserError` if nothing can be written there.
    """
    path = state_path(folder, group, fingerprint)
    temporary = path.with_name(f"{path.name}.part")
    metadata = {"fingerprint": fingerprint, "epochs_done": str(group.epochs_done), "beside": json.dumps(beside)}
    with _writable(folder):
        save_file({name: tensor.cpu() for name, tensor in group.tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)


def load_group(folder: Path, group: Group, fingerprint: str) -> dict[str, Any] | None:
    """Fill the group from its file; what was kept beside it, None if there is no file with this fingerprint."""
    path = state_path(folder, group, fingerprint)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            for name, tensor in group.tensors.items():
                tensor.copy_(file.get_tensor(name))
            group.epochs_done = int(metadata["epochs_done"])
            beside: dict[str, Any] = json.loads(metadata["beside"])
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no state of a sweep ({' '.join(str(error).split())}): delete it") from error
    return beside


def make_folder(folder: Path) -> None:
    """Make the folder of the states; `UserError` if that, or a file in it, cannot be made."""
    probe = folder / ".writable"
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{folder} cannot hold the sweep's state ({reason}): give a folder that you may write to with --out"
        ) from error
