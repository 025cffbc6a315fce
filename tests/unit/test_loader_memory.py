"""The memory of a rank does not grow: neither its own process nor the one that decodes for it, over many epochs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RANK_PROGRAM = """
    import json, multiprocessing, sys
    from pathlib import Path

    import psutil
    import torch

    from dino_dist.config import AugmentSection
    from dino_dist.data.reading.decode import DecodeRules
    from dino_dist.data.shards.index import open_dataset
    from dino_dist.data.loading.loader import make_loader
    from dino_dist.data.order.order import Order
    from dino_dist.data.reading.stream import SampleReader
    from dino_dist.views import ViewDescription, view_recipes

    BATCH, BUFFER_BYTES = 500, 2**25

    def main():
        torch.set_num_threads(1)
        folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
        dataset = open_dataset(str(folder), fallback_dir=folder)
        per_epoch = dataset.num_samples // BATCH
        loader = make_loader(
            reader=SampleReader(dataset=dataset, rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**6)),
            order=Order(shard_counts=dataset.shard_counts, seed=0, shards_per_block=4),
            batch_size=BATCH, rank=0, size=1, start_step=0, stop_step=epochs * per_epoch,
            num_workers=2, buffer_bytes=BUFFER_BYTES,
            describe=ViewDescription(
                recipes=tuple(view_recipes(AugmentSection(local_crops=2))), seed=0, share_jitter=False,
                drop_path_rates=(0.0,),
            ),
        )
        images, kib_by_epoch = 0, []
        for step, (batch,) in enumerate(loader, start=1):
            images += batch.num_images
            if step % per_epoch == 0:
                (beside,) = multiprocessing.active_children()
                processes = [psutil.Process(), psutil.Process(beside.pid)]
                kib_by_epoch.append([process.memory_info().rss // 1024 for process in processes])
        print(json.dumps({"images": images, "kib": kib_by_epoch}))

    if __name__ == "__main__":
        main()
"""


def write_shards(folder: Path, count: int, per_shard: int = 2500) -> None:
    """64-px JPEGs, 500 different ones."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(500):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((64, 64), Image.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    for shard, first in enumerate(range(0, count, per_shard)):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number in range(first, first + per_shard):
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = len(images[number % 500])
                tar.addfile(info, io.BytesIO(images[number % 500]))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.drill)])
def test_resident_memory_is_flat_after_the_first_epoch(tmp_path: Path, count: int) -> None:
    write_shards(tmp_path, count)
    program = tmp_path / "rank.py"
    program.write_text(textwrap.dedent(RANK_PROGRAM))
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "3"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    measured = json.loads(result.stdout)
    print(measured["kib"])
    assert measured["images"] == 3 * count
    first, *later = [sum(epoch) for epoch in measured["kib"]]
    assert len(later) == 2
    assert max(later) <= 1.02 * first
