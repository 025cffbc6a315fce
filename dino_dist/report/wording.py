"""Numbers, shares, times and lengths of time as a reader wants them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

_LONG: Final = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
TIMES: Final = "\N{MULTIPLICATION SIGN}"
DASH: Final = "\N{EN DASH}"
_LAST_S: Final = 253402300799.0
"""The end of the year 9999, beyond which there is no date."""


def number(value: float) -> str:
    """Four significant digits: `0.0383`, `5.05`, `12,345`, `1.145e-5`."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    if 1e4 <= size < 1e6:
        return f"{value:,.0f}"
    if 1e-3 <= size < 1e4:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if value else "0"


def count(value: float) -> str:
    """A number of things: `1,437`, `44.8 k` from a hundred thousand on, `1.28 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(size, 1e5):
            return f"{value / size:.3g} {unit}" if abs(value) < 1e3 * size else f"{value / size:,.0f} {unit}"
    return f"{value:,.0f}"


def step_count(value: float) -> str:
    """A step on an axis: `350`, `2.5k`, `1.2M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"


def percent(share: float) -> str:
    """`81.7%`; more digits near the ends, where they tell something."""
    value = 100 * share
    return f"{value:.2f}%" if 0 < value < 1 or 99 < value < 100 else f"{value:.1f}%"


def span(seconds: float) -> str:
    """A length of time in its two largest units: `3 d 04 h`, `12 min 07 s`, `8.3 s`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.2g} s" if 0 < seconds < 1 else f"{seconds:.1f} s"
    left = round(seconds)
    for (unit, size), (below, small) in pairwise(_LONG):
        if left >= size:
            return f"{left // size} {unit} {left % size // small:02d} {below}"
    return f"{left} s"


def moment(seconds: float) -> str:
    """Seconds since 1970 as `2026-11-22 11:33:46 UTC`."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC" if 0 <= seconds <= _LAST_S else "?"


def seconds_of(text: object) -> float | None:
    """Seconds since 1970 of an ISO 8601 text; None if it is none. Without a time zone it is UTC."""
    try:
        parsed = datetime.fromisoformat(str(text))
        seconds = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds <= _LAST_S else None


def shortened(text: object, limit: int) -> str:
    """At most `limit` characters, with an ellipsis where some went."""
    whole = str(text)
    return whole if len(whole) <= limit else f"{whole[: limit - 1]}…"
