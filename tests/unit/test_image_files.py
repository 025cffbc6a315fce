"""Folders of images read in place: classes mean the same in both, and whatever is no image does no harm."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_dist.config import DataSection
from dino_dist.data.prepare.build import BuildOptions, build_shards
from dino_dist.data.prepare.image_files import FileBytes, ImageFiles, open_image_files
from dino_dist.data.prepare.sources import Source, SourceSet
from dino_dist.data.reading.stream import BadRecord, Sample
from dino_dist.errors import UserError
from dino_dist.inputs import labelled_set, labelled_sets, sample_reader


def write_image(path: Path, level: int, size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, dtype=np.uint8)).save(path)


def test_pixels_labels_and_names_of_a_folder(tmp_path: Path) -> None:
    for level, name in enumerate(["b/x.png", "a/deep/y.png", "a/z.png"]):
        write_image(tmp_path / "set" / name, level)
    (tmp_path / "set" / "a" / "notes.md").write_text("no image")
    dataset = labelled_set(str(tmp_path / "set"), DataSection(), tmp_path / "index")
    assert isinstance(dataset, ImageFiles)
    assert dataset.labels().tolist() == [0, 0, 1]
    reader = pickle.loads(pickle.dumps(sample_reader(dataset, DataSection())))
    samples = [reader.read(number) for number in range(3)]
    assert [(int(sample.pixels[0, 0, 0]), sample.label) for sample in samples] == [(1, 0), (2, 0), (0, 1)]


def test_classes_have_one_number_in_all_sets(tmp_path: Path) -> None:
    for name in ("train/ant/0.png", "train/cat/0.png", "test/bee/0.png", "test/cat/0.png"):
        write_image(tmp_path / name, 9)
    sets = labelled_sets([str(tmp_path / "train"), str(tmp_path / "test")], DataSection(), tmp_path / "index")
    assert [dataset.labels().tolist() for dataset in sets] == [[0, 2], [1, 2]]


def test_a_folder_beside_shards_takes_the_numbers_that_these_were_built_with(tmp_path: Path) -> None:
    for name in ("train/bee/0.png", "train/cat/0.png", "test/ant/0.png", "test/cat/0.png"):
        write_image(tmp_path / name, 9)
    build_shards(str(tmp_path / "train"), tmp_path / "shards", BuildOptions(samples_per_shard=2))
    shards, test = str(tmp_path / "shards"), str(tmp_path / "test")
    _, files = labelled_sets([shards, test], DataSection(), tmp_path / "index")
    assert files.labels().tolist() == [2, 1], "cat is 1 in the shards, ant is new"
    (tmp_path / "shards" / "build.json").unlink()
    with pytest.raises(UserError, match=r"bare numbers, which cannot be compared with the folder names of .*test"):
        labelled_sets([shards, test], DataSection(), tmp_path / "index")


def test_a_list_of_files_with_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "one.png", 1)
    write_image(tmp_path / "two.png", 2)
    (tmp_path / "list.tsv").write_text("two.png\t7\none.png\t3\n")
    dataset = labelled_set(str(tmp_path / "list.tsv"), DataSection(), tmp_path / "index")
    assert dataset.labels().tolist() == [7, 3]


def test_empty_damaged_and_changed_files_are_bad_samples(tmp_path: Path) -> None:
    for number in range(4):
        write_image(tmp_path / "set" / "a" / f"{number}.png", number, (1, 1))
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"")
    (tmp_path / "set" / "a" / "3.png").write_bytes(b"")
    dataset = labelled_set(str(tmp_path / "set"), DataSection(), tmp_path / "index")
    write_image(tmp_path / "set" / "a" / "2.png", 2, (40, 40))
    reader = sample_reader(dataset, DataSection())
    found = [reader.read_exactly(number) for number in range(4)]
    assert isinstance(found[0], Sample)
    assert found[0].pixels.shape == (1, 1, 3)
    reasons = [record.reason for record in found[1:] if isinstance(record, BadRecord)]
    assert reasons == [
        "empty file",
        reasons[1],
        "empty file",
    ]
    assert "when the folder was listed" in reasons[1]
    (tmp_path / "set" / "a" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: No such file"):
        reader.read_exactly(0)


def test_finding_an_image_copies_no_column(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", 1)
    source = Source(
        path=str(tmp_path / "x.png"), offset_bytes=0, size_bytes=(tmp_path / "x.png").stat().st_size, label=1, name="x"
    )
    found = SourceSet(sources=(source,) * 100_000, classes=(), fingerprint="")
    dataset = open_image_files(found, str(tmp_path), {}, tmp_path / "index")
    files = FileBytes(dataset=dataset)
    last = int(dataset.records(0)["offset"][-1])
    tracemalloc.start()
    try:
        assert files.read(0, last, source.size_bytes, 0) == (tmp_path / "x.png").read_bytes()
        assert tracemalloc.get_traced_memory()[1] < 200_000, "the column has 800,000 bytes"
    finally:
        tracemalloc.stop()


def test_what_is_no_set_of_images_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds"):
        labelled_set(str(tmp_path / "empty"), DataSection(), tmp_path / "index")
    write_image(tmp_path / "mixed" / "loose.png", 1)
    write_image(tmp_path / "mixed" / "a" / "x.png", 1)
    with pytest.raises(UserError, match="both directly"):
        labelled_set(str(tmp_path / "mixed"), DataSection(), tmp_path / "index")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "x.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"x\.png: No such file"):
        labelled_set(str(tmp_path / "dangling"), DataSection(), tmp_path / "index")
    write_image(tmp_path / "good" / "x.png", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the list of images"):
        labelled_set(str(tmp_path / "good"), DataSection(), tmp_path / "file" / "below")
