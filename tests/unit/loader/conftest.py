"""What the loader's tests read: four shards of images of different sizes, and the loader on them."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_dist.data.loading.loader import Batch, make_loader
from dino_dist.data.order.order import Order
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.stream import SampleReader
from dino_dist.data.shards.index import open_dataset

COUNTS = [5, 3, 7, 4]
RULES = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)


@pytest.fixture(scope="session")
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


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """The same, for a test that takes some away."""
    for path in shards.iterdir():
        os.link(path, tmp_path / path.name)
    return tmp_path


def _parts(shards: Path) -> dict[str, Any]:
    dataset = open_dataset(str(shards), fallback_dir=shards)
    return {
        "reader": SampleReader(dataset=dataset, rules=RULES),
        "order": Order(shard_counts=dataset.shard_counts, seed=3, shards_per_block=2),
    }


@pytest.fixture(scope="session")
def open_parts() -> Callable[[Path], dict[str, Any]]:
    """`open_parts(shards)`: the `reader` and the `order` of a loader."""
    return _parts


def _load(parts: dict[str, Any], **settings: Any) -> Generator[list[Batch]]:
    usual: dict[str, Any] = {"rank": 0, "size": 1, "start_step": 0, "num_workers": 0, "buffer_bytes": 2**16}
    return make_loader(**{**parts, **usual, **settings})


@pytest.fixture(scope="session")
def load() -> Callable[..., Generator[list[Batch]]]:
    """`load(parts, batch_size=, stop_step=, ...)`: a loader with usual settings for what a test does not care about."""
    return _load
