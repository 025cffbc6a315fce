"""What tells a learning run from a collapsing one: pure statistics of the teacher, fp32, without host synchronisation.

Letters: G teacher views, B images, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIVE_SHARE_OF_UNIFORM = 0.01
"""A prototype is live while its running share of the assignments is above 1/(100 K): a hundredth of a fair share."""


def teacher_entropy(probability_GBK: Tensor) -> Tensor:
    """Mean over samples of `-sum_k p log p`, in nats: 0 for one-hot targets, ln K for uniform ones.

    `probability_GBK`: any leading dimensions, the last one sums to 1 (arXiv:2104.14294, section 5.3, calls this h).
    Zeros count as 0. Returns a 0-dim fp32 tensor.
    """
    entropy_GB: Tensor = torch.special.entr(probability_GBK.detach().float()).sum(-1)
    return entropy_GB.mean()


def kl_divergence(cross_entropy: Tensor, entropy: Tensor) -> Tensor:
    """KL(teacher || student) = H(teacher, student) - H(teacher), in nats; 0 when the student predicts the teacher.

    `cross_entropy` is the loss. The difference is exact because every teacher view takes part in as many pairs as any
    other. Logged beside the entropy, since a rising loss with a falling KL means softer targets, not worse learning.
    """
    return (cross_entropy.detach() - entropy.detach()).float()


def center_norm(center_K: Tensor) -> Tensor:
    """L2 norm of the center: it stops growing in a healthy run. 0-dim, fp32."""
    norm: Tensor = torch.linalg.vector_norm(center_K.detach().float())
    return norm


def mean_assignment(probability_GBK: Tensor) -> Tensor:
    """Share of the assignments that each prototype gets in this batch: the mean over all but the last dimension, [K].

    Ranks hold different images: average it over ranks, weighted by their image counts, before `PrototypeUsage.update_`.
    """
    return probability_GBK.detach().float().flatten(0, -2).mean(0)


def perplexity(share_K: Tensor) -> Tensor:
    """exp of the entropy of a distribution over prototypes: how many are in use, between 1 and K. 0-dim, fp32."""
    entropy: Tensor = torch.special.entr(share_K.float()).sum()
    return entropy.exp()


def live_prototypes(share_K: Tensor) -> Tensor:
    """How many prototypes have a share above 1/(100 K). 0-dim, fp32."""
    return (share_K > LIVE_SHARE_OF_UNIFORM / share_K.numel()).sum().float()


class PrototypeUsage:
    """Exponentially averaged mean assignment: one batch of 64 cannot touch all of 1,024 prototypes, many together can.

    share_n = (1 - m) * sum_i m^(n-i) a_i / (1 - m^n) for mean assignments a_1 ... a_n, unbiased from the first one on.
    `average_K` (a device tensor) and `updates` (an int) are the state: save both, so that a resumed run logs the same.
    The default momentum remembers about 20 steps: enough samples for the alarms, and soon enough to see a collapse.
    """

    def __init__(self, num_prototypes: int, *, momentum: float = 0.95, device: torch.device | None = None) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum {momentum}: must be in [0, 1)")
        self.momentum = momentum
        self.average_K = torch.zeros(num_prototypes, dtype=torch.float32, device=device)
        self.updates = 0

    @torch.no_grad()
    def update_(self, mean_assignment_K: Tensor) -> None:
        """Take one batch's mean assignment ([K], the same on every rank) into the average. One operator, no sync."""
        self.average_K.lerp_(mean_assignment_K.float(), 1.0 - self.momentum)
        self.updates += 1

    def share(self) -> Tensor:
        """The running share of each prototype, [K], sums to 1; zeros before the first update."""
        return self.average_K / (1.0 - self.momentum**self.updates) if self.updates else self.average_K.clone()

    def statistics(self) -> dict[str, Tensor]:
        """`prototype_perplexity`, `live_prototypes`, `top_share` (of the most used one) as 0-dim device tensors."""
        share_K = self.share()
        return {
            "prototype_perplexity": perplexity(share_K),
            "live_prototypes": live_prototypes(share_K),
            "top_share": share_K.max(),
        }
