"""k-NN equals scikit-learn's exact neighbours, for any number of images and any chunking."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from dino_dist.dist import World
from dino_dist.errors import StopAsked, UserError
from dino_dist.eval.features import extract
from dino_dist.eval.knn import (
    KnnAccuracy,
    knn_accuracies,
    knn_accuracy,
    knn_predictions,
    nearest_neighbors,
)


def blobs(images: int, classes: int, seed: int, *, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unnormalised clusters, float64; the class centers depend on the number of classes alone."""
    centers = torch.randn(classes, 12, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    noise = torch.randn(images, 12, generator=generator, dtype=torch.float64)
    return centers[labels] + spread * noise, labels


@pytest.mark.parametrize("k", [1, 5, 20, 300])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_predictions_equal_scikit_learn_in_float64(k: int, temperature: float) -> None:
    train, train_labels = blobs(300, 7, 0)
    test, _ = blobs(101, 7, 1)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.numpy(), train_labels.numpy())
    probabilities = reference.predict_proba(test.numpy())
    (predicted,) = knn_predictions(
        train, train_labels, test, k=[k], temperatures=[temperature], test_chunk=32, train_chunk=64
    ).values()
    assert predicted[:, 0].tolist() == reference.predict(test.numpy()).tolist()
    voted = np.take_along_axis(probabilities, predicted.clamp(min=0).numpy(), 1)
    order = -np.sort(-probabilities, axis=1)[:, :5]
    np.testing.assert_allclose(np.where(predicted.numpy() < 0, 0.0, voted), order, atol=1e-12)


def reference_votes(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int, temperature: float) -> list[int]:
    """scikit-learn's exact neighbours, equal ones by index; the same vote, equal ones by class."""
    search = NearestNeighbors(n_neighbors=len(train), algorithm="brute", metric="cosine").fit(train)
    distances, indices = search.kneighbors(test)
    winners = []
    for distance, index in zip(distances, indices, strict=True):
        nearest = np.lexsort((index, distance))[:k]
        votes: dict[int, float] = {}
        for place in nearest:
            label = int(labels[index[place]])
            votes[label] = votes.get(label, 0.0) + float(np.exp((distance[nearest[0]] - distance[place]) / temperature))
        winners.append(min(votes, key=lambda label: (-votes[label], label)))
    return winners


def signs(count: int, seed: int) -> torch.Tensor:
    """Rows of 16 ones and minus ones: lengths and products are exact, and very many are equal."""
    return torch.randint(0, 2, (count, 16), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def scattered_labels(count: int, seed: int) -> torch.Tensor:
    """Five classes, whose numbers lie up to two thousand millions apart."""
    numbers = torch.tensor([0, 3, 1000, 70_000, 2_000_000_000])
    return numbers[torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(seed))]


KS, TEMPERATURES = [1, 3, 10, 20, 100, 1000], [0.03, 0.07, 0.5]


def test_predictions_equal_scikit_learns_exact_neighbors_where_very_many_are_tied() -> None:
    train, labels, test = signs(300, 20), scattered_labels(300, 21), signs(70, 22)
    predicted = knn_predictions(train, labels, test, k=KS, temperatures=TEMPERATURES, test_chunk=33, train_chunk=77)
    for k in KS:
        for temperature in TEMPERATURES:
            expected = reference_votes(train.numpy(), labels.numpy(), test.numpy(), k, temperature)
            assert predicted[k, temperature][:, 0].tolist() == expected, (k, temperature)


def test_all_temperatures_at_once_are_those_one_by_one() -> None:
    (train, train_labels), (test, test_labels) = blobs(200, 4, 2), blobs(50, 4, 3)
    args = (train, train_labels, test, test_labels)
    at_once = knn_accuracies(*args, k=[5, 1], temperatures=[0.5, 0.07, 0.5])
    assert [(result.k, result.temperature) for result in at_once] == [(5, 0.5), (1, 0.5), (5, 0.07), (1, 0.07)]
    one_by_one = [knn_accuracy(*args, k=[5, 1], temperature=heat) for heat in (0.5, 0.07)]
    assert at_once == [results[k] for results in one_by_one for k in (5, 1)]


def test_a_hundred_thousand_classes_fit_in_memory() -> None:
    train = torch.eye(8).repeat(12_500, 1)
    labels = torch.arange(100_000)
    assert knn_predictions(train, labels, torch.eye(8)[:3], k=[1], temperatures=[0.07])[1, 0.07][:, 0].tolist() == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(("train_chunk", "test_chunk"), [(1, 1), (7, 3), (1000, 1000)])
def test_chunks_do_not_matter(train_chunk: int, test_chunk: int) -> None:
    train, train_labels = blobs(200, 4, 2)
    test, test_labels = blobs(50, 4, 3)
    args = (train, train_labels, test, test_labels)
    assert knn_accuracy(*args, k=[1, 10], train_chunk=train_chunk, test_chunk=test_chunk) == knn_accuracy(
        *args, k=[1, 10]
    )


@pytest.mark.parametrize("train_chunk", [2, 5, 100])
def test_ties_go_to_the_lowest_index(train_chunk: int) -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    train = rows[torch.arange(40) % 2]
    similarity, index = nearest_neighbors(train, torch.tensor([[0.0, 1.0]]), k=25, train_chunk=train_chunk)
    assert index[0].tolist() == [*range(1, 40, 2), 0, 2, 4, 6, 8]
    assert similarity[0].tolist() == [1.0] * 20 + [0.0] * 5


def test_a_tied_vote_goes_to_the_lowest_class() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert knn_predictions(train, torch.tensor([4, 2]), train[:1], k=[2], temperatures=[0.07])[2, 0.07].tolist() == [
        [2, 4]
    ]
    three = torch.tensor([4, 2, 9])
    mirrored = train[[0, 1, 1]] * torch.tensor([[1.0], [1.0], [-1.0]])
    assert knn_predictions(mirrored, three, train[:1], k=[2], temperatures=[0.07])[2, 0.07].tolist() == [[2, 4, -1]]


def test_one_test_image_and_fewer_train_images_than_k() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    result = knn_accuracy(
        train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]]), torch.tensor([0]), k=[1, 20], temperature=0.07
    )
    assert result == {
        1: KnnAccuracy(k=1, temperature=0.07, top1=1.0, top5=1.0),
        20: KnnAccuracy(k=20, temperature=0.07, top1=1.0, top5=1.0),
    }


def test_a_class_without_a_vote_is_no_hit() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    result = knn_accuracy(train, torch.tensor([0, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([1]), k=[1])
    assert result[1].top5 == 0.0


def test_a_test_class_that_the_train_set_lacks_is_wrong_and_no_crash() -> None:
    train, train_labels = blobs(30, 3, 4)
    assert knn_accuracy(train, train_labels, train[:2], torch.tensor([7, 900]), k=[5])[5].top5 == 0.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 1], "1 of 3 train images have no label"),
        ([4, 4, 4], "all 3 train images have label 4, at least two classes"),
        ([], "the train set has no image"),
    ],
)
def test_labels_that_cannot_be_used_are_a_user_error(labels: list[int], message: str) -> None:
    features = torch.randn(len(labels), 2)
    with pytest.raises(UserError, match=message):
        knn_accuracy(features, torch.tensor(labels, dtype=torch.int64), torch.randn(1, 2), torch.tensor([0]), k=[1])


def test_features_that_are_not_finite_are_a_user_error() -> None:
    train, train_labels = blobs(30, 3, 4)
    train[3, 2] = torch.nan
    with pytest.raises(UserError, match="features of 1 of 30 train images are not finite"):
        knn_predictions(train, train_labels, train[:1], k=[1], temperatures=[0.07])


def _rank(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size)
    world = World(rank=rank, size=size)
    images, labels = blobs(41, 4, 6)
    ids = torch.arange(41).flip(0) * 3
    # Rank r holds r shares of the images, so the first has none; batches of 4 end unevenly.
    shares = size * (size - 1) // 2
    bounds = [41 * (r * (r - 1) // 2) // shares for r in range(size + 1)]
    mine = torch.arange(bounds[rank], bounds[rank + 1])
    forwards = 0

    def forward(batch: torch.Tensor) -> torch.Tensor:
        # A collective, as the forward of a sharded model is one.
        nonlocal forwards
        forwards += 1
        dist.all_reduce(torch.ones(1))
        return batch * 2

    result = extract(
        forward, [(images[i], labels[i], ids[i]) for i in torch.split(mine, 4)] if len(mine) else [], world
    )
    assert len(set(world.gather(forwards))) == 1
    assert torch.equal(result.ids_N, ids.flip(0))
    assert torch.equal(result.features_ND, images.flip(0) * 2)
    assert torch.equal(result.labels_N, labels.flip(0))
    test, test_labels = blobs(2 * size - 1, 4, 7)
    alone = knn_accuracy(result.features_ND, result.labels_N, test, test_labels, k=[1, 7])
    assert knn_accuracy(result.features_ND, result.labels_N, test, test_labels, k=[1, 7], world=world) == alone
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_unequal_shares_gather_the_same_features_and_accuracy(size: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, size, tmp_path)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * size


def test_features_keep_no_graph() -> None:
    linear = torch.nn.Linear(3, 2)
    batch = (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    assert not extract(linear, [batch], World()).features_ND.requires_grad


def test_an_id_that_comes_twice_and_no_image_at_all_are_refused() -> None:
    batch = (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="image id 5 came twice"):
        extract(lambda images: images, [batch], World())
    with pytest.raises(ValueError, match="no image"):
        extract(lambda images: images, [], World())


def _refused(world: World) -> str:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        yield torch.ones(2, 3), torch.zeros(2), torch.arange(2) + 10 * world.rank
        if world.rank == 1:
            raise UserError("a file is gone")
        yield torch.ones(2, 3), torch.zeros(2), torch.arange(2) + 10 * world.rank + 5

    try:
        extract(lambda images: world.all_reduce_sum_(images.clone()), batches(), world)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.distributed
def test_what_one_rank_cannot_read_ends_all_and_rank_zero_says_it(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(3, _refused) == ["UserError: a file is gone", *["SaidByRankZero: a file is gone"] * 2]


def _not_finite(world: World, split: str, num_test: int) -> str:
    train, train_labels = blobs(20, 4, 1)
    test, test_labels = blobs(num_test, 4, 2)
    {"train": train, "test": test}[split][-1, 0] = torch.nan
    with pytest.raises(UserError) as caught:
        knn_accuracy(train, train_labels, test, test_labels, k=[1], world=world)
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("split", "num_test", "where"),
    [
        pytest.param("test", 5, "1 of 5 test images", id="in one rank's share"),
        pytest.param("train", 1, "1 of 20 train images", id="a rank without a share"),
    ],
)
def test_a_diverged_feature_ends_all_ranks(
    ranks: Callable[..., list[Any]], split: str, num_test: int, where: str
) -> None:
    said = ranks(2, _not_finite, split, num_test)
    assert said == [f"the features of {where} are not finite; the model has diverged, judge an earlier checkpoint"] * 2


def _interrupted(world: World) -> tuple[int, int]:
    seen = 0

    def forward(images: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return world.all_reduce_sum_(images.clone())

    batches = [(torch.ones(2, 3), torch.zeros(2), torch.arange(2) + 10 * n + 100 * world.rank) for n in range(5)]
    try:
        # Only rank 1 hears of it, before its third batch.
        extract(forward, batches, world, lambda: 2 if world.rank == 1 and seen == 2 else 0)
    except StopAsked as asked:
        return seen, asked.word
    return seen, 0


@pytest.mark.distributed
def test_a_wish_to_stop_on_one_rank_ends_the_evaluation_on_all(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(2, _interrupted) == [(2, 2), (2, 2)]
