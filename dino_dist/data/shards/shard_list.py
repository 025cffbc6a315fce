"""Which tar files of a file system a specification names: a folder, a brace pattern, a glob pattern or a manifest."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

from braceexpand import braceexpand

from dino_dist.data.stores.store_errors import redacted
from dino_dist.errors import UserError

MANIFEST_NAME = "manifest.json"
_MAX_SHARDS = 1_000_000
_MAX_BRACES = 16
_MAX_PATTERN_CHARS = 4096


def list_shards(spec: str) -> list[Path]:
    """The shards that `spec` names, as absolute paths, sorted, each once; a manifest is for the caller to read.

    `UserError` if it names none, one that does not exist or one twice, or anything that cannot be read by offset.
    """
    if spec.startswith("pipe:"):
        raise UserError(
            f"data {redacted(spec)!r}: the output of a command has no offsets to index; give shards on a file system"
        )
    if is_url(spec):
        raise UserError(f"data {redacted(spec)!r}: a URL; give shards on a file system here")
    if not spec or "\0" in spec or len(spec) > _MAX_PATTERN_CHARS:
        raise UserError(
            f"data {spec[:40]!r}: give a folder of .tar shards, a brace or glob pattern, or a manifest.json"
        )
    try:
        paths = _in_folder(Path(spec)) if os.path.isdir(spec) else _matching(spec)
    except OSError as error:
        raise UserError(f"data {spec[:200]!r} cannot be read: {error.strerror}; check the path") from error
    paths = sorted(path.absolute() for path in paths)
    for one, other in pairwise(paths):
        if one == other:
            raise UserError(f"data {redacted(spec)!r} names {one} twice; name each shard once")
    return paths


def is_url(spec: str) -> bool:
    """Whether `spec` names something in a store and not on a file system."""
    return re.match(r"[a-z][a-z0-9+.-]*://", spec) is not None


def is_manifest(spec: str) -> bool:
    """Whether `spec` is the path of a manifest (any name that ends in .json)."""
    return spec.endswith(".json")


def _in_folder(folder: Path) -> list[Path]:
    entries = sorted(folder.iterdir())
    shards = [entry for entry in entries if entry.suffix == ".tar" and entry.is_file()]
    if shards:
        return shards
    if any(entry.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")) for entry in entries):
        raise UserError(f"{folder} holds compressed tars only; decompress them, offsets are needed")
    nested = [entry.name for entry in entries if entry.is_dir() and any(entry.glob("*.tar"))]
    hint = f"its folders {', '.join(nested[:3])} do, name one" if nested else "build some with `dino-dist shards build`"
    raise UserError(f"{folder} holds no .tar shards; {hint}")


def _matching(spec: str) -> list[Path]:
    paths: list[Path] = []
    for pattern in expand_braces(spec):
        if Path(pattern).exists():
            found = [pattern]
        elif glob.has_magic(pattern):
            found = glob.glob(pattern)
            if not found:
                raise UserError(f"data {redacted(spec)!r}: nothing matches {pattern!r}; check the path")
        else:
            raise UserError(f"data {redacted(spec)!r}: {pattern} does not exist; check the path")
        paths += [Path(path) for path in found if path.endswith(".tar") and Path(path).is_file()]
        if len(paths) > _MAX_SHARDS:
            raise UserError(f"data {redacted(spec)!r} names more than {_MAX_SHARDS} shards; use fewer, larger ones")
    if not paths:
        raise UserError(
            f"data {redacted(spec)!r} names no .tar shard; give a folder, a pattern that ends in .tar, or a manifest"
        )
    return paths


def expand_braces(spec: str) -> Iterator[str]:
    """Brace expansion, bounded: a pattern such as {0..999999999} would fill the memory."""
    if spec.count("{") > _MAX_BRACES or re.search(r"\d{19}", spec) or _most_expansions(spec) > _MAX_SHARDS:
        raise UserError(f"data {redacted(spec)!r} names more than {_MAX_SHARDS} shards; use fewer, larger ones")
    if "{" not in spec:
        return iter([spec])
    try:
        return islice(braceexpand(spec, escape=False), _MAX_SHARDS + 1)
    except ValueError as error:  # unbalanced braces
        raise UserError(f"data {redacted(spec)!r}: unreadable braces; write {{000..099}} or {{a,b}}") from error


def _most_expansions(spec: str) -> float:
    """An upper bound: the product of the ranges' lengths, times the most that the commas can give."""
    total = 52.0 ** len(re.findall(r"\{[A-Za-z]\.\.[A-Za-z]", spec))
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", spec):
        total *= abs(int(last) - int(first)) + 1
    braces = max(spec.count("{"), 1)
    return total * (spec.count(",") / braces + 1) ** braces
