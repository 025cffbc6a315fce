"""The loader: the same batches whoever reads them; workers outlive signals but not their rank; errors are a line."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_dist.data.decode import DecodeRules
from dino_dist.data.index import open_dataset
from dino_dist.data.loader import Batch, make_loader
from dino_dist.data.order import Order
from dino_dist.data.stream import SampleReader
from dino_dist.errors import UserError

COUNTS = [5, 3, 7, 4]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 images of different sizes, the eighth of them bad."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    number = 0
    for shard, count in enumerate(COUNTS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for _ in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (2 + number, 5, 3), dtype=np.uint8)).save(buffer, "PNG")
                for suffix, data in (("png", b"bad" if number == 7 else buffer.getvalue()), ("cls", b"%d" % number)):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    open_dataset(str(folder), fallback_dir=folder)
    return folder


def open_parts(shards: Path) -> tuple[SampleReader, Order]:
    dataset = open_dataset(str(shards), fallback_dir=shards)
    rules = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)
    return (
        SampleReader(dataset=dataset, rules=rules),
        Order(shard_counts=dataset.shard_counts, seed=3, shards_per_block=2),
    )


def describe(sample_ids: NDArray[np.int64], epochs: NDArray[np.int64], sizes: NDArray[np.int64]) -> dict[str, Tensor]:
    return {"code": torch.from_numpy(sample_ids * 1000 + epochs), "area": torch.from_numpy(sizes.prod(axis=1))}


def same(one: Batch, two: Batch) -> bool:
    tensors = ("pixels", "sizes", "sample_ids", "epochs", "labels")
    return (
        all(torch.equal(getattr(one, name), getattr(two, name)) for name in tensors)
        and (one.step, one.position, one.bad) == (two.step, two.position, two.bad)
        and one.extra.keys() == two.extra.keys()
        and all(torch.equal(one.extra[name], two.extra[name]) for name in one.extra)
    )


def test_a_batch_is_the_images_of_its_ids(shards: Path) -> None:
    reader, order = open_parts(shards)
    (batch,) = next(make_loader(reader, order, batch_size=19, rank=0, size=1, start_step=1, stop_step=2, num_workers=0))
    assert batch.step == 1
    assert batch.position == 19
    assert set(batch.epochs.tolist()) == {1}
    assert sorted(batch.sample_ids.tolist()) == list(range(19))
    offset = 0
    for (height, width), sample_id, label in zip(
        batch.sizes.tolist(), batch.sample_ids.tolist(), batch.labels.tolist(), strict=True
    ):
        sample = reader.read(sample_id)
        stored = batch.pixels[offset : offset + height * width * 3].reshape(height, width, 3)
        assert torch.equal(stored, torch.from_numpy(sample.pixels))
        assert label == sample.label
        offset += height * width * 3
    assert offset == len(batch.pixels)
    assert [record.sample_id for record in batch.bad] == [7]
    assert batch.decode_s > 0


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_micro_batches_join_to_the_whole(shards: Path, size: int, accumulate: int) -> None:
    reader, order = open_parts(shards)
    parts = [
        list(
            make_loader(
                *open_parts(shards),
                batch_size=8,
                rank=rank,
                size=size,
                accumulate=accumulate,
                start_step=2,
                stop_step=7,
                num_workers=0,
                describe=describe,
            )
        )
        for rank in range(size)
    ]
    for step in range(5):
        batches = [batch for rank in range(size) for batch in parts[rank][step]]
        assert len(batches) == size * accumulate
        assert max(b.num_images for b in batches) - min(b.num_images for b in batches) <= 2
        start = (step + 2) * 8
        assert batches[0].position == start
        epochs, ids = order.ids(start, start + 8)
        assert torch.cat([batch.sample_ids for batch in batches]).tolist() == ids.tolist()
        assert torch.cat([batch.extra["code"] for batch in batches]).tolist() == (ids * 1000 + epochs).tolist()
    assert reader.dataset.num_samples == 19


@pytest.mark.distributed
def test_workers_change_nothing(shards: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    results = [
        list(
            make_loader(
                *open_parts(shards),
                batch_size=6,
                rank=1,
                size=2,
                accumulate=2,
                start_step=1,
                stop_step=9,
                num_workers=num_workers,
                describe=describe,
            )
        )
        for num_workers in (0, 2)
    ]
    assert len(results[0]) == len(results[1]) == 8
    for ones, twos in zip(*results, strict=True):
        assert all(same(one, two) for one, two in zip(ones, twos, strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # the loader draws nothing from the process's generator


@pytest.mark.distributed
def test_closing_the_iterator_ends_its_workers(shards: Path) -> None:
    loader = make_loader(*open_parts(shards), batch_size=4, rank=0, size=1, start_step=0, stop_step=1000, num_workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) >= 2
    loader.close()
    assert multiprocessing.active_children() == []


@pytest.mark.distributed
def test_an_error_in_a_worker_stays_one_line(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        os.link(path, tmp_path / path.name)
    reader, order = open_parts(tmp_path)
    (tmp_path / "2.tar").unlink()
    loader = make_loader(reader, order, batch_size=19, rank=0, size=1, start_step=0, stop_step=3, num_workers=1)
    with pytest.raises(UserError, match=r"2\.tar: No such file") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_moving_a_batch_keeps_ids_and_sizes_here(shards: Path) -> None:
    (batch,) = next(
        make_loader(
            *open_parts(shards),
            batch_size=4,
            rank=0,
            size=1,
            start_step=0,
            stop_step=1,
            num_workers=0,
            describe=describe,
        )
    )
    moved = batch.to(torch.device("meta"))
    assert moved.pixels.is_meta
    assert moved.extra["area"].is_meta
    for name in ("sizes", "sample_ids", "epochs", "labels"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert batch.nbytes == batch.pixels.nbytes + 4 * (16 + 8 + 8 + 8 + 8 + 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pinned_batches(shards: Path, num_workers: int) -> None:
    loader = make_loader(
        *open_parts(shards),
        batch_size=4,
        rank=0,
        size=1,
        start_step=0,
        stop_step=1,
        num_workers=num_workers,
        pin=True,
        describe=describe,
    )
    (batch,) = next(loader)
    assert batch.pixels.is_pinned()
    assert batch.extra["code"].is_pinned()
    assert torch.equal(batch.to(torch.device("cuda"), non_blocking=True).pixels.cpu(), batch.pixels)


def test_impossible_shares_are_refused(shards: Path) -> None:
    reader, order = open_parts(shards)
    with pytest.raises(UserError, match="at least 6 images"):
        make_loader(reader, order, batch_size=5, rank=0, size=3, accumulate=2, start_step=0, stop_step=1, num_workers=0)
    other = Order(shard_counts=np.array([5]), seed=0, shards_per_block=1)
    with pytest.raises(ValueError, match="the order has 5 samples, the data set 19"):
        make_loader(reader, other, batch_size=5, rank=0, size=1, start_step=0, stop_step=1, num_workers=0)


RANK_PROGRAM = """
    import os, signal, sys
    from pathlib import Path
    from dino_dist.data.decode import DecodeRules
    from dino_dist.data.index import open_dataset
    from dino_dist.data.loader import make_loader
    from dino_dist.data.order import Order
    from dino_dist.data.stream import SampleReader

    def main():
        folder = Path(sys.argv[1])
        dataset = open_dataset(str(folder), fallback_dir=folder)
        loader = make_loader(
            SampleReader(dataset=dataset, rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**6)),
            Order(shard_counts=dataset.shard_counts, seed=3, shards_per_block=2),
            batch_size=4, rank=0, size=1, start_step=0, stop_step=40, num_workers=2,
        )
        signals = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, lambda number, frame: signals.append(number))
        next(loader)
        print("ready", flush=True)
        if "crash" in sys.argv:
            raise RuntimeError("with the loader still in use")
        sys.stdin.readline()
        print(len(list(loader)), *sorted(set(signals)), flush=True)

    if __name__ == "__main__":
        main()
"""


@contextmanager
def rank_process(shards: Path, tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own group that has read one batch and waits for a line; nothing of it is left afterwards."""
    program = tmp_path / "rank.py"
    program.write_text(textwrap.dedent(RANK_PROGRAM))
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, str(program), str(shards), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        for member in group_members(process.pid):
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        process.communicate()


def group_members(group: int) -> list[int]:
    """Live processes of a process group, from /proc."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                members.append(int(entry.name))
    return members


@pytest.mark.distributed
def test_workers_work_on_after_the_jobs_signals(shards: Path, tmp_path: Path) -> None:
    """A scheduler signals all processes of a step; the rank still needs batches to end at a step boundary."""
    with rank_process(shards, tmp_path) as process:
        before = group_members(process.pid)
        assert len(before) >= 4  # the rank, the fork server, two workers (and Python's resource tracker)
        signals = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT]
        for number in signals:
            os.killpg(process.pid, number)
        assert set(before) <= set(group_members(process.pid))
        out, _ = process.communicate("go\n")
    assert out == "39 " + " ".join(str(int(number)) for number in sorted(signals)) + "\n"
    assert process.returncode == 0


@pytest.mark.distributed
def test_no_worker_outlives_a_killed_rank(shards: Path, tmp_path: Path) -> None:
    with rank_process(shards, tmp_path) as process:
        process.kill()
        process.wait()
        wait_for_the_end_of(process.pid)


@pytest.mark.distributed
def test_a_rank_that_fails_is_not_held_up_by_its_workers(shards: Path, tmp_path: Path) -> None:
    """At exit Python terminates the workers and waits for them: deaf ones would make a crash a hang."""
    with rank_process(shards, tmp_path, "crash") as process:
        _, errors = process.communicate()
        assert process.returncode == 1
        assert "with the loader still in use" in errors
        wait_for_the_end_of(process.pid)


def wait_for_the_end_of(group: int) -> None:
    """Bounded by the test's own time limit."""
    while group_members(group):
        os.sched_yield()
