"""What a job asks of Slurm: the options of `dino-dist launch`, read and checked before anything is submitted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Final

from dino_dist.errors import UserError

_MAX_SIGNAL_DELAY_S: Final = 120
_MAX_COUNT: Final = 1_000_000
_MINUTES_OF: Final = MappingProxyType({"": 1, "m": 1, "h": 60, "d": 24 * 60})
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")

OWN_OPTIONS: Final = MappingProxyType(
    {
        "nodes": "--nodes",
        "ntasks-per-node": "--tasks-per-node",
        "tasks-per-node": "--tasks-per-node",
        "ntasks": "--nodes and --tasks-per-node",
        "cpus-per-task": "--cpus-per-task",
        "gpus-per-node": "--gpus-per-node",
        "mem": "--mem",
        "partition": "--partition",
        "account": "--account",
        "qos": "--qos",
        "constraint": "--constraint",
        "exclude": "--exclude",
        "comment": "--comment",
        "time": "--time",
        "array": "--sweep",
        "mincpus": "--cpus-per-task",
    }
)
"""Options of sbatch that have an option of ours: given in two places they could contradict each other."""

FIXED_OPTIONS: Final = frozenset(
    {
        *("chdir", "error", "input", "no-requeue", "open-mode", "output", "parsable", "requeue", "test-only", "wait"),
        *("wrap",),
    }
)
"""Options of sbatch that surviving a requeue, or finding the job again, depends on."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The resources of a job and how to ask for them; `UserError` for a value that cannot be."""

    nodes_min: int
    nodes_max: int
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    """Ranks a node."""
    cpus_per_task: int | None = None
    """None: the site's default."""
    mem: str | None = None
    """A node's, in Slurm's words, such as 64G."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """Nodes not to use, joined by commas."""
    comment: str | None = None
    time_min: int | None = None
    """The time limit; None: the partition's default."""
    setup: tuple[str, ...] = ()
    """Shell lines that the job runs first."""
    slurm: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch; `true` is a bare flag."""
    srun_args: tuple[str, ...] = ()
    """Further arguments of the srun that starts the ranks."""

    def __post_init__(self) -> None:
        for name in ("nodes_min", "nodes_max", "tasks_per_node", "cpus_per_task"):
            _check_count(name, getattr(self, name), at_least=1)
        _check_count("gpus_per_node", self.gpus_per_node, at_least=0)
        _check_count("time_min", self.time_min, at_least=1)
        if self.nodes_min > self.nodes_max:
            raise UserError(f"--nodes {self.nodes_min}-{self.nodes_max}: the smaller number comes first")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str):
                check_text(option_name(item.name), value)
        for key, value in self.slurm.items():
            check_slurm_key(key)
            check_text(f"--slurm {key}", value)
        for line in (*self.setup, *self.srun_args):
            check_text("--setup or --srun-arg", line)

    @property
    def world_min(self) -> int:
        """Ranks on the fewest nodes."""
        return self.nodes_min * self.tasks_per_node

    @property
    def world_max(self) -> int:
        """Ranks on the most nodes."""
        return self.nodes_max * self.tasks_per_node

    @property
    def nodes(self) -> str:
        """In sbatch's words: `2`, or `1-2`."""
        return str(self.nodes_min) if self.nodes_min == self.nodes_max else f"{self.nodes_min}-{self.nodes_max}"


def signal_delay_s(time_min: int | None) -> int:
    """How long before the time limit Slurm warns the ranks, in s: a short job is not all warning."""
    return _MAX_SIGNAL_DELAY_S if time_min is None else min(_MAX_SIGNAL_DELAY_S, time_min * 60 // 4)


def parse_nodes(text: str) -> tuple[int, int]:
    """`4` -> (4, 4), `2-8` -> (2, 8)."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?", text.strip(), re.ASCII)
    if match is None:
        raise UserError(f"--nodes {text!r}: give a number of nodes, as in 4, or the fewest and the most, as in 2-8")
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high:
        raise UserError(f"--nodes {text}: the smaller number comes first, as in {high}-{low}")
    return low, high


def parse_time_min(text: str) -> int:
    """A time limit in whole minutes, rounded up; what Slurm reads, and 90m, 72h, 2d."""
    seconds = _seconds(text.strip())
    if seconds is None:
        raise UserError(
            f"--time {text!r}: give minutes as in 30, or 90m, 72h, 2d, or HH:MM:SS, MM:SS, D-HH, D-HH:MM, D-HH:MM:SS"
        )
    if seconds == 0:
        raise UserError(f"--time {text!r}: give at least one minute")
    return -(-seconds // 60)


def parse_count(name: str, text: str, *, at_least: int) -> int:
    """A whole number; `name` is what the user wrote it for."""
    if re.fullmatch(r"\d{1,7}", text.strip(), re.ASCII) is None or int(text) < at_least:
        raise UserError(f"{name}: {text!r} is not a whole number of at least {at_least}")
    return int(text)


def parse_slurm(texts: Iterable[str]) -> dict[str, str]:
    """`key=value` each; a key alone is a bare flag, as `key=true` is."""
    options: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.strip().lstrip("-").partition("=")
        options[slurm_key(key)] = value.strip() if equals else "true"
    return options


def slurm_key(text: str) -> str:
    """A long option of sbatch as Slurm spells it; `UserError` for one that is not free to be set."""
    key = text.strip().lstrip("-").replace("_", "-")
    check_slurm_key(key)
    return key


def check_slurm_key(key: str) -> None:
    """`UserError` for what is no long option of sbatch, or one that is set in another way."""
    if re.fullmatch(r"[a-z][a-z0-9-]+", key, re.ASCII) is None:
        raise UserError(f"--slurm {key!r}: give a long option of sbatch without its dashes, as in reservation=NAME")
    if key in OWN_OPTIONS:
        raise UserError(f"--slurm {key}: use {OWN_OPTIONS[key]}")
    if key in FIXED_OPTIONS:
        raise UserError(f"--slurm {key}: launch sets this itself; a job that it did not set could not be requeued")


def check_text(name: str, value: str) -> None:
    """`UserError` for a value that would not stay one line of the batch script, or says nothing."""
    if not value.strip():
        raise UserError(f"{name}: the value is empty; leave the option out instead")
    if _CONTROL.search(value):
        raise UserError(f"{name}: {value!r} holds a line break or another control character; give one line")


def option_name(field_name: str) -> str:
    """How a field of `JobOptions` is written on the command line."""
    names = {"time_min": "--time", "nodes_min": "--nodes", "nodes_max": "--nodes"}
    return names.get(field_name, f"--{field_name.replace('_', '-')}")


def _check_count(field_name: str, value: int | None, *, at_least: int) -> None:
    if value is not None and not at_least <= value <= 10 * _MAX_COUNT:
        raise UserError(f"{option_name(field_name)} {value}: give a whole number of at least {at_least}")


def _seconds(text: str) -> int | None:
    """None for what is no time; parts after the first stay below 60 (hours of a day below 24)."""
    with_unit = re.fullmatch(r"(\d{1,7})([mhd]?)", text, re.ASCII)
    if with_unit:
        return int(with_unit[1]) * _MINUTES_OF[with_unit[2]] * 60
    days = re.fullmatch(r"(\d{1,5})-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?", text, re.ASCII)
    if days:
        day, hour, minute, second = (int(part or 0) for part in days.groups())
        return None if hour > 23 or minute > 59 or second > 59 else ((day * 24 + hour) * 60 + minute) * 60 + second
    clock = re.fullmatch(r"(?:(\d{1,6}):)?(\d{1,6}):(\d{1,2})", text, re.ASCII)
    if clock is None:
        return None
    hour, minute, second = (int(part or 0) for part in clock.groups())
    if second > 59 or (clock[1] is not None and minute > 59):
        return None
    return (hour * 60 + minute) * 60 + second
