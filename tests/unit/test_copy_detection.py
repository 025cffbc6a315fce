"""Copy detection: features, whitening and the score as their definitions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import pmean

from dino_dist.errors import UserError
from dino_dist.eval.copy_detection import Whitening, copy_average_precision, copy_forward, gem, originals_of
from dino_dist.models.vit import VisionTransformer, ViTShape


def test_features_are_the_class_token_and_the_power_mean_of_the_patches() -> None:
    torch.manual_seed(0)
    shape = ViTShape(embed_dim=16, depth=2, num_heads=2, patch_size=4, image_px=16)
    network = VisionTransformer(shape, "sdpa").eval()
    images = torch.randn(3, 3, 24, 16)
    with torch.no_grad():
        tokens = network.features(images)[-1]
        found = copy_forward(network)(images)
    torch.testing.assert_close(found[:, :16], tokens[:, 0])
    expected = pmean(np.maximum(tokens[:, 1:].double().numpy(), 1e-6), 4, axis=1)
    np.testing.assert_allclose(found[:, 16:].numpy(), expected, rtol=1e-5)


def test_a_high_power_pools_the_largest_patch() -> None:
    patches = torch.tensor([[[1.0, -3.0], [2.0, 0.5]]])
    assert gem(patches)[0].tolist() == pytest.approx([(17 / 2) ** 0.25, 0.5 * 0.5**0.25], rel=1e-5)
    assert gem(patches.double(), power=100)[0].tolist() == pytest.approx([2, 0.5], rel=0.01)


def test_whitening_makes_the_second_moment_the_identity() -> None:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    features = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ mixing
    whitening = Whitening.learned(features)
    turned = features @ whitening.matrix_DD.T
    torch.testing.assert_close(turned.T @ turned / 500, torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)
    # Up to a turn, which no similarity sees, that is the inverse root of the moment.
    root = torch.from_numpy(np.real(sqrtm((features.T @ features / 500).numpy())))
    torch.testing.assert_close(whitening.matrix_DD.T @ whitening.matrix_DD, torch.linalg.inv(root @ root))
    centered = features - features.mean(0)
    torch.testing.assert_close(whitening(features), centered @ whitening.matrix_DD.T)


def test_whitening_survives_features_without_variance() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    features[:, 2] = 0
    assert torch.isfinite(Whitening.learned(features)(features)).all()


def test_copies_find_originals_by_prefix_or_in_order() -> None:
    originals = ["200000.jpg", "200100.jpg", "200101.jpg"]
    assert originals_of(["2001_a.jpg", "2000_b.jpg"], originals, prefix=4) == [[1, 2], [0]]
    assert originals_of(["x", "y", "z"], originals, prefix=0) == [[0], [1], [2]]
    with pytest.raises(UserError, match="2 copies cannot be matched one to one with 3 originals"):
        originals_of(["x", "y"], originals, prefix=0)
    with pytest.raises(UserError, match="no original's name begins with '2009'"):
        originals_of(["200900.jpg"], originals, prefix=4)


def test_score_of_a_hand_worked_search() -> None:
    database = torch.eye(4)
    copies = torch.tensor(
        [
            [5.0, 1.0, 0.0, 0.0],  # its original comes first: 1
            [2.0, 9.0, 0.0, 0.0],  # wants the first, which comes second: (1/2 + 0) / 2
            [3.0, 2.0, 1.0, 0.5],  # wants the first and third: (1 + (2/3 + 1/2) / 2) / 2
            [4.0, 3.0, 2.0, 1.0],  # wants the last, which is not among the first three: 0
        ]
    )
    found = copy_average_precision(copies, database, [[0], [0], [0, 2], [3]], max_results=3)
    assert found.tolist() == pytest.approx([1.0, 0.25, (1 + 7 / 12) / 2, 0.0])


def test_distractors_can_only_harm() -> None:
    generator = torch.Generator().manual_seed(3)
    originals = torch.randn(30, 8, generator=generator)
    copies = originals + torch.randn(30, 8, generator=generator)
    wanted = [[n] for n in range(30)]
    alone = copy_average_precision(copies, originals, wanted)
    crowded = copy_average_precision(copies, torch.cat([originals, torch.randn(200, 8, generator=generator)]), wanted)
    assert (crowded <= alone).all()
    assert crowded.mean() < alone.mean()
