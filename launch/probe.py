"""A look at the cluster from the inside: a few seconds of one free node tell if it shares a folder and our time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dino_dist.manifest import write_text
from dino_dist.slurm import SlurmError, run_slurm

_KEPT_SETTINGS: Final = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_ACCOUNT", "SLURM_PARTITION")
_SEEN_WITHIN_S: Final = 5.0
"""Network file systems show another machine's new file with a delay."""
_END_WITHIN_S: Final = 10.0
_MARK: Final = "dino-dist-probe "

# It creates a file only beside one that was made here: in a folder that is not shared it leaves nothing.
_PROGRAM: Final = f"""
import json, os, socket, sys, time
ours, theirs, nonce = sys.argv[1:]
reply = dict(node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(), problem=None)
try:
    if ours:
        reply["doing"] = "read"
        with open(ours) as file:
            if file.read() != nonce:
                raise OSError(0, "other content than was written")
        reply["doing"] = "write"
        with open(theirs, "x") as file:
            file.write(nonce)
            file.flush()
            os.fsync(file.fileno())
except OSError as error:
    reply["problem"] = error.strerror
print({_MARK!r} + json.dumps(reply), flush=True)
sys.stdin.readline()
print({_MARK!r} + json.dumps(time.time()), flush=True)
"""


class NotProbed(Exception):
    """No node could be asked; the message says why, in Slurm's words where it refused."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What one node of the cluster answered."""

    node: str
    skew_s: float
    """Its clock minus ours beyond the round trip; 0 if the two agree within it."""
    cannot: str | None
    """What it cannot do in the folder, with the reason (`read: ...`, `write: ...`, `share: ...`); None: nothing."""


def ask_node(
    folder: Path | None, options: Sequence[str] = (), *, wait_s: int = 5, timeout_s: float = 40.0, python: str = ""
) -> Probed:
    """Start a small program with `srun` on a node that is free within `wait_s` and let it write in `folder`.

    `options`: of srun, as in `--partition=low`. After `timeout_s` the program is ended and its job cancelled; no file
    and no job stays. `python`: the interpreter there, by default the path of this one. Raises `NotProbed`, or `OSError`
    if this machine itself cannot write in the folder.
    """
    nonce = secrets.token_hex(8)
    name = f"dino-preflight-{nonce}"
    files = [] if folder is None else [folder / f".{name}.{side}" for side in ("here", "there")]
    command = [
        *("srun", "--quiet", f"--job-name={name}", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=100M"),
        *("--time=1", f"--immediate={wait_s}", "--mpi=none", "--chdir=/", *options),
        *(python or sys.executable, "-I", "-u", "-c", _PROGRAM, *(map(str, files) if files else ("", "")), nonce),
    ]
    try:
        if files:
            write_text(files[0], nonce)
        reply, skew_s = asyncio.run(_Conversation(command, name).hold(timeout_s=wait_s + timeout_s))
        cannot = f"{reply['doing']}: {reply['problem']}" if reply["problem"] else None
        if files and cannot is None and not _appears(files[1], nonce):
            cannot = f"share: this machine does not see its file within {_SEEN_WITHIN_S:g} s"
        return Probed(node=reply["node"], skew_s=skew_s, cannot=cannot)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def skew(before_s: float, theirs_s: float, after_s: float) -> float:
    """How far a clock that was read between two readings of ours is ahead (negative: behind) for certain, in s."""
    return max(0.0, theirs_s - after_s) or min(0.0, theirs_s - before_s)


class _Conversation:
    """One run of the program through srun."""

    def __init__(self, command: list[str], job_name: str) -> None:
        self._command = command
        self._job_name = job_name

    async def hold(self, *, timeout_s: float) -> tuple[dict[str, Any], float]:
        """What the node replied, and the skew of its clock in s."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=_environment()
            )
        except OSError as error:
            raise NotProbed(f"srun cannot be run ({error.strerror})") from None
        assert process.stdin is not None
        try:
            async with asyncio.timeout(timeout_s):
                reply = json.loads(await self._marked_line(process))
                before_s = time.time()
                process.stdin.write(b"\n")
                await process.stdin.drain()
                theirs_s = json.loads(await self._marked_line(process))
                skew_s = skew(before_s, theirs_s, time.time())
                process.stdin.close()
                await process.wait()
        except TimeoutError:
            raise NotProbed(f"srun gave no answer within {timeout_s:g} s") from None
        except (ValueError, ConnectionError) as error:
            raise NotProbed(f"srun broke off ({error})") from None
        finally:
            await self._end(process)
        return reply, skew_s

    async def _marked_line(self, process: Process) -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        while line := (await process.stdout.readline()).decode(errors="replace"):
            if line.startswith(_MARK):  # a site's prologue may print too
                return line.removeprefix(_MARK)
        words = " ".join((await process.stderr.read()).decode(errors="replace").split())
        raise NotProbed(words or "srun ended without a word")

    async def _end(self, process: Process) -> None:
        """Whatever happened, neither srun nor its job is left."""
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_WITHIN_S)
        if process.returncode is None:
            process.kill()
            await process.wait()
        if process.returncode:
            with contextlib.suppress(SlurmError):  # then the limit of one minute ends it
                run_slurm("scancel", "--quiet", f"--name={self._job_name}")


def _environment() -> dict[str, str]:
    """Without the marks of a job that this may run in: there srun would start a step of that job."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key in _KEPT_SETTINGS}


def _appears(file: Path, content: str) -> bool:
    until_s = time.monotonic() + _SEEN_WITHIN_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            if file.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > until_s:
            return False
        time.sleep(0.1)
