"""k-NN accuracy of features: exact cosine neighbours and a weighted vote (arXiv:2104.14294, appendix F.1; 1805.01978).

Letters: N train images, M test images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_dist.dist import World
from dino_dist.errors import UserError

_MAX_VOTES = 2**25
"""Cells of one table of votes: with very many classes fewer images vote at once."""


@dataclass(frozen=True, kw_only=True)
class KnnAccuracy:
    """Fractions from 0 to 1 of the test images."""

    k: int
    temperature: float
    top1: float
    top5: float
    """The right class is among the five with most votes (all of them where there are fewer)."""


def nearest_neighbors(train_ND: Tensor, test_MD: Tensor, *, k: int, train_chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """The `k` train rows with the largest dot product for each test row: (similarities [M, k], indices [M, k]).

    Best first, equal ones by index, whatever the chunks. `k` is at most N. Memory is about M * train_chunk numbers.
    """
    best, index = train_ND.new_empty(len(test_MD), 0), torch.empty(len(test_MD), 0, dtype=torch.int64)
    index = index.to(train_ND.device)
    for start in range(0, len(train_ND), train_chunk):
        similarity = test_MD @ train_ND[start : start + train_chunk].T
        chunk_best, chunk_index = _largest(similarity, min(k, similarity.shape[1]))
        # What was found before has the smaller indices and stands first, so a stable sort keeps the order of ties.
        best, index = torch.cat([best, chunk_best], 1), torch.cat([index, chunk_index + start], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :k], index.gather(1, order)[:, :k]
    return best, index


def _largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like `topk`, with equal values by index: topk alone may keep any of those that equal the k-th."""
    value, index = similarity.topk(k, dim=1)
    ambiguous = (similarity >= value[:, -1:]).sum(1) > k
    if bool(ambiguous.any()):
        full, full_index = similarity[ambiguous].sort(dim=1, descending=True, stable=True)
        value[ambiguous], index[ambiguous] = full[:, :k], full_index[:, :k]
    index, by_index = index.sort(dim=1)
    value, by_value = value.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, by_value)


def knn_predictions(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: Sequence[int],
    temperatures: Sequence[float],
    test_chunk: int = 1024,
    train_chunk: int = 65536,
) -> dict[tuple[int, float], Tensor]:
    """The best classes of each test image for each k and temperature, from one search for neighbours.

    [M, min(5, C)] int64, most votes first, ties by class number; a place that no class has won by a vote (k below 5,
    say) holds -1. A neighbor votes for its label with exp(cosine / temperature); with fewer than k train images all of
    them vote. Features [N, D] and [M, D] of any float type (computed in theirs, fp32 at least), not normalised by the
    caller. C is the number of train labels that differ, whatever numbers they are.
    `UserError` for missing labels, a single class or features that are not finite.
    """
    check_labels(train_labels, "train")
    train_ND, test_MD = unit_rows(train_features, "train"), unit_rows(test_features, "test")
    if min(k) < 1 or min(temperatures) <= 0:
        raise ValueError(f"k-NN: k={list(k)} must be at least 1 and temperatures {list(temperatures)} above 0")
    labels_N = train_labels.to(train_ND.device)
    classes = torch.unique_consecutive(labels_N.sort().values)
    label_N = torch.searchsorted(classes, labels_N)
    temperatures = list(dict.fromkeys(temperatures))
    parts: dict[tuple[int, float], list[Tensor]] = {(wanted, heat): [] for wanted in k for heat in temperatures}
    for chunk_MD in torch.split(test_MD, min(test_chunk, max(1, _MAX_VOTES // len(classes)))):
        similarity, index = nearest_neighbors(train_ND, chunk_MD, k=min(max(k), len(train_ND)), train_chunk=train_chunk)
        for heat in temperatures:
            for wanted, ranked in _vote(similarity, label_N[index], len(classes), k, heat).items():
                parts[wanted, heat].append(classes[ranked].where(ranked >= 0, -1))
    return {setting: torch.cat(chunks) for setting, chunks in parts.items()}


def _vote(
    similarity: Tensor, label: Tensor, num_classes: int, k: Sequence[int], temperature: float
) -> Mapping[int, Tensor]:
    """Rank classes by the votes of the first k neighbours, for each k. `similarity` and `label` are [M, max k]."""
    votes = similarity.new_zeros(len(label), num_classes)
    # Relative to the nearest neighbour: the ranking is the same and a low temperature cannot overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    ranked: dict[int, Tensor] = {}
    neighbors = similarity.shape[1]
    for rank in range(neighbors):
        # One neighbour at a time: no two additions meet in one cell, so their order is fixed on a GPU too.
        votes.scatter_add_(1, label[:, rank : rank + 1], weight[:, rank : rank + 1])
        for wanted in k:
            if rank + 1 == min(wanted, neighbors):
                most, number = votes.sort(dim=1, descending=True, stable=True)
                ranked[wanted] = number.where(most > 0, -1)[:, :5]
    return ranked


def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int],
    temperatures: Sequence[float],
    world: World | None = None,
    test_chunk: int = 1024,
    train_chunk: int = 65536,
) -> list[KnnAccuracy]:
    """Top-1 and top-5 accuracy for each temperature and each k, in this order. See `knn_predictions`.

    With a `world`, each rank takes a share of the test images and all get the same result (all features on all ranks).
    """
    world = world or World()
    check_labels(train_labels, "train")
    check_labels(test_labels, "test", one_class_is_fine=True)
    for features, split in ((train_features, "train"), (test_features, "test")):
        check_finite(features, split)  # all of them on all ranks, which would else not fail alike
    settings = [(wanted, heat) for heat in dict.fromkeys(temperatures) for wanted in dict.fromkeys(k)]
    mine = slice(world.rank, None, world.size)
    labels_M = test_labels.to(train_features.device)[mine]
    # Per setting: hits at 1, hits at 5. Counts, so that the sum over ranks is exact.
    hits = torch.zeros(len(settings), 2, dtype=torch.int64, device=world.device)
    if len(labels_M):
        predicted = knn_predictions(
            train_features,
            train_labels,
            test_features[mine],
            k=k,
            temperatures=temperatures,
            test_chunk=test_chunk,
            train_chunk=train_chunk,
        )
        for row, setting in enumerate(settings):
            right = predicted[setting] == labels_M.unsqueeze(1)
            hits[row, 0], hits[row, 1] = right[:, 0].sum(), right.any(1).sum()
    share = (world.all_reduce_sum_(hits).double() / len(test_labels)).tolist()
    return [
        KnnAccuracy(k=wanted, temperature=heat, top1=top1, top5=top5)
        for (wanted, heat), (top1, top5) in zip(settings, share, strict=True)
    ]


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int],
    temperature: float = 0.07,
    world: World | None = None,
    test_chunk: int = 1024,
    train_chunk: int = 65536,
) -> dict[int, KnnAccuracy]:
    """`knn_accuracies` at one temperature: by `k`."""
    accuracies = knn_accuracies(
        train_features,
        train_labels,
        test_features,
        test_labels,
        k=k,
        temperatures=[temperature],
        world=world,
        test_chunk=test_chunk,
        train_chunk=train_chunk,
    )
    return {accuracy.k: accuracy for accuracy in accuracies}


def check_labels(labels: Tensor, which: str, *, one_class_is_fine: bool = False) -> None:
    """`UserError` if the images of data.eval_`which` (train or test) cannot be judged by their labels."""
    missing = int((labels < 0).sum())
    if not len(labels):
        raise UserError(f"the {which} set has no image: give data.eval_{which} one or set it to null")
    if missing:
        raise UserError(
            f"{missing} of {len(labels)} {which} images have no label: add a cls member to each (in a folder: "
            f"a sub-folder for each class) or set data.eval_{which} to null"
        )
    if not one_class_is_fine and bool((labels == labels[0]).all()):
        raise UserError(
            f"all {len(labels)} {which} images have label {int(labels[0])}, at least two classes are needed: "
            f"give data.eval_{which} a labelled set or set it to null"
        )


def unit_rows(features: Tensor, which: str) -> Tensor:
    """Rows scaled to length 1, fp32 at least; `UserError` if there is none or one is not finite."""
    if not len(features):
        raise UserError(f"there is no {which} image: give at least one")
    check_finite(features, which)
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def check_finite(features: Tensor, which: str) -> None:
    """`UserError` if a row of the features of the `which` images (train, say) is not finite."""
    bad = int((~torch.isfinite(features)).any(1).sum())
    if bad:
        raise UserError(
            f"the features of {bad} of {len(features)} {which} images are not finite; the model has diverged, "
            "judge an earlier checkpoint"
        )
