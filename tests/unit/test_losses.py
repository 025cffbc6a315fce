"""The loss equals its definition by nested loops, adds up over parts, and sends gradients where it should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dino_dist.losses import dino_loss


def logits_and_targets(
    student: int, teacher: int, images: int, prototypes: int, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(student * 100 + teacher * 10 + images)
    logits = scale * torch.randn(student, images, prototypes, generator=generator, dtype=torch.float64)
    targets = torch.randn(teacher, images, prototypes, generator=generator, dtype=torch.float64).softmax(-1)
    return logits, targets


def by_loops(student_SBK: Tensor, target_GBK: Tensor, student_temp: float) -> float:
    """Sum over images of the mean over pairs of different views of -sum_k p_k log q_k."""
    total, pairs = 0.0, 0
    for g in range(target_GBK.shape[0]):
        for s in range(student_SBK.shape[0]):
            if s == g:
                continue
            pairs += 1
            for b in range(target_GBK.shape[1]):
                sharpened = [float(value) / student_temp for value in student_SBK[s, b]]
                largest = max(sharpened)
                log_sum = largest + math.log(sum(math.exp(value - largest) for value in sharpened))
                total += sum(
                    -float(p) * (value - log_sum) for p, value in zip(target_GBK[g, b], sharpened, strict=True)
                )
    return total / pairs


@pytest.mark.parametrize(
    ("student", "teacher", "images", "prototypes"), [(2, 2, 1, 2), (2, 2, 4, 9), (6, 2, 3, 17), (5, 1, 2, 5)]
)
@pytest.mark.parametrize("student_temp", [0.1, 1.0])
def test_the_closed_form_is_the_nested_loops(
    student: int, teacher: int, images: int, prototypes: int, student_temp: float
) -> None:
    logits, targets = logits_and_targets(student, teacher, images, prototypes)
    ours = dino_loss(logits, targets, student_temp=student_temp).item()
    assert ours == pytest.approx(by_loops(logits, targets, student_temp), rel=1e-12)


def test_unequal_parts_add_up_to_the_whole() -> None:
    logits, targets = logits_and_targets(6, 2, 11, 13)
    whole = dino_loss(logits, targets, student_temp=0.1)
    parts = [
        dino_loss(logits[:, start:stop], targets[:, start:stop], student_temp=0.1)
        for start, stop in ((0, 5), (5, 6), (6, 6), (6, 11))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-13, atol=0)


def test_gradients_are_those_of_the_definition() -> None:
    """d loss / d logits of view s: (number of its teachers x softmax - sum of their targets) / temperature / pairs."""
    logits, targets = logits_and_targets(5, 2, 3, 7)
    logits.requires_grad_()
    dino_loss(logits, targets, student_temp=0.1).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    softmax = (logits.detach() / 0.1).softmax(-1)
    for s in range(5):
        teachers = [g for g in range(2) if g != s]
        expected = (len(teachers) * softmax[s] - sum(targets[g] for g in teachers)) / 0.1 / (5 * 2 - 2)
        torch.testing.assert_close(logits.grad[s], expected, rtol=1e-11, atol=1e-13)


def test_gradcheck() -> None:
    logits, targets = logits_and_targets(3, 2, 2, 4, scale=0.3)
    assert torch.autograd.gradcheck(lambda x: dino_loss(x, targets, student_temp=0.5), logits.requires_grad_())


def test_a_view_is_never_its_own_target() -> None:
    """With two global views and nothing else, changing a view's own target must not change its gradient."""
    logits, targets = logits_and_targets(2, 2, 3, 5)
    gradients = []
    for own in (targets[0], targets[0].flip(-1)):
        student = logits.clone().requires_grad_()
        dino_loss(student, torch.stack([own, targets[1]]), student_temp=0.1).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        gradients.append(student.grad)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.equal(gradients[0][1], gradients[1][1])


def test_a_student_that_knows_nothing_loses_log_k() -> None:
    _, targets = logits_and_targets(4, 2, 3, 50)
    loss = dino_loss(torch.zeros(4, 3, 50), targets.float(), student_temp=0.1)
    assert loss.item() == pytest.approx(3 * math.log(50), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_fp32(dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(6, 2, 4, 4096)
    low = logits.to(dtype)
    ours = dino_loss(low, targets.float(), student_temp=0.1)
    assert ours.dtype == torch.float32
    exact = dino_loss(low.double(), targets, student_temp=0.1)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)


def test_large_logits_stay_finite() -> None:
    logits, targets = logits_and_targets(4, 2, 3, 20, scale=1e4)
    assert torch.isfinite(dino_loss(logits.float(), targets.float(), student_temp=0.1))
