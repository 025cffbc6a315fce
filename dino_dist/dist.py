"""The world a process runs in: rank, device, collectives between ranks. RANK and SLURM_* are read here."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from dino_dist.errors import SaidByRankZero, UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ProcessEnvironment:
    """What the starter of this process says of it: torchrun, `dino-dist train --nproc`, srun, or nobody (one rank)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0: no rendezvous, a single process."""
    master_listen_fd: int | None = None
    """On rank 0: a socket that already listens on the port, if the starter made one."""
    serve_store: bool = True
    """False where torchrun itself serves the rendezvous."""
    devices_may_be_masked: bool = False
    """True under srun, which may show each task its own GPU alone."""
    job_id: str | None = None
    """Of the Slurm job."""
    restarts: int | None = None
    """How often Slurm has requeued the job."""
    deadline_s: float | None = None
    """When the job will be killed, on the clock of `time.monotonic()`."""

    @staticmethod
    def read(environ: Mapping[str, str] = os.environ) -> ProcessEnvironment:
        """The environment of this process; `UserError` if a starter set only some of its variables, or no numbers."""
        try:
            return ProcessEnvironment._read(environ)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"cannot ask Slurm for the first node's address ({error}): set MASTER_ADDR to it") from None
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"the variables of torchrun or srun are incomplete ({type(error).__name__}: {error}): unset RANK and "
                "WORLD_SIZE, or start with torchrun, srun or --nproc"
            ) from None

    @staticmethod
    def _read(environ: Mapping[str, str]) -> ProcessEnvironment:
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return ProcessEnvironment(
                rank=int(environ["RANK"]),
                size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", "0")),
                local_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
                master_addr=_required(environ, "MASTER_ADDR"),
                master_port=int(_required(environ, "MASTER_PORT")),
                master_listen_fd=int(environ["MASTER_LISTEN_FD"]) if "MASTER_LISTEN_FD" in environ else None,
                serve_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
                **_slurm_job(environ),
            )
        if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            return ProcessEnvironment(
                rank=int(environ["SLURM_PROCID"]),
                size=int(environ["SLURM_STEP_NUM_TASKS"]),
                local_rank=int(environ["SLURM_LOCALID"]),
                local_size=_slurm_tasks_on_this_node(environ),
                master_addr=environ.get("MASTER_ADDR") or _slurm_first_node_address(environ["SLURM_STEP_NODELIST"]),
                master_port=int(environ.get("MASTER_PORT") or _slurm_port(environ)),
                devices_may_be_masked=True,
                **_slurm_job(environ),
            )
        return ProcessEnvironment(**_slurm_job(environ))


def _slurm_job(environ: Mapping[str, str]) -> dict[str, Any]:
    """The job that this process belongs to, if any: a requeue of it may take the run folder over."""
    if "SLURM_JOB_ID" not in environ:
        return {}
    end_s = environ.get("SLURM_JOB_END_TIME")
    return {
        "job_id": environ["SLURM_JOB_ID"],
        "restarts": int(environ.get("SLURM_RESTART_COUNT", "0")),
        "deadline_s": None if end_s is None else time.monotonic() + float(end_s) - time.time(),
    }


def _required(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise UserError(f"RANK and WORLD_SIZE are set but {name} is not: start with torchrun, srun or --nproc")
    return environ[name]


def _slurm_tasks_on_this_node(environ: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE reads like `2(x3),1`: two tasks on each of three nodes, one on the fourth."""
    counts: list[int] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * (int(repeat.rstrip(")")) if repeat else 1)
    return counts[int(environ["SLURM_NODEID"])]


def _slurm_first_node_address(nodelist: str) -> str:
    """NodeAddr of the step's first node: node names need not resolve."""
    names = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    first = names.stdout.split()[0]
    node = subprocess.run(["scontrol", "show", "node", first], capture_output=True, text=True, check=True)
    fields = dict(word.split("=", 1) for word in node.stdout.split() if "=" in word)
    return fields.get("NodeAddr", first)


def _slurm_port(environ: Mapping[str, str]) -> int:
    """The same on every rank, another one after each requeue, below the ephemeral ports (32768 on Linux)."""
    restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
    return 20000 + (int(environ["SLURM_JOB_ID"]) * 31 + int(environ["SLURM_STEP_ID"]) * 7 + restarts * 101) % 12000


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank among all ranks. Passed to whatever communicates; a world of one needs no process group.

    Reductions are over all ranks.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: str = ""

    @property
    def is_first(self) -> bool:
        """True on the rank that writes what is written once."""
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank; small objects of our own only, since they travel pickled between our ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first(self, action: Callable[[], T]) -> T:
        """Let rank 0 act and give all ranks its result; its `UserError` becomes one of all ranks, said by rank 0."""
        message, result = "", None
        if self.is_first:
            try:
                result = action()
            except UserError as error:
                message = str(error)
        message, result = self.broadcast((message, result))
        if message:
            raise UserError(message) if self.is_first else SaidByRankZero(message)
        return cast(T, result)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def barrier(self) -> None:
        """Return once all ranks have arrived."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_world(
    environment: ProcessEnvironment, *, timeout_s: float, device: str = "auto", deterministic: bool = False
) -> Iterator[World]:
    """Join the other ranks, yield this rank's `World`, leave again.

    `device`: `cpu`, `cuda`, or `auto` for CUDA where there is one. A long `timeout_s` suits the start (indexing,
    compiling); `set_timeout` cuts it after the first step. CUDA ranks get gloo beside NCCL for CPU tensors.
    """
    if deterministic:
        # cuBLAS reads it when its first handle is made, and torch's deterministic mode insists on it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no CUDA device here: use train.device=auto or cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    torch_device = torch.device("cuda", _cuda_index(environment)) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(torch_device)
    interface = _interface_towards(environment.master_addr)
    if interface is not None:
        # Left alone, gloo listens where the host's own name resolves to, which is loopback on many systems.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store: TCPStore | HashStore
    if environment.master_port:
        store = TCPStore(
            environment.master_addr,
            environment.master_port,
            environment.size,
            is_master=environment.rank == 0 and environment.serve_store,
            timeout=timeout,
            master_listen_fd=environment.master_listen_fd,
        )
    else:
        store = HashStore()
    dist.init_process_group(backend, store=store, rank=environment.rank, world_size=environment.size, timeout=timeout)
    try:
        yield World(
            rank=environment.rank,
            size=environment.size,
            local_rank=environment.local_rank,
            local_size=environment.local_size,
            device=torch_device,
            host=socket.gethostname(),
        )
    finally:
        dist.destroy_process_group()


def _cuda_index(environment: ProcessEnvironment) -> int:
    """The device of a local rank: its own where Slurm masks the others, else the one with its number."""
    visible = torch.cuda.device_count()
    if visible == 1 and environment.devices_may_be_masked:
        return 0
    if environment.local_rank >= visible:
        raise UserError(
            f"rank {environment.local_rank} of this machine has no GPU of its own ({visible} visible): start at most "
            f"{visible} ranks here, or use train.device=cpu"
        )
    return environment.local_rank


def _interface_towards(address: str) -> str | None:
    """The network interface that routes to another machine; None for this machine itself, or if none is found."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it only chooses a route
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return None
    names = [name for name, entries in psutil.net_if_addrs().items() if any(entry.address == own for entry in entries)]
    return names[0] if names else None


def set_timeout(timeout_s: float, groups: Iterable[dist.ProcessGroup] = ()) -> None:
    """From now on a collective of all ranks, or of `groups`, that waits longer than this fails.

    Long at the start (indexing, compiling), short after the first step, when a wait means a dead rank.
    """
    if dist.is_initialized():
        dist.set_timeout(timedelta(seconds=timeout_s))
    for group in groups:
        dist.set_timeout(timedelta(seconds=timeout_s), group)
