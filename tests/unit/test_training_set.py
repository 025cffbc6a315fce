"""Training data: a plain data set as it always was, or a mixture file joined under one numbering."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dino_dist.data.order.order import Order
from dino_dist.data.order.training_set import TrainingSet, open_training_set
from dino_dist.data.reading.decode import BadSample, DecodeRules
from dino_dist.data.reading.shard_bytes import ShardBytes
from dino_dist.data.reading.stream import Sample, SampleReader
from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import UserError

COUNTS_A, COUNTS_B = [4, 6], [3, 5, 2]
"""Twice ten samples."""


@pytest.fixture(scope="module")
def folder(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data sets `a` and `b` below it."""
    top = tmp_path_factory.mktemp("sets")
    make_shards(top / "a", COUNTS_A, seed=1)
    make_shards(top / "b", COUNTS_B, seed=2)
    return top


@pytest.fixture
def open_text(folder: Path) -> Callable[[str], TrainingSet]:
    def open_it(text: str, name: str = "mixture.yaml") -> TrainingSet:
        (folder / name).write_text(text)
        return open_training_set(str(folder / name), fallback_dir=folder)

    return open_it


def epoch_ids(training_set: TrainingSet, epoch: int = 0) -> list[int]:
    n = training_set.num_samples
    order = training_set.order(seed=3, shards_per_block=2)
    assert order.samples_per_epoch == n
    return order.ids(epoch * n, (epoch + 1) * n).sample_ids.tolist()


def test_a_plain_data_set_has_the_order_and_hash_it_always_had(folder: Path) -> None:
    dataset = open_dataset(str(folder / "a"), fallback_dir=folder)
    training_set = open_training_set(str(folder / "a"), fallback_dir=folder)
    assert training_set.hash == training_set.dataset.hash == dataset.hash
    assert training_set.num_samples == 10
    assert training_set.shares() == []
    plain = Order(shard_counts=np.array(COUNTS_A), seed=3, shards_per_block=2).ids(0, 35)
    ours = training_set.order(seed=3, shards_per_block=2).ids(0, 35)
    assert all(np.array_equal(one, other) for one, other in zip(plain, ours, strict=True))


def test_sets_are_joined_one_after_the_other(open_text: Callable[[str], TrainingSet], folder: Path) -> None:
    joined = open_text("sets: [{shards: a}, {shards: b}]").dataset
    assert joined.num_samples == 20
    assert [shard.name for shard in joined.shards] == ["0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar", "1/2.tar"]
    assert joined.first_ids.tolist() == [0, 4, 10, 13, 18, 20]
    rules = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)
    parts = [SampleReader(dataset=open_dataset(str(folder / x), fallback_dir=folder), rules=rules) for x in "ab"]
    whole = SampleReader(dataset=joined, rules=rules)
    for sample_id in range(20):
        found, expected = whole.read_exactly(sample_id), parts[sample_id // 10].read_exactly(sample_id % 10)
        assert isinstance(found, Sample)
        assert isinstance(expected, Sample)
        assert np.array_equal(found.pixels, expected.pixels)
        assert found.label == expected.label


def test_without_weights_an_epoch_is_each_sample_once(open_text: Callable[[str], TrainingSet]) -> None:
    training_set = open_text("sets: [{shards: a}, {shards: b}]")
    assert training_set.num_samples == 20
    for epoch in range(3):
        assert sorted(epoch_ids(training_set, epoch)) == list(range(20))
    assert epoch_ids(training_set, 0) != epoch_ids(training_set, 1)


def test_weights_share_an_epoch_as_long_as_the_sets_together(open_text: Callable[[str], TrainingSet]) -> None:
    training_set = open_text("sets: [{shards: a, weight: 0.7}, {shards: b, weight: 0.3}]")
    assert training_set.num_samples == 20
    for epoch in range(3):
        assert sum(i < 10 for i in epoch_ids(training_set, epoch)) == 14
    (first, second) = training_set.shares()
    assert "14 an epoch (70.00%; 1.4 passes)" in first
    assert "6 an epoch (30.00%; 0.6 passes)" in second


def test_epoch_samples_sets_the_length(open_text: Callable[[str], TrainingSet]) -> None:
    training_set = open_text("epoch_samples: 7\nsets: [{shards: a, weight: 2}, {shards: b, weight: 1}]")
    assert training_set.num_samples == 7
    assert sum(i < 10 for i in epoch_ids(training_set)) == 5
    assert open_text("epoch_samples: 50\nsets: [{shards: a}]").num_samples == 50


def test_a_selection_takes_its_samples_as_often_as_it_says(
    open_text: Callable[[str], TrainingSet], folder: Path
) -> None:
    (folder / "b.tsv").write_text("0.tar/00001\t2\n2.tar/00009\t3\n1.tar/00004\t0\n")
    training_set = open_text("sets: [{shards: a}, {shards: b, selection: b.tsv}]")
    assert training_set.num_samples == 15
    assert training_set.dataset.num_samples == 20, "unselected samples keep their ids"
    for epoch in range(3):
        expected = {**dict.fromkeys(range(10), 1), 11: 2, 19: 3}
        assert Counter(epoch_ids(training_set, epoch)) == Counter(expected)
    order = training_set.order(seed=3, shards_per_block=2)
    stream = order.ids(0, 15)
    keys = set(zip(stream.sample_ids.tolist(), stream.repeats.tolist(), strict=True))
    assert {key for key in keys if key[0] >= 10} == {(11, 0), (11, 1), (19, 0), (19, 1), (19, 2)}
    assert sorted(order.shards_from(0, 9)) == [0, 1, 2, 4]


def test_what_a_selection_leaves_out_stands_in_for_nothing(
    open_text: Callable[[str], TrainingSet], folder: Path, make_shards: Callable[..., Path]
) -> None:
    """Of shard 0.tar of set b (ids 10, 11, 12...) the second sample is bad, and the third was left out."""
    (folder / "b.tsv").write_text("0.tar/00000\t1\n0.tar/00001\t1\n")
    training_set = open_text("sets: [{shards: a}, {shards: b, selection: b.tsv}]")
    first = int(training_set.sets[1].first_id)
    shard = training_set.dataset.locate_one(first)
    assert training_set.members(shard).tolist() == [first, first + 1]
    assert training_set.members(0).tolist() == list(range(int(training_set.dataset.first_ids[1])))

    class OneBad(ShardBytes):
        def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
            record = self.dataset.records(shard)[first + 1 - int(self.dataset.first_ids[shard])]
            if offset == int(record["offset"]):
                raise BadSample("for this test")
            return super().read(shard, offset, size, crc32)

    rules = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)
    source = OneBad(dataset=training_set.dataset)
    picky = SampleReader(dataset=training_set.dataset, rules=rules, source=source, members=training_set.members)
    usual = SampleReader(dataset=training_set.dataset, rules=rules, source=source)
    assert np.array_equal(picky.read(first + 1).pixels, picky.read(first).pixels)
    assert not np.array_equal(usual.read(first + 1).pixels, usual.read(first).pixels)
    assert [record.sample_id for record in picky.read(first + 1).bad] == [first + 1]


def test_the_same_data_twice_is_two_sets(open_text: Callable[[str], TrainingSet]) -> None:
    training_set = open_text("sets: [{shards: a, weight: 1}, {shards: a, weight: 1}]")
    ids = np.array(epoch_ids(training_set))
    assert sorted(ids.tolist()) == list(range(20))
    assert ids[ids < 10].tolist() != (ids[ids >= 10] - 10).tolist(), "each is shuffled in its own way"


def test_the_hash_tells_what_changes_the_stream(open_text: Callable[[str], TrainingSet], folder: Path) -> None:
    (folder / "one.tsv").write_text("0\t1\n")
    (folder / "two.tsv").write_text("0\t2\n")
    texts = [
        "sets: [{shards: a}]",
        "sets: [{shards: b}]",
        "sets: [{shards: a}, {shards: b}]",
        "sets: [{shards: b}, {shards: a}]",
        "sets: [{shards: a, weight: 0.7}, {shards: b, weight: 0.3}]",
        "sets: [{shards: a, weight: 0.6}, {shards: b, weight: 0.4}]",
        "epoch_samples: 21\nsets: [{shards: a}, {shards: b}]",
        "sets: [{shards: a, selection: one.tsv}, {shards: b}]",
        "sets: [{shards: a, selection: two.tsv}, {shards: b}]",
        "epoch_samples: 11\nsets: [{shards: a, weight: 1, selection: two.tsv}, {shards: b, weight: 10}]",
    ]
    sets = [open_text(text) for text in texts]
    assert len({each.hash for each in sets}) == len(texts)
    streams = [np.stack(each.order(seed=0, shards_per_block=2).ids(0, 60)).tobytes() for each in sets]
    assert len(set(streams)) == len(texts)
    alike = ["sets: [{shards: a, weight: 7}, {shards: b, weight: 3}]", f"sets:\n- {{shards: {folder}/a, weight: 0.7}}"]
    alike[1] += "\n- shards: b/{0..2}.tar\n  weight: 0.3\nepoch_samples: 20\n"
    for text in alike:
        assert open_text(text).hash == sets[4].hash, "it means the same"


def test_paths_start_at_the_file(
    open_text: Callable[[str], TrainingSet], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_text("sets: [{shards: a}]").hash
    monkeypatch.chdir(tmp_path)
    assert open_training_set(str(folder / "mixture.yaml"), fallback_dir=tmp_path).hash == expected
    monkeypatch.chdir(folder)
    assert open_training_set("mixture.yaml", fallback_dir=tmp_path).hash == expected
    (folder / "below").mkdir()
    assert open_text("sets: [{shards: ../a}]", "below/mixture.yml").hash == expected


def test_it_travels_small(open_text: Callable[[str], TrainingSet]) -> None:
    order = open_text("sets: [{shards: a}, {shards: b}]").order(seed=3, shards_per_block=2)
    assert np.array_equal(pickle.loads(pickle.dumps(order)).ids(5, 50).sample_ids, order.ids(5, 50).sample_ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"mixture.yaml is null; it must hold keys of sets, epoch_samples"),
        ("- a\n", r"mixture.yaml is \['a'\]; it must hold keys"),
        ("sets: [{shards: a}", r"cannot be read as YAML"),
        ("sets: [{shards: a}]\nsets: [{shards: b}]", r"line 2 gives 'sets' a second time"),
        ("sets: [{shards: a, shards: b}]", r"gives 'shards' a second time"),
        ("set: [{shards: a}]", r"unknown key 'set'; did you mean sets\?"),
        ("sets: [{shards: a}]\nepoch_sample: 5", r"unknown key 'epoch_sample'; did you mean epoch_samples\?"),
        ("sets: [{shards: a, wieght: 5}]", r"sets\[0\]: unknown key 'wieght'; did you mean weight\?"),
        ("sets: [{shards: a, 3: 5}]", r"sets\[0\]: unknown key 3"),
        ("epoch_samples: 5", r"sets=null must be a list"),
        ("sets: []", r"sets=\[\] must be a list of 1 to"),
        ("sets: {shards: a}", r"sets={'shards': 'a'} must be a list"),
        ("sets: [a]", r"sets\[0\] is 'a'; it must hold keys of shards, weight, selection"),
        ("sets: [{weight: 1}]", r"sets\[0\].shards=null must be a folder"),
        ("sets: [{shards: [a, b]}]", r"sets\[0\].shards=\['a', 'b'\] must be a folder"),
        ("sets: [{shards: other.yaml}]", r"sets\[0\].shards='other.yaml' is itself a mixture"),
        ("sets: [{shards: a, selection: 5}]", r"sets\[0\].selection=5 must be the path"),
        ("sets: [{shards: a, weight: 0}]", r"sets\[0\].weight=0 must be a positive number"),
        ("sets: [{shards: a, weight: -1.5}]", r"weight=-1.5 must be"),
        ("sets: [{shards: a, weight: .nan}]", r"weight=nan must be"),
        ("sets: [{shards: a, weight: .inf}]", r"weight=inf must be"),
        ("sets: [{shards: a, weight: true}]", r"weight=True must be"),
        ("sets: [{shards: a, weight: 1e-3}]", r"weight='1e-3' must be a positive .* write 0.001"),
        ("sets: [{shards: a, weight: 1}, {shards: b}]", r"sets\[1\] has no weight but others have"),
        ("epoch_samples: 0\nsets: [{shards: a}]", r"epoch_samples=0 must be a whole number from 1"),
        ("epoch_samples: 5.5\nsets: [{shards: a}]", r"epoch_samples=5.5 must be"),
        ("epoch_samples: true\nsets: [{shards: a}]", r"epoch_samples=True must be"),
        ("sets: [{shards: a, weight: 1}, {shards: b, weight: 100}]", r"sets\[0\] \(.*a\) gets no sample in an epoch"),
        ("sets: [{shards: nowhere}]", r"nowhere does not exist"),
        ("sets: [{shards: a, selection: nowhere.tsv}]", r"nowhere.tsv cannot be read"),
        ("sets: &s [*s, *s]", r"sets\[0\] is \["),
        ("x: &a [1,1,1,1]\nsets: &b [*a,*a,*a,*a]\nepoch_samples: [*b,*b,*b,*b]", r"unknown key 'x'"),
        ("sets: [{shards: a, ? [1, 2] : 5}]", r"cannot be read as YAML"),
        ("sets: !!python/object/apply:os.system ['true']", r"cannot be read as YAML"),
        ("sets: [{shards: 2020-13-45}]", r"cannot be read as YAML"),
    ],
)
def test_what_is_wrong_is_named(open_text: Callable[[str], TrainingSet], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_text(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_mixture_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml cannot be read: No such file"):
        open_training_set(str(tmp_path / "none.yaml"), fallback_dir=tmp_path)
