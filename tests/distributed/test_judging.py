"""Two ranks judge as one: the same neighbours, the same classifiers to the last bit, of shards and of folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.neighbors import NearestNeighbors

from dino_dist.config_file import load_config
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.knn import knn_accuracies
from dino_dist.judging.evaluator import Evaluator
from dino_dist.judging.judge import judge_knn, judge_logreg, labelled_judge
from dino_dist.judging.judged_network import JudgedNetwork
from dino_dist.judging.linear_probe import judge_linear
from dino_dist.models.vit import VisionTransformer, ViTShape
from dino_dist.weights.network_weights import NetworkWeights, build_backbone

pytestmark = pytest.mark.distributed

SHAPE = ViTShape(embed_dim=16, depth=3, num_heads=2, patch_size=4, image_px=16, init_std=0.2)


def random_network() -> NetworkWeights:
    """A small network whose weights are the same wherever this is called."""
    torch.manual_seed(5)
    state = VisionTransformer(SHAPE, "sdpa").state_dict()
    return NetworkWeights(source="random", network="teacher", step=7, shape=SHAPE, backbone=state)


def image_folder(folder: Path, counts: dict[str, int], seed: int, bad: tuple[str, ...] = ()) -> Path:
    """Sub-folders of PNGs of several sizes, brighter from class to class; those named in `bad` are no images."""
    generator = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            size = generator.integers(1, 30, 2)
            pixels = generator.integers(0, 80, (*size, 3)) + 50 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{image:03d}.png")
    for name in bad:
        (folder / name).write_bytes(b"no image")
    return folder


def judged(world: World, train: str, test: str, index_dir: str, *more: str) -> JudgedNetwork:
    """The random network and settings for small images."""
    settings = ["data.train=unused", "model.patch_size=4", "eval.resize_px=16", "eval.crop_px=16", "eval.batch_size=5"]
    config = load_config(
        None, [*settings, "data.num_workers=0", f"data.eval_train={train}", f"data.eval_test={test}", *more]
    )
    weights = random_network()
    backbone = build_backbone(weights, world.device, "sdpa")
    return JudgedNetwork(backbone=backbone, weights=weights, config=config, world=world, index_dir=Path(index_dir))


def judge_all(world: World, train: str, test: str, index_dir: str, state: str) -> list[dict[str, Any]]:
    """All three kinds."""
    more = [
        "eval.knn_k=[1,5]",
        "eval.knn_temperatures=[0.5]",
        "eval.linear_blocks=[1,2]",
        "eval.linear_epochs=4",
        "eval.linear_batch_size=8",
        "eval.linear_lr=[0.01,0.1]",
        "eval.logreg_C=[0.1,1.0,10.0]",
    ]
    judge = labelled_judge(judged(world, train, test, index_dir, *more))
    return [judge_knn(judge), judge_linear(judge, Path(state)), judge_logreg(judge)]


COUNTS = {"ant": 19, "bee": 13, "cat": 9}


def test_two_ranks_judge_folders_of_images_as_one(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    train = image_folder(tmp_path / "train", COUNTS, 0, bad=("bee/004.png", "cat/000.png"))
    test = image_folder(tmp_path / "test", {"bee": 6, "cat": 4, "dog": 2}, 1, bad=("bee/000.png",))
    arguments = (str(train), str(test), str(tmp_path / "index"))
    alone = judge_all(World(), *arguments, str(tmp_path / "one"))
    for result in alone:
        assert result["classes"] == 3
        assert (result["train_images"], result["test_images"], result["bad_images"]) == (39, 11, 3)
        assert [line.split(": ")[0] for line in result["first_bad_images"]] == [
            str(train / "bee/004.png"),
            str(train / "cat/000.png"),
            str(test / "bee/000.png"),
        ]
    assert len(alone[1]["results"]) == 8
    for answer in ranks(2, judge_all, *arguments, str(tmp_path / "two")):
        assert answer == alone


def thumbnails(world: World, test: str, index_dir: str, ids: list[int]) -> Any:
    network = judged(world, test, test, index_dir, "eval.batch_size=2")
    return Evaluator(network.config, world, Path(index_dir)).thumbnails(ids, 8).numpy()


def test_ranks_share_out_the_pictures_of_the_projector(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    test = image_folder(tmp_path / "test", COUNTS, 0)
    arguments = (str(test), str(tmp_path / "index"), [40, 3, 7, 0, 12])
    alone = thumbnails(World(), *arguments)
    assert alone.shape == (5, 3, 8, 8)
    means = alone.mean((1, 2, 3))
    assert means[0] > means[4], "cats are brighter than ants"
    for size in (2, 7):  # more ranks than pictures
        for found in ranks(size, thumbnails, *arguments):
            np.testing.assert_array_equal(found, alone)


def test_labels_may_have_gaps_and_test_classes_may_be_new(tmp_path: Path) -> None:
    """The same images under numbers that leave gaps, one of them for a class that only the test images have."""
    train = image_folder(tmp_path / "train", COUNTS, 0)
    test = image_folder(tmp_path / "test", {"ant": 5, "bee": 6, "cat": 4, "dog": 2}, 1)

    def listed(folder: Path, numbers: dict[str, int]) -> str:
        files = [(file, number) for name, number in numbers.items() for file in sorted((folder / name).iterdir())]
        path = tmp_path / f"{folder.name}.tsv"
        path.write_text("".join(f"{file}\t{number}\n" for file, number in files))
        return str(path)

    index = str(tmp_path / "index")
    by_folder = judge_all(World(), str(train), str(test), index, str(tmp_path / "one"))
    numbers = {"ant": 3, "bee": 5, "cat": 70000}
    test_numbers = {**numbers, "dog": 4}
    by_list = judge_all(World(), listed(train, numbers), listed(test, test_numbers), index, str(tmp_path / "two"))
    for kind in range(3):
        assert by_list[kind]["results"] == by_folder[kind]["results"]
    tops = [score["top1"] for score in by_list[1]["results"]]
    assert 0 < max(tops) <= 15 / 17, "a class that training lacks is always missed"
    assert by_list[2]["logreg_top1"] == by_folder[2]["logreg_top1"] <= 15 / 17


def test_damage_of_any_length_is_left_out_and_counted(tmp_path: Path) -> None:
    """Two classes with more undecodable files in a row than good ones: neither ends the evaluation."""
    bad = tuple(f"{name}/{number}.png" for name in ("bee", "cat") for number in range(100, 140))
    train = image_folder(tmp_path / "train", COUNTS, 0, bad=bad)
    test = image_folder(tmp_path / "test", {"bee": 6, "cat": 4}, 1, bad=bad[:30])
    result = judge_knn(labelled_judge(judged(World(), str(train), str(test), str(tmp_path / "index"))))
    assert (result["train_images"], result["test_images"], result["bad_images"]) == (41, 10, 110)


class Killed(Exception):
    """Stands for the end of the process."""


def killed_sweep(world: World, train: str, index_dir: str, state: str, at: int) -> None:
    """A sweep that ends without a word after `at` epochs."""

    def tell(what: str, done: int, total: int) -> None:
        if what.startswith("epochs") and done == at:
            raise Killed

    try:
        judge_linear(labelled_judge(sweep_network(world, train, index_dir), tell), Path(state), save_every_s=0.0)
    except Killed:
        return
    raise AssertionError("it was to be killed")


def sweep(world: World, train: str, index_dir: str, state: str) -> tuple[dict[str, Any], list[int]]:
    """The result of a whole sweep, and the epochs that it told of."""
    told = []
    judge = labelled_judge(
        sweep_network(world, train, index_dir),
        lambda what, done, total: told.append(done) if what.startswith("epochs") else None,
    )
    return judge_linear(judge, Path(state), save_every_s=0.0), told


def sweep_network(world: World, train: str, index_dir: str) -> JudgedNetwork:
    more = ["eval.linear_epochs=5", "eval.linear_batch_size=8", "eval.linear_blocks=[1,3]", "eval.linear_augment=true"]
    return judged(world, train, train, index_dir, *more)


def test_a_killed_sweep_goes_on_from_its_state_on_another_number_of_ranks(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    train = str(image_folder(tmp_path / "train", COUNTS, 0, bad=("bee/004.png",)))
    index = str(tmp_path / "index")
    whole, told = sweep(World(), train, index, str(tmp_path / "whole"))
    assert told == [1, 2, 3, 4, 5]
    assert (whole["train_images"], whole["test_images"], whole["bad_images"]) == (40, 40, 2)
    state = str(tmp_path / "state")
    ranks(2, killed_sweep, train, index, state, 3)
    resumed, told = sweep(World(), train, index, state)
    assert told == [3, 4, 5], "epochs 1 to 3 are not trained again"
    assert resumed == whole
    for name in sorted(path.name for path in (tmp_path / "whole").iterdir()):
        ours, theirs = load_file(tmp_path / "state" / name), load_file(tmp_path / "whole" / name)
        assert {key: array.tobytes() for key, array in ours.items()} == {
            key: array.tobytes() for key, array in theirs.items()
        }
    again, told = sweep(World(), train, index, state)
    assert again == whole, "the bad train image too, although train images are not read again"
    assert told == [5]


def refused_sweep(world: World, train: str, index_dir: str, state: str, diverged: bool) -> str:
    network = sweep_network(world, train, index_dir)
    if diverged:
        torch.nn.init.constant_(network.backbone.norm.weight, 3e38)
        torch.nn.init.constant_(network.backbone.norm.bias, 3e38)
    with pytest.raises(UserError) as caught:
        judge_linear(labelled_judge(network), Path(state))
    return f"{type(caught.value).__name__}: {caught.value}"


def test_what_a_sweep_refuses_is_said_once(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    train, index, state = str(image_folder(tmp_path / "train", COUNTS, 0)), str(tmp_path / "index"), tmp_path / "state"
    said = ranks(2, refused_sweep, train, index, str(state), True)
    assert "of 41 train images are not finite" in said[0]
    sweep(World(), train, index, str(state))
    files = sorted(state.iterdir())
    assert len(files) == 4
    files[-1].write_bytes(b"junk")
    damaged = ranks(2, refused_sweep, train, index, str(state), False)
    assert f"{files[-1]} is no state of a sweep" in damaged[0]
    for answer in (said, damaged):
        assert answer[0].startswith("UserError: ")
        assert answer[1] == answer[0].replace("UserError", "SaidByRankZero", 1)
    left = image_folder(tmp_path / "left", {"ant": 4, "bee": 1}, 0, bad=("bee/000.png",))
    only = ranks(2, refused_sweep, str(left), index, str(tmp_path / "other"), False)
    assert "all 4 train images have label 0" in only[0]


def signs(count: int, seed: int) -> torch.Tensor:
    """Rows of 16 ones and minus ones: lengths and products are exact, and very many are equal."""
    return torch.randint(0, 2, (count, 16), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def labels_of(count: int) -> torch.Tensor:
    return torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(3))


def hits(world: World, k: int, temperature: float, labels: list[int]) -> float:
    """The share of the 51 test rows whose prediction is that of `labels`."""
    (result,) = knn_accuracies(
        *(signs(200, 1), labels_of(200), signs(51, 2), torch.tensor(labels)),
        k=[k],
        temperatures=[temperature],
        world=world,
    )
    return result.top1


def all_hits(world: World, expected: list[tuple[int, float, list[int]]]) -> list[float]:
    return [hits(world, *setting) for setting in expected]


def test_any_ranks_predict_what_scikit_learns_exact_neighbors_do(ranks: Callable[..., list[Any]]) -> None:
    """Judged by its predictions as labels, every test row has to be a hit."""
    train, test, labels = signs(200, 1).numpy(), signs(51, 2).numpy(), labels_of(200).numpy()
    search = NearestNeighbors(n_neighbors=200, algorithm="brute", metric="cosine").fit(train)
    distances, indices = search.kneighbors(test)
    expected = []
    for temperature in (0.07, 0.2):
        for k in (1, 10, 20):
            winners = []
            for distance, index in zip(distances, indices, strict=True):
                nearest = np.lexsort((index, distance))[:k]
                votes = np.bincount(labels[index[nearest]], np.exp(-distance[nearest] / temperature), 4)
                winners.append(int(votes.argmax()))
            expected.append((k, temperature, winners))
    assert {winner for _, _, winners in expected for winner in winners} == {0, 1, 2, 3}
    everything = [1.0] * len(expected)
    assert all_hits(World(), expected) == everything
    for size in (2, 3):
        assert ranks(size, all_hits, expected) == [everything] * size
    one_wrong = [(k, temperature, [(winners[0] + 1) % 4, *winners[1:]]) for k, temperature, winners in expected]
    assert all_hits(World(), one_wrong) == [50 / 51] * len(expected)
