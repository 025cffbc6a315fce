"""The blurs of a batch, in blocks along the diagonal, equal their definitions: six extended boxes, and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops.blur import BLOCK, blur, box_radius, make_plan
from dino_dist.errors import UserError

CPU = torch.device("cpu")
SIGMAS = [0.0, 0.1, 0.7, 1.41, 1.42, 2.0]
SIDES_PX = [5, 6, 12, 13, 14, BLOCK, BLOCK + 1, 3 * BLOCK, 98]


def pictures(side_px: int) -> torch.Tensor:
    """Levels [N, 3, S, S], one for each sigma."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(SIGMAS), 3, side_px, side_px, generator=generator) * 255


def blurred(levels: torch.Tensor, plan_arguments: tuple[str, float]) -> torch.Tensor:
    kind, sigma_max_px = plan_arguments
    plan = make_plan(kind, levels.shape[-1], sigma_max_px, CPU)  # type: ignore[arg-type]
    rows = levels.permute(0, 2, 1, 3).contiguous()
    return blur(rows, torch.tensor(SIGMAS), plan).permute(0, 2, 1, 3)


def box_pass(line: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """One extended box along the last axis, with the border repeated."""
    reach = int(radius) + 1
    wide = np.pad(line, [(0, 0)] * (line.ndim - 1) + [(reach, reach)], mode="edge")
    size = line.shape[-1]
    total = (radius - int(radius)) * (wide[..., :size] + wide[..., 2 * reach : 2 * reach + size])
    for shift in range(1, 2 * reach):
        total += wide[..., shift : shift + size]
    return total / (2.0 * radius + 1.0)


@pytest.mark.parametrize("side_px", [1, 2, *SIDES_PX])
@pytest.mark.parametrize("sigma_max_px", [2.0, 3.5])
def test_three_boxes(side_px: int, sigma_max_px: float) -> None:
    """A plan for wider blurs than asked for gives the same."""
    levels = pictures(side_px)
    views = blurred(levels, ("box3", sigma_max_px))
    assert torch.equal(views[0], levels[0]), "no blur must change no bit"
    for view, picture, sigma in zip(views[1:], levels[1:], SIGMAS[1:], strict=True):
        radius = float(box_radius(torch.tensor(sigma, dtype=torch.float64)))
        expected = picture.double().numpy()
        for _ in range(3):
            expected = box_pass(expected, radius)
        for _ in range(3):
            expected = box_pass(expected.swapaxes(1, 2), radius).swapaxes(1, 2)
        assert np.abs(view.numpy() - expected).max() <= 1e-4 * 255, f"sigma {sigma}"


@pytest.mark.parametrize("side_px", SIDES_PX)
def test_nine_taps(side_px: int) -> None:
    levels = pictures(side_px)
    views = blurred(levels, ("taps9", 2.0))
    assert torch.equal(views[0], levels[0]), "no blur must change no bit"
    for view, picture, sigma in zip(views[1:], levels[1:], SIGMAS[1:], strict=True):
        assert (view - tv.gaussian_blur(picture, [9, 9], [sigma, sigma])).abs().max() <= 1e-4 * 255, f"sigma {sigma}"


@pytest.mark.parametrize("side_px", [1, 4])
def test_a_side_without_enough_pixels_to_mirror_is_refused(side_px: int) -> None:
    with pytest.raises(UserError, match=f"size_px={side_px} is too small"):
        make_plan("taps9", side_px, 2.0, CPU)
