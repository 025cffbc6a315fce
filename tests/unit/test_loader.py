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
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_dist.data.loading.batch_copies import HostCopies
from dino_dist.data.loading.decode_process import DecodeJob
from dino_dist.data.loading.loader import Batch, DataProcess, Describe, make_loader, read_batch
from dino_dist.data.order.order import Order, StreamIds
from dino_dist.data.order.step_plan import StepPlan
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.shard_bytes import ShardBytes
from dino_dist.data.reading.stream import SampleReader
from dino_dist.data.shards.index import open_dataset
from dino_dist.data.stores.store_options import StoreCounts
from dino_dist.errors import RunFailed, UserError

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


class Parts(TypedDict):
    reader: SampleReader
    order: Order


class Settings(TypedDict, total=False):
    """What most tests do not care about."""

    rank: int
    size: int
    accumulate: int
    start_step: int
    num_workers: int
    buffer_bytes: int
    device: torch.device
    describe: Describe


RULES = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)


def open_parts(shards: Path) -> Parts:
    dataset = open_dataset(str(shards), fallback_dir=shards)
    return {
        "reader": SampleReader(dataset=dataset, rules=RULES),
        "order": Order(shard_counts=dataset.shard_counts, seed=3, shards_per_block=2),
    }


def load(parts: Parts, *, batch_size: int, stop_step: int, **settings: Unpack[Settings]) -> Generator[list[Batch]]:
    usual: Settings = {"rank": 0, "size": 1, "start_step": 0, "num_workers": 0, "buffer_bytes": 2**16}
    return make_loader(**parts, batch_size=batch_size, stop_step=stop_step, **{**usual, **settings})


def describe(ids: StreamIds, sizes: NDArray[np.int64]) -> dict[str, Tensor]:
    return {
        "code": torch.from_numpy(ids.sample_ids * 1000 + ids.epochs + ids.repeats),
        "area": torch.from_numpy(sizes.prod(axis=1).astype(np.float32)[None]),
        "odd": torch.from_numpy(sizes % 2 == 1),
    }


def same(one: Batch, two: Batch) -> bool:
    tensors = ("pixels", "sizes", "sample_ids", "epochs", "repeats", "labels")
    return (
        all(torch.equal(getattr(one, name), getattr(two, name)) for name in tensors)
        and (one.step, one.bad) == (two.step, two.bad)
        and one.extra.keys() == two.extra.keys()
        and all(torch.equal(one.extra[name], two.extra[name]) for name in one.extra)
    )


def all_same(ones: list[list[Batch]], twos: list[list[Batch]]) -> bool:
    return len(ones) == len(twos) and all(
        len(one) == len(two) and all(map(same, one, two)) for one, two in zip(ones, twos, strict=True)
    )


def test_a_batch_is_the_images_of_its_ids(shards: Path) -> None:
    parts = open_parts(shards)
    (batch,) = next(load(parts, batch_size=19, start_step=1, stop_step=2))
    assert batch.step == 1
    assert set(batch.epochs.tolist()) == {1}
    assert set(batch.repeats.tolist()) == {0}
    assert sorted(batch.sample_ids.tolist()) == list(range(19))
    offset = 0
    for (height, width), sample_id, label in zip(
        batch.sizes.tolist(), batch.sample_ids.tolist(), batch.labels.tolist(), strict=True
    ):
        sample = parts["reader"].read(sample_id)
        stored = batch.pixels[offset : offset + height * width * 3].reshape(height, width, 3)
        assert torch.equal(stored, torch.from_numpy(sample.pixels))
        assert label == sample.label
        offset += height * width * 3
    assert offset == len(batch.pixels)
    assert [record.sample_id for record in batch.bad] == [7]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_micro_batches_join_to_the_whole(shards: Path, size: int, accumulate: int) -> None:
    parts = open_parts(shards)
    by_rank = [
        list(
            load(
                parts,
                batch_size=8,
                rank=rank,
                size=size,
                accumulate=accumulate,
                start_step=2,
                stop_step=7,
                describe=describe,
            )
        )
        for rank in range(size)
    ]
    for step in range(5):
        batches = [batch for rank in range(size) for batch in by_rank[rank][step]]
        assert len(batches) == size * accumulate
        assert max(b.num_images for b in batches) - min(b.num_images for b in batches) <= 2
        start = (step + 2) * 8
        ids = parts["order"].ids(start, start + 8)
        assert torch.cat([batch.sample_ids for batch in batches]).tolist() == ids.sample_ids.tolist()
        assert torch.cat([batch.epochs for batch in batches]).tolist() == ids.epochs.tolist()
        codes = torch.cat([batch.extra["code"] for batch in batches])
        assert codes.tolist() == (ids.sample_ids * 1000 + ids.epochs).tolist()


@pytest.mark.distributed
def test_threads_and_buffers_change_nothing(shards: Path) -> None:
    """Also: all batches are held to the end, in a buffer that holds but one or two of them: they own their memory."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    wanted = list(load(open_parts(shards), batch_size=6, stop_step=9, rank=1, size=2, accumulate=2, describe=describe))
    largest = max(batch.nbytes for batches in wanted for batch in batches)
    for num_workers, buffer_bytes in ((1, largest + 100), (3, largest + 100), (2, 2**20)):
        results = list(
            load(
                open_parts(shards),
                batch_size=6,
                stop_step=9,
                rank=1,
                size=2,
                accumulate=2,
                describe=describe,
                num_workers=num_workers,
                buffer_bytes=buffer_bytes,
            )
        )
        assert all_same(wanted, results)
    assert torch.equal(torch.get_rng_state(), before)  # the loader draws nothing from the process's generator


@pytest.mark.distributed
def test_memory_of_batches_that_nobody_holds_is_used_again(shards: Path) -> None:
    loader = load(open_parts(shards), batch_size=5, stop_step=40, num_workers=1)
    held = next(loader)[0]
    pixels = held.pixels[3:]  # a view keeps the memory as well
    copy = pixels.clone()
    del held
    places = set()
    for (batch,) in loader:
        assert batch.pixels.data_ptr() != pixels.data_ptr() - 3
        places.add(batch.pixels.data_ptr())
        del batch
    assert len(places) <= 8  # of 39 batches; sizes differ, and a few are spare
    assert torch.equal(pixels, copy)


@pytest.mark.distributed
def test_closing_the_iterator_ends_its_process(shards: Path) -> None:
    names, fds = os.listdir("/dev/shm"), len(os.listdir("/proc/self/fd"))
    for batches_taken in (1, 3):
        loader = load(open_parts(shards), batch_size=4, stop_step=1000, num_workers=2)
        for _ in range(batches_taken):
            next(loader)
        assert [child.name for child in multiprocessing.active_children()] == ["data"]
        assert os.listdir("/dev/shm") == names
        loader.close()
        assert multiprocessing.active_children() == []
    assert len(os.listdir("/proc/self/fd")) <= fds + 8  # the fork server's, which stays
    assert list(load(open_parts(shards), batch_size=4, start_step=3, stop_step=3, num_workers=2)) == []


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_in_a_worker_stays_one_line(shards: Path, tmp_path: Path, num_workers: int) -> None:
    for path in shards.iterdir():
        os.link(path, tmp_path / path.name)
    parts = open_parts(tmp_path)
    missing = range(8, 15)
    good = next(step for step in range(19) if parts["order"].ids(step, step + 1).sample_ids[0] in missing)
    (tmp_path / "2.tar").unlink()
    loader = load(parts, batch_size=1, stop_step=19, num_workers=num_workers)
    for _ in range(good):
        next(loader)  # what comes before it still arrives
    with pytest.raises(UserError, match=r"2\.tar: No such file") as caught:
        next(loader)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.distributed
def test_micro_batches_larger_than_the_buffer_pass_beside_it(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of them, or some; said once, or not where there are none."""
    wanted = list(load(open_parts(shards), batch_size=10, stop_step=12, accumulate=2, describe=describe))
    sizes = sorted(batch.pixels.nbytes for batches in wanted for batch in batches)
    for buffer_bytes in (sizes[0] // 2, sizes[len(sizes) // 2] + 100, 2**16):
        caplog.clear()
        loader = load(
            open_parts(shards),
            batch_size=10,
            stop_step=12,
            accumulate=2,
            describe=describe,
            num_workers=2,
            buffer_bytes=buffer_bytes,
        )
        assert all_same(wanted, list(loader))
        assert len(caplog.messages) == (buffer_bytes < sizes[-1])
        for line in caplog.messages:
            assert (
                f"a micro-batch of 5 images that take 1 MiB, more than data.buffer_mib={buffer_bytes / 2**20:g}" in line
            )


def one_job(parts: Parts, *, describe: Describe | None = None) -> DecodeJob:
    """A step of all samples."""
    plan = StepPlan(order=parts["order"], batch_size=19, rank=0, size=1, accumulate=1)
    return DecodeJob(reader=parts["reader"], plan=plan, describe=describe, start_step=0, stop_step=1, num_threads=2)


def describe_at_length(ids: StreamIds, sizes: NDArray[np.int64]) -> dict[str, Tensor]:
    return {"long": torch.full((2**20,), int(ids.sample_ids[0]))}


@pytest.mark.distributed
def test_a_process_killed_within_a_message_is_one_clear_error(shards: Path) -> None:
    with closing(DataProcess(one_job(open_parts(shards), describe=describe_at_length), 2**16)) as beside:
        beside._connection.poll(None)  # for its first bytes: the rest is more than a socket takes
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        assert not beside.has_batch()
        with pytest.raises(RunFailed, match=rf"pid {process.pid}\) was killed by SIGKILL: by the kernel"):
            beside.receive()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, r"was killed by SIGKILL: by the kernel, if the memory"),
        (signal.SIGSEGV, r"crashed \(SIGSEGV\): a defect of"),
        (signal.SIGRTMIN + 3, rf"was killed by signal {signal.SIGRTMIN + 3}; the same command"),
    ],
)
def test_a_killed_process_is_one_clear_error(shards: Path, number: int, how: str) -> None:
    loader = load(open_parts(shards), batch_size=4, stop_step=10**6, num_workers=1)
    next(loader)
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    with pytest.raises(RunFailed, match=rf"pid {process.pid}\) {how}") as caught:
        for _ in loader:  # those that were ready may still come
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.distributed
def test_an_error_that_came_ahead_of_time_waits_until_it_is_asked_for(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        os.link(path, tmp_path / path.name)
    parts = open_parts(tmp_path)
    (tmp_path / "2.tar").unlink()
    with closing(DataProcess(one_job(parts), 2**16)) as beside:
        beside._connection.poll(None)
        assert not beside.has_batch()
        for _ in range(2):
            with pytest.raises(UserError, match=r"2\.tar: No such file"):
                beside.receive()
            assert not beside.has_batch()


class CopiesAside(HostCopies):
    """As on a GPU, steps are copied before they are asked for."""

    runs_aside = True


@pytest.mark.distributed
@pytest.mark.parametrize("accumulate", [1, 2])
def test_copying_ahead_ends_with_the_stream(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulate: int
) -> None:
    for path in shards.iterdir():
        os.link(path, tmp_path / path.name)
    parts = open_parts(tmp_path)
    good = next(step for step in range(19) if parts["order"].ids(2 * step, 2 * step + 2).sample_ids.max() >= 15)
    (tmp_path / "3.tar").unlink()
    monkeypatch.setattr("dino_dist.data.loading.loader.batch_copies", lambda device, memory: CopiesAside(device))
    loader = load(parts, batch_size=2, stop_step=9, accumulate=accumulate, num_workers=2)
    assert [next(loader)[0].step for _ in range(good)] == list(range(good))
    with pytest.raises(UserError, match=r"3\.tar: No such file"):
        next(loader)


def describe_wrongly(ids: StreamIds, sizes: NDArray[np.int64]) -> dict[str, Tensor]:
    raise ZeroDivisionError(f"a defect, at {ids.sample_ids[0]} of {sizes.shape}")


@pytest.mark.distributed
def test_a_defect_in_the_process_is_told_with_its_place(shards: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)images failed:.*in describe_wrongly.*ZeroDivisionError: a defect, at"):
        next(load(open_parts(shards), batch_size=4, stop_step=1, num_workers=1, describe=describe_wrongly))


@dataclass(frozen=True, kw_only=True)
class WrittenDown:
    """Reads as its source does, and notes in files how much was read, and which shards would be needed."""

    source: ShardBytes
    folder: Path

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        with open(self.folder / "reads", "ab") as file:
            file.write(b".")
        return self.source.read(shard, offset, size, crc32)

    def will_need(self, shards: Sequence[int]) -> None:
        with open(self.folder / "hints", "a", encoding="utf-8") as file:
            file.write(" ".join(map(str, shards)) + "\n")

    def counts(self) -> StoreCounts:
        return StoreCounts(direct_reads=1)

    def close(self) -> None:
        (self.folder / "closed").touch()


@pytest.mark.distributed
def test_reading_ahead_is_bounded_by_the_buffer(shards: Path, tmp_path: Path) -> None:
    parts = open_parts(shards)
    dataset = parts["reader"].dataset
    source = WrittenDown(source=ShardBytes(dataset=dataset), folder=tmp_path)
    parts["reader"] = SampleReader(dataset=dataset, rules=RULES, source=source)
    room = 3
    loader = load(parts, batch_size=1, stop_step=400, num_workers=2, buffer_bytes=room * 320)  # 3 of the largest
    smallest = 2 * 5 * 3
    for taken, _ in enumerate(loader, start=1):
        in_the_ring = room * 320 // max(64, smallest)
        beyond = 2  # one whose files are read, and one that waits for room
        substitutes = taken // 19 + 2
        assert (tmp_path / "reads").stat().st_size <= taken + in_the_ring + beyond + substitutes
    assert (tmp_path / "closed").exists()
    assert not (tmp_path / "hints").exists()  # local shards need none


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_of_a_store_are_named_before_they_are_read(shards: Path, tmp_path: Path, num_workers: int) -> None:
    parts = open_parts(shards)
    local = parts["reader"].dataset
    remote = replace(local, shards=tuple(replace(s, location=f"http://localhost:1/{s.name}") for s in local.shards))
    source = WrittenDown(source=ShardBytes(dataset=local), folder=tmp_path)
    parts["reader"] = SampleReader(dataset=remote, rules=RULES, source=source)
    for (batch,) in load(parts, batch_size=2, stop_step=20, num_workers=num_workers):
        assert batch.store == StoreCounts(direct_reads=1)
    hints = [[int(shard) for shard in line.split()] for line in (tmp_path / "hints").read_text().splitlines()]
    assert hints[0] == parts["order"].shards_from(0, 4)
    assert 5 <= len(hints) <= 10  # 40 positions, shards of about 5
    assert all(sorted(hint) == [0, 1, 2, 3] for hint in hints)


@pytest.mark.parametrize("with_extras", [False, True])
def test_some_samples_by_their_ids(shards: Path, with_extras: bool) -> None:
    parts = open_parts(shards)
    (whole,) = next(load(parts, batch_size=19, stop_step=1, describe=describe))
    ids = parts["order"].ids(3, 7)
    batch = read_batch(parts["reader"], ids, describe=describe if with_extras else None)
    assert torch.equal(batch.sizes, whole.sizes[3:7])
    assert torch.equal(batch.labels, whole.labels[3:7])
    starts = [0, *whole.sizes.prod(dim=1).mul(3).cumsum(0).tolist()]
    assert torch.equal(batch.pixels, whole.pixels[starts[3] : starts[7]])
    assert batch.extra.keys() == ({"code", "area", "odd"} if with_extras else set())
    assert read_batch(parts["reader"], parts["order"].ids(3, 3)).num_images == 0


def test_moving_a_batch_keeps_ids_and_sizes_here(shards: Path) -> None:
    (batch,) = next(load(open_parts(shards), batch_size=4, stop_step=1, describe=describe))
    moved = batch.to(torch.device("meta"))
    assert moved.pixels.is_meta
    assert moved.extra["area"].is_meta
    for name in ("sizes", "sample_ids", "epochs", "repeats", "labels"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert batch.nbytes == batch.pixels.nbytes + 4 * (16 + 8 + 8 + 8 + 8 + 8 + 4 + 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies on a stream of their own need a CUDA device")
@pytest.mark.parametrize("buffer_bytes", [5_000, 2**20])
def test_batches_on_a_gpu(shards: Path, buffer_bytes: int) -> None:
    """Each step is used by work that is queued behind other work, while later steps are copied."""
    device = torch.device("cuda")
    wanted = list(load(open_parts(shards), batch_size=6, stop_step=30, accumulate=2, describe=describe))
    loader = load(
        open_parts(shards),
        batch_size=6,
        stop_step=30,
        accumulate=2,
        describe=describe,
        num_workers=2,
        buffer_bytes=buffer_bytes,
        device=device,
    )
    busy = torch.randn(2048, 2048, device=device)
    results = []
    for batches in loader:
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        assert all(batch.pixels.device.type == "cuda" for batch in batches)
        results.append([replace(batch, pixels=batch.pixels + (busy[0, 0] * 0).byte()) for batch in batches])
    cpu = torch.device("cpu")
    assert all_same(wanted, [[batch.to(cpu) for batch in batches] for batches in results])


def test_impossible_shares_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="at least 6 images"):
        load(open_parts(shards), batch_size=5, rank=0, size=3, accumulate=2, stop_step=1)


RANK_PROGRAM = """
    import os, signal, sys
    from pathlib import Path
    from dino_dist.data.reading.decode import DecodeRules
    from dino_dist.data.shards.index import open_dataset
    from dino_dist.data.loading.loader import make_loader
    from dino_dist.data.order.order import Order
    from dino_dist.data.reading.stream import SampleReader

    def main():
        folder = Path(sys.argv[1])
        dataset = open_dataset(str(folder), fallback_dir=folder)
        loader = make_loader(
            reader=SampleReader(dataset=dataset, rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**6)),
            order=Order(shard_counts=dataset.shard_counts, seed=3, shards_per_block=2),
            batch_size=4, rank=0, size=1, start_step=0, stop_step=40, num_workers=2, buffer_bytes=2**16,
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
        assert len(before) >= 3  # the rank, the fork server, its process (and Python's resource tracker)
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
