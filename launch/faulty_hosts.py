"""Which machines a run has reason to avoid: those that its ledger blames for faults more than once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_REPEATED: Final = 2
"""One fault may be anybody's: a second one, in another attempt, on the same machine is a reason to try without it."""


@dataclass(frozen=True, kw_only=True)
class FaultyHost:
    """A machine that was named as the cause of faults in several attempts."""

    host: str
    attempts: int
    """In how many of them."""
    last_time: str
    last_why: str


def repeat_offenders(ledger_rows: Iterable[Mapping[str, Any]]) -> list[FaultyHost]:
    """Hosts that `fault` rows name as `suspect_host` in two attempts or more, the worst first.

    All rows of one attempt count once: a node that dies is reported by many ranks. Rows without a suspect do not
    count, since the host that reports a fault is seldom the one that caused it.
    """
    attempts: defaultdict[str, set[Any]] = defaultdict(set)
    last: dict[str, Mapping[str, Any]] = {}
    for row in ledger_rows:
        host = row.get("suspect_host")
        if row.get("event") == "fault" and isinstance(host, str) and host and row.get("attempt") is not None:
            attempts[host].add(row["attempt"])
            last[host] = row
    faulty = [
        FaultyHost(
            host=host,
            attempts=len(numbers),
            last_time=str(last[host].get("time")),
            last_why=str(last[host].get("why")),
        )
        for host, numbers in attempts.items()
        if len(numbers) >= _REPEATED
    ]
    return sorted(faulty, key=lambda found: (-found.attempts, found.host))
