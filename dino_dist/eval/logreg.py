"""Logistic regression on frozen features, by scikit-learn: strengths tried on a tenth of the images, the best refitted.

Features have length 1, as DINOv2's protocol has them; the solver is scikit-learn's default (L-BFGS, L2).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.knn import check_labels, unit_rows
from dino_dist.randomness import Purpose, permutation, substream

_HELD_OUT = 10
"""One of so many train images chooses the strength."""

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One inverse strength of regularisation."""

    C: float
    held_out_top1: float
    """Fraction of the tenth of the train images that was kept aside."""
    converged: bool


@dataclass(frozen=True, kw_only=True)
class LogregResult:
    """The classifier with the best strength, fitted on all train images. Fractions from 0 to 1 of the test images."""

    C: float
    top1: float
    top5: float
    converged: bool
    tried: tuple[Tried, ...]
    """Empty where there was nothing to choose."""


def logistic_regression(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    strengths: Sequence[float],
    max_iterations: int = 1000,
    seed: int,
    world: World | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> LogregResult:
    """Choose C on a held-out tenth (the smallest of equally good ones), refit on all, judge on the test images.

    Features [N, D] and [M, D], the same on all ranks, which share out the strengths; the result is the same on all.
    `tell`: how many fits are done, of how many. `UserError` for missing labels, a single class, features that are not
    finite, or too few images to keep some aside.
    """
    world = world or World()
    check_labels(train_labels, "train")
    check_labels(test_labels, "test", one_class_is_fine=True)
    x, y = unit_rows(train_features, "train").cpu().numpy(), train_labels.cpu().numpy()
    strengths = sorted(set(strengths))
    fits = len(strengths) + 1 if len(strengths) > 1 else 1
    tried: list[Tried] = []
    if len(strengths) > 1:
        order = permutation(len(y), key=(seed, 0), stream=substream(Purpose.SPLIT))
        aside, rest = order[: max(1, len(y) // _HELD_OUT)], order[max(1, len(y) // _HELD_OUT) :]
        if len(np.unique(y[rest])) < 2:
            raise UserError(f"{len(y)} train images are too few to choose from eval.logreg_C: give one value")
        own: list[Tried] = []
        for number, strength in enumerate(strengths[world.rank :: world.size]):
            model, converged = _fit(x[rest], y[rest], strength, max_iterations)
            right = model.predict(x[aside]) == y[aside]
            own.append(Tried(C=strength, held_out_top1=float(right.mean()), converged=converged))
            tell(min(fits - 1, (number + 1) * world.size), fits)
        tried = sorted((one for part in world.gather(own) for one in part), key=lambda one: one.C)
    best = max(tried, key=lambda one: one.held_out_top1).C if tried else strengths[0]

    def final() -> tuple[float, float, bool]:
        model, converged = _fit(x, y, best, max_iterations)
        test_x, test_y = unit_rows(test_features, "test").cpu().numpy(), test_labels.cpu().numpy()
        return *_top1_top5(model, test_x, test_y), converged

    top1, top5, converged = world.first(final)
    tell(fits, fits)
    return LogregResult(C=best, top1=top1, top5=top5, converged=converged, tried=tuple(tried))


def _fit(x: Floats, y: Ints, strength: float, max_iterations: int) -> tuple[LogisticRegression, bool]:
    model = LogisticRegression(C=strength, max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y)
    converged = True
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):  # of the iterations or of the line search
            converged = False  # told in the result
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model, converged


def _top1_top5(model: LogisticRegression, x: Floats, y: Ints) -> tuple[float, float]:
    scores = model.decision_function(x)
    if scores.ndim == 1:  # two classes
        scores = np.stack([-scores, scores], axis=1)
    best = model.classes_[np.argsort(-scores, axis=1, kind="stable")[:, :5]]
    right = best == y[:, None]
    return float(right[:, 0].mean()), float(right.any(axis=1).mean())
