"""Average precision equals scikit-learn's and hand-worked examples; protocols, junk, ties and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.retrieval import (
    EASY,
    HARD,
    JUNK,
    PROTOCOLS,
    PUBLISHED_SCALES,
    average_precision,
    precision_at,
    rank_gallery,
    retrieval_forward,
    retrieval_scores,
    same_label,
)
from dino_dist.models.vit import VisionTransformer, ViTShape


def places(length: int, *ones: int) -> Tensor:
    """A ranked list with these places (from 1) marked."""
    row = torch.zeros(1, length, dtype=torch.bool)
    row[0, [place - 1 for place in ones]] = True
    return row


def set_of(seed: int, queries: int = 30, gallery: int = 80, classes: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query and gallery features and labels; float64, so that scikit-learn sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 10, generator=generator, dtype=torch.float64)
    labels = [torch.randint(0, classes, (count,), generator=generator) for count in (queries, gallery)]
    features = [
        centers[label] + 1.5 * torch.randn(len(label), 10, generator=generator, dtype=torch.float64) for label in labels
    ]
    return features[0], features[1], labels[0], labels[1]


def test_hand_worked_examples() -> None:
    none = places(5)
    # Found first and third: by steps (1/1 + 2/3) / 2; trapezoids take the mean with (1, 1/2) just before each.
    assert average_precision(places(5, 1, 3), none, area="steps").item() == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(places(5, 1, 3), none).item() == pytest.approx((1 + (2 / 3 + 1 / 2) / 2) / 2)
    # Found second alone: 1/2 by steps, (1/2 + 0/1) / 2 by trapezoids.
    assert average_precision(places(5, 2), none, area="steps").item() == 0.5
    assert average_precision(places(5, 2), none).item() == 0.25
    # Junk first: what stands second counts as first.
    assert average_precision(places(5, 2), places(5, 1)).item() == 1.0
    # One of two is not in the list at all.
    assert average_precision(places(5, 1), none, num_wanted_Q=torch.tensor([2])).item() == 0.5
    assert math.isnan(average_precision(none, none).item())


def test_hand_worked_precisions() -> None:
    none = places(20)
    assert precision_at(places(20, 1, 3, 12), none, k=1).item() == 1.0
    assert precision_at(places(20, 1, 3, 12), none, k=5).item() == pytest.approx(2 / 5)
    assert precision_at(places(20, 1, 3), none, k=10).item() == pytest.approx(2 / 3), "ends at the last one to find"
    assert precision_at(places(20, 2, 4), places(20, 1, 3), k=5).item() == 1.0, "junk takes no place"
    assert math.isnan(precision_at(none, none, k=5).item())


@pytest.mark.parametrize("seed", range(5))
def test_steps_equal_scikit_learn(seed: int) -> None:
    queries, gallery, query_labels, gallery_labels = set_of(seed)
    scores = retrieval_scores(
        queries, gallery, same_label(query_labels, gallery_labels), protocols=["medium"], area="steps"
    )["medium"]
    cosine = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T
    expected = [
        average_precision_score((gallery_labels == label).numpy(), row.numpy())
        for row, label in zip(cosine, query_labels, strict=True)
    ]
    assert np.abs(scores.average_precision_Q.numpy() - expected).max() < 1e-12
    assert scores.mean_average_precision == pytest.approx(float(np.mean(expected)), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_trapezoids_are_the_area_under_the_curve(seed: int) -> None:
    """Through (recall, precision) after each image: vertical parts, where recall stands still, have no area."""
    wanted = torch.rand(1, 50, generator=torch.Generator().manual_seed(seed)) < 0.2
    found = np.cumsum(wanted[0].numpy())
    recall = np.concatenate([[0.0], found / found[-1]])
    precision = np.concatenate([[1.0], found / np.arange(1, 51)])
    area = np.trapezoid(precision, recall)
    assert average_precision(wanted, torch.zeros_like(wanted)).item() == pytest.approx(float(area), abs=1e-12)


def test_protocols_and_junk_equal_a_gallery_without_the_ignored() -> None:
    """By the benchmark's words: easy finds easy without hard, medium both, hard finds hard without easy."""
    queries, gallery, _, _ = set_of(7)
    codes = torch.randint(0, 4, (30, 80), generator=torch.Generator().manual_seed(7), dtype=torch.int8)
    codes[:, 0], codes[:, 1] = EASY, HARD  # something to find for each
    codes[4] = JUNK
    codes[9][codes[9] == HARD] = 0
    scores = retrieval_scores(queries, gallery, lambda chosen: codes[chosen], area="steps")
    cosine = (torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T).numpy()
    for name, wanted, ignored in (
        ("easy", [EASY], [HARD, JUNK]),
        ("medium", [EASY, HARD], [JUNK]),
        ("hard", [HARD], [EASY, JUNK]),
    ):
        expected = []
        for query, row in enumerate(codes.numpy()):
            kept = ~np.isin(row, ignored)
            truth = np.isin(row[kept], wanted)
            expected.append(average_precision_score(truth, cosine[query, kept]) if truth.any() else np.nan)
        np.testing.assert_allclose(scores[name].average_precision_Q.numpy(), expected, atol=1e-12)
        assert scores[name].num_queries == np.isfinite(expected).sum() == {"hard": 28}.get(name, 29)
        assert scores[name].mean_average_precision == pytest.approx(float(np.nanmean(expected)))


def test_equal_similarities_rank_by_index() -> None:
    gallery = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert rank_gallery(torch.tensor([[1.0, 0.0]]), gallery).tolist() == [[1, 2, 3, 0]]


def _scores_on_ranks(world: World, max_elements: int) -> list[float]:
    queries, gallery, query_labels, gallery_labels = set_of(3)
    relation = same_label(query_labels, gallery_labels)
    score = retrieval_scores(queries, gallery, relation, protocols=["medium"], world=world, max_elements=max_elements)[
        "medium"
    ]
    return [*score.average_precision_Q.tolist(), score.mean_average_precision, *score.precision_at.values()]


@pytest.mark.distributed
def test_ranks_and_chunks_change_nothing(ranks: Callable[..., list[Any]]) -> None:
    whole = _scores_on_ranks(World(), 2**22)
    for max_elements in (1, 7 * 80):
        np.testing.assert_allclose(_scores_on_ranks(World(), max_elements), whole, atol=1e-14)
        for found in ranks(3, _scores_on_ranks, max_elements):
            np.testing.assert_allclose(found, whole, atol=1e-14)


def test_nothing_to_find_and_bad_features_are_refused() -> None:
    queries, gallery, _, _ = set_of(0)
    nothing = same_label(torch.zeros(30), torch.ones(80))
    with pytest.raises(UserError, match="none of the 30 queries"):
        retrieval_scores(queries, gallery, nothing, protocols=["medium"])
    gallery[3, 2] = torch.nan
    with pytest.raises(UserError, match="1 of 80 gallery images are not finite"):
        retrieval_scores(queries, gallery, nothing)
    with pytest.raises(UserError, match="no query image"):
        retrieval_scores(queries[:0], gallery, nothing)
    assert [*PROTOCOLS] == ["easy", "medium", "hard"]


def test_features_of_an_image_of_any_size() -> None:
    """The mean over three scales, each cut to whole patches at the right and at the bottom."""
    torch.manual_seed(0)
    shape = ViTShape(embed_dim=16, depth=2, num_heads=2, patch_size=4, image_px=16)
    network = VisionTransformer(shape, "sdpa").eval()
    images = torch.randn(2, 3, 35, 50)
    with torch.no_grad():
        found = retrieval_forward(network, PUBLISHED_SCALES)(images)
        single = retrieval_forward(network)(images)
        sides = [(32, 48), (24, 32), (16, 24)]
        expected = torch.zeros_like(found)
        for scale, (height, width) in zip(PUBLISHED_SCALES, sides, strict=True):
            small = (
                images if scale == 1 else torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear")
            )
            expected += network([small[:, :, :height, :width]]) / 3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(single, network([images[:, :, :32, :48]]).detach(), atol=1e-6, rtol=0)
