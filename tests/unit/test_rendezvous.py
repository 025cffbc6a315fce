"""Ranks find each other through a file that names a free port; who is missing is named on all of them."""

from __future__ import annotations

import json
import multiprocessing
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from dino_dist.errors import RunFailed, StopAsked, UserError
from dino_dist.rendezvous import Meeting, meet, publish

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 60.0


def _rank(meeting: Meeting, timeout_s: float, answers: Any) -> None:
    try:
        met = meet(meeting, timeout_s=timeout_s, store_timeout_s=30)
        store = met.store
        met.connect().set(f"from/{meeting.rank}", "second connection")
        store.wait([f"from/{rank}" for rank in range(meeting.size)])
        answers.put((meeting.rank, getattr(store, "port", meeting.port)))
        if meeting.rank == 0:  # which serves the others
            store.wait([f"bye/{rank}" for rank in range(1, meeting.size)])
        else:
            store.set(f"bye/{meeting.rank}", "")
    except (RunFailed, UserError) as error:
        answers.put((meeting.rank, f"{type(error).__name__}: {error}"))


def gather(meetings: list[Meeting], timeout_s: float = PATIENCE_S) -> dict[int, Any]:
    """What each rank came to: the port, or its error."""
    answers = FORK.Queue()
    processes = [FORK.Process(target=_rank, args=(meeting, timeout_s, answers), daemon=True) for meeting in meetings]
    for process in processes:
        process.start()
    result = dict(answers.get(timeout=PATIENCE_S) for _ in meetings)
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    return result


def by_file(folder: Path, rank: int, size: int, key: str = "12.0.0", **more: Any) -> Meeting:
    address = {"address": "127.0.0.1"} if rank == 0 else {}
    return Meeting(rank=rank, size=size, host=f"n{rank}", file=folder / "meet.json", key=key, **address, **more)


@pytest.mark.distributed
def test_ranks_meet_at_a_port_that_the_file_names(tmp_path: Path) -> None:
    """An old file does not mislead, nor does a listener on the port that it names."""
    with socket.create_server(("", 0)) as occupied:
        old = {"start": "12.0.0", "address": "127.0.0.1", "port": occupied.getsockname()[1]}
        (tmp_path / "meet.json").write_text(json.dumps(old))
        found = gather([by_file(tmp_path, rank, 3, key="12.0.1") for rank in (2, 1, 0)])
        assert set(found) == {0, 1, 2}
        assert len(set(found.values())) == 1
        assert found[0] != occupied.getsockname()[1]
    assert json.loads((tmp_path / "meet.json").read_text())["port"] == found[0]


@pytest.mark.distributed
@pytest.mark.parametrize("listen", [True, False])
def test_ranks_meet_where_the_starter_says(listen: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        fd = listener.detach() if listen else None
    meetings = [
        Meeting(rank=rank, size=2, host="n", address="127.0.0.1", port=port, listen_fd=None if rank else fd)
        for rank in range(2)
    ]
    assert gather(meetings) == {0: port, 1: port}


@pytest.mark.distributed
def test_missing_ranks_and_silent_nodes_are_named_on_all(tmp_path: Path) -> None:
    hosts = ("n0", "n1", "n2", "n3")
    present = [by_file(tmp_path, rank, 4, expected_hosts=hosts if rank == 0 else ()) for rank in (0, 2)]
    found = gather(present, timeout_s=2)
    for rank in (0, 2):
        assert found[rank].startswith("FailedTogether: ranks 1, 3 of 4 did not come within 2 s")
        assert "nothing was heard from n1, n3" in found[rank]


def test_a_rank_without_rank_zero_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="rank 1 on n1 could not join: rank 0 has not said"):
        meet(by_file(tmp_path, 1, 2), timeout_s=0.5, store_timeout_s=5)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    meeting = Meeting(rank=1, size=2, host="n1", address="127.0.0.1", port=port)
    with pytest.raises(RunFailed, match=f"127.0.0.1:{port} does not answer"):
        meet(meeting, timeout_s=0.5, store_timeout_s=5)


def test_a_port_in_use_that_the_user_chose_is_one_line() -> None:
    with socket.create_server(("", 0)) as occupied:
        port = occupied.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT={port}"):
            meet(Meeting(rank=0, size=2, host="n0", address="127.0.0.1", port=port), timeout_s=2, store_timeout_s=5)


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_can_be_interrupted(tmp_path: Path, rank: int) -> None:
    with pytest.raises(StopAsked):
        meet(by_file(tmp_path, rank, 2), timeout_s=PATIENCE_S, store_timeout_s=5, poll=_stop)


def _stop() -> None:
    raise StopAsked(1)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"start": "12.0.0"}', '{"start": "12.0.0", "address": 1}'])
def test_a_damaged_file_is_waited_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "meet.json").write_text(content)
    with pytest.raises(RunFailed, match="has not said"):
        meet(by_file(tmp_path, 1, 2), timeout_s=0.3, store_timeout_s=5)


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        publish(tmp_path / "file" / "meet.json", {})


def test_a_world_of_one_needs_nobody(tmp_path: Path) -> None:
    met = meet(by_file(tmp_path, 0, 1), timeout_s=5, store_timeout_s=5)
    met.store.set("a", "b")
    assert met.connect().get("a") == b"b"


@pytest.mark.distributed
def test_a_store_that_outlives_a_start_does_not_mix_them() -> None:
    """torchrun's: ranks of its restart must not take the roll call of the ones before for theirs."""
    server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    place = {"address": "127.0.0.1", "port": server.port, "serve": False, "host": "n"}
    for start in ("0", "1"):
        assert gather([Meeting(rank=rank, size=2, prefix=start, **place) for rank in range(2)]).keys() == {0, 1}
    found = gather([Meeting(rank=0, size=2, prefix="2", **place)], timeout_s=1)
    assert "rank 1 of 2 did not come" in found[0]
