"""J and F against hand-worked masks, and against scipy and scikit-image saying the same in their words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter
from skimage.morphology import disk
from sklearn.metrics import jaccard_score

from dino_dist.eval.region_and_boundary import boundary, boundary_similarity, over_time, region_similarity


def blob(rng: np.random.Generator, height: int, width: int, share: float) -> NDArray[np.bool_]:
    """A random shape with holes and islands that may touch the frame's border."""
    smooth = gaussian_filter(rng.normal(size=(height, width)), 4)
    mask: NDArray[np.bool_] = smooth > np.quantile(smooth, 1 - share)
    return mask


def square(side: int, top: int, left: int, size: int) -> torch.Tensor:
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[0, top : top + size, left : left + size] = True
    return mask


def test_hand_worked_regions() -> None:
    full, shifted, none = square(20, 4, 4, 8), square(20, 4, 8, 8), square(20, 0, 0, 0)
    assert region_similarity(full, full).item() == 1.0
    assert region_similarity(full, shifted).item() == pytest.approx(32 / 96)
    assert region_similarity(full, none).item() == 0.0
    assert region_similarity(none, none).item() == 1.0
    void = square(20, 0, 8, 12)  # takes the right half of both: 4 x 8 px are left, of which the first 4 are found
    assert region_similarity(full, square(20, 4, 4, 4), void).item() == 0.5


def test_hand_worked_boundary_pixels() -> None:
    edge = boundary(square(6, 2, 2, 2))[0]
    marked = {(int(row), int(column)) for row, column in edge.nonzero()}
    # Half a pixel towards the origin: the ring that begins one row and column before the square.
    assert marked == {(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)}
    assert not boundary(torch.ones(1, 5, 5, dtype=torch.bool)).any(), "the frame's border is no boundary"


def test_hand_worked_boundary_similarity() -> None:
    full, none = square(20, 4, 4, 8), square(20, 0, 0, 0)
    assert boundary_similarity(full, full).item() == 1.0
    assert boundary_similarity(none, none).item() == 1.0
    assert boundary_similarity(full, none).item() == 0.0
    assert boundary_similarity(none, full).item() == 0.0
    # 20 px: ceil(0.008 * 28.3) is 1 px. One px aside all match.
    assert boundary_similarity(full, square(20, 4, 5, 8)).item() == 1.0
    # Three px aside, rings of 32 px: top and bottom share 6 px and match one more; the two sides inside the other's
    # ring match where they begin and end.
    assert boundary_similarity(full, square(20, 4, 7, 8)).item() == pytest.approx((2 * 7 + 2) / 32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_void", [False, True])
def test_equal_to_scipy_and_scikit_learn(seed: int, with_void: bool) -> None:
    rng = np.random.default_rng(seed)
    height, width = 60 + 7 * seed, 110
    found, true = (blob(rng, height, width, share) for share in (0.2, 0.25))
    true = true | found if seed % 2 else true  # shapes that overlap much, and some that hardly do
    void = blob(rng, height, width, 0.1) if with_void else np.zeros_like(found)
    tensors = [torch.from_numpy(mask)[None] for mask in (found, true, void)]
    j = region_similarity(*tensors).item()
    assert j == pytest.approx(jaccard_score(true[~void], found[~void]), abs=1e-12)
    f = boundary_similarity(*tensors).item()
    assert f == pytest.approx(stated_anew(found & ~void, true & ~void), abs=1e-12)


def stated_anew(found: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """Pixel loops for the boundary, distances for precision and dilation for recall."""

    def edges(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        rows, columns = mask.shape
        marked = np.zeros_like(mask)
        for y in range(rows):
            for x in range(columns):
                around = [(y + 1, x), (y, x + 1), (y + 1, x + 1)]
                marked[y, x] = any(mask[min(v, rows - 1), min(u, columns - 1)] != mask[y, x] for v, u in around)
        return marked

    radius = math.ceil(0.008 * np.linalg.norm(found.shape))
    found_edge, true_edge = edges(found), edges(true)
    precision = float((distance_transform_edt(~true_edge)[found_edge] <= radius).mean())
    recall = float(binary_dilation(found_edge, disk(radius))[true_edge].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_many_pairs_at_once_are_each_pair_alone() -> None:
    rng = np.random.default_rng(9)
    found, true = (torch.from_numpy(np.stack([blob(rng, 40, 50, 0.3) for _ in range(4)])) for _ in range(2))
    for measure in (region_similarity, boundary_similarity):
        alone = torch.cat([measure(found[n : n + 1], true[n : n + 1]) for n in range(4)])
        assert torch.equal(measure(found, true), alone)


def test_over_time() -> None:
    values = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    # Nine values: quarters end at places 1, 3, 5, 7 and 9, and share them.
    found = over_time(values)
    assert found.mean == pytest.approx(0.5)
    assert found.recall == pytest.approx(4 / 9), "0.5 is not above 0.5"
    assert found.decay == pytest.approx((0.9 + 0.8 + 0.7) / 3 - (0.3 + 0.2 + 0.1) / 3)
    assert over_time([0.25]).decay == 0.0
    with pytest.raises(ValueError, match="no frame"):
        over_time([])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 10, 66, 400])
def test_quarters_are_the_benchmarks(count: int) -> None:
    values = np.random.default_rng(count).random(count)
    ends = (np.round(np.linspace(1, count, 5) + 1e-10) - 1).astype(int)
    quarters = [values[ends[n] : ends[n + 1] + 1] for n in range(4)]
    assert over_time(values.tolist()).decay == pytest.approx(quarters[0].mean() - quarters[3].mean(), abs=1e-12)
