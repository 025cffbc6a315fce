"""Building shards: every image once, the same bytes always, going on after a stop, checked afterwards."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dino_dist.data.prepare.build import BuildOptions, build_shards
from dino_dist.data.prepare.check import check_shards
from dino_dist.data.reading.decode import DecodeRules, decode_image
from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import UserError

RULES = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)


def image_bytes(number: int, file_format: str = "PNG", **options: object) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (20 + number % 7, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """25 images of three classes, of several formats."""
    root = tmp_path / "photos"
    for number in range(25):
        file_format = ["PNG", "JPEG", "BMP", "WEBP", "TIFF"][number % 5]
        path = root / "abc"[number % 3] / f"{number}.{file_format.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number, file_format))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_every_file_once_with_its_bytes_and_label(photos: Path, tmp_path: Path) -> None:
    options = BuildOptions(samples_per_shard=7, keep_source=True)
    report = build_shards(str(photos), tmp_path / "out", options)
    assert report.dataset.shard_counts.tolist() == [6, 6, 6, 7]
    assert (report.num_rejected, report.num_written) == (0, 4)
    seen: Counter[str] = Counter()
    classes = json.loads((tmp_path / "out" / "build.json").read_text())["classes"]
    keys = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        samples: dict[str, dict[str, bytes]] = {}
        for name, data in members.items():
            key, suffix = name.split(".")
            samples.setdefault(key, {})[suffix] = data
        for key, sample in samples.items():
            keys.append(key)
            source = json.loads(sample.pop("json"))["source"]
            assert classes[int(sample.pop("cls"))] == source.split("/")[0]
            ((suffix, data),) = sample.items()
            assert data == (photos / source).read_bytes()
            seen[source] += 1
            assert suffix in ("png", "jpg", "bmp", "webp", "tif")
    assert seen == Counter(str(path.relative_to(photos)) for path in photos.rglob("*.*"))
    assert keys == [f"{number:08d}" for number in range(25)]
    sources_in_order = [int(Path(s).stem) for s in seen]
    assert sources_in_order != sorted(sources_in_order)


def test_webdataset_reads_what_was_built(photos: Path, tmp_path: Path) -> None:
    build_shards(str(photos), tmp_path / "out", BuildOptions(samples_per_shard=9))
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    dataset = open_dataset(str(tmp_path / "out"), fallback_dir=tmp_path)
    assert [sample["__key__"] for sample in samples] == [
        bytes(key).decode() for shard in range(3) for key in dataset.records(shard)["key"]
    ]
    assert [int(sample["cls"]) for sample in samples] == dataset.labels().tolist()


def test_bytes_depend_on_input_and_options_alone(photos: Path, tmp_path: Path) -> None:
    options = BuildOptions(samples_per_shard=10)
    build_shards(str(photos), tmp_path / "one", options)
    build_shards(str(photos), tmp_path / "two", options)
    build_shards(str(photos), tmp_path / "other", BuildOptions(samples_per_shard=10, seed=1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


@pytest.mark.distributed
def test_processes_change_nothing(photos: Path, tmp_path: Path) -> None:
    options = BuildOptions(samples_per_shard=10, resize_short_px=12)
    build_shards(str(photos), tmp_path / "one", options)
    build_shards(str(photos), tmp_path / "two", options, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    reports = [
        check_shards(str(tmp_path / "two"), rules=RULES, fallback_dir=tmp_path, num_workers=workers)
        for workers in (1, 2)
    ]
    assert reports[0] == reports[1]


def test_the_same_command_goes_on(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = BuildOptions(samples_per_shard=5)
    build_shards(str(photos), out, options)
    whole = contents(out)
    (out / "shard-000002.tar").unlink()
    (out / "shard-000003.tar").rename(out / "shard-000003.tar.tmp")  # killed while writing
    (out / "shard-000003.tar.tmp").write_bytes(b"half")
    report = build_shards(str(photos), out, options)
    assert report.num_written == 2
    assert contents(out) == whole
    assert not list(out.glob("*.tmp*"))
    assert build_shards(str(photos), out, options).num_written == 0


def test_two_builds_at_once_do_each_other_no_harm(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second runs from start to end while the first has a shard written but not yet renamed."""
    out, options = tmp_path / "out", BuildOptions(samples_per_shard=9)
    build_shards(str(photos), tmp_path / "alone", options)
    replace = os.replace
    second = []

    def replace_after_another_build(source: Path, target: Path) -> None:
        if target.suffix == ".tar" and not second:
            second.append(target)
            assert build_shards(str(photos), out, options).num_written == 3
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_after_another_build)
    build_shards(str(photos), out, options)
    assert second
    assert contents(out) == contents(tmp_path / "alone")
    assert not list(out.glob("*.tmp*"))


def test_another_build_is_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(str(photos), out, BuildOptions(samples_per_shard=5))
    with pytest.raises(UserError, match="another build \\(different: options\\)"):
        build_shards(str(photos), out, BuildOptions(samples_per_shard=6))
    (photos / "a" / "new.png").write_bytes(image_bytes(99))
    with pytest.raises(UserError, match="different: input, images"):
        build_shards(str(photos), out, BuildOptions(samples_per_shard=5))
    (out / "build.json").unlink()
    with pytest.raises(UserError, match="another build"):
        build_shards(str(photos), out, BuildOptions(samples_per_shard=5))


def test_bad_images_are_listed_and_counted(photos: Path, tmp_path: Path) -> None:
    (photos / "a" / "broken.jpg").write_bytes(image_bytes(0, "JPEG")[:200])
    (photos / "b" / "empty.png").write_bytes(b"")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"2 of 27 images .* more than max_bad_fraction=0\.05"):
        build_shards(str(photos), out, BuildOptions(samples_per_shard=9), max_bad_fraction=0.05)
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == ["a/broken.jpg", "b/empty.png"]
    assert all(row["reason"] for row in rows)
    assert not list(out.glob("*.tar"))
    report = build_shards(str(photos), out, BuildOptions(samples_per_shard=9), max_bad_fraction=0.1)
    assert (report.num_rejected, report.dataset.num_samples) == (2, 25)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of the 1 images"):
        build_shards(str(tmp_path / "bad"), tmp_path / "out2", BuildOptions(), max_bad_fraction=1)


def test_resizing_makes_large_images_smaller_and_leaves_the_others(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40), (10, 200, 30)).save(root / "large.jpg", exif=exif)
    Image.new("L", (40, 80), 77).save(root / "grey.png")
    Image.new("RGB", (30, 16), (1, 2, 3)).save(root / "small.bmp")
    options = BuildOptions(resize_short_px=16, keep_source=True)
    build_shards(str(root), tmp_path / "out", options)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    by_source = {
        json.loads(data)["source"]: next(
            (n.split(".")[1], d)
            for n, d in members.items()
            if n.split(".")[0] == name.split(".")[0] and "json" not in n
        )
        for name, data in members.items()
        if name.endswith("json")
    }
    assert by_source["small.bmp"] == ("bmp", (root / "small.bmp").read_bytes())
    assert by_source["large.jpg"][0] == "jpg"
    assert decode_image(by_source["large.jpg"][1], RULES).shape == (16, 32, 3)
    with Image.open(io.BytesIO(by_source["large.jpg"][1])) as image:
        assert image.getexif()[0x0112] == 6
    assert by_source["grey.png"][0] == "png"
    assert decode_image(by_source["grey.png"][1], RULES).shape == (32, 16, 3)


def test_tars_can_be_built_anew(photos: Path, tmp_path: Path) -> None:
    first = build_shards(str(photos), tmp_path / "first", BuildOptions(samples_per_shard=25)).dataset
    second = build_shards(str(tmp_path / "first"), tmp_path / "second", BuildOptions(samples_per_shard=4)).dataset
    assert second.shard_counts.tolist() == [3, 4, 3, 4, 3, 4, 4]
    assert Counter(second.labels().tolist()) == Counter(first.labels().tolist())


@pytest.mark.parametrize(
    "options", [{"samples_per_shard": 0}, {"resize_short_px": 0}, {"jpeg_quality": 101}], ids=lambda o: next(iter(o))
)
def test_impossible_options(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        BuildOptions(**options)


def test_a_folder_that_cannot_be_written_to_is_named(photos: Path, tmp_path: Path) -> None:
    """As on a disk that fills up: the system refuses to write more; the same command goes on later."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, allowed[1]))
    try:
        with pytest.raises(
            UserError, match=rf"^{tmp_path}/out cannot be written to \(File too large\); see to its disk"
        ):
            build_shards(str(photos), tmp_path / "out", BuildOptions(samples_per_shard=25))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert not list((tmp_path / "out").glob("*.tmp*"))
    assert build_shards(str(photos), tmp_path / "out", BuildOptions(samples_per_shard=25)).dataset.num_samples == 25
