"""What Slurm prints about a cluster, read: its settings, its partitions, their nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dino_dist.slurm import parse_fields

_UNUSABLE: Final = frozenset(
    {"down", "drained", "draining", "drain", "fail", "failing", "failg", "unknown", "inval", "future", "error"}
)
_NOT_RESPONDING: Final = "*"
_GPUS: Final = re.compile(r"^gpu(?::[^:()]+)?:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as sinfo shows it."""

    name: str
    state: str
    gpus: int

    @property
    def usable(self) -> bool:
        """Free, busy or asleep: it can run a job now or later without help."""
        return not self.state.endswith(_NOT_RESPONDING) and self.state.rstrip("~#!%$@^-+") not in _UNUSABLE


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config`: names and values, which may hold blanks."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """`scontrol --oneliner show partition`: the fields of each partition by its name."""
    rows = (parse_fields(line) for line in text.splitlines() if line.startswith("PartitionName="))
    return {row["PartitionName"]: row for row in rows}


def parse_nodes(text: str) -> dict[str, list[Node]]:
    """`sinfo --noheader --Node --format '%R|%N|%T|%G'`: the nodes of each partition by its name."""
    nodes: dict[str, list[Node]] = {}
    for line in text.splitlines():
        if line.count("|") == 3:
            partition, name, state, gres = (word.strip() for word in line.split("|"))
            nodes.setdefault(partition, []).append(Node(name=name, state=state.lower(), gpus=count_gpus(gres)))
    return nodes


def count_gpus(gres: str) -> int:
    """GPUs in a list of generic resources, as in `gpu:a100:8(S:0-1),nvme:1`."""
    found = (_GPUS.match(word.strip()) for word in re.split(r",(?![^(]*\))", gres))
    return sum(int(match[1]) for match in found if match)


def parse_limit_s(text: str) -> float | None:
    """A time as scontrol prints it (`7-00:00:00`, `00:30:00`, `UNLIMITED`, `NONE`), in s; None where there is none."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def seconds_of(fields: Mapping[str, str], name: str) -> float:
    match = re.match(r"\d+", fields.get(name, ""))
    return float(match[0]) if match else 0.0
