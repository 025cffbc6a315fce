"""The rows of a JSON lines file of any length, one at a time; broken ones are counted, not fatal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_LARGEST_STEP: Final = 10**15


class JsonRows:
    """Iterate over it for the rows that are objects. A missing file has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = 0
        """Lines that were no JSON object; one that is being written now is not counted."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.broken = 0
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield row
                elif line.endswith(b"\n") and line.strip():
                    self.broken += 1


def step_of(row: Mapping[str, Any]) -> int | None:
    """The step of a row, if it has a sensible one."""
    step = row.get("step")
    return step if type(step) is int and 0 <= step <= _LARGEST_STEP else None


def number_of(value: object) -> float | None:
    """A finite number, else None; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
