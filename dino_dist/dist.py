"""The world a process runs in: rank, device, collectives between ranks. RANK and SLURM_* are read here."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from dino_dist.errors import StopAsked, UserError, for_rank
from dino_dist.network_defaults import network_defaults
from dino_dist.polling import Poll, nothing_to_poll
from dino_dist.rendezvous import Meeting, Met, meet
from dino_dist.slurm import SlurmError, expand, node_address, own_job_id

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ProcessEnvironment:
    """What the starter of this process says of it: torchrun, `dino-dist train --nproc`, srun, or nobody (one rank)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = field(default_factory=socket.gethostname)
    """The name of this node: Slurm's where Slurm started the process."""
    master_addr: str = "127.0.0.1"
    """Of rank 0; under srun the other ranks leave it empty and read it from the run folder."""
    master_port: int = 0
    """0: rank 0 takes a free one; in a world of one there is no rendezvous at all."""
    start: str = ""
    """Names this start of a Slurm job among all others; empty where the starter gave address and port."""
    nodelist: str = ""
    """The nodes of the Slurm step, in Slurm's short form."""
    master_listen_fd: int | None = None
    """On rank 0: a socket that already listens on the port, if the starter made one."""
    serve_store: bool = True
    """False where torchrun itself serves the rendezvous."""
    store_prefix: str = ""
    """Under torchrun, whose store outlives its restarts: what tells them apart."""
    devices_may_be_masked: bool = False
    """True under srun, which may show each task its own GPU alone."""
    job_id: str | None = None
    """Of the Slurm job."""
    restarts: int | None = None
    """How often Slurm has requeued the job."""

    @staticmethod
    def read(environ: Mapping[str, str] = os.environ) -> ProcessEnvironment:
        """The environment of this process; `UserError` if a starter set only some of its variables, or no numbers."""
        try:
            return ProcessEnvironment._read(environ)
        except SlurmError as error:
            raise UserError(f"cannot ask Slurm for this node's address ({error}): set MASTER_ADDR to it") from None
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
                store_prefix=_torchrun_start(environ),
                **_slurm_job(environ),
            )
        if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            return ProcessEnvironment(
                rank=int(environ["SLURM_PROCID"]),
                size=int(environ["SLURM_STEP_NUM_TASKS"]),
                local_rank=int(environ["SLURM_LOCALID"]),
                local_size=_slurm_tasks_on_this_node(environ),
                devices_may_be_masked=True,
                **_slurm_meeting(environ),
                **_slurm_job(environ),
            )
        return ProcessEnvironment(**_slurm_job(environ))


def _torchrun_start(environ: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RESTART_COUNT" not in environ:
        return ""
    return f"dino_dist/{environ.get('TORCHELASTIC_RUN_ID', '')}/{environ['TORCHELASTIC_RESTART_COUNT']}"


def _slurm_job(environ: Mapping[str, str]) -> dict[str, Any]:
    """The job that this process belongs to, if any: a requeue of it may take the run folder over."""
    job_id = own_job_id(environ)
    if job_id is None:
        return {}
    node = {"host": environ["SLURMD_NODENAME"]} if "SLURMD_NODENAME" in environ else {}
    return {"job_id": job_id, "restarts": int(environ.get("SLURM_RESTART_COUNT", "0")), **node}


def _slurm_meeting(environ: Mapping[str, str]) -> dict[str, Any]:
    """Where the ranks of a step meet: as the user says, else through the run folder at an address that rank 0 knows."""
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return {"master_addr": environ["MASTER_ADDR"], "master_port": int(environ["MASTER_PORT"])}
    address = ""
    if environ["SLURM_PROCID"] == "0":  # the others read it: a thousand questions at once are hard on a controller
        address = environ.get("MASTER_ADDR") or node_address(environ["SLURMD_NODENAME"])
    parts = (environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"], environ.get("SLURM_RESTART_COUNT", "0"))
    return {"master_addr": address, "start": ".".join(parts), "nodelist": environ["SLURM_STEP_NODELIST"]}


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
    """The name of this rank's node."""
    connect_store: Callable[[], Store] = HashStore
    """Opens a connection of its own to the ranks' key-value store, for a thread: a store is locked during a call."""

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
        """Let rank 0 act and give all ranks its result.

        Its `UserError` becomes one of all ranks, said by rank 0; its `StopAsked` is raised on all of them.
        """
        problem: UserError | None = None
        stop_word, result = 0, None
        if self.is_first:
            try:
                result = action()
            except UserError as error:
                problem = error
            except StopAsked as asked:
                stop_word = asked.word
        problem, stop_word, result = self.broadcast((problem, stop_word, result))
        if problem is not None:
            raise for_rank(problem, is_first=self.is_first)
        if stop_word:
            raise StopAsked(stop_word)
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
    environment: ProcessEnvironment,
    *,
    timeout_s: float,
    join_timeout_s: float = 300.0,
    run_dir: Path | None = None,
    device: str = "auto",
    deterministic: bool = False,
    poll: Poll = nothing_to_poll,
) -> Iterator[World]:
    """Join the other ranks, yield this rank's `World`, leave again.

    `device`: `cpu`, `cuda`, or `auto` for CUDA where there is one. A long `timeout_s` suits the start (indexing,
    compiling); `set_timeout` cuts it after the first step. CUDA ranks get gloo beside NCCL for CPU tensors.
    `run_dir`: through which ranks that srun started find each other, and where NCCL's flight records go. `poll` is
    called while others are waited for, and may raise. `RunFailed` names the ranks missing after `join_timeout_s`.
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
    if environment.size > 1:
        met = meet(_meeting(environment, run_dir), timeout_s=join_timeout_s, store_timeout_s=timeout_s, poll=poll)
    else:
        alone = HashStore()
        met = Met(address="127.0.0.1", store=alone, connect=lambda: alone)
    trace_folder = None if run_dir is None else run_dir / "logs"
    for default in network_defaults(interface=_interface_towards(met.address), trace_folder=trace_folder):
        os.environ.setdefault(default.name, default.value)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend, store=met.store, rank=environment.rank, world_size=environment.size, timeout=timeout
    )
    try:
        yield World(
            rank=environment.rank,
            size=environment.size,
            local_rank=environment.local_rank,
            local_size=environment.local_size,
            device=torch_device,
            host=environment.host,
            connect_store=met.connect,
        )
    finally:
        dist.destroy_process_group()


def _meeting(environment: ProcessEnvironment, run_dir: Path | None) -> Meeting:
    if environment.start and run_dir is None:
        raise ValueError("ranks that srun started meet through a folder: give run_dir")
    return Meeting(
        rank=environment.rank,
        size=environment.size,
        host=environment.host,
        address=environment.master_addr,
        port=environment.master_port,
        listen_fd=environment.master_listen_fd,
        serve=environment.serve_store,
        file=run_dir / "rendezvous.json" if environment.start and run_dir is not None else None,
        key=environment.start,
        prefix=environment.store_prefix,
        expected_hosts=_nodes(environment) if environment.rank == 0 else (),
    )


def _nodes(environment: ProcessEnvironment) -> tuple[str, ...]:
    """Only for a message: without Slurm's help it names no nodes."""
    try:
        return tuple(expand(environment.nodelist)) if environment.nodelist else ()
    except SlurmError:
        return ()


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
