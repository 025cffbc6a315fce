"""`dino-dist doctor`: what works on this machine, what does not, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dino_dist.errors import UserError
from dino_dist.models.attention import choose_backend
from launch.job_options import JobOptions
from launch.preflight import check_cluster

_PACKAGES = (
    *("torch", "torchvision", "numpy", "pillow", "webdataset", "safetensors", "omegaconf", "tensorboard"),
    *("scikit-learn", "submitit", "fairscale", "xformers", "matplotlib", "fsspec"),
)

Finding = dict[str, Any]


def examine(*, slurm: JobOptions | None = None, run_dir: Path | None = None) -> list[Finding]:
    """Rows {what, works, detail}; `works` is null where it is a fact, not a test.

    `slurm`: also look at the cluster, for a job with these options, and ask a free node about `run_dir` and the time;
    these rows also say `fatal`, true for what keeps such a job from running at all.
    """
    findings = [_fact("python", platform.python_version()), _fact("machine", platform.platform())]
    findings += [_package(name) for name in _PACKAGES]
    findings += [
        _fact("cpu cores", str(len(os.sched_getaffinity(0)))),
        _fact("memory", _gib(psutil.virtual_memory().total)),
    ]
    findings += _gpus()
    findings += [_attention(name) for name in ("explicit", "sdpa", "xformers")]
    findings.append(_test("gloo (CPU collectives)", dist.is_gloo_available(), "built into torch"))
    nccl = dist.is_nccl_available() and torch.cuda.is_available()
    findings.append(_test("NCCL (GPU collectives)", nccl, "ready" if nccl else "needs a CUDA device"))
    if nccl and os.path.ismount("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        detail = f"{_gib(free)} free; NCCL's buffers between the GPUs of a node lie there (docker: --shm-size=1g)"
        findings.append(_test("/dev/shm", free >= 2**29, detail))
    if slurm is None:
        findings.append(_slurm())
    findings.append(_fact("free disk here", _gib(shutil.disk_usage(".").free)))
    if slurm is not None:
        findings += [asdict(row) for row in check_cluster(slurm, run_dir, probe=True)]
    return findings


def table(findings: list[Finding]) -> None:
    """Print the rows for a person."""
    rows = Table("", "what", "detail")
    marks = {True: "[green]ok[/green]", False: "[yellow]no[/yellow]", None: ""}
    for finding in findings:
        rows.add_row(marks[finding["works"]], escape(finding["what"]), escape(finding["detail"]))  # n[0-1] is no markup
    Console().print(rows)


def _package(name: str) -> Finding:
    try:
        return _test(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _test(name, False, "not installed")


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [_test("CUDA", False, "torch sees no CUDA device: training runs on the CPU")]
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        rows.append(_test(f"cuda:{index}", True, f"{device.name}, {_gib(device.total_memory)}, {bf16}"))
    return rows


def _attention(name: Any) -> Finding:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choice = choose_backend(name, device, dtype=torch.float32)
    except UserError as error:
        return _test(f"attention: {name}", False, str(error))
    return _test(f"attention: {name}", True, f"on {device.type} ({choice.reason})")


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return _test("Slurm", False, "sbatch is not on the PATH")
    answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30, check=False)
    return _test("Slurm", answer.returncode == 0, (answer.stdout or answer.stderr).strip().split("\n")[0])


def _fact(what: str, detail: str) -> Finding:
    return {"what": what, "works": None, "detail": detail}


def _test(what: str, works: bool, detail: str) -> Finding:
    return {"what": what, "works": works, "detail": detail}


def _gib(count_bytes: int) -> str:
    return f"{count_bytes / 2**30:.1f} GiB"
