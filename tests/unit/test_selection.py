"""Selections: what a file takes, read alike however it names samples, and what it may not hold."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dino_dist.data.order import selection as module
from dino_dist.data.order.selection import MAX_MULTIPLICITY, Selection, read_selection
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.errors import UserError


def write_shard(path: Path, keys: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key in keys:
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))


KEYS = {
    "a/000.tar": ["z", "class/9", "y-10", "ünïcode", "10"],
    "a/001.tar": ["z", "b"],
    "b/000.tar": ["deep/er/1", "deep/er/10", "e"],
}
"""The same base names in two folders, the same key in two shards, keys in no order, with slashes, not in ASCII."""

NAMES = [f"{shard}/{key}" for shard, keys in KEYS.items() for key in keys]
"""By sample id."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    folder = tmp_path_factory.mktemp("shards")
    for shard, keys in KEYS.items():
        write_shard(folder / shard, keys)
    return open_dataset(f"{folder}/{{a,b}}/*.tar", fallback_dir=folder)


@pytest.fixture
def read(dataset: DatasetIndex, tmp_path: Path) -> Callable[[str | bytes], Selection]:
    def read_text(text: str | bytes) -> Selection:
        path = tmp_path / "selection.tsv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_selection(path, dataset)

    return read_text


def taken(selection: Selection) -> dict[int, int]:
    """Multiplicity by sample id, by asking for every slot."""
    ids, repeats = selection.resolve(np.arange(selection.num_slots))
    for sample_id in set(ids.tolist()):
        assert repeats[ids == sample_id].tolist() == list(range(int((ids == sample_id).sum())))
    return dict(Counter(ids.tolist()))


def test_names_and_ids_in_any_order_mean_the_same(read: Callable[[str], Selection]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        wanted = {int(i): int(rng.integers(0, 4)) for i in rng.permutation(len(NAMES))[: rng.integers(1, len(NAMES))]}
        wanted[3] = 2
        expected = {sample_id: count for sample_id, count in wanted.items() if count}
        by_id = read("".join(f"{i}\t{m}\n" for i, m in wanted.items()))
        by_name = read("".join(f"{NAMES[i]}\t{m}\n" for i, m in sorted(wanted.items(), key=lambda _: rng.random())))
        assert taken(by_id) == taken(by_name) == expected
        assert by_id.num_slots == sum(expected.values())
        assert by_id.digest == by_name.digest


def test_the_digest_tells_what_is_taken(read: Callable[[str], Selection]) -> None:
    texts = ["0\t1\n", "0\t2\n", "1\t1\n", "0\t1\n1\t1\n", "0\t1\n2\t1\n"]
    assert len({read(text).digest for text in texts}) == len(texts)
    assert read("0\t1\n5\t0\n").digest == read("0\t1").digest, (
        "what is taken no time, and the last line's end, are none"
    )


def test_slots_of_each_shard(read: Callable[[str], Selection], dataset: DatasetIndex) -> None:
    selection = read("9\t3\n0\t1\n4\t2\n")
    assert dataset.first_ids.tolist() == [0, 5, 7, 10]
    assert np.diff(selection.slots_below(dataset.first_ids)).tolist() == [3, 0, 3]
    assert taken(selection) == {0: 1, 4: 2, 9: 3}


@pytest.mark.parametrize("read_bytes", [1, 7, 40, 10**6])
@pytest.mark.parametrize("table_bytes", [30, 10**6])
def test_pieces_do_not_show(
    read: Callable[[str], Selection], monkeypatch: pytest.MonkeyPatch, read_bytes: int, table_bytes: int
) -> None:
    whole = [read("".join(f"{name}\t{1 + i % 3}\n" for i, name in enumerate(NAMES))).digest for _ in range(2)]
    monkeypatch.setattr(module, "_READ_BYTES", read_bytes)
    monkeypatch.setattr(module, "_TABLE_BYTES", table_bytes)
    pieces = read("".join(f"{name}\t{1 + i % 3}\n" for i, name in enumerate(NAMES)))
    assert pieces.digest == whole[0] == whole[1]
    with pytest.raises(UserError, match=r"line 8: .*multiplicity 'x'|line 8: multiplicity 'x'"):
        read("".join(f"{name}\t{'x' if i == 7 else 1}\n" for i, name in enumerate(NAMES)))
    with pytest.raises(UserError, match="in lines 2 and 10"):
        read("".join(f"{name}\t1\n" for name in [*NAMES[:9], NAMES[1]]))


GOOD = "0\t1\n1\t2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("0\t0\n1\t0\n", "takes no sample"),
        (GOOD + "2\n", r"line 3 is '2'; a sample, one tab"),
        (GOOD + "\n3\t1\n", r"line 3 is ''; a sample, one tab"),
        (GOOD + "2\t1\t1\n", r"line 3 is .*one tab"),
        (GOOD + "2 1\n", r"line 3 is '2 1'"),
        (GOOD + "2\t-1\n", r"line 3: multiplicity '-1' must be a whole number"),
        (GOOD + "2\t1.5\n", r"line 3: multiplicity '1.5'"),
        (GOOD + "2\t\n", r"line 3: multiplicity ''"),
        (GOOD + "2\t 1\n", r"line 3: multiplicity ' 1'"),
        (GOOD + "2\t+1\n", r"line 3: multiplicity '\+1'"),
        (GOOD + "2\t1_0\n", r"line 3: multiplicity '1_0'"),
        (GOOD + "2\t1e2\n", r"line 3: multiplicity '1e2'"),
        (GOOD + "2\t٣\n", r"line 3: multiplicity "),
        (GOOD + "2\t1\r\n", r"line 3: multiplicity '1"),
        (GOOD + f"2\t{MAX_MULTIPLICITY + 1}\n", r"line 3: multiplicity '1000001' .* to 1000000"),
        (GOOD + f"2\t{10**30}\n", r"line 3: multiplicity '1000"),
        (GOOD + "10\t1\n", r"line 3: there is no sample '10'; ids are whole numbers from 0 to 9"),
        (GOOD + f"{2**64}\t1\n", r"line 3: there is no sample '18446744073709551616'"),
        (GOOD + "-1\t1\n", r"line 3: there is no sample '-1'"),
        (GOOD + "x\t1\n", r"line 3: there is no sample 'x'"),
        (GOOD + "\t1\n", r"line 3: there is no sample ''"),
        (GOOD + "00\t1\n", r"lists sample 0 twice, in lines 1 and 3"),
        (GOOD + "5\t1\n1\t0\n", r"lists sample 1 twice, in lines 2 and 4"),
        (GOOD + "a/000.tar/z\t1\n", r"line 3: 'a/000.tar/z' is named otherwise than the first line, by id"),
        ("a/000.tar/z\t1\n2\t1\n", r"line 2: '2' is named otherwise than the first line, by shard and key"),
        ("a/000.tar/z\t1\na/002.tar/z\t1\n", r"line 2: the data set has no shard 'a/002.tar'; did you mean a/00"),
        ("a/000.tar/z\t1\na/000/z\t1\n", r"line 2: the data set has no shard 'a/000/z'; did you mean a/000.tar"),
        ("a/000.tar/z\t1\na/000.tar/Z\t1\n", r"line 2: shard a/000.tar has no sample with the key 'Z'"),
        ("a/000.tar/z\t1\na/000.tar/\t1\n", r"line 2: shard a/000.tar has no sample with the key ''"),
        ("b/000.tar/e.jpg\t1\n", r"line 1: shard b/000.tar has no sample with the key 'e.jpg'; .*first dot"),
        ("b/000.tar/deep/er/100\t1\n", r"line 1: shard b/000.tar has no sample with the key 'deep/er/100'"),
        ("a/001.tar/b\t1\na/001.tar/z\t1\na/001.tar/b\t1\n", r"lists sample 6 twice, in lines 1 and 3"),
        (GOOD + "2\t1\0\n", r"line 3 holds a zero byte"),
        (GOOD + "9" * 2000 + "\t1\n", r"line 3 has more than 1024 bytes"),
        (b"\x1f\x8b\x08\xff\xfe junk", r"line 1 is "),
        (b"0\t1\n\xff\xfe\t1\n", r"line 2: there is no sample '.*xff"),
        (b"x" * 100_000, r"line 1 has more than 1024 bytes"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    read: Callable[[str | bytes], Selection], text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(text)
    assert "selection.tsv" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_that_cannot_be_read(dataset: DatasetIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.tsv cannot be read: No such file"):
        read_selection(tmp_path / "none.tsv", dataset)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_selection(tmp_path, dataset)
