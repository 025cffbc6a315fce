"""DINO's projection head: an MLP, an L2 norm, weight-normalised prototypes; its batch norm spans all ranks.

Letters: N rows (crops), C features, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dino_dist.errors import UserError


class WeightNormLinear(nn.Module):
    """x -> x Wᵀ with rows W_k = g_k v_k / ||v_k|| and no bias: one prototype a row (arXiv:1602.07868, eq. 2)."""

    def __init__(self, in_features: int, out_features: int, *, train_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Directions as torch starts a bias-free Linear, U(-1, 1) / √in; norms 1."""
        bound = self.weight_v.shape[1] ** -0.5
        nn.init.uniform_(self.weight_v, -bound, bound)
        nn.init.ones_(self.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, K]; at least fp32 out, since the norms are taken in fp32.

        The norm scales the products, not the weight: the normalised [K, in] matrix (64 MiB for 65,536 prototypes of
        256) would otherwise be saved for backward.
        """
        products: Tensor = F.linear(x, self.weight_v)
        norm_dtype = torch.promote_types(self.weight_v.dtype, torch.float32)
        norms_K: Tensor = torch.linalg.vector_norm(self.weight_v, dim=1, dtype=norm_dtype)
        return products * (self.weight_g.squeeze(1) / norms_K)


class _AllReduceSum(torch.autograd.Function):
    """Sum over the ranks of the default group; backward sums the gradients: every rank's loss depends on every part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class ReducedBatchNorm1d(nn.Module):
    """Batch norm of [N, C] with the statistics of all ranks' rows, whatever each rank's N.

    One all-reduce of (sum, sum of squares, count), on any device and backend. No running statistics: the head serves
    the loss alone and is never evaluated, so nothing would read them. The variance is biased, eps 1e-5.
    """

    def __init__(self, num_features: int, *, world_size: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.world_size = world_size
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The identity after normalisation."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x_NC: Tensor) -> Tensor:
        """[N, C] -> [N, C], input dtype; statistics in at least fp32. A collective: every rank must call it."""
        wide_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
        statistics = torch.cat(
            [wide_NC.sum(dim=0), wide_NC.square().sum(dim=0), wide_NC.new_full((1,), wide_NC.shape[0])]
        )
        if self.world_size > 1:
            statistics = _AllReduceSum.apply(statistics)
        sum_C, square_C, count = statistics.split_with_sizes([self.num_features, self.num_features, 1])
        mean_C = sum_C / count
        # Rounding may take the difference of squares below zero.
        variance_C = (square_C / count - mean_C.square()).clamp_min(0.0)
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return torch.addcmul(self.bias - mean_C * scale_C, wide_NC, scale_C).to(x_NC.dtype)


class DinoHead(nn.Module):
    """MLP -> L2 norm -> prototypes; parameter names are the published checkpoints'."""

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        world_size: int = 1,
        init_std: float = 0.02,
    ) -> None:
        """`norm_last_layer` keeps the prototypes' norms at 1 (untrained); `world_size` is for the batch norm alone.

        `init_std`: standard deviation of the truncated normal that starts the MLP's weights.
        """
        super().__init__()
        self.init_std = init_std
        if num_layers < 1:
            raise UserError(f"head.num_layers={num_layers} must be at least 1")
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for index in range(num_layers - 1):
            layers.append(nn.Linear(widths[index], widths[index + 1]))
            if batch_norm:
                layers.append(ReducedBatchNorm1d(widths[index + 1], world_size=world_size))
            layers.append(nn.GELU())
        last = nn.Linear(widths[-2], widths[-1])
        # A single layer is named `mlp.weight`, not `mlp.0.weight`, in published checkpoints.
        self.mlp: nn.Module = nn.Sequential(*layers, last) if layers else last
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes, train_norm=not norm_last_layer)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew from torch's default generator, as published."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.init_std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, WeightNormLinear | ReducedBatchNorm1d):
                module.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_dim] -> prototype logits [N, K], at least fp32."""
        bottleneck: Tensor = self.mlp(x)
        wide = bottleneck.to(torch.promote_types(bottleneck.dtype, torch.float32))
        logits: Tensor = self.last_layer(F.normalize(wide, p=2.0, dim=-1).to(bottleneck.dtype))
        return logits
