"""Copy detection as the paper measures it on Copydays "strong" (arXiv:2104.14294, section 4.1.2, table 4).

A copy is to find its original: features are the class token and the GeM-pooled patches, optionally whitened, and the
score is the mean average precision of the first 20 results. Letters: N images, P patches, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.eval.knn import check_finite, unit_rows
from dino_dist.eval.retrieval import average_precision, rank_gallery
from dino_dist.models.vit import VisionTransformer

GEM_POWER = 4.0
GEM_FLOOR = 1e-6
"""Patches are raised to a power: what is not positive counts as this."""
MAX_RESULTS = 20
"""Results of a query that are looked at."""
_WHITENING_POWER = 0.5
_MIN_RELATIVE_VARIANCE = 1e-5


def gem(patches_NPD: Tensor, *, power: float = GEM_POWER) -> Tensor:
    """Generalised mean over patches, [N, D]: (mean of max(x, 1e-6)^power)^(1 / power) (arXiv:1711.02512)."""
    return patches_NPD.clamp_min(GEM_FLOOR).pow(power).mean(1).pow(1 / power)


def copy_forward(network: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """Images [N, 3, h, w] -> the last block's normed class token and pooled patches, [N, 2 D]."""

    def forward(images: Tensor) -> Tensor:
        tokens = network.features(images.to(network.cls_token.dtype))[-1]
        return torch.cat([tokens[:, 0], gem(tokens[:, 1:])], dim=1)

    return forward


@dataclass(frozen=True, kw_only=True, eq=False)
class Whitening:
    """Subtract a mean, turn to principal directions, divide each by its standard deviation."""

    mean_D: Tensor
    matrix_DD: Tensor

    @staticmethod
    def learned(features_ND: Tensor) -> Whitening:
        """From the features of images that are in neither set.

        As published: directions and variances are those of the second moment about zero, X^T X / N, and variances
        below 1e-5 of the largest are raised to that. `UserError` if features are not finite.
        """
        check_finite(features_ND, "whitening")
        features = features_ND.double()
        moment_DD = features.T @ features / len(features)
        variance, directions = torch.linalg.eigh(moment_DD.cpu())
        variance = variance.clamp_min(float(variance[-1]) * _MIN_RELATIVE_VARIANCE).flip(0)
        matrix = directions.flip(1).T / variance.pow(_WHITENING_POWER).unsqueeze(1)
        return Whitening(
            mean_D=features.mean(0).to(features_ND), matrix_DD=matrix.to(features_ND.device, features_ND.dtype)
        )

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Whitened rows [N, D]."""
        return (features_ND - self.mean_D) @ self.matrix_DD.T


def originals_of(copy_names: Sequence[str], original_names: Sequence[str], *, prefix: int) -> list[list[int]]:
    """Which originals each copy is to find: those whose file name begins with the same `prefix` characters.

    With `prefix` 0, the n-th copy is that of the n-th original, both sorted. `UserError` for a copy without one.
    """
    if not prefix:
        if len(copy_names) != len(original_names):
            raise UserError(
                f"{len(copy_names)} copies cannot be matched one to one with {len(original_names)} originals: "
                "such a block needs one copy of each"
            )
        return [[index] for index in range(len(copy_names))]
    by_prefix: dict[str, list[int]] = {}
    for index, name in enumerate(original_names):
        by_prefix.setdefault(name[:prefix], []).append(index)
    for name in copy_names:
        if name[:prefix] not in by_prefix:
            raise UserError(f"no original's name begins with {name[:prefix]!r}, as that of the copy {name} does")
    return [by_prefix[name[:prefix]] for name in copy_names]


def copy_average_precision(
    copies_QD: Tensor, database_ND: Tensor, originals: Sequence[Sequence[int]], *, max_results: int = MAX_RESULTS
) -> Tensor:
    """Average precision (trapezoids) of each copy over its first results, float64 [Q].

    `database_ND`: the originals first, then distractors if there are any. Equal similarities rank by index.
    """
    copies, database = unit_rows(copies_QD, "copy"), unit_rows(database_ND, "original")
    wanted_QN = torch.zeros(len(copies), len(database), dtype=torch.bool, device=copies.device)
    for row, indices in zip(wanted_QN, originals, strict=True):
        row[list(indices)] = True
    first = rank_gallery(copies, database)[:, :max_results]
    found = wanted_QN.gather(1, first)
    return average_precision(found, torch.zeros_like(found), num_wanted_Q=wanted_QN.sum(1)).cpu()
