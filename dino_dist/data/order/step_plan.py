"""Which samples a rank's micro-batches of any step hold: a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.data.order.order import SampleOrder, StreamIds, micro_slices, rank_slice
from dino_dist.errors import UserError

Describe = Callable[[StreamIds, NDArray[np.int64]], dict[str, Tensor]]
"""(n ids, sizes int64 [n, 2]) -> named CPU tensors, whose shapes follow from n; runs where images are decoded, so it
must be picklable."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """A rank's part of every step; `UserError` if it is too small to be accumulated."""

    order: SampleOrder
    batch_size: int
    """Of all ranks together."""
    rank: int
    size: int
    accumulate: int

    def __post_init__(self) -> None:
        if self.batch_size // self.size < self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} gives some of {self.size} ranks fewer images a step than "
                f"train.accumulate={self.accumulate}; at least {self.size * self.accumulate} images are needed"
            )

    def micro_batches(self, step: int) -> list[StreamIds]:
        """`accumulate` parts: the rank's share of the positions [step * B, (step + 1) * B)."""
        start, stop = rank_slice(step * self.batch_size, (step + 1) * self.batch_size, self.rank, self.size)
        parts = micro_slices(stop - start, self.accumulate)
        return [self.order.ids(start + first, start + last) for first, last in parts]
