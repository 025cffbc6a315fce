"""What makes a folder a checkpoint: a manifest with the size and sha256 of each file, and its verification."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "state.json"
TENSOR_SUFFIX = ".safetensors"
FORMAT_VERSION = 1

_COMMITTED = re.compile(r"^step-(\d{8,})$")


class BadCheckpoint(Exception):
    """A checkpoint folder is not what its manifest says; the message says how."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor as a whole, over all ranks."""

    dtype: str
    """As torch prints it, such as `torch.float32`."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The table of contents of a checkpoint."""

    step: int
    attempt: int
    world: int
    """Ranks that wrote it; any number can load it."""
    files: dict[str, FileRecord]
    tensors: dict[str, TensorSpec]


@dataclass(frozen=True, kw_only=True)
class VerifiedCheckpoint:
    """A committed checkpoint whose every byte was compared with its manifest."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    """Counters, parameter-group fields, config, versions: plain JSON."""

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return self.manifest.step


def folder_name(step: int) -> str:
    """`step-00001000`."""
    return f"step-{step:08d}"


def committed(checkpoints: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints as (step, folder), newest first, unverified."""
    found = ((_COMMITTED.match(name), name) for name in os.listdir(checkpoints))
    return sorted(((int(match.group(1)), checkpoints / name) for match, name in found if match), reverse=True)


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file as it reads back, after it was forced to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def write_text(path: Path, text: str) -> None:
    """Write a small file and force it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, which carries its own hash."""
    content = {"version": FORMAT_VERSION, **asdict(manifest)}
    write_text(folder / MANIFEST, json.dumps(content | {"sha256": _own_hash(content)}, indent=1))


def verify(folder: Path) -> VerifiedCheckpoint:
    """Compare every file of a checkpoint with its manifest; `BadCheckpoint` at the first difference.

    A tensor file that the manifest does not name is a difference too, since the tensors' reader lists the folder. Other
    strange files are never opened.
    """
    try:
        manifest = _read_manifest(folder)
        if folder.name != folder_name(manifest.step):
            raise BadCheckpoint(f"its manifest is of step {manifest.step}")
        extra = {name for name in os.listdir(folder) if name.endswith(TENSOR_SUFFIX)} - set(manifest.files)
        if extra:
            raise BadCheckpoint(f"{sorted(extra)[0]} is not in its manifest")
        for name, record in manifest.files.items():
            _check_size(folder, name, record)
        for name, record in manifest.files.items():
            _check_content(folder, name, record)
        state = json.loads((folder / STATE).read_bytes())
    except OSError as error:
        raise BadCheckpoint(f"{Path(error.filename or folder).name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{STATE} is not JSON ({error})") from error
    return VerifiedCheckpoint(path=folder, manifest=manifest, state=state)


def newest_verified(checkpoints: Path) -> tuple[VerifiedCheckpoint | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and those newer ones that do not, each with what is wrong.

    Reads only; `None` when there is no good one.
    """
    bad: dict[Path, str] = {}
    for _, folder in committed(checkpoints):
        try:
            return verify(folder), bad
        except BadCheckpoint as error:
            bad[folder] = str(error)
    return None, bad


def _own_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        claimed = content.pop("sha256")
        if _own_hash(content) != claimed:
            raise BadCheckpoint(f"{MANIFEST} does not have the hash it names")
        if content.pop("version") != FORMAT_VERSION:
            raise BadCheckpoint(f"{MANIFEST} is not of version {FORMAT_VERSION}")
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        tensors = {
            name: TensorSpec(dtype=spec["dtype"], shape=tuple(spec["shape"]))
            for name, spec in content.pop("tensors").items()
        }
        manifest = Manifest(files=files, tensors=tensors, **content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{MANIFEST} is not a manifest ({error})") from error
    outside = [name for name in manifest.files if Path(name).name != name or name in (MANIFEST, "..")]
    if outside or STATE not in manifest.files:
        raise BadCheckpoint(f"{MANIFEST} names {outside[0] if outside else 'no ' + STATE}")
    return manifest


def _check_size(folder: Path, name: str, record: FileRecord) -> None:
    try:
        found = os.lstat(folder / name)
    except FileNotFoundError:
        raise BadCheckpoint(f"{name} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadCheckpoint(f"{name} is not a plain file")
    if found.st_size != record.bytes:
        raise BadCheckpoint(f"{name} has {found.st_size} bytes, not {record.bytes}")


def _check_content(folder: Path, name: str, record: FileRecord) -> None:
    with open(folder / name, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
            raise BadCheckpoint(f"{name} does not have its manifest's sha256")
