"""Colours are principal components as scikit-learn finds them, alike for all pictures, the same at each call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dino_dist.errors import UserError
from dino_dist.pictures.patch_colors import PatchSample


def patches(seed: int, rows: int = 12, columns: int = 10, dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dim, generator=generator) * torch.linspace(4, 0.1, dim) + 3


def test_the_components_are_those_of_scikit_learn() -> None:
    sample = PatchSample()
    images = [patches(0), patches(1, rows=5)]
    for image in images:
        sample.add(image, torch.ones(image.shape[:2]))
    colors = sample.fit()
    everything = torch.cat([image.flatten(0, 1) for image in images]).double().numpy()
    expected = PCA(3, svd_solver="full").fit(everything)
    directions = colors.colors.directions_DC
    np.testing.assert_allclose(np.abs(directions.T @ expected.components_.T), np.eye(3), atol=1e-6)
    drawn = colors(images[1])
    assert drawn.shape == (3, 5, 10)
    scores = (images[1].flatten(0, 1).double().numpy() - everything.mean(0)) @ directions
    for channel in range(3):
        order = np.argsort(scores[:, channel])
        assert (np.diff(drawn[channel].flatten().numpy()[order]) >= 0).all()
    assert (drawn.amin((1, 2)) < 0.2).all()
    assert (drawn.amax((1, 2)) > 0.8).all()


def test_a_flipped_sign_changes_no_colour() -> None:
    """Solvers return components of either sign: the rule of the greatest weight decides."""
    sample = PatchSample()
    sample.add(patches(2), torch.ones(12, 10))
    directions = sample.fit().colors.directions_DC
    assert (directions[np.abs(directions).argmax(0), range(3)] > 0).all()


@pytest.mark.parametrize("turned", [1.0, -1.0])
def test_the_foreground_is_the_side_that_cls_attends_to(turned: float) -> None:
    features = torch.randn(8, 8, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    features[2:5, 3:7, 0] += 10 * turned
    attention = torch.full((8, 8), 0.1)
    attention[2:5, 3:7] = 1.0
    sample = PatchSample()
    sample.add(features, attention)
    drawn = sample.fit(foreground=0.5)(features)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 3:7] = True
    assert drawn[:, ~inside].max() == 0.0
    assert drawn[:, inside].std() > 0.1, "the object's parts differ in colour"


def test_a_sample_takes_each_nth_patch_of_all() -> None:
    sample = PatchSample(max_rows=100)
    numbers = torch.arange(1000.0)
    for part in numbers.split(70):
        sample.add(part.view(1, -1, 1), torch.ones(1, len(part)))
    kept = torch.cat(sample._features).flatten()
    step = kept[1] - kept[0]
    assert 50 <= len(kept) <= 100
    assert torch.equal(kept, torch.arange(0.0, 1000.0, float(step)))


def test_a_network_of_two_features_has_no_blue() -> None:
    sample = PatchSample()
    sample.add(patches(3, dim=2), torch.ones(12, 10))
    assert sample.fit()(patches(3, dim=2))[2].max() == 0.0


def test_nothing_to_color() -> None:
    sample = PatchSample()
    sample.add(torch.ones(3, 3, 4), torch.ones(3, 3))
    with pytest.raises(UserError, match="nothing to color"):
        sample.fit()
    sample.add(torch.full((3, 3, 4), torch.nan), torch.ones(3, 3))
    with pytest.raises(UserError, match="not finite"):
        sample.fit()
