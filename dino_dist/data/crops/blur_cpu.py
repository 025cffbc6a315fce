"""The blur's matrix for one picture on the CPU: the same as `blur`'s, in float64 until it is laid out in bands."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dino_dist.data.crops.bands import BLOCK, Bands
from dino_dist.data.crops.blur import box_radius, make_plan
from dino_dist.data.crops.render_rules import BlurKind


class BlurMatrices:
    """Makes the matrices that blur views of one side; see `blur.make_plan` for what is refused."""

    def __init__(self, kind: BlurKind, side_px: int, sigma_max_px: float) -> None:
        plan = make_plan(kind, side_px, sigma_max_px, torch.device("cpu"), block_px=BLOCK)
        self.reach_px = plan.reach_px
        self._kind = plan.kind
        self._distances = plan.distances.double().numpy()
        self._small_px = plan.shifts.shape[1]
        self._shifts = plan.shifts.double().flatten(1).numpy()
        self._entries = plan.entries.numpy()

    def __call__(self, sigma_px: float) -> Bands:
        """The matrix of a positive `sigma_px`."""
        one_pass = (self._tap_weights(sigma_px) @ self._shifts).reshape(self._small_px, self._small_px)
        whole = one_pass if self._kind == "taps9" else one_pass @ one_pass @ one_pass
        flat = np.append(whole.astype(np.float32), np.float32(0.0))
        return Bands(weights=torch.from_numpy(flat[self._entries]), first=-self.reach_px, step=BLOCK)

    def _tap_weights(self, sigma_px: float) -> NDArray[np.float64]:
        """As `blur.tap_weights`, for a number."""
        if self._kind == "box3":
            radius = box_radius(sigma_px)
            box: NDArray[np.float64] = np.clip(radius + 1.0 - self._distances, 0.0, 1.0) / (2.0 * radius + 1.0)
            return box
        curve: NDArray[np.float64] = np.exp(-0.5 * (self._distances / sigma_px) ** 2)
        curve /= curve.sum()
        return curve
