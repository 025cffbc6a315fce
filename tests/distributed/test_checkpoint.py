"""A checkpoint comes back equal on any number of ranks, and a bad one never comes back."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dino_dist.checkpoint import Checkpointer
from dino_dist.checkpoint_tensors import load_tensors
from dino_dist.dist import World
from dino_dist.errors import Superseded, UserError
from dino_dist.fencing import file_lock
from dino_dist.ledger import read_rows
from dino_dist.manifest import BadCheckpoint, newest_verified, verify
from dino_dist.run_folder import Attempt, RunFolder

# Torch warns of each save without a process group, which is what the tests in this process mean to do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FORK = multiprocessing.get_context("fork")
STATE = {"step": 10, "samples_consumed": 640, "lr": 0.1 + 0.2, "groups": [{"betas": [0.9, 0.999]}], "name": "é"}


def enter_rank(body: Callable[[World], Any], rank: int, size: int, store: Path, connection: Connection) -> None:
    """One rank of a small world; sends ("done", result) or ("failed", traceback)."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size)
        answer = ("done", body(World(rank=rank, size=size, host=f"node{rank}")))
        dist.destroy_process_group()
    except BaseException:
        answer = ("failed", traceback.format_exc())
    connection.send(answer)


def on_ranks(size: int, body: Callable[[World], Any], scratch: Path) -> list[Any]:
    """Run `body` on `size` gloo ranks, forked from here; their results in rank order."""
    store = scratch / f"store-{len(list(scratch.iterdir()))}"
    pipes = [FORK.Pipe() for _ in range(size)]
    ranks = [
        FORK.Process(target=enter_rank, args=(body, rank, size, store, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    try:
        answers = []
        for ours, _ in pipes:
            assert ours.poll(60), "a rank hangs"
            answers.append(ours.recv())
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
            process.join()
    for kind, value in answers:
        assert kind == "done", value
    return [value for _, value in answers]


def values(seed: int) -> dict[str, Tensor]:
    """Tensors of every kind that a run saves; sizes that 2 and 3 ranks cannot split evenly."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 1))
    whole = {f"student.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return whole | {f"moment.{name}": tensor * 2 for name, tensor in whole.items()} | plain_values(seed)


def plain_values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "center": torch.randn(1, 9, generator=generator, dtype=torch.float64),
        "count": torch.tensor(seed),
        "temperature": torch.tensor(0.04 + seed),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "transposed": torch.randn(4, 3, generator=generator).t(),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False, seed % 2 == 0]),
    }


def sharded(world: World, seed: int) -> dict[str, Tensor]:
    """`values(seed)` with the model's tensors as FSDP2 shards them over the ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
    shards: dict[str, Tensor] = {f"student.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    return shards | {f"moment.{name}": tensor * 2 for name, tensor in shards.items()} | plain_values(seed)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(whole(tensor), wanted[name]), name


def spoil(tensors: dict[str, Tensor]) -> None:
    """Overwrite in place, as the next training step would."""
    for tensor in tensors.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(1)


def join(world: World, folder: RunFolder) -> Attempt:
    number = world.broadcast(folder.begin_attempt().number if world.is_first else 0)
    return folder.join_attempt(number)


def checkpointer(folder: RunFolder, attempt: Attempt, world: World | None = None, **options: Any) -> Checkpointer:
    settings: dict[str, Any] = {"keep": 2, "keep_every_steps": None, "async_save": True} | options
    return Checkpointer(folder, attempt, world or World(), **settings)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def attempt(folder: RunFolder) -> Iterator[Attempt]:
    with folder.begin_attempt() as begun:
        yield begun


@pytest.fixture
def three(folder: RunFolder, attempt: Attempt) -> Checkpointer:
    """A run with the checkpoints of steps 10, 20, 30; step s holds values(s)."""
    saver = checkpointer(folder, attempt, keep=3)
    for step in (10, 20, 30):
        assert saver.save(values(step), STATE | {"step": step}, step=step, wait=True)
    return saver


def names(folder: RunFolder) -> list[str]:
    return sorted(os.listdir(folder.checkpoints))


def faults(folder: RunFolder) -> list[str]:
    return [row["why"] for row in read_rows(folder.ledger) if row["event"] == "fault"]


# Equality


def save_on_two(folder: RunFolder) -> Callable[[World], None]:
    def body(world: World) -> None:
        saver = checkpointer(folder, join(world, folder), world)
        tensors = sharded(world, 10)
        assert saver.save(tensors, STATE, step=10)
        spoil(tensors)
        assert saver.finish()
        assert saver.last_save_s is not None

    return body


def load_on_any(folder: RunFolder) -> Callable[[World], None]:
    def body(world: World) -> None:
        loader = checkpointer(folder, join(world, folder), world)
        tensors = sharded(world, 99)
        choice = loader.newest()
        assert choice is not None
        assert loader.load(choice, tensors) == STATE
        assert_same(tensors, values(10))
        loader.close()

    return body


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_save_and_any_number_loads(folder: RunFolder, tmp_path: Path) -> None:
    on_ranks(2, save_on_two(folder), tmp_path)
    assert names(folder) == ["step-00000010"]
    for size in (1, 2, 3):
        on_ranks(size, load_on_any(folder), tmp_path)
    restored = [row for row in read_rows(folder.ledger) if row["event"] == "restore"]
    assert [(row["step"], row["rank"]) for row in restored] == [(10, 0)] * 3

    with folder.begin_attempt() as attempt:
        loader, tensors = checkpointer(folder, attempt), values(99)
        choice = loader.newest()
        assert choice is not None
        assert loader.load(choice, tensors) == STATE
        assert_same(tensors, values(10))


def test_tensors_may_change_as_soon_as_save_returns(folder: RunFolder, attempt: Attempt) -> None:
    saver = checkpointer(folder, attempt, keep=3)
    tensors, state = values(0), dict(STATE)
    for step in (1, 2, 3):
        for name, tensor in values(step).items():
            tensors[name].copy_(tensor)
        state["step"] = step
        assert saver.save(tensors, state, step=step)
        spoil(tensors)
        state["step"] = -1
    assert saver.finish()
    for step in (1, 2, 3):
        checkpoint = verify(folder.checkpoints / f"step-{step:08d}")
        load_tensors(checkpoint, tensors)
        assert_same(tensors, values(step))
        assert checkpoint.state == STATE | {"step": step}


def test_synchronous_save_is_committed_at_return(folder: RunFolder, attempt: Attempt) -> None:
    assert checkpointer(folder, attempt, async_save=False).save(values(1), STATE, step=1)
    assert names(folder) == ["step-00000001"]


def test_same_step_is_not_written_again(three: Checkpointer, folder: RunFolder) -> None:
    before = os.stat(folder.checkpoints / "step-00000030").st_ino
    assert three.save(values(0), STATE, step=30, wait=True)
    assert os.stat(folder.checkpoints / "step-00000030").st_ino == before


def test_new_run_has_no_checkpoint(folder: RunFolder, attempt: Attempt) -> None:
    assert checkpointer(folder, attempt).newest() is None


# Strictness


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda wanted: wanted.pop("center"), "center is in it but not in the model"),
        (lambda wanted: wanted.update(extra=torch.zeros(1)), "extra is missing from it"),
        (
            lambda wanted: wanted.update(center=torch.zeros(1, 9)),
            r"center is torch.float64\[1, 9\] in it, torch.float32",
        ),
        (lambda wanted: wanted.update(half=torch.zeros(4).bfloat16()), r"half is torch.bfloat16\[3\] in it"),
    ],
)
def test_only_exactly_fitting_tensors_are_loaded(
    three: Checkpointer, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    choice, wanted = three.newest(), values(0)
    assert choice is not None
    change(wanted)
    before = {name: tensor.clone() for name, tensor in wanted.items()}
    with pytest.raises(UserError, match=message):
        three.load(choice, wanted)
    assert_same(wanted, before)


def test_evaluation_may_load_a_part(three: Checkpointer) -> None:
    choice = three.newest()
    assert choice is not None
    part = {"center": torch.zeros(1, 9, dtype=torch.float64)}
    load_tensors(choice, part, subset=True)
    assert_same(part, {"center": values(30)["center"]})


# Damage


def tensor_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.safetensors"))


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped tensor byte": lambda path: flip_byte(tensor_file(path), -1),
    "flipped state byte": lambda path: flip_byte(path / "state.json", 3),
    "flipped manifest byte": lambda path: flip_byte(path / "manifest.json", 40),
    "truncated": lambda path: os.truncate(tensor_file(path), 100),
    "empty": lambda path: os.truncate(tensor_file(path), 0),
    "missing tensors": lambda path: tensor_file(path).unlink(),
    "missing state": lambda path: (path / "state.json").unlink(),
    "missing manifest": lambda path: (path / "manifest.json").unlink(),
    "extra tensors": lambda path: shutil.copy(tensor_file(path), path / "shard-00009-model-00001-of-00001.safetensors"),
    "link": lambda path: (
        shutil.move(tensor_file(path), path / "elsewhere"),
        (path / "shard-00001-model-00001-of-00001.safetensors").symlink_to("elsewhere"),
    ),
    "renamed": lambda path: path.rename(path.with_name("step-00000040")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_newest_is_passed_over_aloud(
    three: Checkpointer, folder: RunFolder, damage: Callable[[Path], object]
) -> None:
    damage(folder.checkpoints / "step-00000030")
    choice, tensors = three.newest(), values(0)
    assert choice is not None
    assert choice.step == 20
    assert three.load(choice, tensors)["step"] == 20
    assert_same(tensors, values(20))
    (why,) = faults(folder)
    assert "does not verify" in why
    # The way is free for the same step, and the bad one does not outlive it.
    assert three.save(values(31), STATE, step=30, wait=True)
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


def test_any_flipped_bit_anywhere_is_found(three: Checkpointer, folder: RunFolder) -> None:
    checkpoint = folder.checkpoints / "step-00000030"
    rng = random.Random(20_240)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for _ in range(60):
            changed = bytearray(content)
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            # White space and the like in the manifest may change without changing what it says.
            same = path.name == "manifest.json" and says_the_same(changed, content)
            if not same:
                with pytest.raises(BadCheckpoint):
                    verify(checkpoint)
        path.write_bytes(content)
    assert verify(checkpoint).step == 30


def says_the_same(changed: bytearray, content: bytes) -> bool:
    try:
        return json.loads(bytes(changed)) == json.loads(content)
    except ValueError:
        return False


def test_run_whose_checkpoints_are_all_bad_does_not_start_from_scratch(three: Checkpointer, folder: RunFolder) -> None:
    for step in (10, 20, 30):
        flip_byte(tensor_file(folder.checkpoints / f"step-{step:08d}"), -1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* verifies") as refused:
            three.newest()
        assert "\n" not in str(refused.value)
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "optimizer.pkl", "model.pt"])
def test_planted_pickle_is_never_run(three: Checkpointer, folder: RunFolder, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    (folder.checkpoints / "step-00000030" / name).write_bytes(pickle.dumps(Bomb(marker)))
    choice, tensors = three.newest(), values(0)
    assert choice is not None
    three.load(choice, tensors)
    assert_same(tensors, values(choice.step))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_pickle_in_place_of_a_file_is_never_run(
    three: Checkpointer, folder: RunFolder, tmp_path: Path, name: str
) -> None:
    marker = tmp_path / "ran"
    (folder.checkpoints / "step-00000030" / name).write_bytes(pickle.dumps(Bomb(marker)))
    choice = three.newest()
    assert choice is not None
    assert choice.step == 20
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../step-00000020/state.json", "/etc/hostname", "..", "manifest.json"])
def test_manifest_cannot_name_files_elsewhere(three: Checkpointer, folder: RunFolder, name: str) -> None:
    path = folder.checkpoints / "step-00000030" / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][name] = {"bytes": 1, "sha256": "00"}
    del content["sha256"]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))
    with pytest.raises(BadCheckpoint, match="names"):
        verify(path.parent)


def test_nothing_in_a_checkpoint_is_pickled(three: Checkpointer, folder: RunFolder) -> None:
    suffixes = {path.suffix for path in (folder.checkpoints / "step-00000030").iterdir()}
    assert suffixes == {".json", ".safetensors"}


# Keeping and removing


@pytest.mark.parametrize(
    ("keep", "every", "kept"),
    [
        (1, None, [70]),
        (2, None, [60, 70]),
        (2, 30, [30, 60, 70]),
        (1, 20, [20, 40, 60, 70]),
        (1, 25, [30, 50, 70]),  # saves need not fall on the multiples
        (9, None, range(10, 71, 10)),
    ],
)
def test_retention(folder: RunFolder, attempt: Attempt, keep: int, every: int | None, kept: list[int]) -> None:
    saver = checkpointer(folder, attempt, keep=keep, keep_every_steps=every)
    tensors = {"weight": torch.ones(3)}
    for step in range(10, 71, 10):
        assert saver.save(tensors, {}, step=step)
    assert saver.finish()
    assert names(folder) == [f"step-{step:08d}" for step in kept]


def test_the_good_checkpoint_survives_bad_newer_ones(three: Checkpointer, folder: RunFolder, attempt: Attempt) -> None:
    for step in (20, 30):
        flip_byte(tensor_file(folder.checkpoints / f"step-{step:08d}"), -1)
    saver = checkpointer(folder, attempt, keep=1)
    choice = saver.newest()
    assert choice is not None
    assert choice.step == 10
    assert names(folder) == [".bad-step-00000020-1", ".bad-step-00000030-1", "step-00000010"]
    assert saver.save(values(15), STATE, step=15, wait=True)
    assert names(folder) == ["step-00000015"]


def test_leftovers_of_older_attempts_go_at_the_start(folder: RunFolder) -> None:
    for name in ("step-00000010.tmp-1", ".trash-1-step-00000005"):
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "file").write_text("half")
    with folder.begin_attempt() as attempt:
        checkpointer(folder, attempt)
        assert names(folder) == []


# Failure


def fail_on_last_rank(folder: RunFolder) -> Callable[[World], list[Any]]:
    def body(world: World) -> list[Any]:
        saver = checkpointer(folder, join(world, folder), world)
        assert saver.save(sharded(world, 10), STATE, step=10, wait=True)
        if world.rank == world.size - 1:
            # Writing beyond this size fails, as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        answers = [saver.save(sharded(world, 20), STATE, step=20, wait=True)]
        answers += [saver.save(sharded(world, 30), STATE, step=30), saver.finish()]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        answers += [saver.save(sharded(world, 40), STATE, step=40, wait=True)]
        return answers

    return body


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_full_disk_on_one_rank_fails_the_save_for_all_and_training_goes_on(
    folder: RunFolder, tmp_path: Path, size: int
) -> None:
    if size == 1:
        # Alone, the ledger cannot be written either: the log must say it, and nothing may raise.
        assert on_ranks(1, fail_on_last_rank(folder), tmp_path) == [[False, True, False, True]]
    else:
        assert on_ranks(2, fail_on_last_rank(folder), tmp_path) == [[False, True, False, True]] * 2
        assert [row["step"] for row in read_rows(folder.ledger) if row["event"] == "fault"] == [20, 30]
        assert all("File too large" in why for why in faults(folder))
    assert names(folder) == ["step-00000010", "step-00000040"]


def test_failed_save_is_loud(folder: RunFolder, attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    saver = checkpointer(folder, attempt)
    shared = torch.ones(3)
    with caplog.at_level(logging.ERROR):
        assert not saver.save({"a": shared, "b": shared}, {}, step=5, wait=True)
    assert any("CHECKPOINT OF STEP 5 FAILED" in record.message for record in caplog.records)
    assert [row["step"] for row in read_rows(folder.ledger)] == [5]
    assert names(folder) == []


def die_in_the_second_save(folder: RunFolder) -> Callable[[World], Any]:
    def body(world: World) -> Any:
        saver = checkpointer(folder, join(world, folder), world)
        assert saver.save(sharded(world, 10), STATE, step=10, wait=True)
        if world.rank == 1:
            return None
        return saver.save(sharded(world, 20), STATE, step=20, wait=True)

    return body


@pytest.mark.distributed
def test_lost_rank_fails_the_save_and_keeps_the_last_one(folder: RunFolder, tmp_path: Path) -> None:
    assert on_ranks(2, die_in_the_second_save(folder), tmp_path) == [False, None]
    good, bad = newest_verified(folder.checkpoints)
    assert good is not None
    assert (good.step, bad) == (10, {})


# Fencing


def test_superseded_attempt_cannot_begin_a_save(folder: RunFolder) -> None:
    old = folder.begin_attempt(job_id="7", restarts=0)
    saver = checkpointer(folder, old)
    with folder.begin_attempt(job_id="7", restarts=1):
        with pytest.raises(Superseded):
            saver.save(values(1), STATE, step=1)
        assert names(folder) == []
    old.close()


def test_attempt_superseded_during_a_save_cannot_commit(folder: RunFolder) -> None:
    old = folder.begin_attempt()
    saver = checkpointer(folder, old)
    assert saver.save(values(1), STATE, step=1, wait=True)
    before = folder.ledger.read_bytes()
    with file_lock(folder.attempts / "lock"):
        assert saver.save(values(2), STATE, step=2)
        folder.attempt_file(2).write_text("{}")
    with pytest.raises(Superseded):
        saver.finish()
    with pytest.raises(Superseded):
        saver.save(values(3), STATE, step=3)
    assert [name for name in names(folder) if "tmp" not in name] == ["step-00000001"]
    assert folder.ledger.read_bytes() == before
    old.close()
