"""Colours of patch features: their first three principal components as red, green and blue, alike for all pictures.

With a foreground threshold as in arXiv:2304.07193, section 7.5: a first analysis of all patches separates the object,
a second one of its patches alone gives the colours. The sign of a component means nothing; here the side to which CLS
attends more is the foreground, and of the colours each component's greatest weight is positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.errors import UserError

_COMPONENTS = 3
_MAX_ROWS = 2**18
"""Patches that the analysis looks at: 400 MB of 384 features; with more, every n-th."""
_SPREAD = (0.01, 0.99)
"""Quantiles of a component that become 0 and 1: a few extreme patches would leave the rest grey."""

_LEAST_VARIANCE = 1e-12
"""Of the mean square of the features: less is rounding."""

Floats = NDArray[np.float64]


class PatchSample:
    """Patches of all pictures for the analysis: each one, or each n-th once there are too many."""

    def __init__(self, max_rows: int = _MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._every = 1
        self._seen = 0
        self._features: list[Tensor] = []
        self._attention: list[Tensor] = []
        self._kept = 0

    def add(self, patches_hwD: Tensor, attention_hw: Tensor) -> None:
        """One picture's patches, and what CLS gives to each (mean of the heads)."""
        first = -self._seen % self._every
        self._seen += attention_hw.numel()
        self._features.append(patches_hwD.flatten(0, 1)[first :: self._every].cpu())
        self._attention.append((attention_hw / attention_hw.mean()).flatten()[first :: self._every].cpu())
        self._kept += len(self._attention[-1])
        while self._kept > self._max_rows:
            # Every second of those kept is every (2 n)-th of all, whichever pictures they are of.
            self._features = [torch.cat(self._features)[::2].contiguous()]
            self._attention = [torch.cat(self._attention)[::2].contiguous()]
            self._every, self._kept = 2 * self._every, len(self._attention[0])

    def fit(self, foreground: float | None = None) -> PatchColors:
        """`foreground`: patches whose first component, stretched to 0 ... 1, is below it become black; None: no patch.

        `UserError` if fewer than two patches differ, or none is left.
        """
        rows = torch.cat(self._features).double().numpy()
        if foreground is None:
            return PatchColors(colors=_axes(rows, _COMPONENTS))
        separating = _axes(rows, 1).toward(rows, torch.cat(self._attention).double().numpy())
        kept = separating(rows)[:, 0] >= foreground
        if np.count_nonzero(kept) < 2:
            raise UserError(
                f"--pca-foreground {foreground:g} leaves {np.count_nonzero(kept)} patches: give a lower one"
            )
        return PatchColors(colors=_axes(rows[kept], _COMPONENTS), separating=separating, foreground=foreground)


@dataclass(frozen=True, kw_only=True, eq=False)
class Axes:
    """Principal components, each stretched to 0 ... 1."""

    center_D: Floats
    directions_DC: Floats
    low_C: Floats
    high_C: Floats

    def __call__(self, rows_ND: Floats) -> Floats:
        """[N, D] -> [N, components] in [0, 1]."""
        span = np.maximum(self.high_C - self.low_C, np.finfo(np.float64).tiny)
        return np.clip(((rows_ND - self.center_D) @ self.directions_DC - self.low_C) / span, 0.0, 1.0)

    def toward(self, rows_ND: Floats, attention_N: Floats) -> Axes:
        """The same, each component turned so that it rises with the attention."""
        projected = (rows_ND - self.center_D) @ self.directions_DC
        turn = np.where((attention_N - attention_N.mean()) @ projected < 0.0, -1.0, 1.0)
        low, high = np.minimum(self.low_C * turn, self.high_C * turn), np.maximum(self.low_C * turn, self.high_C * turn)
        return Axes(center_D=self.center_D, directions_DC=self.directions_DC * turn, low_C=low, high_C=high)


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchColors:
    """Turns patch features into colours."""

    colors: Axes
    separating: Axes | None = None
    foreground: float = 0.0

    def __call__(self, patches_hwD: Tensor) -> Tensor:
        """[h, w, D] -> [3, h, w] in [0, 1]; background black."""
        height, width, _ = patches_hwD.shape
        rows = patches_hwD.flatten(0, 1).double().cpu().numpy()
        colors = self.colors(rows)
        colors = np.pad(colors, ((0, 0), (0, _COMPONENTS - colors.shape[1])))
        if self.separating is not None:
            colors = colors * (self.separating(rows)[:, :1] >= self.foreground)
        return torch.from_numpy(colors).float().t().reshape(_COMPONENTS, height, width)


def _axes(rows_ND: Floats, count: int) -> Axes:
    """The first components of the rows, fewer where the features are fewer."""
    center = rows_ND.mean(axis=0)
    if not np.isfinite(center).all():
        raise UserError("the patch features are not finite: the network has diverged, take an earlier checkpoint")
    centered = rows_ND - center
    # The covariance is D x D whatever the patches; eigh sorts upwards.
    variance, directions = np.linalg.eigh(centered.T @ centered / len(rows_ND))
    if variance[-1] <= _LEAST_VARIANCE * np.square(rows_ND).mean():
        raise UserError("all patches have the same features, so that there is nothing to color: give other pictures")
    chosen = directions[:, ::-1][:, :count]
    largest = np.abs(chosen).argmax(axis=0)
    chosen = chosen * np.sign(chosen[largest, np.arange(chosen.shape[1])])
    low, high = np.quantile(centered @ chosen, _SPREAD, axis=0)
    return Axes(center_D=center, directions_DC=chosen, low_C=low, high_C=high)
