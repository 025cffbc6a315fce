"""What speaks for and against a job on a cluster: pure functions from Slurm's settings to lines of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from launch.cluster_facts import Node, parse_limit_s, seconds_of
from launch.job_options import JobOptions

_START_UP_S: Final = 60.0
"""Between a job's start and its first steps, besides reading the checkpoint back."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    what: str
    works: bool | None
    """None: a fact, or something that could not be checked."""
    detail: str
    """What is wrong, why it matters, what to do: complete without `what`."""
    fatal: bool = False
    """A submission would be lost or wait for ever: `works` is False too."""


@dataclass(frozen=True, kw_only=True)
class SaveTime:
    """How long a checkpoint of this run took, and where that was read."""

    seconds: float
    source: str


def fact(what: str, detail: str) -> Finding:
    return Finding(what=what, works=None, detail=detail)


def good(what: str, detail: str) -> Finding:
    return Finding(what=what, works=True, detail=detail)


def warning(what: str, detail: str) -> Finding:
    return Finding(what=what, works=False, detail=detail)


def fatal(what: str, detail: str) -> Finding:
    return Finding(what=what, works=False, detail=detail, fatal=True)


def choose_partitions(
    partitions: Mapping[str, Mapping[str, str]], asked: str | None
) -> tuple[list[str], Finding | None]:
    """The partitions a job goes to (several: Slurm takes the first that fits), or the row that says there is none."""
    there_are = ", ".join(partitions) or "none that you may see"
    if asked is None:
        default = [name for name, fields in partitions.items() if fields.get("Default") == "YES"]
        why = f"no partition was named and this cluster has no default: choose --partition from {there_are}"
        return default, None if default else fatal("Slurm partition", why)
    names = [name for name in asked.split(",") if name]
    unknown = [name for name in names if name not in partitions]
    if unknown or not names:
        why = f"--partition {asked}: Slurm knows no {(unknown or [asked])[0]!r}; its partitions are {there_are}"
        return [], fatal("Slurm partition", why)
    return names, None


def cluster_rows(config: Mapping[str, str], save: SaveTime | None) -> Iterator[Finding]:
    """What holds for every job of the cluster: requeues, kills, dead nodes."""
    if config.get("JobRequeue") == "0":
        yield fact(
            "Slurm JobRequeue",
            "JobRequeue=0: a job whose node fails comes back only if it was submitted with --requeue, as dino-dist "
            "launch does: give it to sbatch scripts of your own",
        )
    else:
        yield good("Slurm JobRequeue", "JobRequeue=1: jobs may be requeued")
    yield _kill_wait(seconds_of(config, "KillWait"), save)
    timeout_s = seconds_of(config, "SlurmdTimeout")
    if timeout_s == 0:
        yield warning(
            "Slurm dead nodes",
            "SlurmdTimeout=0: Slurm never gives up a node that does not answer, so a job whose node died is not "
            "requeued by Slurm: only the run's own time-outs end it",
        )
    else:
        yield fact("Slurm dead nodes", f"a node that does not answer is given up after {timeout_s:g} s (SlurmdTimeout)")
    complete_wait_s = seconds_of(config, "CompleteWait")
    if complete_wait_s:
        yield fact("Slurm CompleteWait", f"a job's nodes are held back up to {complete_wait_s:g} s after its end")


def preemption_rows(
    config: Mapping[str, str],
    partitions: Mapping[str, Mapping[str, str]],
    name: str,
    save: SaveTime | None,
    at_stake: str,
) -> Iterator[Finding]:
    """Whether jobs of a partition are preempted, what becomes of them, and whether a save fits in before."""
    what = f"Slurm preemption ({name})"
    kind = config.get("PreemptType", "preempt/none")
    by_partition = kind == "preempt/partition_prio"
    owner = f"partition {name}" if by_partition else "the cluster (a QOS may have its own: sacctmgr show qos)"
    mode = (partitions[name] if by_partition else config).get("PreemptMode", "OFF")
    modes = set(mode.upper().split(",")) - {"WITHIN"}
    if kind == "preempt/none" or modes <= {"OFF", "GANG"}:
        yield good(what, f"jobs are not preempted (PreemptType={kind}, PreemptMode={mode})" + _gang(modes))
        return
    above = _higher_tiers(partitions, name)
    if by_partition and not above:
        yield good(what, f"jobs are not preempted: no partition has a higher PriorityTier than {name}")
        return
    by = f"jobs of {', '.join(above)}" if by_partition else "jobs of another QOS"
    grace_s = seconds_of(partitions[name], "GraceTime")
    if "CANCEL" in modes:
        last_hope = f"it comes back only if it saves and requeues itself within GraceTime={grace_s:g} s"
        if grace_s == 0:
            last_hope = "with GraceTime=0 it has no time to do so itself"
        yield warning(
            what,
            f"PreemptMode={mode} of {owner}: Slurm cancels a job preempted by {by} and does not requeue it, --requeue "
            f"or not; {last_hope}: choose a partition with PreemptMode=REQUEUE, or look after the job",
        )
    elif "SUSPEND" in modes:
        yield fact(
            what,
            f"PreemptMode={mode} of {owner}: a job preempted by {by} is stopped where it is, keeps its memory and goes "
            "on later; nothing is saved or lost, but a long stop looks like a hang to whoever waits for the run",
        )
        return
    else:
        yield good(what, f"PreemptMode={mode} of {owner}: a job preempted by {by} is requeued" + _gang(modes))
    if config.get("PreemptMode", "OFF").upper() == "OFF":
        yield warning(what, f"PreemptMode=OFF of the cluster with PreemptType={kind}: Slurm calls these incompatible")
    yield _grace(name, grace_s, seconds_of(config, "KillWait"), save, at_stake)
    yield _protocol(name, "preempt_send_user_signal" in config.get("SlurmctldParameters", "").split(","), grace_s)


def time_rows(
    partition: Mapping[str, str], options: JobOptions, save: SaveTime | None, config: Mapping[str, str]
) -> Iterator[Finding]:
    """The time limit of the job against the partition's and against the time that a save takes."""
    what = "Slurm time limit"
    name = partition["PartitionName"]
    max_text, default_text = partition.get("MaxTime", "UNLIMITED"), partition.get("DefaultTime", "NONE")
    max_s = parse_limit_s(max_text) or math.inf
    if options.time_min:
        limit_s, text = options.time_min * 60.0, f"--time {options.time_min} min"
    else:
        limit_s = parse_limit_s(default_text) or max_s
        text = f"no --time, so partition {name}'s {'MaxTime' if limit_s == max_s else 'DefaultTime'}={_limit(limit_s)}"
    if limit_s > max_s:
        why = f"{text} is above MaxTime={max_text} of partition {name}: ask for {max_s / 60:g} min or less"
        # A QOS may lift the partition's limit where the cluster leaves it to the scheduler.
        lifted = options.qos is not None and config.get("EnforcePartLimits", "NO").upper() == "NO"
        yield warning(what, why + f", unless QOS {options.qos} allows it") if lifted else fatal(what, why)
        return
    if math.isinf(limit_s):
        yield good(what, f"none ({text})")
        return
    if save is None:
        yield fact(what, f"{text}; how much of it one save needs is not measured yet")
        return
    # A run stops twice its save time before the limit, and reads back what it saved. Slurm counts whole minutes.
    needed_min = int((3 * save.seconds + _START_UP_S) // 60)
    spent = f"a start and a save of {save.seconds:.3g} s ({save.source}) need {needed_min} min"
    if limit_s < needed_min * 60:
        yield fatal(what, f"{text}: too short to get on, {spent}: ask for --time {2 * needed_min} or more")
    else:
        yield good(what, f"{text}; {spent} of it")


def node_rows(partition: Mapping[str, str], options: JobOptions, nodes: list[Node]) -> Iterator[Finding]:
    """The nodes and GPUs asked for against those of the partition."""
    name, low, high = partition["PartitionName"], options.nodes_min, options.nodes_max
    asked = f"--nodes {low}" if low == high else f"--nodes {low}-{high}"
    if partition.get("State", "UP") != "UP":
        yield warning("Slurm partition", f"partition {name} is {partition['State']}: a job there would not start")
    fewest, most = (partition.get(key, "") for key in ("MinNodes", "MaxNodes"))
    if most.isdigit() and low > int(most):
        yield fatal("Slurm nodes", f"{asked}: partition {name} allows a job at most {most} nodes (MaxNodes)")
    if fewest.isdigit() and high < int(fewest):
        yield fatal("Slurm nodes", f"{asked}: partition {name} wants at least {fewest} nodes a job (MinNodes)")
    yield _node_count(name, asked, low, high, nodes, bool(options.exclude))
    yield _gpus(name, options, nodes)


def _kill_wait(kill_wait_s: float, save: SaveTime | None) -> Finding:
    what, have = "Slurm KillWait", f"scancel leaves a run {kill_wait_s:g} s until SIGKILL (KillWait)"
    if save is None:
        return fact(what, f"{have}; the save time is not measured yet")
    takes = f"a save takes {save.seconds:.3g} s ({save.source})"
    if save.seconds < kill_wait_s:
        return good(what, f"{have}; {takes}")
    return warning(
        what,
        f"{have}, but {takes}: scancel costs what the run did since its last checkpoint: stop it with dino-dist cancel",
    )


def _grace(name: str, grace_s: float, kill_wait_s: float, save: SaveTime | None, at_stake: str) -> Finding:
    what = f"Slurm GraceTime ({name})"
    have = (
        f"preemption leaves {grace_s + kill_wait_s:g} s to save (GraceTime {grace_s:g} s + KillWait {kill_wait_s:g} s)"
    )
    if save is None:
        return fact(what, f"{have}; the save time is not measured yet")
    takes = f"a save takes {save.seconds:.3g} s ({save.source})"
    if 2 * save.seconds <= grace_s + kill_wait_s:
        return good(what, f"{have}; {takes}")
    return warning(
        what,
        f"{have}, but {takes} and begins after a step: a preemption may lose up to {at_stake}: save more often, "
        f"use more ranks or a faster disk, or ask for GraceTime >= {math.ceil(2 * save.seconds)}",
    )


def _protocol(name: str, user_signal: bool, grace_s: float) -> Finding:
    if grace_s == 0:
        text = "GraceTime=0: the ranks get SIGTERM at once, and SIGKILL KillWait later"
    elif user_signal:
        text = f"preempt_send_user_signal: the ranks get the job's --signal (SIGUSR2), then {grace_s:g} s of GraceTime"
    else:
        text = f"no preempt_send_user_signal: the ranks get SIGTERM, then {grace_s:g} s of GraceTime"
    return fact(f"Slurm preemption signal ({name})", f"{text}; the run saves on either")


def _higher_tiers(partitions: Mapping[str, Mapping[str, str]], name: str) -> list[str]:
    tier = {other: int(fields.get("PriorityTier", "1")) for other, fields in partitions.items()}
    return [other for other in partitions if tier[other] > tier[name]]


def _gang(modes: set[str]) -> str:
    return "; GANG: jobs may be stopped in turn to share nodes, which slows a run down" if "GANG" in modes else ""


def _node_count(name: str, asked: str, low: int, high: int, nodes: list[Node], some_excluded: bool) -> Finding:
    what = "Slurm nodes"
    usable = sum(node.usable for node in nodes)
    have = f"partition {name} has {len(nodes)} nodes{' besides the excluded ones' * some_excluded}, {usable} of them up"
    if low > len(nodes):
        return fatal(what, f"{asked}: {have}: the job would wait for ever, ask for {len(nodes)} or fewer")
    if low > usable:
        return warning(what, f"{asked}: {have}: the job waits until more are, or ask for --nodes MIN-MAX with fewer")
    if high > len(nodes):
        return good(what, f"{asked}: {have}; it never gets more than {len(nodes)}")
    return good(what, f"{asked}: {have}")


def _gpus(name: str, options: JobOptions, nodes: list[Node]) -> Finding:
    what, asked = "Slurm GPUs", options.gpus_per_node
    counts = sorted({node.gpus for node in nodes})
    have = f"nodes of partition {name} have {' or '.join(map(str, counts)) or 'no'} GPUs"
    fit = sum(node.gpus >= asked for node in nodes)
    if asked and fit < options.nodes_min:
        return fatal(
            what, f"--gpus-per-node {asked}: only {fit} nodes of partition {name} have that many ({have}): ask for less"
        )
    if not asked and any(counts):
        return fact(what, f"{have}, none were asked for: the run would train on CPUs unless --gpus-per-node is given")
    return good(what, f"{asked} a node asked for; {have}") if asked else fact(what, f"{have}, none asked for")


def _limit(seconds: float) -> str:
    return "UNLIMITED" if math.isinf(seconds) else f"{seconds / 60:g} min"
