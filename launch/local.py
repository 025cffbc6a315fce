"""N ranks of one command on this machine: they share a rendezvous, signals and their end."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from dino_dist.errors import UserError

_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_PEER_GRACE_S = 20.0
"""How long the other ranks may go on after one has died: they save nothing any more, but may still say why."""


def run_ranks(command: Sequence[str], num_ranks: int) -> int:
    """Run `command` as `num_ranks` ranks and return one exit code for all; the first rank that fails decides.

    The ranks die with this process, even if it is killed. SIGTERM, SIGINT and SIGUSR2 are passed on to every rank; the
    ranks start with them blocked, and are to unblock them once they catch them.
    """
    if num_ranks < 1:
        raise UserError(f"--nproc {num_ranks}: give at least 1")
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    # Held back here until they can be passed on, and in the ranks, which inherit it, until they can save.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        # Bound here and handed to rank 0, so that no other process can take the port in between.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            for rank in range(num_ranks):
                ranks.append(_start(command, rank, num_ranks, port, listener))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _wait(ranks)
    finally:
        for started in ranks:
            if started.poll() is None:
                started.kill()
            started.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(
    command: Sequence[str], rank: int, num_ranks: int, port: int, listener: socket.socket
) -> subprocess.Popen[bytes]:
    environment = dict(
        os.environ,
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if rank == 0:
        environment["MASTER_LISTEN_FD"] = str(listener.fileno())
    launcher = os.getpid()

    def die_with_launcher() -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the line above
            os._exit(1)

    return subprocess.Popen(
        command,
        env=environment,
        pass_fds=(listener.fileno(),) if rank == 0 else (),
        # A session of their own: Ctrl-C reaches the ranks once, through this process.
        start_new_session=True,
        preexec_fn=die_with_launcher if sys.platform == "linux" else None,
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all ranks; once one fails the others get a little time to fail by themselves, with their own words."""
    first_failure, deadline = 0, float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        for index, code in enumerate(codes):
            if code not in (None, 0, 3) and not first_failure:
                assert code is not None
                first_failure = code if code > 0 else 128 - code
                deadline = time.monotonic() + _PEER_GRACE_S
                if code != 2:
                    _say(index, code, sum(other is None for other in codes))
        if all(code is not None for code in codes):
            return first_failure or max(code or 0 for code in codes)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)


def _say(index: int, code: int, still_running: int) -> None:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(f"rank {index} {how}; ending the {still_running} other ranks", file=sys.stderr)
