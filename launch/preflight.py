"""What could go wrong with a job on this cluster, asked before it is submitted: Slurm's settings and a free node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dino_dist.config import Config
from dino_dist.errors import UserError
from dino_dist.ledger import read_rows
from dino_dist.manifest import STATE, committed
from dino_dist.run_folder import RunFolder
from dino_dist.slurm import SlurmError, expand, run_slurm
from launch.cluster_facts import Node, parse_config, parse_nodes, parse_partitions
from launch.cluster_rules import (
    Finding,
    SaveTime,
    choose_partitions,
    cluster_rows,
    fact,
    fatal,
    good,
    node_rows,
    preemption_rows,
    time_rows,
    warning,
)
from launch.job_options import JobOptions
from launch.probe import NotProbed, Probed, ask_node

_TOLERATED_SKEW_S: Final = 2.0
_FREE_WITHIN_S: Final = 5


def check_submission(config: Config, options: JobOptions, run_dir: Path, *, probe: bool) -> list[Finding]:
    """All findings for a job with these options; see `check_cluster`. Slurm's absence is a fatal one."""
    return check_cluster(options, run_dir, probe=probe, at_stake=f"checkpoint.every={config.checkpoint.every}")


def check_cluster(
    options: JobOptions, run_dir: Path | None, *, probe: bool, at_stake: str = "the last checkpoint interval"
) -> list[Finding]:
    """What speaks for and against a job with these options on this cluster.

    `run_dir`: a run folder, which need not exist yet; its measured save time is what the cluster's times are judged by.
    `probe`: also ask a free node (`srun`, one minute at most) if it can write there and what time it is. `at_stake`:
    the work that a save which does not end in time costs. Never raises for what Slurm says or does not say.
    """
    try:
        config = parse_config(run_slurm("scontrol", "show", "config"))
        partitions = parse_partitions(run_slurm("scontrol", "--all", "--oneliner", "show", "partition"))
        names, bad = choose_partitions(partitions, options.partition)
        if bad is not None:
            return [_slurm_row(config), bad]
        nodes = _read_nodes(options.exclude)
        save = None if run_dir is None else measured_save(run_dir)
        findings = [_slurm_row(config), *cluster_rows(config, save)]
        for name in names:
            findings += preemption_rows(config, partitions, name, save, at_stake)
            rows = [
                *time_rows(partitions[name], options, save, config),
                *node_rows(partitions[name], options, nodes.get(name, [])),
            ]
            # Slurm takes whichever of several partitions fits: what one of them refuses is not the end.
            findings += rows if len(names) == 1 else [replace(row, fatal=False) for row in rows]
    except SlurmError as error:
        return [fatal("Slurm", str(error))]
    except OSError as error:
        return [fatal("run folder", f"{run_dir}: cannot be read ({error.strerror}): choose another run.dir")]
    return findings + (_probe_rows(options, run_dir) if probe else [])


def refuse_fatal(findings: list[Finding]) -> None:
    """`UserError` with the first finding that makes a submission pointless."""
    for finding in findings:
        if finding.fatal:
            raise UserError(finding.detail)


def measured_save(run_dir: Path) -> SaveTime | None:
    """How long saves of this run took: by its newest checkpoint, else by its ledger; None if nothing tells."""
    folder = RunFolder(run_dir)
    for _, checkpoint in committed(folder.checkpoints) if folder.checkpoints.is_dir() else ():
        try:
            seconds = json.loads((checkpoint / STATE).read_bytes())["save_s"]
        except (OSError, ValueError, KeyError, TypeError):  # a damaged checkpoint is the resume's to report
            continue
        if isinstance(seconds, int | float):
            return SaveTime(seconds=seconds, source=checkpoint.name)
    saves = [row for row in read_rows(folder.ledger) if row.get("event") == "save" and "seconds" in row]
    return SaveTime(seconds=saves[-1]["seconds"], source=folder.ledger.name) if saves else None


def probe_rows(probed: Probed, folder: Path | None) -> list[Finding]:
    """What a node of the cluster said of the folder and of the time."""
    rows = []
    if folder is not None:
        rows.append(_folder_row(probed, folder))
    if abs(probed.skew_s) > _TOLERATED_SKEW_S:
        side = "ahead of" if probed.skew_s > 0 else "behind"
        why = (
            f"the clock of {probed.node} is {abs(probed.skew_s):.1f} s {side} this machine's: times in the ledger and "
            "in Slurm's time limit will not agree: have the cluster's time service looked at"
        )
        return [*rows, warning("Slurm clocks", why)]
    return [*rows, good("Slurm clocks", f"{probed.node} agrees with this machine within {_TOLERATED_SKEW_S:g} s")]


def _probe_rows(options: JobOptions, run_dir: Path | None) -> list[Finding]:
    flags = ("partition", "account", "qos", "constraint", "exclude")
    given = {flag: getattr(options, flag) for flag in flags}
    folder = run_dir
    try:
        folder = None if run_dir is None else _existing(run_dir.absolute())
        probed = ask_node(
            folder, [f"--{flag}={value}" for flag, value in given.items() if value], wait_s=_FREE_WITHIN_S
        )
    except NotProbed as error:
        why = f"not checked whether a node can write in the run folder, nor its clock: {error}"
        return [fact("Slurm compute side", why)]
    except OSError as error:
        return [fatal("run folder", f"{folder}: this machine cannot write there ({error.strerror}): choose run.dir")]
    return probe_rows(probed, folder)


def _read_nodes(exclude: str | None) -> dict[str, list[Node]]:
    """The nodes that a job may get, by partition."""
    text = run_slurm("sinfo", "--all", "--noheader", "--Node", "--format=%R|%N|%T|%G")
    excluded = set(expand(exclude)) if exclude and "/" not in exclude else set()  # with a slash it names a file
    return {
        partition: [node for node in nodes if node.name not in excluded]
        for partition, nodes in parse_nodes(text).items()
    }


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _folder_row(probed: Probed, folder: Path) -> Finding:
    if probed.cannot is None:
        return good("run folder", f"{folder}: {probed.node} writes there and this machine reads it")
    doing, _, reason = probed.cannot.partition(": ")
    what_fails = {
        "read": f"{probed.node} does not see what this machine writes there ({reason})",
        "write": f"{probed.node} cannot write there ({reason})",
        "share": f"{probed.node} writes there, but {reason}",
    }[doing]
    return fatal("run folder", f"{folder}: {what_fails}: choose a run.dir on a file system that all nodes share")


def _slurm_row(config: Mapping[str, str]) -> Finding:
    return good("Slurm", f"{config.get('SLURM_VERSION', 'version unknown')}, cluster {config.get('ClusterName', '?')}")
