"""The DINO loss: cross-entropy between views (arXiv:2104.14294, equation 3)."""

# Letters: S student views, the first G of them the teacher's own; B images on this rank; K prototypes.

from __future__ import annotations

import torch
from torch import Tensor


def dino_loss(student_SBK: Tensor, target_GBK: Tensor, *, student_temp: float) -> Tensor:
    """Cross-entropy of every teacher view with every *other* student view, averaged over pairs, summed over images.

        sum over b of mean over (g, s), s != g, of
            -sum_k target[g, b, k] * log_softmax(student[s, b] / student_temp)[k]

    `target_GBK` holds probabilities without gradient. The sum over images, not their mean, lets ranks and micro-batches
    of unequal size add up to the mean over the whole batch. At least fp32 inside; a scalar.
    """
    num_student, num_teacher = student_SBK.shape[0], target_GBK.shape[0]
    compute_dtype = torch.promote_types(student_SBK.dtype, torch.float32)
    log_prob_SBK = torch.log_softmax(student_SBK.to(compute_dtype) / student_temp, dim=-1)
    # One matrix product over (image, prototype) gives all S x G cross-entropies and keeps nothing but its operands.
    cross_entropy_SG = -log_prob_SBK.flatten(1) @ target_GBK.flatten(1).T
    num_pairs = num_student * num_teacher - num_teacher
    return (cross_entropy_SG.sum() - cross_entropy_SG.diagonal().sum()) / num_pairs
