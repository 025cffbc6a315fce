"""The quickstart's shards: all digits, the last 360 apart, and a second start finds them."""

from __future__ import annotations

from pathlib import Path

from dino_dist.data.shards.index import open_dataset
from launch.quickstart import build_digit_shards


def test_a_second_start_finds_the_shards_of_the_first(tmp_path: Path) -> None:
    train, test = build_digit_shards(tmp_path / "shards")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert build_digit_shards(tmp_path / "shards") == (train, test)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == before
    counts = [open_dataset(str(folder), fallback_dir=tmp_path).num_samples for folder in (train, test)]
    assert counts == [1437, 360]
