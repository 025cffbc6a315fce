"""Parameter groups, clipping and the update rules, all on this rank's shards of the parameters.

AdamW and SGD are elementwise, so a shard is updated without knowing the rest; only norms need the other ranks. A step
with a bad number is undone on the device: the optimizers read `found_inf` (0-dim, 1 = leave everything as it is), so
nobody waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dino_dist.config import OptimSection
from dino_dist.schedules import StepSettings


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that lives on this rank, sharing its memory: the tensor itself where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Biases and norms have no weight decay; position embeddings and class token have it, as published."""
    return not (name.endswith(".bias") or parameter.ndim == 1)


class ShardedParameters:
    """The student's trainable parameters as this rank holds them: names, shards, gradients.

    `shards` share memory with the module's parameters (and are those where nothing is sharded); `load_gradients` points
    their `.grad` at the module's gradients. `is_prototype` marks the last layer, whose updates may be frozen.
    """

    def __init__(self, student: nn.Module) -> None:
        named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.shards = [nn.Parameter(local_shard(p.detach())) if isinstance(p, DTensor) else p for p in self.parameters]
        self.decayed = [is_decayed(name, p) for name, p in named]
        self.is_prototype = ["last_layer" in name for name in self.names]

    def load_gradients(self) -> list[Tensor]:
        """Move every gradient from the module to its shard and return them; a parameter without one is an error."""
        gradients = []
        for name, parameter, shard in zip(self.names, self.parameters, self.shards, strict=True):
            if parameter.grad is None:
                raise RuntimeError(f"parameter {name} took no part in the loss")
            gradient = local_shard(parameter.grad)
            parameter.grad = None  # first: it may be the shard itself
            shard.grad = gradient
            gradients.append(gradient)
        return gradients

    def drop_prototype_gradients(self) -> None:
        """Leave the last layer out of the coming update, its weight decay and moments included."""
        for shard, is_prototype in zip(self.shards, self.is_prototype, strict=True):
            if is_prototype:
                shard.grad = None

    def clear_gradients(self) -> None:
        """Free the gradients."""
        for shard in self.shards:
            shard.grad = None

    def like_parameter(self, index: int, local: Tensor) -> Tensor:
        """`local` in the role of shard `index`: a DTensor of the parameter's layout where the parameter is one."""
        parameter = self.parameters[index]
        if not isinstance(parameter, DTensor) or local.ndim != parameter.ndim:
            return local
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )


def squared_norms(gradients: list[Tensor]) -> Tensor:
    """Sum of squares of every local gradient, one vector [len(gradients)]."""
    return torch.stack(torch._foreach_norm(gradients)).square()


def clip_(gradients: list[Tensor], norms_P: Tensor, *, largest: float, scope: str) -> None:
    """Scale gradients in place so that no norm exceeds `largest` (0: do nothing).

    `scope`: `parameter` (each by its own norm, as published: g * min(1, c / (|g| + 1e-6))) or `global` (all by the norm
    of all). `norms_P` are norms over all ranks.
    """
    if largest == 0:
        return
    if scope == "global":
        factor = (largest / (torch.linalg.vector_norm(norms_P) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
    else:
        factors_P = (largest / (norms_P + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors_P.unbind()))


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888), as in the published code.

    Tensors with weight decay get `lr * trust * |p| / |g + wd p|`; biases and norms plain momentum SGD without decay.
    Norms are over all ranks: `sum_over_shards` adds a vector of squares over the ranks that share a parameter.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        trust_coefficient: float,
        sum_over_shards: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust_coefficient": trust_coefficient})
        self._sum_over_shards = sum_over_shards

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shards = [p for p in group["params"] if p.grad is not None]
            if not shards:
                continue
            updates = [p.grad for p in shards]
            if group["adapted"]:
                updates = list(torch._foreach_add(updates, shards, alpha=group["weight_decay"]))
                squares_2P = torch.stack([squared_norms(shards), squared_norms(updates)])
                norms_2P = self._sum_over_shards(squares_2P).sqrt()
                ratios_P = group["trust_coefficient"] * norms_2P[0] / norms_2P[1]
                ratios_P = torch.where((norms_2P > 0).all(0), ratios_P, torch.ones_like(ratios_P))
                updates = list(torch._foreach_mul(updates, list(ratios_P.unbind())))
            for shard, update in zip(shards, updates, strict=True):
                self._apply(shard, update, group["lr"], group["momentum"])

    def _apply(self, shard: Tensor, update: Tensor, lr: float, momentum: float) -> None:
        buffer = self.state[shard]["momentum_buffer"]
        new_buffer = buffer * momentum + update
        new_shard = shard - lr * new_buffer
        if self.found_inf is not None:
            # A NaN times zero is a NaN, so the old values are selected, not added.
            new_buffer = torch.where(self.found_inf > 0, buffer, new_buffer)
            new_shard = torch.where(self.found_inf > 0, shard, new_shard)
        buffer.copy_(new_buffer)
        shard.copy_(new_shard)


def parameter_groups(parameters: ShardedParameters) -> list[dict[str, Any]]:
    """Two groups: decayed first, then undecayed, as published."""
    groups = []
    for decayed in (True, False):
        members = [shard for shard, d in zip(parameters.shards, parameters.decayed, strict=True) if d == decayed]
        groups.append({"params": members, "weight_decay": 0.0, "adapted": decayed})
    return groups


class Update:
    """An update rule that leaves all as it is where `found_inf` is 1; `inner` holds the state of this rank's part.

    The two differ only for oss, where fairscale's OSS updates a part of the parameters here and broadcasts it.
    """

    def __init__(self, outer: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> None:
        self.outer = outer
        self.inner = inner

    def step(self, *, found_inf: Tensor) -> None:
        """Update every shard that has a gradient. `found_inf`: 0-dim, 0 or 1."""
        self.inner.found_inf = found_inf  # type: ignore[attr-defined]
        self.outer.step()


def build_optimizer(
    parameters: ShardedParameters, section: OptimSection, sum_over_shards: Callable[[Tensor], Tensor], *, oss: bool
) -> Update:
    """The update rule over the local shards, its whole state allocated now.

    State from the first step on makes checkpoints alike before and after the last layer thaws. A zero moment and step
    count 0 are what AdamW and SGD would create themselves.
    """
    groups = parameter_groups(parameters)
    kinds: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "adamw": (torch.optim.AdamW, {"betas": (section.beta1, section.beta2), "eps": section.eps, "fused": True}),
        "sgd": (torch.optim.SGD, {"momentum": section.momentum, "fused": True}),
        "lars": (
            Lars,
            {
                "momentum": section.momentum,
                "trust_coefficient": section.trust_coefficient,
                "sum_over_shards": sum_over_shards,
            },
        ),
    }
    kind, settings = kinds[section.name]
    outer: torch.optim.Optimizer
    if oss:
        from fairscale.optim import OSS

        outer = OSS(groups, optim=kind, lr=0.0, **settings)
        inner: torch.optim.Optimizer = outer.optim  # type: ignore[attr-defined]
    else:
        outer = inner = kind(groups, lr=0.0, **settings)  # type: ignore[call-arg]
    for group in inner.param_groups:
        for shard in group["params"]:
            inner.state[shard] = _initial_state(section.name, shard)
    return Update(outer, inner)


def _initial_state(name: str, shard: Tensor) -> dict[str, Tensor]:
    if name == "adamw":
        return {
            "step": torch.zeros((), dtype=torch.float32, device=shard.device),
            "exp_avg": torch.zeros_like(shard),
            "exp_avg_sq": torch.zeros_like(shard),
        }
    return {"momentum_buffer": torch.zeros_like(shard)}


def apply_settings(update: Update, settings: StepSettings) -> None:
    """Write a step's learning rate and weight decay into the groups."""
    for group in update.outer.param_groups:
        group["lr"] = settings.lr
        group["weight_decay"] = settings.weight_decay if group["adapted"] else 0.0


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: ShardedParameters) -> dict[str, Tensor]:
    """The optimizer's state as `optimizer.<parameter>.<field>`, in the parameters' own layout, sharing memory."""
    tensors = {}
    for index, (name, shard) in enumerate(zip(parameters.names, parameters.shards, strict=True)):
        state: Mapping[str, Tensor] = optimizer.state.get(shard, {})
        for key, value in state.items():
            tensors[f"optimizer.{name}.{key}"] = parameters.like_parameter(index, value)
    return tensors


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Every field of the parameter groups that JSON can hold: not the parameters, and no function."""
    return [
        {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in group.items()
            if isinstance(value, int | float | str | tuple | None)
        }
        for group in optimizer.param_groups
    ]
