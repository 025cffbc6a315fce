"""The manifest of a folder of shards: a row for each, and the digest that says what sample ids mean."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dino_dist.data.shards.shard_index import write_atomically
from dino_dist.errors import UserError

MAX_MANIFEST_BYTES = 2**30
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """What a manifest says of one shard."""

    name: str
    bytes: int
    mtime_ns: int
    """When it was indexed; tells that it changed, and is no part of any hash (copies have other times)."""
    samples: int
    sha256: str
    """Of the index (`shard_index.records_sha256`)."""


def dataset_hash(rows: Iterable[tuple[str, ManifestRow]]) -> str:
    """Digest of shards' names, sizes and indexes, in order."""
    digest = hashlib.sha256(b"dino_dist data set 1\n")
    for name, row in rows:
        digest.update(f"{row.bytes} {row.samples} {row.sha256} {name}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_manifest(path: Path) -> dict[str, ManifestRow]:
    """The rows of a manifest by shard name; `UserError` if it is anything but a manifest of this version."""
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path} is no shard manifest (too large); delete it and it is made again")
        return parse_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path, its file system and its permissions") from error


def parse_manifest(content: bytes, place: str) -> dict[str, ManifestRow]:
    """As `read_manifest`, of the bytes found at `place`."""
    try:
        document: Any = json.loads(content)
        if not isinstance(document, dict) or type(document.get("version")) is not int:
            raise ValueError("it says no version")
        if document["version"] != _VERSION:
            raise UserError(
                f"{place} is a shard manifest of version {document['version']}, this program reads {_VERSION}; "
                f"delete it and it is made again (`dino-dist shards index`)"
            )
        rows = [_checked_row(row) for row in document["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{place} is no shard manifest ({reason}); delete it and it is made again") from error
    return {row.name: row for row in rows}


def add_to_manifest(path: Path, new: list[ManifestRow], *, is_there: Callable[[str], bool]) -> None:
    """Write a manifest with these rows and the earlier ones of shards that still are there."""
    # Other shards of the folder may belong to another data set (train beside test): keep their rows.
    rows = read_manifest(path) if path.exists() else {}
    rows = {name: row for name, row in rows.items() if is_there(name)}
    rows |= {row.name: row for row in new}
    ordered = [rows[name] for name in sorted(rows)]
    document = {
        "version": _VERSION,
        "hash": dataset_hash((row.name, row) for row in ordered),
        "samples": sum(row.samples for row in ordered),
        "shards": [asdict(row) for row in ordered],
    }
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def _checked_row(fields: Any) -> ManifestRow:
    """A row as written above; names stay in their folder, counts stay possible. `ValueError` otherwise."""
    if not all(isinstance(fields[key], str) for key in ("name", "sha256")):
        raise ValueError("a name or digest is no text")
    row = ManifestRow(**fields)
    bare = row.name.endswith(".tar") and not set(b"/\0\n") & set(os.fsencode(row.name))
    numbers = all(type(value) is int and 0 <= value < 2**63 for value in (row.bytes, row.mtime_ns, row.samples))
    # A sample needs a header and a block.
    if not (bare and numbers and len(row.sha256) == 64 and 1 <= row.samples <= max(1, row.bytes // 512)):
        raise ValueError(f"row {str(fields)[:80]}")
    return row
