"""The teacher follows the student by the published formula, stays put where a step is refused, and is used afresh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dino_dist.build import build_step
from dino_dist.config import (
    AugmentSection,
    Config,
    DataSection,
    EvalSection,
    HeadSection,
    ModelSection,
    ParallelSection,
    TrainSection,
)
from dino_dist.config_checks import check
from dino_dist.dist import World
from dino_dist.student_teacher import StudentTeacher

YES, NO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def networks(*, norm_last_layer: bool = False, seed: int = 0) -> StudentTeacher:
    config = Config(
        data=DataSection(train="none"),
        model=ModelSection(embed_dim=16, depth=2, num_heads=2, patch_size=4, attention="sdpa"),
        head=HeadSection(num_prototypes=13, hidden_dim=12, bottleneck_dim=6, norm_last_layer=norm_last_layer),
        augment=AugmentSection(global_px=16, local_px=8),
        train=TrainSection(precision="fp64", device="cpu", batch_size=2),
        eval=EvalSection(resize_px=16, crop_px=16),
        parallel=ParallelSection(strategy="none"),
    )
    check(config)
    return build_step(replace(config, run=replace(config.run, seed=seed)), World(), "sdpa").networks


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def shake(network: torch.nn.Module, seed: int = 5) -> None:
    """Move every weight, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def crops() -> list[Tensor]:
    return [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]


def test_both_start_alike_and_only_the_student_learns() -> None:
    pair = networks()
    student, teacher = weights(pair.student), weights(pair.teacher)
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert not any(parameter.requires_grad for parameter in pair.teacher.parameters())
    assert all(parameter.requires_grad for parameter in pair.student.parameters())


def test_fixed_prototype_norms_have_no_gradient() -> None:
    frozen = [name for name, p in networks(norm_last_layer=True).student.named_parameters() if not p.requires_grad]
    assert frozen == ["head.last_layer.weight_g"]


def test_the_seed_decides_the_weights() -> None:
    first, again, other = weights(networks().student), weights(networks().student), weights(networks(seed=1).student)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.pos_embed"], other["backbone.pos_embed"])


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996])
def test_the_teacher_is_the_moving_average(momentum: float) -> None:
    pair = networks()
    expected = weights(pair.teacher)
    for seed in range(3):
        shake(pair.student, seed)
        pair.update_teacher(momentum, YES)
        student = weights(pair.student)
        expected = {name: momentum * old + (1 - momentum) * student[name] for name, old in expected.items()}
    for name, tensor in weights(pair.teacher).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize(("momentum", "accept"), [(0.5, NO), (1.0, YES)], ids=["refused", "momentum 1"])
def test_a_teacher_that_must_not_move_keeps_every_bit(momentum: float, accept: Tensor) -> None:
    pair = networks()
    shake(pair.student)
    student, teacher = weights(pair.student), weights(pair.teacher)
    pair.update_teacher(momentum, accept)
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in weights(pair.teacher).items())
    assert all(torch.equal(tensor, student[name]) for name, tensor in weights(pair.student).items())


def test_at_momentum_zero_the_teachers_output_is_the_students() -> None:
    """The forward pass uses the updated weights, not a copy gathered before."""
    pair = networks()
    with torch.no_grad():
        before = pair.teacher(crops())
        shake(pair.student)
        pair.update_teacher(0.0, YES)
        torch.testing.assert_close(pair.teacher(crops()), pair.student(crops()), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(pair.teacher(crops()), before)


def test_one_copy_has_no_drift() -> None:
    pair = networks()
    assert pair.teacher_drift() is None
    teacher = weights(pair.teacher)
    pair.take_first_replica()
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in weights(pair.teacher).items())


def test_tensors_share_memory_with_the_networks() -> None:
    """A checkpoint fills them in place."""
    pair = networks()
    tensors = pair.tensors()
    assert {name.split(".")[0] for name in tensors} == {"student", "teacher"}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(2.0)
    assert all(bool((p == 2.0).all()) for p in [*pair.student.parameters(), *pair.teacher.parameters()])
