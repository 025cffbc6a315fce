"""Parameter groups, clipping and update rules equal independent statements; a refused step leaves every bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_dist.build import build_network
from dino_dist.config import AugmentSection, Config, DataSection, HeadSection, ModelSection, OptimSection
from dino_dist.optim import (
    ShardedParameters,
    Update,
    apply_settings,
    build_optimizer,
    clip_,
    group_settings,
    optimizer_tensors,
    parameter_groups,
    squared_norms,
)
from dino_dist.schedules import StepSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "dino_v1_trajectory_a.npz"
NO, YES = torch.zeros(()), torch.ones(())
SHAPES = {
    "a.weight": (5, 3),
    "a.bias": (5,),
    "norm.weight": (5,),
    "last_layer.weight_v": (7, 5),
    "cls_token": (1, 1, 5),
}


class Bag(nn.Module):
    """Parameters under dotted names and nothing else."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            owner.register_parameter(leaf, nn.Parameter(value))


def gradients_of(step: int, *, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


def settings_of(step: int, *, train_last_layer: bool = True) -> StepSettings:
    return StepSettings(
        lr=0.1 / (1 + step),
        weight_decay=0.04 * (1 + step),
        momentum=0.99,
        teacher_temp=0.04,
        train_last_layer=train_last_layer,
    )


def build(section: OptimSection) -> tuple[Bag, ShardedParameters, Update]:
    bag = Bag()
    parameters = ShardedParameters(bag)
    return bag, parameters, build_optimizer(parameters, section, lambda squares: squares, oss=False)


def one_step(bag: Bag, parameters: ShardedParameters, update: Update, step: int, *, bad: bool = False) -> None:
    for name, gradient in gradients_of(step).items():
        bag.get_parameter(name).grad = gradient.clone()
    parameters.load_gradients()
    apply_settings(update, settings_of(step))
    update.step(found_inf=YES if bad else NO)
    parameters.clear_gradients()


def test_groups_are_the_recorded_ones() -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        meta = json.loads(str(golden["meta.json"]))
    settings = meta["config"]
    config = Config(
        data=DataSection(train="none"),
        model=ModelSection(
            embed_dim=settings["embed_dim"],
            depth=settings["depth"],
            num_heads=settings["num_heads"],
            patch_size=settings["patch_px"],
        ),
        head=HeadSection(
            num_prototypes=settings["num_prototypes"],
            hidden_dim=settings["head_hidden_dim"],
            bottleneck_dim=settings["head_bottleneck_dim"],
            norm_last_layer=settings["norm_last_layer"],
        ),
        augment=AugmentSection(global_px=settings["global_px"]),
    )
    parameters = ShardedParameters(build_network(config, "explicit", is_teacher=False, world_size=1))
    pairs = list(zip(parameters.names, parameters.decayed, strict=True))
    assert [name for name, decayed in pairs if decayed] == meta["decayed"]
    assert [name for name, decayed in pairs if not decayed] == meta["undecayed"]
    assert sorted(parameters.names) == sorted(meta["grad_parameters"])
    names = {id(shard): name for shard, name in zip(parameters.shards, parameters.names, strict=True)}
    first, second = parameter_groups(parameters)
    assert [names[id(p)] for p in first["params"]] == meta["decayed"]
    assert [names[id(p)] for p in second["params"]] == meta["undecayed"]


def test_only_the_decayed_group_decays() -> None:
    _, _, update = build(OptimSection())
    apply_settings(update, settings_of(2))
    assert [group["weight_decay"] for group in update.outer.param_groups] == [pytest.approx(0.12), 0.0]
    assert all(group["lr"] == pytest.approx(0.1 / 3) for group in update.outer.param_groups)


def test_group_settings_leave_out_what_json_cannot_hold() -> None:
    _, _, update = build(OptimSection(name="lars"))
    for group in update.outer.param_groups:
        group["sum_over_shards"] = len  # as fairscale's OSS copies its arguments into the groups
    saved = group_settings(update.outer)
    assert json.loads(json.dumps(saved)) == saved
    assert {"lr", "weight_decay", "momentum", "trust_coefficient"} <= saved[0].keys()


def test_group_settings_are_plain_and_complete() -> None:
    _, _, update = build(OptimSection())
    saved = group_settings(update.outer)
    assert json.loads(json.dumps(saved)) == saved
    for ours, group in zip(saved, update.outer.param_groups, strict=True):
        assert ours.keys() == group.keys() - {"params"}


def test_a_parameter_without_gradient_is_an_error() -> None:
    bag, parameters, _ = build(OptimSection())
    for name, gradient in gradients_of(0).items():
        bag.get_parameter(name).grad = None if name == "norm.weight" else gradient
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        parameters.load_gradients()


@pytest.mark.parametrize("largest", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("seed", [0, 1])
def test_clipping_a_parameter_is_torchs_on_each_alone(largest: float, seed: int) -> None:
    ours = list(gradients_of(seed, scale=0.7).values())
    reference = [nn.Parameter(torch.zeros_like(gradient)) for gradient in ours]
    for parameter, gradient in zip(reference, ours, strict=True):
        parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([parameter], largest)
    clip_(ours, squared_norms(ours).sqrt(), largest=largest, scope="parameter")
    for gradient, parameter in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("largest", [0.5, 3.0, 1e6])
def test_global_clipping_is_torchs_on_all(largest: float) -> None:
    ours = list(gradients_of(3).values())
    reference = [nn.Parameter(torch.zeros_like(gradient)) for gradient in ours]
    for parameter, gradient in zip(reference, ours, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(reference, largest)
    clip_(ours, squared_norms(ours).sqrt(), largest=largest, scope="global")
    for gradient, parameter in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_no_clipping_leaves_every_bit(scope: str) -> None:
    ours, before = list(gradients_of(0, scale=100.0).values()), list(gradients_of(0, scale=100.0).values())
    clip_(ours, squared_norms(ours).sqrt(), largest=0.0, scope=scope)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def adamw_by_hand(steps: int, section: OptimSection) -> dict[str, Tensor]:
    """Decoupled weight decay (arXiv:1711.05101, algorithm 2), one parameter after the other."""
    weights = {name: p.detach().clone() for name, p in Bag().named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(steps):
        now = settings_of(step)
        for name, gradient in gradients_of(step).items():
            first[name] = section.beta1 * first[name] + (1 - section.beta1) * gradient
            second[name] = section.beta2 * second[name] + (1 - section.beta2) * gradient**2
            mean = first[name] / (1 - section.beta1 ** (step + 1))
            variance = second[name] / (1 - section.beta2 ** (step + 1))
            decay = 0.0 if name.endswith(".bias") or gradient.ndim == 1 else now.weight_decay
            weights[name] = weights[name] * (1 - now.lr * decay) - now.lr * mean / (variance.sqrt() + section.eps)
    return weights


def momentum_by_hand(steps: int, section: OptimSection, *, adaptive: bool) -> dict[str, Tensor]:
    """SGD with momentum; with `adaptive`, LARS (arXiv:1708.03888): decayed tensors scaled by trust |w| / |g + wd w|."""
    weights = {name: p.detach().clone() for name, p in Bag().named_parameters()}
    buffers = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(steps):
        now = settings_of(step)
        for name, gradient in gradients_of(step).items():
            update = gradient.clone()
            if gradient.ndim > 1 and not name.endswith(".bias"):
                update = update + now.weight_decay * weights[name]
                if adaptive:
                    ratio = (
                        section.trust_coefficient * weights[name].square().sum().sqrt() / update.square().sum().sqrt()
                    )
                    update = update * ratio
            buffers[name] = section.momentum * buffers[name] + update
            weights[name] = weights[name] - now.lr * buffers[name]
    return weights


SECTIONS = {
    "adamw": OptimSection(name="adamw", beta1=0.8, beta2=0.95, eps=1e-3),
    "sgd": OptimSection(name="sgd", momentum=0.8),
    "lars": OptimSection(name="lars", momentum=0.8, trust_coefficient=0.02),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_update_rule_is_the_one_written_by_hand(name: str) -> None:
    section = SECTIONS[name]
    bag, parameters, update = build(section)
    for step in range(4):
        one_step(bag, parameters, update, step)
    expected = adamw_by_hand(4, section) if name == "adamw" else momentum_by_hand(4, section, adaptive=name == "lars")
    for key, weight in bag.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[key], rtol=1e-11, atol=1e-13, msg=key)


def test_lars_does_not_adapt_to_nothing() -> None:
    """A zero weight or a zero update has no ratio: it is 1, not a NaN."""
    bag, parameters, update = build(SECTIONS["lars"])
    with torch.no_grad():
        bag.get_parameter("a.weight").zero_()
        bag.get_parameter("cls_token").zero_()
    for name, gradient in gradients_of(0).items():
        bag.get_parameter(name).grad = torch.zeros_like(gradient) if name == "cls_token" else gradient.clone()
    parameters.load_gradients()
    apply_settings(update, settings_of(0))
    update.step(found_inf=NO)
    torch.testing.assert_close(bag.get_parameter("a.weight").detach(), -0.1 * gradients_of(0)["a.weight"])
    assert not bag.get_parameter("cls_token").any()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_refused_step_leaves_weights_and_moments_to_the_bit(name: str) -> None:
    bag, parameters, update = build(SECTIONS[name])
    one_step(bag, parameters, update, 0)

    def everything() -> dict[str, Tensor]:
        weights = {key: p.detach().clone() for key, p in bag.named_parameters()}
        return weights | {key: t.detach().clone() for key, t in optimizer_tensors(update.inner, parameters).items()}

    before = everything()
    for gradient in (float("nan"), float("inf"), 1.0):
        for key, shape in SHAPES.items():
            bag.get_parameter(key).grad = torch.full(shape, gradient, dtype=torch.float64)
        parameters.load_gradients()
        apply_settings(update, settings_of(1))
        update.step(found_inf=YES)
        parameters.clear_gradients()
    after = everything()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_refused_step_is_as_if_it_never_was(name: str) -> None:
    ways = []
    for bad_steps in ((), (1,)):
        bag, parameters, update = build(SECTIONS[name])
        one_step(bag, parameters, update, 0)
        for _ in bad_steps:
            one_step(bag, parameters, update, 9, bad=True)
        one_step(bag, parameters, update, 2)
        ways.append({key: p.detach() for key, p in bag.named_parameters()})
    assert all(torch.equal(ways[0][key], ways[1][key]) for key in SHAPES)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_made_at_the_start_is_what_torch_would_make_at_the_first_step(name: str) -> None:
    """The same updates to the last bit, and the same fields, as the plain optimizer whose state comes lazily."""
    section = SECTIONS[name]
    bag, parameters, update = build(section)
    other = Bag()
    plain_parameters = ShardedParameters(other)
    groups: list[dict[str, Any]] = parameter_groups(plain_parameters)
    plain: torch.optim.Optimizer
    if name == "adamw":
        plain = torch.optim.AdamW(groups, lr=0.0, betas=(section.beta1, section.beta2), eps=section.eps, fused=True)
    else:
        plain = torch.optim.SGD(groups, lr=0.0, momentum=section.momentum, fused=True)
    assert not plain.state
    for step in range(3):
        one_step(bag, parameters, update, step)
        one_step(other, plain_parameters, Update(plain, plain), step)
    ours, theirs = optimizer_tensors(update.inner, parameters), optimizer_tensors(plain, plain_parameters)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key
    for (key, weight), expected in zip(bag.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, expected), key


@pytest.mark.parametrize("name", SECTIONS)
def test_state_has_one_shape_before_and_after_the_last_layer_thaws(name: str) -> None:
    bag, parameters, update = build(SECTIONS[name])
    at_start = {key: tensor.shape for key, tensor in optimizer_tensors(update.inner, parameters).items()}
    assert {key.rsplit(".", 1)[0] for key in at_start} == {f"optimizer.{key}" for key in SHAPES}
    one_step(bag, parameters, update, 0)
    assert {key: tensor.shape for key, tensor in optimizer_tensors(update.inner, parameters).items()} == at_start


@pytest.mark.parametrize("name", SECTIONS)
def test_a_frozen_last_layer_keeps_weight_and_moments(name: str) -> None:
    bag, parameters, update = build(SECTIONS[name])
    one_step(bag, parameters, update, 0)
    key = "last_layer.weight_v"
    weight = bag.get_parameter(key).detach().clone()
    moments = {k: t.clone() for k, t in optimizer_tensors(update.inner, parameters).items() if key in k}
    others = bag.get_parameter("a.weight").detach().clone()
    for name_, gradient in gradients_of(1).items():
        bag.get_parameter(name_).grad = gradient
    parameters.load_gradients()
    parameters.drop_prototype_gradients()
    apply_settings(update, settings_of(1, train_last_layer=False))
    update.step(found_inf=NO)
    assert torch.equal(bag.get_parameter(key), weight)
    assert moments
    assert all(torch.equal(optimizer_tensors(update.inner, parameters)[k], t) for k, t in moments.items())
    assert not torch.equal(bag.get_parameter("a.weight"), others)


def test_norms_without_trained_prototype_norms_leave_them_out() -> None:
    bag = Bag()
    bag.get_parameter("norm.weight").requires_grad_(False)
    assert "norm.weight" not in ShardedParameters(bag).names
