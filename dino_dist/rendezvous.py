"""How the ranks of one start find each other: rank 0 chooses a free port and publishes it, all answer a roll call.

A port that is computed (from the job's number, say) may be in use, and is the same after a requeue. A port that the
kernel chose is free; the file that names it carries the start it belongs to, so an old one misleads nobody.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dino_dist.errors import FailedTogether, RunFailed, UserError
from dino_dist.polling import Poll, nothing_to_poll

_log = logging.getLogger(__name__)

_POLL_S = 0.1
_CONNECT_TRY_S = 10.0
_REMIND_AFTER_S = 30.0
_ROLL_CALL = "roll_call"


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the ranks of one start meet."""

    rank: int
    size: int
    host: str
    """The name that this rank's node goes by, for messages."""
    address: str = ""
    """Of rank 0; known to it alone where a file tells the others."""
    port: int = 0
    """0: rank 0 takes a free one."""
    listen_fd: int | None = None
    """On rank 0: a socket that listens on the port already."""
    serve: bool = True
    """False where somebody else serves the store."""
    file: Path | None = None
    """Through which rank 0 tells the others where it is; None: all know `address` and `port`."""
    key: str = ""
    """What tells this start from all others, in the file."""
    prefix: str = ""
    """Of all keys, where somebody else's store outlives a start."""
    expected_hosts: tuple[str, ...] = ()
    """Nodes that ranks were started on, where that is known."""


@dataclass(frozen=True, kw_only=True)
class Met:
    """What the ranks of a start share once all are there."""

    address: str
    """Of the store, as this rank reaches it."""
    store: Store
    connect: Callable[[], Store]
    """Makes a connection of its own to the store: one that is in a call is locked."""


def meet(meeting: Meeting, *, timeout_s: float, store_timeout_s: float, poll: Poll = nothing_to_poll) -> Met:
    """Join the other ranks; returns once all are there.

    `poll` is called while waiting and may raise. `RunFailed` after `timeout_s` names the ranks that did not come and
    the nodes nothing was heard from; `UserError` if the file cannot be written or a given port cannot be served.
    """
    deadline = time.monotonic() + timeout_s
    store_timeout = timedelta(seconds=store_timeout_s)
    if meeting.rank == 0 and meeting.serve:
        first, address, port = _serve(meeting, store_timeout)
    else:
        first, address, port = _connect(meeting, deadline, store_timeout, poll)

    def prefixed(store: TCPStore) -> Store:
        return PrefixStore(meeting.prefix, store) if meeting.prefix else store

    def connect() -> Store:
        return prefixed(TCPStore(address, port, None, False, store_timeout, wait_for_workers=False))

    store = prefixed(first)
    _roll_call(meeting, store, deadline, timeout_s, poll)
    return Met(address=address, store=store, connect=connect)


def _serve(meeting: Meeting, store_timeout: timedelta) -> tuple[TCPStore, str, int]:
    descriptor, port = meeting.listen_fd, meeting.port
    if descriptor is None and not port:
        listener = socket.create_server(("", 0), backlog=max(128, 2 * meeting.size))
        port = int(listener.getsockname()[1])
        descriptor = listener.detach()  # the store owns it from here
    address = meeting.address or "127.0.0.1"
    try:
        store = TCPStore(address, port, None, True, store_timeout, wait_for_workers=False, master_listen_fd=descriptor)
    except DistError as error:
        raise UserError(
            f"MASTER_PORT={port} cannot be served on {meeting.host} ({str(error).splitlines()[0][:99]}): choose another"
        ) from error
    if meeting.file is not None:
        publish(meeting.file, {"start": meeting.key, "address": address, "port": port, "host": meeting.host})
    return store, address, port


def publish(file: Path, content: dict[str, Any]) -> None:
    """Put `content` into `file`, whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise UserError(
            f"run.dir={file.parent}: cannot write there ({error.strerror}): choose a folder that you may write to"
        ) from error


def _connect(meeting: Meeting, deadline: float, store_timeout: timedelta, poll: Poll) -> tuple[TCPStore, str, int]:
    last = f"rank 0 has not said in {meeting.file} where it is" if meeting.file else "no try yet"
    while time.monotonic() < deadline:
        poll()
        place = _published(meeting) if meeting.file is not None else (meeting.address, meeting.port)
        if place is not None:
            try_s = timedelta(seconds=max(min(_CONNECT_TRY_S, deadline - time.monotonic()), 1.0))
            try:
                store = TCPStore(*place, None, False, try_s, wait_for_workers=False)
                store.set_timeout(store_timeout)
                return store, *place
            except (DistError, RuntimeError) as error:
                last = f"{place[0]}:{place[1]} does not answer ({str(error).splitlines()[0][:120]})"
        time.sleep(_POLL_S)
    raise RunFailed(
        f"rank {meeting.rank} on {meeting.host} could not join: {last}: see what rank 0 says, and whether its node "
        "can be reached from here"
    )


def _published(meeting: Meeting) -> tuple[str, int] | None:
    assert meeting.file is not None
    try:
        os.listdir(meeting.file.parent)  # a network file system then looks again for what it thinks it knows
        content = json.loads(meeting.file.read_text(encoding="utf-8"))
        return (str(content["address"]), int(content["port"])) if content["start"] == meeting.key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _roll_call(meeting: Meeting, store: Store, deadline: float, timeout_s: float, poll: Poll) -> None:
    """All ranks return, or all raise: rank 0 counts and tells the others."""
    try:
        store.set(f"arrived/{meeting.rank}", meeting.host)
        if meeting.rank == 0:
            missing = _wait_for_all(meeting, store, deadline, poll)
            store.set(_ROLL_CALL, _absentees(meeting, store, missing, timeout_s))
        while not store.check([_ROLL_CALL]):
            poll()
            if time.monotonic() > deadline + _CONNECT_TRY_S:
                raise RunFailed(f"rank {meeting.rank} on {meeting.host} waits for rank 0, which does not answer")
            time.sleep(_POLL_S)
        verdict = store.get(_ROLL_CALL).decode()
        if verdict:
            _dismiss(meeting, store)
    except DistError as error:
        raise RunFailed(f"rank {meeting.rank} lost rank 0 while the others gathered ({error})") from error
    if verdict:
        raise FailedTogether(verdict)


def _dismiss(meeting: Meeting, store: Store) -> None:
    """Where the roll call failed: rank 0, whose process serves the store, leaves last."""
    store.set(f"dismissed/{meeting.rank}", "")
    if meeting.rank:
        return
    present = [rank for rank in range(meeting.size) if store.check([f"arrived/{rank}"])]
    patience_end = time.monotonic() + _CONNECT_TRY_S
    while not store.check([f"dismissed/{rank}" for rank in present]) and time.monotonic() < patience_end:
        time.sleep(_POLL_S)
    time.sleep(_POLL_S)  # their last call is answered


def _wait_for_all(meeting: Meeting, store: Store, deadline: float, poll: Poll) -> list[int]:
    """Ranks that have not come before the deadline."""
    missing = list(range(meeting.size))
    remind_at = time.monotonic() + _REMIND_AFTER_S
    while True:
        missing = [rank for rank in missing if not store.check([f"arrived/{rank}"])]
        now = time.monotonic()
        if not missing or now > deadline:
            return missing
        if now > remind_at:
            remind_at = now + _REMIND_AFTER_S
            _log.warning("still waiting for %s of %d", _named(missing), meeting.size)
        poll()
        time.sleep(_POLL_S)


def _absentees(meeting: Meeting, store: Store, missing: list[int], timeout_s: float) -> str:
    if not missing:
        return ""
    here = {store.get(f"arrived/{rank}").decode() for rank in range(meeting.size) if rank not in set(missing)}
    silent = [host for host in meeting.expected_hosts if host not in here]
    nodes = f"; nothing was heard from {', '.join(silent)}" if silent else ""
    return (
        f"{_named(missing)} of {meeting.size} did not come within {timeout_s:g} s{nodes}: see their logs, and whether "
        "rank 0's node can be reached from there"
    )


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
