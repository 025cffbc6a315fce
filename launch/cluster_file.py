"""The user's defaults for a cluster (partition, account, environment lines), merged under the command line's values."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml

from dino_dist.errors import UserError
from launch.job_options import JobOptions, check_text, parse_count, parse_nodes, parse_time_min, slurm_key

_UNSET: Final = frozenset({"", "null", "~"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Some options of a job, from the file or from the command line; None and empty: not given."""

    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    comment: str | None = None
    time: str | None = None
    setup: tuple[str, ...] = ()
    slurm: Mapping[str, str] = field(default_factory=dict)

    def over(self, below: Settings) -> Settings:
        """These settings, and those of `below` that are not given here; its setup lines run first."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: value for name, value in own.items() if value is not None}
        slurm = {**below.slurm, **self.slurm}
        return replace(below, **given | {"setup": below.setup + self.setup, "slurm": slurm})


def job_options(nodes: str, settings: Settings, *, srun_args: tuple[str, ...] = ()) -> JobOptions:
    """The options of a job on `nodes` (`4`, or `2-8`); a task a GPU where neither is said, `false` drops a flag."""
    nodes_min, nodes_max = parse_nodes(nodes)
    gpus_per_node = settings.gpus_per_node or 0
    return JobOptions(
        nodes_min=nodes_min,
        nodes_max=nodes_max,
        gpus_per_node=gpus_per_node,
        tasks_per_node=max(gpus_per_node, 1) if settings.tasks_per_node is None else settings.tasks_per_node,
        cpus_per_task=settings.cpus_per_task,
        mem=settings.mem,
        partition=settings.partition,
        account=settings.account,
        qos=settings.qos,
        constraint=settings.constraint,
        exclude=settings.exclude,
        comment=settings.comment,
        time_min=None if settings.time is None else parse_time_min(settings.time),
        setup=settings.setup,
        slurm=MappingProxyType({key: value for key, value in settings.slurm.items() if value.lower() != "false"}),
        srun_args=srun_args,
    )


def cluster_file_path(environ: Mapping[str, str] = os.environ) -> Path | None:
    """`$DINO_DIST_CLUSTER`, else `dino_dist/cluster.yaml` in the user's folder of configurations, if it exists."""
    named = environ.get("DINO_DIST_CLUSTER")
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise UserError(f"DINO_DIST_CLUSTER={named}: there is no such file; unset it or write the file")
        return path
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".config")
    path = Path(home) / "dino_dist" / "cluster.yaml"
    return path if path.is_file() else None


def read_cluster_file(path: Path | None) -> Settings:
    """The settings of a file; `UserError` names the file and the key that is unknown or has a wrong value."""
    if path is None:
        return Settings()
    content = _read_mapping(path)
    known = [item.name for item in fields(Settings)]
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"keys are {', '.join(known)}"
            raise UserError(f"{path}: unknown key {key!r}: {hint}")
        if isinstance(value, str) and value in _UNSET:
            continue
        read: Callable[[str, Any], Any] = _READERS.get(key, _read_text)
        try:
            values[key] = read(key, value)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return Settings(**values)


def _read_mapping(path: Path) -> dict[str, Any]:
    """Every scalar as the text that stands there: YAML itself reads 3:00:00 as 10800, and a partition `on` as true."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # strings only: builds no objects
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold lines such as `partition: gpu`")
    return {str(key): value for key, value in content.items()}


def _read_text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{key} must be one value, not {type(value).__name__}")
    check_text(key, value)
    return value


def _read_count(key: str, value: Any) -> int:
    return parse_count(key, _read_text(key, value), at_least=0 if key == "gpus_per_node" else 1)


def _read_time(key: str, value: Any) -> str:
    text = _read_text(key, value)
    parse_time_min(text)
    return text


def _read_setup(key: str, value: Any) -> tuple[str, ...]:
    lines = value if isinstance(value, list) else str(value).splitlines() if isinstance(value, str) else None
    if lines is None or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{key} must be a list of shell lines")
    kept = tuple(line for line in lines if line.strip())
    for line in kept:
        check_text(key, line)
    return kept


def _read_exclude(key: str, value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_read_text(key, name) for name in value)
    return _read_text(key, value)


def _read_slurm(key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{key} must hold options of sbatch, such as `reservation: NAME`")
    return {slurm_key(name): _read_text(f"{key}.{name}", text) for name, text in value.items()}


_READERS: Final[Mapping[str, Callable[[str, Any], Any]]] = MappingProxyType(
    {
        "gpus_per_node": _read_count,
        "tasks_per_node": _read_count,
        "cpus_per_task": _read_count,
        "time": _read_time,
        "setup": _read_setup,
        "exclude": _read_exclude,
        "slurm": _read_slurm,
    }
)
