"""Nothing in a checkpoint is a pickle, none that is put there is run, and a manifest names no files elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from dino_dist.checkpoint import Checkpointer
from dino_dist.manifest import BadCheckpoint, verify
from dino_dist.run_folder import RunFolder

# Torch warns of each save without a process group, which is what the tests in this process mean to do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "optimizer.pkl", "model.pt"])
def test_planted_pickle_is_never_run(
    three: Checkpointer, contents: Any, folder: RunFolder, tmp_path: Path, name: str
) -> None:
    marker = tmp_path / "ran"
    (folder.checkpoints / "step-00000030" / name).write_bytes(pickle.dumps(Bomb(marker)))
    choice, tensors = three.newest(), contents.values(0)
    assert choice is not None
    three.load(choice, tensors)
    contents.assert_same(tensors, contents.values(choice.step))
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
