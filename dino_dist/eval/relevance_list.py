"""A list of queries and gallery images, and which is to find which: JSON of the published layout, or tab-separated.

JSON is the revised Oxford and Paris files' own layout (they come as pickles, which are never read here):
`{"imlist": [NAME, ...], "qimlist": [NAME, ...], "gnd": [{"easy": [...], "hard": [...], "junk": [...], "bbx": [...]},
...]}` with one entry of `gnd` a query, numbers that count `imlist` from 0, and optionally the query's box `bbx`
(left, top, right, bottom in px).

Tab-separated, for one's own images, a line each: ROLE, PATH, GROUP and optionally GRADE. ROLE is `query`, `gallery` or
`both`; images of one GROUP are to find each other; an empty GROUP is a distractor; GRADE, of a gallery image, is `easy`
(the default), `hard` or `junk`. An image that is both is junk to itself. Lines that begin with # are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.eval.retrieval import EASY, HARD, JUNK, UNRELATED

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in px."""

_GRADES = {"easy": EASY, "hard": HARD, "junk": JUNK}
_ROLES = ("query", "gallery", "both")


@dataclass(frozen=True, kw_only=True)
class RelevanceList:
    """Names as the list has them; numbers count `gallery` from 0."""

    queries: tuple[str, ...]
    gallery: tuple[str, ...]
    judged: tuple[dict[int, int], ...]
    """Of each query: the code of each gallery image that it is not unrelated to."""
    boxes: tuple[Box | None, ...]
    """Of each query: what it shows of its image; None: all of it."""

    @property
    def graded(self) -> bool:
        """Whether anything is hard: if not, the protocols easy and hard say nothing."""
        return any(HARD in codes.values() for codes in self.judged)

    @property
    def protocols(self) -> tuple[str, ...]:
        """Those that say something: `medium`; where anything is hard `hard` too, and `easy` if anything is easy."""
        if not self.graded:
            return ("medium",)
        has_easy = any(EASY in codes.values() for codes in self.judged)
        return (*(("easy",) if has_easy else ()), "medium", "hard")

    def relation(self, queries: slice) -> Tensor:
        """int8 [q, N] of codes, on the CPU."""
        chosen = self.judged[queries]
        codes_QN = torch.full((len(chosen), len(self.gallery)), UNRELATED, dtype=torch.int8)
        for row, codes in zip(codes_QN, chosen, strict=True):
            if codes:
                row[list(codes)] = torch.tensor(list(codes.values()), dtype=torch.int8)
        return codes_QN


def read_relevance_list(path: Path) -> RelevanceList:
    """The list in a `.json` or `.tsv` file; `UserError` that names the place for whatever is wrong with it."""
    if path.suffix not in (".json", ".tsv"):
        hint = "; convert the published pickle to JSON where you trust it" if path.suffix == ".pkl" else ""
        raise UserError(f"{path}: a list of queries and gallery must end in .json or .tsv{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}): give a .json or .tsv list") from None
    found = _from_json(path, text) if path.suffix == ".json" else _from_lines(path, text)
    if not found.queries or not found.gallery:
        raise UserError(
            f"{path} has {len(found.queries)} queries and {len(found.gallery)} gallery images: at least one of each "
            "is needed"
        )
    return found


def _from_json(path: Path, text: str) -> RelevanceList:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): give imlist, qimlist and gnd") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object with imlist, qimlist and gnd")
    gallery, queries = _names(path, content, "imlist"), _names(path, content, "qimlist")
    entries = content.get("gnd")
    if not isinstance(entries, list) or len(entries) != len(queries):
        raise UserError(f"{path}: gnd must be a list with one entry for each of the {len(queries)} queries")
    return RelevanceList(
        queries=queries,
        gallery=gallery,
        judged=tuple(_judged(f"{path}: gnd[{n}]", entry, len(gallery)) for n, entry in enumerate(entries)),
        boxes=tuple(_box(f"{path}: gnd[{n}]", entry) for n, entry in enumerate(entries)),
    )


def _names(path: Path, content: dict[str, Any], key: str) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: {key} must be a list of image names")
    return tuple(names)


def _judged(where: str, entry: Any, num_gallery: int) -> dict[int, int]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with easy, hard and junk")
    codes: dict[int, int] = {}
    for grade, code in _GRADES.items():
        numbers = entry.get(grade, [])
        if not isinstance(numbers, list):
            raise UserError(f"{where}.{grade} must be a list of numbers of gallery images")
        for number in numbers:
            if type(number) is not int or not 0 <= number < num_gallery:
                raise UserError(f"{where}.{grade} has {number!r}: numbers of imlist go from 0 to {num_gallery - 1}")
            if number in codes:
                raise UserError(f"{where} has gallery image {number} twice: it can be easy, hard or junk, and once")
            codes[number] = code
    return codes


def _box(where: str, entry: dict[str, Any]) -> Box | None:
    box = entry.get("bbx")
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
        raise UserError(f"{where}.bbx must be four numbers: left, top, right, bottom in px")
    left, top, right, bottom = box
    if not (0 <= left < right < 1e6 and 0 <= top < bottom < 1e6):  # NaN is neither
        raise UserError(f"{where}.bbx {box} is no box: it must be left < right and top < bottom, from 0")
    return float(left), float(top), float(right), float(bottom)


@dataclass(frozen=True, kw_only=True)
class _Line:
    role: str
    name: str
    group: str
    code: int


def _from_lines(path: Path, text: str) -> RelevanceList:
    lines = [
        _parsed(f"{path} line {number}", line)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.startswith("#")
    ]
    queries = [line for line in lines if line.role != "gallery"]
    gallery = [line for line in lines if line.role != "query"]
    for which, chosen in (("queries", queries), ("gallery", gallery)):
        if len({line.name for line in chosen}) != len(chosen):
            names = sorted(line.name for line in chosen)
            twice = next(a for a, b in pairwise(names) if a == b)
            raise UserError(f"{path}: {twice} is twice among the {which}: give each image one line")
    return RelevanceList(
        queries=tuple(line.name for line in queries),
        gallery=tuple(line.name for line in gallery),
        judged=_by_group(queries, gallery),
        boxes=(None,) * len(queries),
    )


def _parsed(where: str, line: str) -> _Line:
    role, *fields = line.split("\t")
    if role not in _ROLES or len(fields) not in (1, 2, 3) or not fields[0]:
        raise UserError(
            f"{where} must read ROLE<tab>PATH<tab>GROUP<tab>GRADE, the last two may be left out, with a role of "
            f"{', '.join(_ROLES)}"
        )
    name, group, grade = (*fields, "", "")[:3]
    if grade and (grade not in _GRADES or role == "query"):
        raise UserError(f"{where}: grade {grade!r} of a {role}: give easy, hard or junk, to gallery images alone")
    return _Line(role=role, name=name, group=group, code=_GRADES[grade or "easy"])


def _by_group(queries: Sequence[_Line], gallery: Sequence[_Line]) -> tuple[dict[int, int], ...]:
    members: dict[str, dict[int, int]] = {}
    own_number = {line.name: number for number, line in enumerate(gallery)}
    for number, line in enumerate(gallery):
        if line.group:
            members.setdefault(line.group, {})[number] = line.code
    judged = []
    for query in queries:
        codes = dict(members.get(query.group, {}))
        if query.name in own_number:
            codes[own_number[query.name]] = JUNK
        judged.append(codes)
    return tuple(judged)
