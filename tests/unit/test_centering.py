"""The center: centered and sharpened targets, one update a step whatever the parts, and nothing at all if refused."""

from __future__ import annotations

import torch
from torch import Tensor

from dino_dist.centering import Centering

K = 11
CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def centering(momentum: float = 0.9, dtype: torch.dtype = torch.float64) -> Centering:
    made = Centering(K, momentum=momentum, device=CPU, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    made.center_1K.copy_(torch.randn(1, K, generator=generator, dtype=torch.float64))
    return made


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_starts_at_zero() -> None:
    made = Centering(K, momentum=0.9, device=CPU, dtype=torch.float32)
    assert torch.equal(made.center_1K, torch.zeros(1, K))


def test_targets_are_centered_and_sharpened() -> None:
    made = centering()
    teacher = logits(6)
    targets = made.targets(teacher, 0.04)
    weights = torch.exp((teacher - made.center_1K) / 0.04 - 100.0)
    torch.testing.assert_close(targets, weights / weights.sum(1, keepdim=True), rtol=1e-11, atol=1e-300)


def test_a_step_uses_the_center_from_before_it() -> None:
    """Parts of one batch see the same center; it moves once, after them."""
    made = centering()
    before = made.center_1K.clone()
    for part in torch.split(logits(6), [1, 5]):
        made.targets(part, 0.04)
        assert torch.equal(made.center_1K, before)


def test_the_update_is_the_running_mean_of_the_logits() -> None:
    made = centering(momentum=0.8)
    before, teacher = made.center_1K.clone(), logits(6)
    made.targets(teacher, 0.04)
    made.update(made.take_sums()[0] / 6, YES)
    torch.testing.assert_close(
        made.center_1K, 0.8 * before + 0.2 * teacher.mean(0, keepdim=True), rtol=1e-13, atol=1e-15
    )


def test_unequal_parts_and_ranks_add_up_to_the_whole_batch() -> None:
    teacher = logits(7)
    whole, accumulated = centering(), centering()
    whole.targets(teacher, 0.05)
    expected = whole.take_sums()
    for part in torch.split(teacher, [4, 1, 2]):
        accumulated.targets(part, 0.05)
    torch.testing.assert_close(accumulated.take_sums(), expected, rtol=1e-13, atol=1e-14)
    ranks = torch.zeros(2, K, dtype=torch.float64)
    for part in torch.split(teacher, [3, 4]):
        rank = centering()
        rank.targets(part, 0.05)
        ranks += rank.take_sums()
    torch.testing.assert_close(ranks, expected, rtol=1e-13, atol=1e-14)


def test_the_second_row_sums_the_targets() -> None:
    made = centering()
    targets = made.targets(logits(5), 0.05)
    torch.testing.assert_close(made.take_sums()[1], targets.sum(0))


def test_sums_are_forgotten_once_taken() -> None:
    made = centering()
    made.targets(logits(5, seed=1), 0.05)
    made.take_sums()
    made.targets(logits(3, seed=2), 0.05)
    torch.testing.assert_close(made.take_sums()[0], logits(3, seed=2).sum(0))


def test_a_refused_update_leaves_every_bit() -> None:
    made = centering()
    before = made.center_1K.clone()
    made.update(torch.full((K,), float("nan"), dtype=torch.float64), NO)
    made.update(torch.full((K,), 7.0, dtype=torch.float64), NO)
    assert torch.equal(made.center_1K, before)


def test_the_center_keeps_its_place_in_memory() -> None:
    """A checkpoint fills it in place."""
    made = centering()
    address = made.center_1K.data_ptr()
    made.update(torch.ones(K, dtype=torch.float64), YES)
    assert made.center_1K.data_ptr() == address


def test_low_precision_logits_are_centered_in_fp32() -> None:
    made = centering(dtype=torch.float32)
    teacher = logits(6).to(torch.bfloat16)
    targets = made.targets(teacher, 0.04)
    assert targets.dtype == torch.float32
    exact = ((teacher.double() - made.center_1K.double()) / 0.04).softmax(-1)
    torch.testing.assert_close(targets.double(), exact, rtol=1e-4, atol=1e-7)
