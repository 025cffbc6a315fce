"""The index of one tar shard: where each sample's image lies, its checksum, label and key; made once, then mapped.

Stored beside the shard as `NAME.tar.index.npy`, a plain structured array: nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.shards.tar_members import Archive, FileArchive, Member, printable, read_members
from dino_dist.errors import UserError

Records = NDArray[np.void]

INDEX_SUFFIX = ".index.npy"
IMAGE_SUFFIXES = frozenset({b"jpg", b"jpeg", b"png", b"webp", b"ppm", b"pgm", b"bmp", b"tif", b"tiff"})
NO_LABEL = -1
"""The sample has neither a `cls` member nor a `json` member with `label` or `cls`."""
UNREADABLE_LABEL = -2
"""The sample has one, but it is no integer from 0 to 2^31-1 (a class name, say): good for training without labels."""
# What NumPy raises for a damaged header, which it parses as a Python literal.
_UNREADABLE_NPY = (
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    SyntaxError,
    TokenError,
    RecursionError,
    OverflowError,
    MemoryError,
)
_MAX_KEY_BYTES = 512
_MAX_CLS_BYTES = 64
_MAX_JSON_BYTES = 2**20
_CHUNK_BYTES = 2**20
_MAX_IMAGE_BYTES = 2**32 - 1  # the index keeps sizes in 32 bits


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The samples of one shard, in the order of their images.

    `records` has the fields `offset` (uint64, byte in the tar), `size` (uint32, bytes of the image member), `crc32`
    (uint32, zlib's, of these bytes), `label` (int32) and `key` (bytes: folder and name up to the first dot of the base
    name, as webdataset has it).
    """

    records: Records
    bytes: int
    """Size of the tar when it was indexed."""
    mtime_ns: int
    """Its modification time then; 0 where the store tells none."""


class FileIdentity(NamedTuple):
    """Tells a file from any other and from itself once it was written to."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int


class _Layout(NamedTuple):
    """Where the rows of an index file lie in it."""

    dtype: np.dtype[np.void]
    rows: int
    start_byte: int


@dataclass(slots=True)
class _Found:
    """The members of one key that matter here."""

    image: Member | None = None
    crc32: int = 0
    cls: int | None = None
    """The label that a `cls` member gives."""
    json: int | None = None
    """The label that a `json` member gives."""


def index_shard(path: Path) -> ShardIndex:
    """Read the tar at `path`: its headers, images (for their checksums) and small label members.

    Members with other suffixes are ignored, and never opened. `UserError` if the tar is damaged or holds links,
    devices or unsafe names (see `tar_members`), a key has two images, or there is no image at all.
    """
    with opened(path) as fd:
        return index_archive(FileArchive(fd), str(path), mtime_ns=os.fstat(fd).st_mtime_ns)


def index_archive(archive: Archive, shard: str, *, mtime_ns: int = 0) -> ShardIndex:
    """As `index_shard`, of a tar anywhere, read from its start to its end; `shard` names it in errors."""
    samples = _group(archive, shard)
    rows = sorted(
        (found.image.offset_bytes, found.image.size_bytes, found.crc32, _label(found), key)
        for key, found in samples.items()
        if found.image is not None
    )
    if not rows:
        raise UserError(f"{shard}: no images inside; members must be named KEY.jpg, .png, .webp, .ppm, .bmp or .tif")
    key_bytes = max(len(row[-1]) for row in rows)
    return ShardIndex(
        records=np.array(rows, dtype=record_dtype(key_bytes)), bytes=archive.size_bytes, mtime_ns=mtime_ns
    )


def record_dtype(key_bytes: int) -> np.dtype[np.void]:
    """The layout of an index whose longest key has `key_bytes` bytes."""
    return np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("label", "<i4"), ("key", f"S{key_bytes}")])


def records_sha256(records: Records) -> str:
    """Digest of the layout and the rows: the same wherever and by whichever NumPy the file was written."""
    digest = hashlib.sha256(f"{records.dtype['key'].itemsize} {len(records)}\n".encode())
    digest.update(np.ascontiguousarray(records).view(np.uint8).data)
    return digest.hexdigest()


def write_records(path: Path, records: Records) -> None:
    """Store an index file; it appears whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def map_records(path: Path) -> tuple[Records, FileIdentity]:
    """Map an index file, unchecked but for its layout; `UserError` if it is none or cannot be read."""
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            layout = _read_layout(file, stat.st_size)
            records: Records = np.memmap(
                file, dtype=layout.dtype, mode="r", offset=layout.start_byte, shape=(layout.rows,)
            )
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; indexes are read all through a run (see to the file, its permissions "
            f"and `ulimit -n`)"
        ) from error
    except _UNREADABLE_NPY as error:
        raise UserError(f"{path} is no shard index ({_one_line(error)}); delete it and it is made again") from error
    return records, FileIdentity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def check_records(records: Records, path: Path, *, sha256: str) -> None:
    """`UserError` if these records, read from `path`, are not those with the digest that the manifest gives."""
    if records_sha256(records) != sha256:
        raise UserError(f"{path} does not match its manifest.json; delete both and they are made again")


def parse_records(content: bytes, *, sha256: str) -> Records | None:
    """The index in the bytes of an index file; None if they are not those of the index with this digest."""
    try:
        layout = _read_layout(io.BytesIO(content), len(content))
        records: Records = np.frombuffer(content, dtype=layout.dtype, count=layout.rows, offset=layout.start_byte)
    except _UNREADABLE_NPY:
        return None
    return records if records_sha256(records) == sha256 else None


def _read_layout(file: IO[bytes], size_bytes: int) -> _Layout:
    """What the header of an index file says, held against the file's size before anything of that size is asked for.

    One of `_UNREADABLE_NPY` if it is anything else, an archive or a pickle among them.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a NumPy array of format 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    names = dtype.names or ()
    if len(shape) != 1 or "key" not in names or dtype != record_dtype(dtype["key"].itemsize):
        raise ValueError("not the rows of an index")
    layout = _Layout(dtype, shape[0], file.tell())
    if layout.rows < 1 or layout.start_byte + layout.rows * dtype.itemsize != size_bytes:
        raise ValueError(f"{size_bytes} bytes do not hold the {layout.rows} rows that its header names")
    return layout


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name, make it durable, then rename: readers see the old or the whole new one."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A read-only descriptor of a shard; `UserError` if there is no such regular file or it may not be read."""
    if not path.is_file():
        raise UserError(f"{path}: no such shard (a regular file is needed); check the path")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise UserError(f"{path}: this user may not read the shard; change its permissions") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _group(archive: Archive, shard: str) -> dict[bytes, _Found]:
    samples: dict[bytes, _Found] = {}
    for member in read_members(archive, shard):
        folder, slash, base = member.name.rpartition(b"/")
        stem, _, suffix = base.partition(b".")
        suffix = suffix.lower()
        slot = "image" if suffix in IMAGE_SUFFIXES else suffix.decode() if suffix in (b"cls", b"json") else None
        if not stem or slot is None:
            continue
        key = folder + slash + stem
        if len(key) > _MAX_KEY_BYTES:
            raise UserError(f"{shard}: key {printable(key[:40])!r}... has {len(key)} bytes; at most {_MAX_KEY_BYTES}")
        found = samples.setdefault(key, _Found())
        if getattr(found, slot) is not None:
            raise UserError(
                f"{shard}: sample {printable(key)!r} has two {slot} members (the second at byte "
                f"{member.offset_bytes}); a key names one sample, rebuild the shard"
            )
        if slot == "image":
            found.image, found.crc32 = member, _crc32(archive, member, shard)
        else:
            setattr(found, slot, (_cls_label if slot == "cls" else _json_label)(archive, member))
    return samples


def _crc32(archive: Archive, member: Member, shard: str) -> int:
    if member.size_bytes > _MAX_IMAGE_BYTES:
        raise UserError(f"{shard}: {printable(member.name)!r} has {member.size_bytes} bytes; at most 4 GiB")
    crc32, at, end = 0, member.offset_bytes, member.offset_bytes + member.size_bytes
    while at < end:
        data = archive.read(at, min(end - at, _CHUNK_BYTES))
        if not data:
            raise UserError(f"{shard} became shorter while it was indexed; index it when nobody writes to it")
        crc32 = zlib.crc32(data, crc32)
        at += len(data)
    return crc32


def _label(found: _Found) -> int:
    if found.cls is not None:
        return found.cls
    return NO_LABEL if found.json is None else found.json


def _cls_label(archive: Archive, member: Member) -> int:
    if member.size_bytes > _MAX_CLS_BYTES:
        return UNREADABLE_LABEL
    text = archive.read(member.offset_bytes, member.size_bytes).strip()
    return _checked_label(int(text)) if text.isdigit() else UNREADABLE_LABEL


def _json_label(archive: Archive, member: Member) -> int:
    if member.size_bytes > _MAX_JSON_BYTES:
        return NO_LABEL
    try:
        value: Any = json.loads(archive.read(member.offset_bytes, member.size_bytes))
    except (ValueError, RecursionError):  # metadata of any origin: text that is no JSON carries no label
        return NO_LABEL
    if not isinstance(value, dict):
        return NO_LABEL
    label = value.get("label", value.get("cls"))
    if label is None:
        return NO_LABEL
    return _checked_label(label) if isinstance(label, int) and not isinstance(label, bool) else UNREADABLE_LABEL


def _checked_label(label: int) -> int:
    return label if 0 <= label < 2**31 else UNREADABLE_LABEL


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
