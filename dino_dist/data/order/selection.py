"""A selection: which samples of a data set an epoch holds, and how often; read from a text file, made by curation.

One line a sample, in any order, without a heading: the sample, a tab, its multiplicity. The sample is its id (a number;
ids move when shards are added) or its shard and key with a slash between them (`00017.tar/n01440764_10026`, the shard
as the data set names it); a file holds one kind. What is not listed, or has multiplicity 0, is left out.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.shards.index import DatasetIndex
from dino_dist.data.shards.tar_members import printable
from dino_dist.errors import UserError

Ids = NDArray[np.int64]
Texts = NDArray[np.bytes_]

MAX_MULTIPLICITY = 1_000_000
"""Of one sample; a larger one is a mistake, and would fill a block of the order with it."""

_MAX_LINE_BYTES = 1024
_READ_BYTES = 2**25
_TABLE_BYTES = 2**27  # lines as a table of equal widths: a few long ones must not multiply the memory
_MAX_DIGITS = 18  # fits 63 bits
_EXAMPLE = "write `00000.tar/KEY<TAB>2` or `SAMPLE_ID<TAB>2`"


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Selected samples with their multiplicities: slot numbers run through them, a sample taking one for each repeat.

    16 bytes a selected sample, however often it repeats.
    """

    sample_ids: Ids
    """int64 [R], ascending: the ids that are taken at least once."""
    first_slots: Ids
    """int64 [R + 1]: the slots first_slots[r] .. first_slots[r + 1] - 1 are repeats of sample_ids[r]."""

    @property
    def num_slots(self) -> int:
        """Samples of one pass, repeats counted."""
        return int(self.first_slots[-1])

    @property
    def digest(self) -> str:
        """Equal if and only if the same samples are taken equally often, whatever the file looked like."""
        digest = hashlib.sha256(b"dino_dist selection 1\n")
        for column in (self.sample_ids, self.first_slots):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        return digest.hexdigest()

    def resolve(self, slots: Ids) -> tuple[Ids, Ids]:
        """Sample ids and repeats (0 .. multiplicity - 1) of slots, int64 [n] each."""
        rows = np.searchsorted(self.first_slots, slots, side="right") - 1
        return self.sample_ids[rows], slots - self.first_slots[rows]

    def slots_below(self, bounds: Ids) -> Ids:
        """How many slots belong to samples with ids below each bound."""
        return self.first_slots[np.searchsorted(self.sample_ids, bounds)]


def read_selection(path: Path, dataset: DatasetIndex) -> Selection:
    """Read a selection of samples of `dataset`; ten million lines take some ten seconds and a gigabyte at the most.

    `UserError` names the file, the line and the value: a line of another form, a sample that the data set lacks or that
    is listed twice, a multiplicity that is no whole number from 0 to a million; or nothing is selected.
    """
    ids, counts = [], []
    finder = _Finder(path, dataset)
    try:
        with open(path, "rb") as file:
            for first_line, lines in _chunks(path, file):
                names, numbers = _columns(path, first_line, lines)
                counts.append(_multiplicities(path, first_line, numbers))
                ids.append(finder.find(first_line, names))
    except OSError as error:
        raise UserError(f"selection {path} cannot be read: {error.strerror}; check the path") from error
    if not ids:
        raise UserError(f"selection {path} is empty; {_EXAMPLE} for each sample to take")
    return _checked(path, np.concatenate(ids), np.concatenate(counts))


def _checked(path: Path, ids: Ids, counts: Ids) -> Selection:
    by_id = np.argsort(ids, kind="stable")
    ids = ids[by_id]
    (again,) = np.nonzero(ids[1:] == ids[:-1])
    if again.size:
        pair = again[np.argmin(by_id[again + 1])]
        raise UserError(
            f"selection {path} lists sample {ids[pair]} twice, in lines {by_id[pair] + 1} and {by_id[pair + 1] + 1}; "
            f"give it one line with its multiplicity"
        )
    counts = counts[by_id]
    taken = counts > 0
    if not taken.any():
        raise UserError(f"selection {path} takes no sample: every multiplicity is 0; give some 1 or more")
    first_slots = np.concatenate([[0], np.cumsum(counts[taken])])
    return Selection(sample_ids=ids[taken], first_slots=first_slots)


def _chunks(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a file without their ends, many at a time, with the number of the first of them."""
    line = 1
    while chunk := file.read(_READ_BYTES):
        chunk += file.readline(_MAX_LINE_BYTES + 1)
        lines = chunk.removesuffix(b"\n").split(b"\n")
        width = max(map(len, lines))
        if width > _MAX_LINE_BYTES:
            number = line + next(i for i, text in enumerate(lines) if len(text) > _MAX_LINE_BYTES)
            raise UserError(f"selection {path} line {number} has more than {_MAX_LINE_BYTES} bytes; {_EXAMPLE}")
        if b"\0" in chunk:  # a table of bytes would drop those that end a line
            number = line + next(i for i, text in enumerate(lines) if b"\0" in text)
            raise UserError(f"selection {path} line {number} holds a zero byte: this is no text file; {_EXAMPLE}")
        step = _TABLE_BYTES // max(width, 1)
        for start in range(0, len(lines), step):
            yield line + start, lines[start : start + step]
        line += len(lines)


def _columns(path: Path, first_line: int, lines: list[bytes]) -> tuple[Texts, Texts]:
    table = np.array(lines, dtype=np.bytes_)
    tabs = np.strings.count(table, b"\t")
    if (tabs != 1).any():
        row = int(np.argmax(tabs != 1))
        raise UserError(
            f"selection {path} line {first_line + row} is {_shown(table[row])}; a sample, one tab and a "
            f"multiplicity are needed: {_EXAMPLE}"
        )
    names, _, numbers = np.strings.partition(table, b"\t")
    return names, numbers


def _multiplicities(path: Path, first_line: int, numbers: Texts) -> Ids:
    good = _are_numbers(numbers)
    counts = np.where(good, numbers, b"0").astype(np.int64)
    good &= counts <= MAX_MULTIPLICITY
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(
            f"selection {path} line {first_line + row}: multiplicity {_shown(numbers[row])} must be a whole number "
            f"from 0 to {MAX_MULTIPLICITY}"
        )
    return counts


class _Finder:
    """Finds samples of one data set by id or by shard and key."""

    def __init__(self, path: Path, dataset: DatasetIndex) -> None:
        self._path = path
        self._dataset = dataset
        names = np.array([entry.name.encode("utf-8", "surrogateescape") for entry in dataset.shards], dtype=np.bytes_)
        self._by_name = np.argsort(names)
        self._names = names[self._by_name]
        self._by_key: bool | None = None

    def find(self, first_line: int, names: Texts) -> Ids:
        """The ids of the samples of some lines."""
        with_slash = np.strings.find(names, b"/") >= 0
        if self._by_key is None:
            self._by_key = bool(with_slash[0])
        if (with_slash != self._by_key).any():
            row = int(np.argmax(with_slash != self._by_key))
            kind = "shard and key" if self._by_key else "id"
            raise UserError(
                f"selection {self._path} line {first_line + row}: {_shown(names[row])} is named otherwise than the "
                f"first line, by {kind}; name all samples by id or all by shard and key"
            )
        return self._find_keys(first_line, names) if self._by_key else self._find_ids(first_line, names)

    def _find_ids(self, first_line: int, names: Texts) -> Ids:
        good = _are_numbers(names)
        ids = np.where(good, names, b"0").astype(np.int64)
        good &= ids < self._dataset.num_samples
        if not good.all():
            row = int(np.argmin(good))
            raise UserError(
                f"selection {self._path} line {first_line + row}: there is no sample {_shown(names[row])}; ids are "
                f"whole numbers from 0 to {self._dataset.num_samples - 1}, or {_EXAMPLE}"
            )
        return ids

    def _find_keys(self, first_line: int, names: Texts) -> Ids:
        before, suffix, keys = np.strings.partition(names, b".tar/")
        shard_names, line_of, shard_of_line = np.unique(
            np.strings.add(before, np.strings.replace(suffix, b"/", b"")), return_index=True, return_inverse=True
        )
        by_shard = np.argsort(shard_of_line, kind="stable")
        cuts = np.searchsorted(shard_of_line[by_shard], np.arange(len(shard_names) + 1))
        ids = np.empty(len(names), dtype=np.int64)
        for number, shard_name in enumerate(shard_names):
            shard = self._shard(first_line + int(line_of[number]), bytes(shard_name))
            rows = by_shard[cuts[number] : cuts[number + 1]]
            ids[rows] = self._ids_in_shard(shard, first_line + rows, keys[rows])
        return ids

    def _shard(self, line: int, name: bytes) -> int:
        at = int(np.searchsorted(self._names, name))
        if at < len(self._names) and self._names[at] == name:
            return int(self._by_name[at])
        known = [printable(each) for each in self._names[:10_000].tolist()]
        near = difflib.get_close_matches(printable(name), known, n=1, cutoff=0.0)
        raise UserError(
            f"selection {self._path} line {line}: the data set has no shard {_shown(name)}; did you mean {near[0]}? "
            f"(the whole sample is named SHARD.tar/KEY)"
        )

    def _ids_in_shard(self, shard: int, lines: Ids, keys: Texts) -> Ids:
        known: Texts = self._dataset.records(shard)["key"]
        by_key = np.argsort(known)
        at = np.minimum(np.searchsorted(known, keys, sorter=by_key), len(known) - 1)
        rows = by_key[at]
        missing = known[rows] != keys
        if missing.any():
            row = int(np.argmax(missing))
            raise UserError(
                f"selection {self._path} line {lines[row]}: shard {self._dataset.shards[shard].name} has no sample "
                f"with the key {_shown(keys[row])}; keys are member names up to the first dot"
            )
        return np.asarray(int(self._dataset.first_ids[shard]) + rows, dtype=np.int64)


def _are_numbers(texts: Texts) -> NDArray[np.bool_]:
    return np.strings.isdigit(texts) & (np.strings.str_len(texts) <= _MAX_DIGITS)


def _shown(text: bytes) -> str:
    return repr(printable(bytes(text))[:80])
