"""Indexing: what is indexed again, where indexes are kept, and what an interruption leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dino_dist.data.shards.folder_index import IndexJob, index_folder
from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import StopAsked, UserError


def test_only_changed_shards_are_indexed_again(
    write_tar: Callable[[Path, list[tuple[str, bytes]]], None], folder: Path, fallback: Path
) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    before = {path.name: path.stat().st_ino for path in folder.glob("*.npy")}
    open_dataset(str(folder), fallback_dir=fallback)
    assert {path.name: path.stat().st_ino for path in folder.glob("*.npy")} == before
    write_tar(folder / "001.tar", [("new.jpg", b"new"), ("new2.jpg", b"new")])
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    assert dataset.shard_counts.tolist() == [3, 2, 4]
    after = {path.name: path.stat().st_ino for path in folder.glob("*.npy")}
    assert [name for name in before if before[name] != after[name]] == ["001.tar.index.npy"]
    os.utime(folder / "000.tar", ns=(1, 1))  # same size, other time
    open_dataset(str(folder), fallback_dir=fallback)
    assert (folder / "000.tar.index.npy").stat().st_ino != before["000.tar.index.npy"]
    # Indexing one shard by itself forgets nothing of the others.
    write_tar(folder / "001.tar", [("new.jpg", b"newer!"), ("new2.jpg", b"new")])
    open_dataset(str(folder / "001.tar"), fallback_dir=fallback)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [row["name"] for row in manifest["shards"]] == ["000.tar", "001.tar", "002.tar"]
    (folder / "002.tar.index.npy").unlink()
    assert open_dataset(str(folder), fallback_dir=fallback).num_samples == 9
    assert not list(folder.glob("*tmp*"))


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder below the temporary one that every user may enter."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    yield root
    shutil.rmtree(root)


def _open_as_another_user(spec: str, fallback: Path, answer: Connection) -> None:
    if os.geteuid() == 0:  # for whom no folder is read-only
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        dataset = open_dataset(spec, fallback_dir=fallback)
        answer.send((dataset.hash, len(dataset.records(0))))
    except UserError as error:
        answer.send(str(error))


@pytest.mark.distributed
def test_a_read_only_folder_is_indexed_elsewhere(
    write_shards: Callable[[Path, list[int]], None], public_folder: Path
) -> None:
    shards, writable = public_folder / "shards", public_folder / "writable"
    write_shards(shards, [2, 3])
    writable.mkdir()
    writable.chmod(0o777)
    shards.chmod(0o555)
    context = multiprocessing.get_context("fork")
    answers = []
    for fallback in (writable, writable, shards):
        ours, theirs = context.Pipe()
        process = context.Process(target=_open_as_another_user, args=(str(shards), fallback, theirs))
        process.start()
        answers.append(ours.recv())
        process.join()
    assert not (shards / "manifest.json").exists()
    assert answers[0] == answers[1]
    assert answers[0][1] == 2
    assert "make one writable" in answers[2]
    shards.chmod(0o755)
    assert open_dataset(str(shards), fallback_dir=writable).hash == answers[0][0]


def test_an_interrupted_indexing_goes_on_where_it_was(folder: Path, fallback: Path) -> None:
    def stop_after(number: int) -> Callable[[], None]:
        left = iter(range(number))

        def poll() -> None:
            if next(left, None) is None:
                raise StopAsked(1)

        return poll

    with pytest.raises(StopAsked):
        open_dataset(str(folder), fallback_dir=fallback, poll=stop_after(1), num_threads=1)
    kept = json.loads((folder / "manifest.json").read_text())["shards"]
    assert [row["name"] for row in kept] == ["000.tar", "001.tar"]
    # Two of three are done, so one poll is all that is left.
    assert open_dataset(str(folder), fallback_dir=fallback, poll=stop_after(1)).num_samples == 8


def _index_and_die(folder: Path, after: int, save_every_s: float) -> None:
    left = iter(range(after - 1))

    def poll() -> None:
        if next(left, None) is None:
            os._exit(9)

    paths = sorted(folder.glob("*.tar"))
    index_folder(folder, paths, folder, IndexJob(1, poll, save_every_s=save_every_s))


@pytest.mark.distributed
@pytest.mark.parametrize(("save_every_s", "kept"), [(0.0, 2), (3600.0, 0)])
def test_a_process_that_dies_keeps_what_it_saved(folder: Path, fallback: Path, save_every_s: float, kept: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_index_and_die, args=(folder, 2, save_every_s))
    process.start()
    process.join()
    assert process.exitcode == 9
    polls: list[None] = []
    dataset = open_dataset(str(folder), fallback_dir=fallback, poll=lambda: polls.append(None))
    assert dataset.num_samples == 8
    assert len(polls) == 3 - kept
