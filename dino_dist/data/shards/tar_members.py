"""Strict reading of tar headers: where each member's bytes lie, or one line that says what is wrong and where.

Python's `tarfile` ends silently at some kinds of damage (a header cut short, a missing end), which would shrink a data
set unnoticed. A shard needs little of the format, so this reads just that and refuses the rest: POSIX ustar, GNU long
names and pax paths; regular files and directories; nothing that points outside the archive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple, NoReturn, Protocol

from dino_dist.errors import UserError

BLOCK_BYTES = 512
_WINDOW_BYTES = 8192
_MAX_EXTENSION_BYTES = 2**20  # pax records and long names: text, never large
_MAX_PADDING_BYTES = 2**20  # tar pads to its record size: 10 KiB by default, 1 MiB with -b 2048
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_REGULAR = frozenset(b"0\x007")
_DIRECTORY = ord("5")
_PAX, _PAX_GLOBAL, _GNU_LONG_NAME = ord("x"), ord("g"), ord("L")
_REFUSED = {
    ord("1"): "a hard link",
    ord("2"): "a symbolic link",
    ord("K"): "a link with a long name",
    ord("3"): "a character device",
    ord("4"): "a block device",
    ord("6"): "a FIFO",
    ord("S"): "a sparse file",
}


class Member(NamedTuple):
    """A regular file in a tar: `size_bytes` bytes at `offset_bytes` of the archive."""

    name: bytes
    offset_bytes: int
    size_bytes: int


class Archive(Protocol):
    """The bytes of a tar, wherever it lies."""

    size_bytes: int

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; fewer only at the end."""
        ...


class FileArchive:
    """A tar that is open at the descriptor `fd`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size_bytes = os.fstat(fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; fewer only at the end of the file."""
        return os.pread(self._fd, size, offset)


def printable(name: bytes) -> str:
    """A member's name or key for a message: one line, whatever its bytes."""
    return name.decode("utf-8", "backslashreplace").encode("unicode_escape").decode("ascii")


def read_members(archive: Archive, shard: str) -> Iterator[Member]:
    """The regular files of a tar, in order; reads headers only. `shard` names it in errors.

    `UserError` for a damaged or truncated archive, a link or device, an absolute name or one with `..`, anything
    after the end of the archive.
    """
    return _Scan(archive, shard).members()


class _Scan:
    """One pass over the headers of one archive."""

    def __init__(self, archive: Archive, shard: str) -> None:
        self._archive = archive
        self._shard = shard
        self._total_bytes = archive.size_bytes
        self._window = b""
        self._window_at = 0

    def members(self) -> Iterator[Member]:
        at = 0
        if self._read(0, 2) == b"\x1f\x8b":
            self._fail(0, "gzip data; decompress it")
        path_override: bytes | None = None
        size_override: int | None = None
        while (header := self._header(at)) is not None:
            kind = header[156]
            size = _number(header[124:136])
            if kind in _REGULAR and size_override is not None:
                size = size_override
            if size is None:
                self._fail(at, "a header with an unreadable size")
            data_at = at + BLOCK_BYTES
            if data_at + size > self._total_bytes:
                self._fail(at, f"a member of {size} bytes, but only {self._total_bytes - data_at} follow: truncated")
            if kind in (_PAX, _PAX_GLOBAL, _GNU_LONG_NAME):
                path, new_size = self._extension(kind, at, size)
                path_override = path if path is not None else path_override
                size_override = new_size if new_size is not None else size_override
            else:
                name = self._checked_name(at, path_override if path_override is not None else _name(header))
                path_override = size_override = None
                if self._is_file(kind, name, at):
                    yield Member(name, data_at, size)
            at = data_at + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if path_override is not None or size_override is not None:
            self._fail(at, "the end of the archive where a member was announced")

    def _header(self, at: int) -> bytes | None:
        """The checked header at `at`, or None at the end of the archive."""
        header = self._read(at, BLOCK_BYTES)
        if len(header) < BLOCK_BYTES:
            self._fail(at, "the end of the file where a header or the end of the archive must be: truncated")
        if header == _ZERO_BLOCK:
            self._check_padding(at)
            return None
        stored = _number(header[148:156])
        computed = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if stored != computed:
            self._fail(at, "no tar header (its checksum is wrong)")
        return header

    def _check_padding(self, at: int) -> None:
        """Data after the end of the archive would be left out in silence: refuse it."""
        left = self._total_bytes - at
        if left > _MAX_PADDING_BYTES:
            self._fail(at, f"the end of the archive, but {left} bytes follow: more than padding")
        if self._archive.read(at, left).strip(b"\0"):
            self._fail(at, "the end of the archive, but data follows: tars joined by cat must be repacked")

    def _extension(self, kind: int, at: int, size: int) -> tuple[bytes | None, int | None]:
        """Name and size that a pax or GNU header gives to the next member."""
        if size > _MAX_EXTENSION_BYTES:
            self._fail(at, f"a name or attribute header of {size} bytes")
        data = self._archive.read(at + BLOCK_BYTES, size)
        if kind == _GNU_LONG_NAME:
            return data.rstrip(b"\0"), None
        records = _pax_records(data)
        if records is None:
            self._fail(at, "an unreadable pax header")
        path, size_text = records.get(b"path"), records.get(b"size")
        if any(key.startswith(b"GNU.sparse") for key in records):
            self._fail(at, "a sparse file, which shards may not hold")
        if kind == _PAX_GLOBAL:
            if path is not None or size_text is not None:
                self._fail(at, "a global pax header that renames or resizes members")
            return None, None
        if size_text is not None and not (size_text.isdigit() and len(size_text) < 20):
            self._fail(at, "an unreadable pax size")
        return path, None if size_text is None else int(size_text)

    def _checked_name(self, at: int, name: bytes) -> bytes:
        if not name or b"\0" in name:
            self._fail(at, "a member without a readable name")
        if name.startswith(b"/") or b".." in name.split(b"/"):
            self._fail(at, f"a member named {printable(name)!r}: absolute names and '..' are refused")
        return name.removeprefix(b"./")

    def _is_file(self, kind: int, name: bytes, at: int) -> bool:
        if kind == _DIRECTORY or (kind in _REGULAR and name.endswith(b"/")):
            return False
        if kind not in _REGULAR:
            what = _REFUSED.get(kind, f"of unknown type {chr(kind)!a}")
            self._fail(at, f"member {printable(name)!r} is {what}: shards may hold regular files only")
        return True

    def _read(self, at: int, count: int) -> bytes:
        """Headers of small members lie close together: read a window at once."""
        if not self._window_at <= at <= self._window_at + len(self._window) - count:
            self._window, self._window_at = self._archive.read(at, _WINDOW_BYTES), at
        start = at - self._window_at
        return self._window[start : start + count]

    def _fail(self, at: int, found: str) -> NoReturn:
        raise UserError(f"{self._shard}: bad tar at byte {at}: {found}; replace or remove this shard")


def _number(field: bytes) -> int | None:
    """A numeric header field: octal text, or GNU's base 256 where the first bit is set; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits:
        return 0
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    # GNU's own format ("ustar ") keeps times where POSIX keeps the prefix.
    if prefix and header[257:263] == b"ustar\0":
        return prefix + b"/" + name
    return name


def _pax_records(data: bytes) -> dict[bytes, bytes] | None:
    """The `LENGTH KEY=VALUE\\n` records of a pax header; None if they do not parse."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 9)
        length = data[at:space] if space > 0 else b""
        if not length.isdigit():
            return None
        end = at + int(length)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or data[end - 1 : end] != b"\n" or not equals:
            return None
        records[key] = value
        at = end
    return records
