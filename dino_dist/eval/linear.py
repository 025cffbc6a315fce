"""Linear classifiers on frozen features: the protocol of DINO (arXiv:2104.14294, appendix F.2) over many settings.

A group is all classifiers that see the same columns of the features: one a learning rate, trained together. Groups know
nothing of each other, so they are dealt out to ranks, and a result is the same for any number of ranks. SGD with
momentum 0.9 and no weight decay; the learning rate follows a cosine to 0 over all steps, without a warm-up (the
published code lowers it once an epoch).

Letters: N train images, M test images, n images of a step, D features of a group, C classes, R learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_dist.randomness import Purpose, permutation, substream

_MOMENTUM = 0.9
_INIT_STD = 0.01
_LR_REFERENCE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which features a group sees: class tokens of the last blocks, and the mean of the last block's patches."""

    blocks: int
    avgpool: bool

    @property
    def name(self) -> str:
        """Such as `last4-avgpool`."""
        return f"last{self.blocks}{'-avgpool' if self.avgpool else ''}"

    def of(self, features: Tensor, *, embed_dim: int) -> Tensor:
        """A view of features as `stacked_features` lays them out."""
        stored_blocks = features.shape[1] // embed_dim - 1
        stop = stored_blocks + self.avgpool
        return features[:, (stored_blocks - self.blocks) * embed_dim : stop * embed_dim]


def stacked_features(tokens: Sequence[Tensor]) -> Tensor:
    """What all groups choose from: class tokens of blocks' normed tokens [n, 1 + P, D], then the last's mean patch.

    [n, (blocks + 1) * D]; so any number of last blocks, with or without the mean, are neighbouring columns.
    """
    return torch.cat([*(block[:, 0] for block in tokens), tokens[-1][:, 1:].mean(dim=1)], dim=1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every classifier is trained."""

    rates: tuple[float, ...]
    """Peak learning rates of 256 images a step; scaled with the batch."""
    epochs: int
    batch_size: int
    """At most; fewer where there are not as many images."""
    seed: int
    """Of the initial weights and the order of images."""


@dataclass(kw_only=True, eq=False)
class Group:
    """The classifiers of one group, and how far they are."""

    columns: Columns
    weight_RCD: Tensor
    bias_RC: Tensor
    weight_momentum_RCD: Tensor
    bias_momentum_RC: Tensor
    epochs_done: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, besides `epochs_done`."""
        return {
            "weight": self.weight_RCD,
            "bias": self.bias_RC,
            "weight_momentum": self.weight_momentum_RCD,
            "bias_momentum": self.bias_momentum_RC,
        }


def new_group(columns: Columns, recipe: Recipe, *, num_features: int, num_classes: int, like: Tensor) -> Group:
    """Classifiers at their start, the same weights for each learning rate; of the type and on the device of `like`."""
    generator = torch.Generator().manual_seed(recipe.seed)
    start_CD = torch.randn(num_classes, num_features, generator=generator).mul_(_INIT_STD).to(like)
    weight_RCD = start_CD.expand(len(recipe.rates), -1, -1).clone()
    bias_RC = torch.zeros(weight_RCD.shape[:2], dtype=like.dtype, device=like.device)
    return Group(
        columns=columns,
        weight_RCD=weight_RCD,
        bias_RC=bias_RC,
        weight_momentum_RCD=torch.zeros_like(weight_RCD),
        bias_momentum_RC=torch.zeros_like(bias_RC),
    )


@torch.no_grad()
def train_epoch(group: Group, features_ND: Tensor, labels_N: Tensor, recipe: Recipe) -> None:
    """The group's next epoch over its own columns [N, D]; labels 0 ... C - 1. The last step may be a smaller one."""
    num_images = len(features_ND)
    batch_size = min(recipe.batch_size, num_images)
    steps = math.ceil(num_images / batch_size)
    rates_R = torch.tensor(recipe.rates, dtype=group.weight_RCD.dtype, device=group.weight_RCD.device)
    rates_R = rates_R * (batch_size / _LR_REFERENCE_BATCH)
    key = (recipe.seed, group.epochs_done)
    order = torch.from_numpy(permutation(num_images, key=key, stream=substream(Purpose.ORDER_SAMPLES)))
    for step, rows in enumerate(torch.split(order.to(features_ND.device), batch_size)):
        done = (group.epochs_done * steps + step) / (recipe.epochs * steps)
        _step(group, features_ND[rows], labels_N[rows], rates_R * (0.5 * (1.0 + math.cos(math.pi * done))))
    group.epochs_done += 1


def _step(group: Group, x_nD: Tensor, labels_n: Tensor, rates_R: Tensor) -> None:
    """One step of SGD for every learning rate; the gradient of a softmax classifier is short enough to be written."""
    num_rates, num_classes, _ = group.weight_RCD.shape
    error_nRC = _logits(group, x_nD).softmax(dim=2)
    error_nRC -= F.one_hot(labels_n, num_classes).to(error_nRC).unsqueeze(1)
    error_nRC /= len(x_nD)
    weight_gradient = (error_nRC.flatten(1).T @ x_nD).view_as(group.weight_RCD)
    group.weight_momentum_RCD.mul_(_MOMENTUM).add_(weight_gradient)
    group.bias_momentum_RC.mul_(_MOMENTUM).add_(error_nRC.sum(0))
    group.weight_RCD.addcmul_(rates_R.view(num_rates, 1, 1), group.weight_momentum_RCD, value=-1)
    group.bias_RC.addcmul_(rates_R.view(num_rates, 1), group.bias_momentum_RC, value=-1)


def _logits(group: Group, x_nD: Tensor) -> Tensor:
    num_rates, num_classes, _ = group.weight_RCD.shape
    logits = torch.addmm(group.bias_RC.flatten(), x_nD, group.weight_RCD.flatten(0, 1).T)
    return logits.view(len(x_nD), num_rates, num_classes)


@torch.no_grad()
def accuracies(group: Group, features_MD: Tensor, labels_M: Tensor, *, chunk: int = 4096) -> list[tuple[float, float]]:
    """Top-1 and top-5 (fractions) of each learning rate's classifier; 0 for one whose weights are not finite.

    A label of -1 stands for a class that was not trained: never right.
    """
    num_rates, num_classes, _ = group.weight_RCD.shape
    hits_R2 = torch.zeros(num_rates, 2, dtype=torch.int64, device=features_MD.device)
    for x_nD, labels_n in zip(torch.split(features_MD, chunk), torch.split(labels_M, chunk), strict=True):
        best = _logits(group, x_nD).topk(min(5, num_classes), dim=2).indices
        right = best == labels_n.view(-1, 1, 1)
        hits_R2[:, 0] += right[:, :, 0].sum(0)
        hits_R2[:, 1] += right.any(2).sum(0)
    hits_R2[~group.weight_RCD.isfinite().flatten(1).all(1)] = 0
    shares = (hits_R2.double() / len(labels_M)).tolist()
    return [(top1, top5) for top1, top5 in shares]
