"""What tells a learning run from a collapsing one: pure statistics of the teacher, fp32, without host synchronisation.

Letters: G teacher views, B images, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIVE_SHARE_OF_UNIFORM = 0.01
"""A prototype is live while its running share of the assignments is above 1/(100 K): a hundredth of a fair share."""


def center_norm(center_K: Tensor) -> Tensor:
    """L2 norm of the center: it stops growing in a healthy run. 0-dim, fp32."""
    norm: Tensor = torch.linalg.vector_norm(center_K.detach().float())
    return norm


def perplexity(share_K: Tensor) -> Tensor:
    """exp of the entropy of a distribution over prototypes: how many are in use, between 1 and K. 0-dim, fp32."""
    entropy: Tensor = torch.special.entr(share_K.float()).sum()
    return entropy.exp()


def live_prototypes(share_K: Tensor) -> Tensor:
    """How many prototypes have a share above 1/(100 K). 0-dim, fp32."""
    return (share_K > LIVE_SHARE_OF_UNIFORM / share_K.numel()).sum().float()


class PrototypeUsage:
    """Exponentially averaged mean assignment: a batch of 64 cannot touch all of 1,024 prototypes, the last 50 can.

    share_n is proportional to sum_i m^(n-i) a_i for mean assignments a_1 ... a_n, each of which sums to 1: dividing by
    the total makes it unbiased from the first update on, refused steps or not. `average_K` is the whole state.
    """

    def __init__(self, num_prototypes: int, *, momentum: float = 0.98, device: torch.device | None = None) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum {momentum}: must be in [0, 1)")
        self.momentum = momentum
        self.average_K = torch.zeros(num_prototypes, dtype=torch.float32, device=device)

    @torch.no_grad()
    def update_(self, mean_assignment_K: Tensor) -> None:
        """Take one batch's mean assignment ([K], the same on every rank) into the average. One operator, no sync."""
        self.average_K.lerp_(mean_assignment_K.float(), 1.0 - self.momentum)

    def share(self) -> Tensor:
        """The running share of each prototype, [K], sums to 1; zeros before the first update."""
        return self.average_K / self.average_K.sum().clamp_min(torch.finfo(torch.float32).tiny)

    def statistics(self) -> dict[str, Tensor]:
        """`prototype_perplexity`, `live_prototypes`, `top_share` (of the most used one) as 0-dim device tensors."""
        share_K = self.share()
        return {
            "prototype_perplexity": perplexity(share_K),
            "live_prototypes": live_prototypes(share_K),
            "top_share": share_K.max(),
        }
