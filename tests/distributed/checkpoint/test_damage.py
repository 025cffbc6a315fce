"""A damaged checkpoint is found, passed over aloud, and never the reason to start from scratch."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dino_dist.checkpoint import Checkpointer
from dino_dist.errors import UserError
from dino_dist.manifest import BadCheckpoint, verify
from dino_dist.run_folder import Attempt, RunFolder

# Torch warns of each save without a process group, which is what the tests in this process mean to do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensor_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.safetensors"))


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def put_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


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
    "link": lambda path: put_link(tensor_file(path)),
    "renamed": lambda path: path.rename(path.with_name("step-00000040")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_newest_is_passed_over_aloud(
    three: Checkpointer,
    contents: Any,
    folder: RunFolder,
    names: Callable[[], list[str]],
    faults: Callable[[], list[str]],
    damage: Callable[[Path], object],
) -> None:
    damage(folder.checkpoints / "step-00000030")
    choice, tensors = three.newest(), contents.values(0)
    assert choice is not None
    assert choice.step == 20
    assert three.load(choice, tensors)["step"] == 20
    contents.assert_same(tensors, contents.values(20))
    (why,) = faults()
    assert "does not verify" in why
    # The way is free for the same step, and the bad one does not outlive it.
    assert three.save(contents.values(31), contents.state, step=30, wait=True)
    assert names() == ["step-00000010", "step-00000020", "step-00000030"]


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
        return bool(json.loads(bytes(changed)) == json.loads(content))
    except ValueError:
        return False


def test_run_whose_checkpoints_are_all_bad_does_not_start_from_scratch(
    three: Checkpointer, folder: RunFolder, names: Callable[[], list[str]]
) -> None:
    for step in (10, 20, 30):
        flip_byte(tensor_file(folder.checkpoints / f"step-{step:08d}"), -1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* verifies") as refused:
            three.newest()
        assert "\n" not in str(refused.value)
    assert names() == ["step-00000010", "step-00000020", "step-00000030"]


def test_the_good_checkpoint_survives_bad_newer_ones(
    three: Checkpointer,
    contents: Any,
    folder: RunFolder,
    attempt: Attempt,
    checkpointer: Callable[..., Checkpointer],
    names: Callable[[], list[str]],
) -> None:
    for step in (20, 30):
        flip_byte(tensor_file(folder.checkpoints / f"step-{step:08d}"), -1)
    saver = checkpointer(attempt, keep=1)
    choice = saver.newest()
    assert choice is not None
    assert choice.step == 10
    assert names() == [".bad-step-00000020-1", ".bad-step-00000030-1", "step-00000010"]
    assert saver.save(contents.values(15), contents.state, step=15, wait=True)
    assert names() == ["step-00000015"]
