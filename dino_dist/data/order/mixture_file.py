"""The text of a mixture, a YAML file: which data sets, in which proportions, with which selections.

epoch_samples: 2000000          # optional; as many as the sets hold together
sets:
  - shards: imagenet/train      # folder, brace or glob pattern, manifest or URL
    weight: 0.7                 # optional, for all sets or none; as many as the set holds
  - shards: https://example.org/web-{000..999}.tar
    weight: 0.3
    selection: web.tsv          # optional (see `selection`); all samples, once
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from dino_dist.data.order.order import MAX_PARTS
from dino_dist.errors import UserError

MAX_EPOCH_SAMPLES = 10**12
MAX_WEIGHT = 10**15
"""Weights are proportions: more than this, or less than its reciprocal, is a slip."""

_MAX_FILE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """One data set of a mixture, paths resolved."""

    shards: str
    weight: Fraction | None = None
    """Exact value of the number in the file; none: the samples that the set holds, repeats counted."""
    selection: Path | None = None


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """A whole mixture."""

    sets: tuple[SetSpec, ...]
    """At least one; either all have weights or none has."""
    epoch_samples: int | None = None
    """None: the sum of what the sets hold."""


def is_mixture(spec: str) -> bool:
    """Whether a data specification is the path of a mixture (any name that ends in .yaml or .yml)."""
    return spec.endswith((".yaml", ".yml"))


def read_mixture(path: Path) -> MixtureSpec:
    """Read a mixture; relative paths in it start at its own folder. `UserError` names the key and what is allowed."""
    document = _mapping(_load(path), MixtureSpec, str(path))
    epoch_samples = document.get("epoch_samples")
    if epoch_samples is not None and not _is_whole(epoch_samples, 1, MAX_EPOCH_SAMPLES):
        raise UserError(
            f"{path}: epoch_samples={_shown(epoch_samples)} must be a whole number from 1 to {MAX_EPOCH_SAMPLES}"
        )
    entries = document.get("sets")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_PARTS:
        raise UserError(
            f"{path}: sets={_shown(entries)} must be a list of 1 to {MAX_PARTS} data sets, each `- shards: SPEC`"
        )
    sets = tuple(_set(entry, f"{path}: sets[{number}]", path.parent) for number, entry in enumerate(entries))
    without = [number for number, each in enumerate(sets) if each.weight is None]
    if without and len(without) < len(sets):
        raise UserError(
            f"{path}: sets[{without[0]}] has no weight but others have; give each set one, or none to any "
            f"(then each counts as often as it has samples)"
        )
    return MixtureSpec(sets=sets, epoch_samples=epoch_samples)


def _set(entry: Any, where: str, folder: Path) -> SetSpec:
    values = _mapping(entry, SetSpec, where)
    shards, weight, selection = values.get("shards"), values.get("weight"), values.get("selection")
    if not isinstance(shards, str) or not shards:
        raise UserError(f"{where}.shards={_shown(shards)} must be a folder, pattern, manifest or URL of shards")
    if is_mixture(shards):
        raise UserError(f"{where}.shards={_shown(shards)} is itself a mixture; list its sets here instead")
    if selection is not None and (not isinstance(selection, str) or not selection):
        raise UserError(f"{where}.selection={_shown(selection)} must be the path of a selection file")
    return SetSpec(
        shards=shards if _is_anchored(shards) else os.path.join(folder, shards),
        weight=None if weight is None else _weight(weight, where),
        selection=None if selection is None else folder / selection,
    )


def _weight(value: Any, where: str) -> Fraction:
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 / MAX_WEIGHT <= value <= MAX_WEIGHT:
        return Fraction(repr(value))  # 0.3 is three tenths
    hint = " (YAML takes 1e-3 for text: write 0.001)" if isinstance(value, str) else ""
    raise UserError(f"{where}.weight={_shown(value)} must be a positive number such as 0.5{hint}")


def _is_anchored(shards: str) -> bool:
    """Whether a specification is no path below the mixture's own folder: absolute, a URL, or refused later on."""
    return os.path.isabs(shards) or re.match(r"[a-z][a-z0-9+.-]*://|pipe:|\{/", shards) is not None


class _StrictLoader(yaml.SafeLoader):
    """YAML forbids a key twice, but its reader here lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1} gives {key.value!r} a second time; keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UserError(f"mixture {path} has more than {_MAX_FILE_BYTES} bytes; is it the right file?")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"mixture {path} cannot be read: {error.strerror}; check data.train") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"mixture {path} cannot be read as YAML: {reason}") from error


def _mapping(value: Any, schema: type, where: str) -> dict[str, Any]:
    """A mapping whose keys are fields of `schema`."""
    known = [each.name for each in fields(schema)]
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_shown(value)}; it must hold keys of {_listed(known)}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise UserError(f"{where}: unknown key {_shown(key)}; did you mean {near[0]}? (known: {_listed(known)})")
    return value


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _shown(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)[:120]  # however a value of aliases may unfold
