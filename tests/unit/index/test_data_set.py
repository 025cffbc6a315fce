"""A data set is its contents: whatever names the shards, wherever they lie, whichever process reads them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import UserError


def test_ids_run_through_the_shards(folder: Path, fallback: Path) -> None:
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    assert dataset.shard_counts.tolist() == [3, 1, 4]
    shards, rows = dataset.locate(np.arange(8))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == [
        (s, r) for s, n in enumerate([3, 1, 4]) for r in range(n)
    ]
    assert dataset.locate(np.empty(0, dtype=np.int64))[0].shape == (0,)
    for outside in (-1, 8):
        with pytest.raises(ValueError, match=r"0\.\.7"):
            dataset.locate(np.array([0, outside]))
    assert dataset.labels().tolist() == [-1] * 8
    assert bytes(dataset.records(2)["key"][1]) == b"2-1"
    assert not fallback.exists()


def test_every_way_to_name_the_shards_gives_one_data_set(folder: Path, fallback: Path) -> None:
    specs = [str(folder), f"{folder}/{{000..002}}.tar", f"{folder}/*.tar", f"{folder}/manifest.json"]
    datasets = [open_dataset(spec, fallback_dir=fallback) for spec in specs]
    assert len({dataset.hash for dataset in datasets}) == 1
    assert datasets[0].hash == json.loads((folder / "manifest.json").read_text())["hash"]
    part = open_dataset(f"{folder}/{{000,002}}.tar", fallback_dir=fallback)
    assert part.num_samples == 7
    assert part.hash != datasets[0].hash
    assert (
        open_dataset(f"{folder}/manifest.json", fallback_dir=fallback).num_samples == 8
    )  # rows of the others are kept


def test_shards_of_two_folders(write_shards: Callable[[Path, list[int]], None], tmp_path: Path, fallback: Path) -> None:
    write_shards(tmp_path / "a", [2])
    write_shards(tmp_path / "b", [2])
    dataset = open_dataset(f"{tmp_path}/{{a,b}}/000.tar", fallback_dir=fallback)
    assert [shard.name for shard in dataset.shards] == ["a/000.tar", "b/000.tar"]
    assert dataset.num_samples == 4


def test_the_hash_is_that_of_the_contents(
    write_tar: Callable[[Path, list[tuple[str, bytes]]], None], folder: Path, fallback: Path, tmp_path: Path
) -> None:
    original = open_dataset(str(folder), fallback_dir=fallback).hash
    copy = tmp_path / "elsewhere" / "copy"
    copy.mkdir(parents=True)
    for tar in folder.glob("*.tar"):
        shutil.copyfile(tar, copy / tar.name)  # new times, and indexed anew
    assert open_dataset(str(copy), fallback_dir=fallback).hash == original
    write_tar(copy / "001.tar", [("1-0.jpg", b"image 1 0"), ("1-0.cls", b"5")])
    assert open_dataset(str(copy), fallback_dir=fallback).hash != original
    (copy / "001.tar").rename(copy / "009.tar")
    assert open_dataset(str(copy), fallback_dir=fallback).hash != original


def test_a_copy_in_another_process_reads_the_same(folder: Path, fallback: Path) -> None:
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    dataset.records(0)
    size = len(pickle.dumps(dataset))
    copy = pickle.loads(pickle.dumps(dataset))
    assert size < 4000
    assert np.array_equal(copy.records(1), dataset.records(1))


def test_missing_things_are_named(folder: Path, fallback: Path) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    (folder / "001.tar").unlink()
    with pytest.raises(UserError, match=r"001\.tar, which is not beside it"):
        open_dataset(f"{folder}/manifest.json", fallback_dir=fallback)
    with pytest.raises(UserError, match=r"nothing\.json: No such file or directory; check the path"):
        open_dataset(f"{folder}/nothing.json", fallback_dir=fallback)
