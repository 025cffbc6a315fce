"""Centering and sharpening of the teacher's output (arXiv:2104.14294, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor


class Centering:
    """The center c [1, K], a running mean of the teacher's logits over all ranks.

    A step asks for `targets` once a micro-batch, takes this rank's sums, adds them over ranks and calls `update` once.
    So the center is the same for all parts of a batch, and unequal parts weigh by their number of images.
    """

    def __init__(self, num_prototypes: int, *, momentum: float, device: torch.device, dtype: torch.dtype) -> None:
        self.center_1K = torch.zeros(1, num_prototypes, device=device, dtype=dtype)
        self._momentum = momentum
        self._sums_2K: Tensor | None = None

    def targets(self, logits_NK: Tensor, temperature: float) -> Tensor:
        """softmax((logits - c) / temperature), at least fp32; remembers the sums of logits and targets."""
        logits_NK = logits_NK.to(self.center_1K.dtype)
        target_NK = torch.softmax((logits_NK - self.center_1K) / temperature, dim=-1)
        sums_2K = torch.stack([logits_NK.sum(0), target_NK.sum(0)])
        self._sums_2K = sums_2K if self._sums_2K is None else self._sums_2K + sums_2K
        return target_NK

    def take_sums(self) -> Tensor:
        """Sums [2, K] of this rank's logits and targets since the last call, to be added over ranks."""
        assert self._sums_2K is not None, "targets() comes first"
        sums_2K, self._sums_2K = self._sums_2K, None
        return sums_2K

    def update(self, mean_logits_K: Tensor, accept: Tensor) -> None:
        """c <- m c + (1 - m) mean(logits), where `accept` (0-dim bool) holds."""
        moved_1K = torch.lerp(mean_logits_K[None], self.center_1K, self._momentum)
        self.center_1K.copy_(torch.where(accept, moved_1K, self.center_1K))
