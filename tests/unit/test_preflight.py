"""The findings before a submission: Slurm's texts are read right, and each rule speaks when it should, only then."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dino_dist.config import Config
from dino_dist.errors import UserError
from launch.cluster_facts import Node, count_gpus, parse_config, parse_limit_s, parse_nodes, parse_partitions
from launch.cluster_rules import (
    Finding,
    SaveTime,
    choose_partitions,
    cluster_rows,
    node_rows,
    preemption_rows,
    time_rows,
)
from launch.job_options import JobOptions
from launch.preflight import check_cluster, check_submission, measured_save, probe_rows, refuse_fatal
from launch.probe import NotProbed, Probed, ask_node, skew

# As Slurm 22.05 prints it.
CONFIG = """Configuration data as of 2026-11-22T07:33:24
ClusterName             = dev
CompleteWait            = 0 sec
CpuFreqGovernors        = OnDemand,Performance,UserSpace
EnforcePartLimits       = NO
JobRequeue              = 1
KillWait                = 5 sec
PowerPlugin             =
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SlurmctldHost[0]        = vm(localhost)
SlurmctldParameters     = preempt_send_user_signal
SlurmdTimeout           = 15 sec
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""
PARTITIONS = (
    "PartitionName=low AllowGroups=ALL Default=YES QoS=N/A DefaultTime=NONE GraceTime=20 Hidden=NO MaxNodes=UNLIMITED "
    "MaxTime=UNLIMITED MinNodes=0 Nodes=n[0-1] PriorityTier=1 PreemptMode=REQUEUE State=UP JobDefaults=(null) "
    "TRES=cpu=4,mem=16000M,node=2,billing=4\n"
    "PartitionName=high AllowGroups=ALL Default=NO QoS=N/A DefaultTime=NONE GraceTime=0 Hidden=NO MaxNodes=UNLIMITED "
    "MaxTime=UNLIMITED MinNodes=0 Nodes=n[0-1] PriorityTier=10 PreemptMode=OFF State=UP\n"
    "PartitionName=xc AllowGroups=ALL Default=NO QoS=N/A DefaultTime=01:00:00 GraceTime=10 Hidden=NO MaxNodes=1 "
    "MaxTime=7-00:00:00 MinNodes=1 Nodes=n[0-1] PriorityTier=0 PreemptMode=CANCEL State=UP\n"
)
NODES = "high|n0|idle|(null)\nlow|n0|idle|(null)\nhigh|n1|down*|(null)\nlow|n1|down*|(null)\n"

config = parse_config(CONFIG)
partitions = parse_partitions(PARTITIONS)


def options(nodes: str = "1", **more: Any) -> JobOptions:
    low, _, high = nodes.partition("-")
    return JobOptions(nodes_min=int(low), nodes_max=int(high or low), **more)


def save(seconds: float) -> SaveTime:
    return SaveTime(seconds=seconds, source="step-00000010")


def only(rows: list[Finding], what: str) -> Finding:
    (row,) = (row for row in rows if what in row.what)
    assert row.detail, row
    assert "\n" not in row.detail
    assert row.works is False or not row.fatal
    return row


def preempted(name: str, seconds: float | None = None, *, cluster: dict[str, str] | None = None, **fields: str) -> Any:
    changed = {**partitions, name: {**partitions[name], **fields}}
    time = None if seconds is None else save(seconds)
    return list(preemption_rows({**config, **(cluster or {})}, changed, name, time, "checkpoint.every=1ep"))


def test_settings_are_read_as_slurm_prints_them() -> None:
    assert config["KillWait"] == "5 sec"
    assert config["PowerPlugin"] == ""
    assert config["SlurmctldHost[0]"] == "vm(localhost)"
    assert list(partitions) == ["low", "high", "xc"]
    assert partitions["low"]["TRES"] == "cpu=4,mem=16000M,node=2,billing=4"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("7-00:00:00", 604800.0), ("00:30:00", 1800.0), ("1-02:03:04", 93784.0)),
        *(("UNLIMITED", math.inf), ("INFINITE", math.inf), ("NONE", None), ("soon", None)),
    ],
)
def test_limits_are_read(text: str, seconds: float | None) -> None:
    assert parse_limit_s(text) == seconds


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        *(("(null)", 0), ("", 0), ("gpu:4", 4), ("gpu:a100:8(S:0-1)", 8), ("gpu:h100:8(S:0,1),nvme:1", 8)),
        *(("nvme:3,gpu:tesla:2,gpu:kepler:1", 3), ("gpu_mem:80", 0), ("shard:16,gpu:v100:4(S:0-3)", 4)),
    ],
)
def test_gpus_are_counted(gres: str, count: int) -> None:
    assert count_gpus(gres) == count


@pytest.mark.parametrize(
    ("state", "usable"),
    [
        *(("idle", True), ("mixed", True), ("allocated", True), ("idle~", True), ("planned", True), ("mixed-", True)),
        *(("down*", False), ("down", False), ("idle*", False), ("drained", False), ("draining", False)),
        *(("draining@", False), ("unknown", False), ("powered_down", True)),
    ],
)
def test_nodes_that_can_run_a_job(state: str, usable: bool) -> None:
    (node,) = parse_nodes(f"low|n0|{state}|gpu:2\n")["low"]
    assert node == Node(name="n0", state=state, gpus=2)
    assert node.usable is usable


def test_partitions_are_chosen_or_named() -> None:
    assert choose_partitions(partitions, None) == (["low"], None)
    assert choose_partitions(partitions, "high,low") == (["high", "low"], None)
    names, bad = choose_partitions(partitions, "low,gpu")
    assert (names, bad is not None and bad.fatal) == ([], True)
    assert bad is not None
    assert "'gpu'" in bad.detail
    assert "low, high, xc" in bad.detail
    _, bad = choose_partitions({name: {**row, "Default": "NO"} for name, row in partitions.items()}, None)
    assert bad is not None
    assert bad.fatal


def test_requeue_that_works() -> None:
    rows = preempted("low", 4.0)
    assert only(rows, "preemption (low)").works is True
    assert "high" in only(rows, "preemption (low)").detail
    grace = only(rows, "GraceTime")
    assert grace.works is True
    assert "25 s" in grace.detail  # 20 s of GraceTime, then KillWait
    assert "SIGUSR2" in only(rows, "signal").detail


def test_cancel_is_a_warning_and_not_the_end() -> None:
    row = only(preempted("xc"), "preemption (xc)")
    assert row.works is False
    assert not row.fatal
    assert "GraceTime=10 s" in row.detail
    row = only(preempted("xc", GraceTime="0"), "preemption (xc)")
    assert "no time" in row.detail


@pytest.mark.parametrize(
    ("name", "cluster", "fields"),
    [
        ("high", {}, {}),
        ("low", {"PreemptType": "preempt/none", "PreemptMode": "OFF"}, {"PreemptMode": "OFF"}),
        ("low", {}, {"PriorityTier": "10"}),
    ],
)
def test_partitions_whose_jobs_stay(name: str, cluster: dict[str, str], fields: dict[str, str]) -> None:
    (row,) = preempted(name, 1e6, cluster=cluster, **fields)
    assert row.works is True
    assert "not preempted" in row.detail


def test_suspension_is_told() -> None:
    (row,) = preempted("low", PreemptMode="GANG,SUSPEND")
    assert row.works is None
    assert "stopped where it is" in row.detail


def test_modes_of_a_qos_cluster_are_the_clusters() -> None:
    rows = preempted("low", cluster={"PreemptType": "preempt/qos", "PreemptMode": "CANCEL"})
    assert only(rows, "preemption (low)").works is False


@pytest.mark.parametrize(("seconds", "works"), [(None, None), (1.0, True), (12.5, True), (12.6, False)])
def test_grace_is_weighed_against_the_save(seconds: float | None, works: bool | None) -> None:
    row = only(preempted("low", seconds), "GraceTime")
    assert row.works is works
    assert not row.fatal
    assert ("not measured yet" in row.detail) is (seconds is None)
    assert ("checkpoint.every=1ep" in row.detail) is (works is False)


def test_the_signal_that_comes_is_said() -> None:
    assert "SIGTERM" in only(preempted("low", cluster={"SlurmctldParameters": "(null)"}), "signal").detail
    both = preempted("low", cluster={"SlurmctldParameters": "idle_on_node_suspend,preempt_send_user_signal"})
    assert "SIGUSR2" in only(both, "signal").detail
    assert "SIGTERM at once" in only(preempted("low", GraceTime="0"), "signal").detail


def test_what_holds_for_the_cluster() -> None:
    rows = list(cluster_rows(config, save(4.0)))
    assert only(rows, "KillWait").works is True
    assert "15 s" in only(rows, "dead nodes").detail
    rows = list(cluster_rows({**config, "JobRequeue": "0", "SlurmdTimeout": "0 sec"}, save(6.0)))
    assert only(rows, "KillWait").works is False
    assert only(rows, "dead nodes").works is False
    assert "--requeue" in only(rows, "JobRequeue").detail
    assert not any(row.fatal for row in rows)


@pytest.mark.parametrize(
    ("time_min", "seconds", "works", "fatal"),
    [
        (None, 100.0, True, False),  # the default of one hour
        (60, None, None, False),
        (1, 0.3, True, False),  # a small model gets on in a minute
        (5, 100.0, False, True),
        (6, 100.0, True, False),
        (10080, 1.0, True, False),
        (10081, 1.0, False, True),
    ],
)
def test_time_limits(time_min: int | None, seconds: float | None, works: bool | None, fatal: bool) -> None:
    time = None if seconds is None else save(seconds)
    row = only(list(time_rows(partitions["xc"], options(time_min=time_min), time, config)), "time limit")
    assert (row.works, row.fatal) == (works, fatal)
    if time_min == 10081:
        assert "7-00:00:00" in row.detail


def test_no_limit_at_all() -> None:
    row = only(list(time_rows(partitions["low"], options(), save(1e5), config)), "time limit")
    assert row.works is True
    assert "UNLIMITED" in row.detail


@pytest.mark.parametrize(("enforced", "fatal"), [("NO", False), ("ALL", True)])
def test_a_qos_may_lift_the_limit(enforced: str, fatal: bool) -> None:
    rows = time_rows(partitions["xc"], options(time_min=20000, qos="long"), None, {"EnforcePartLimits": enforced})
    assert only(list(rows), "time limit").fatal is fatal


@pytest.mark.parametrize(
    ("nodes", "works", "fatal"), [("1", True, False), ("2", False, False), ("1-5", True, False), ("3", False, True)]
)
def test_nodes_that_there_are(nodes: str, works: bool, fatal: bool) -> None:
    rows = list(node_rows(partitions["low"], options(nodes), parse_nodes(NODES)["low"]))
    row = only(rows, "nodes")
    assert (row.works, row.fatal) == (works, fatal)
    assert "2 nodes, 1 of them up" in row.detail


def test_nodes_that_a_partition_allows() -> None:
    nodes = parse_nodes(NODES)["low"]
    most = [row for row in node_rows(partitions["xc"], options("2"), nodes) if "MaxNodes" in row.detail]
    assert [row.fatal for row in most] == [True]
    fewest = [row for row in node_rows({**partitions["low"], "MinNodes": "2"}, options("1"), nodes) if row.fatal]
    assert ["MinNodes" in row.detail for row in fewest] == [True]
    (down,) = (
        row for row in node_rows({**partitions["low"], "State": "DRAIN"}, options(), nodes) if "DRAIN" in row.detail
    )
    assert down.works is False


@pytest.mark.parametrize(
    ("asked", "works", "fatal"), [(0, None, False), (4, True, False), (8, True, False), (9, False, True)]
)
def test_gpus_that_there_are(asked: int, works: bool | None, fatal: bool) -> None:
    nodes = [Node(name="n0", state="idle", gpus=4), Node(name="n1", state="idle", gpus=8)]
    row = only(list(node_rows(partitions["low"], options(gpus_per_node=asked), nodes)), "GPUs")
    assert (row.works, row.fatal) == (works, fatal)


def test_save_time_is_the_newest_measured(tmp_path: Path) -> None:
    assert measured_save(tmp_path / "none") is None
    rows = [{"event": "save", "seconds": 3.0}, {"event": "start"}, {"event": "save", "seconds": 2.5}]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measured_save(tmp_path) == SaveTime(seconds=2.5, source="ledger.jsonl")
    for step, saved in ((10, 1.5), (20, None)):  # the first save has nothing measured to write
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"save_s": saved}))
    assert measured_save(tmp_path) == SaveTime(seconds=1.5, source="step-00000010")


@pytest.mark.parametrize(
    ("before_s", "theirs_s", "after_s", "expected_s"),
    [(10.0, 10.2, 10.5, 0.0), (10.0, 13.5, 10.5, 3.0), (10.0, 7.0, 10.5, -3.0), (10.0, 10.0, 10.0, 0.0)],
)
def test_skew_is_what_the_round_trip_cannot_explain(
    before_s: float, theirs_s: float, after_s: float, expected_s: float
) -> None:
    assert skew(before_s, theirs_s, after_s) == expected_s


@pytest.mark.parametrize(
    "cannot", [None, "read: No such file or directory", "write: Read-only file system", "share: x"]
)
def test_a_folder_that_nodes_cannot_use_is_the_end(cannot: str | None, tmp_path: Path) -> None:
    row = only(probe_rows(Probed(node="n1", skew_s=0.0, cannot=cannot), tmp_path), "run folder")
    assert row.fatal is (cannot is not None)
    assert "n1" in row.detail


@pytest.mark.parametrize(("skew_s", "works"), [(1.9, True), (2.1, False), (-2.1, False)])
def test_a_wrong_clock_is_a_warning(skew_s: float, works: bool) -> None:
    (row,) = probe_rows(Probed(node="n1", skew_s=skew_s, cannot=None), None)
    assert (row.works, row.fatal) == (works, False)
    assert works or ("ahead" in row.detail) is (skew_s > 0)


def test_the_first_fatal_finding_refuses() -> None:
    rows = [Finding(what="a", works=False, detail="a warning")]
    refuse_fatal(rows)
    with pytest.raises(UserError, match=r"^the end$"):
        refuse_fatal([*rows, Finding(what="b", works=False, detail="the end", fatal=True)])


def test_without_slurm_there_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for rows in (
        check_cluster(options(), None, probe=True),
        check_submission(Config(), options(), tmp_path, probe=False),
    ):
        (row,) = rows
        assert row.fatal
        assert "scontrol is not on the PATH" in row.detail


LOCAL = "while [[ $1 == -* ]]; do shift; done\nours=$6; theirs=$7\n"
"""Of a stand-in for srun that runs the command here: `<python> -I -u -c <program> <ours> <theirs> <nonce>`."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    for name, script in {"scancel": f"echo $* >> {tmp_path}/cancelled", **commands}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("before", "cannot"),
    [
        ("echo welcome to this site", None),
        ('mv "$ours" "$ours.gone"; trap \'rm "$ours.gone"\' EXIT', "read: No such file or directory"),
        ('echo other > "$ours"', "read: other content than was written"),
        ('touch "$theirs"', "write: File exists"),
    ],
)
@pytest.mark.distributed
def test_the_probe_tells_what_fails_and_leaves_no_file(
    before: str, cannot: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, srun=f'{LOCAL}{before}\n"$@"')
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    probed = ask_node(folder, ["--partition=low"])
    assert (probed.cannot, probed.skew_s) == (cannot, 0.0)
    assert os.listdir(folder) == []
    assert not (tmp_path / "cancelled").exists()


@pytest.mark.parametrize(
    ("srun", "words"),
    [
        ("echo srun: error: Requested nodes are busy >&2; exit 1", "Requested nodes are busy"),
        ("exec sleep 100", "no answer within"),
        (f'{LOCAL}"$1" -c "print({"dino-dist-probe {"!r})"', "broke off"),
        ("exit 0", "without a word"),
    ],
)
@pytest.mark.distributed
def test_a_probe_that_fails_says_why_and_leaves_no_job(
    srun: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, srun=srun)
    with pytest.raises(NotProbed, match=words):
        ask_node(folder, wait_s=1, timeout_s=0, python=sys.executable)
    assert os.listdir(folder) == []
    if "sleep" in srun:
        assert "--name=dino-preflight-" in (tmp_path / "cancelled").read_text()


@pytest.mark.distributed
def test_a_hidden_environment_starts_no_step_of_a_job(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, srun=f"env > {tmp_path}/seen; exit 1")
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CONF", "SLURM_ACCOUNT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(NotProbed):
        ask_node(None)
    seen = {line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert {name for name in seen if name.startswith("SLURM_")} == {"SLURM_CONF", "SLURM_ACCOUNT"}
