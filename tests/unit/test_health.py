"""The health statistics equal numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dino_dist import health


def test_teacher_entropy_of_known_distributions() -> None:
    one_hot = torch.eye(4)
    uniform = torch.full((2, 3, 8), 1 / 8)
    half = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert health.teacher_entropy(one_hot).item() == 0.0
    assert health.teacher_entropy(uniform).item() == pytest.approx(math.log(8), rel=1e-6)
    assert health.teacher_entropy(half).item() == pytest.approx(math.log(2) / 2, rel=1e-6)


def test_kl_is_zero_for_a_student_that_predicts_the_teacher_and_matches_torch_otherwise() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 7, generator=generator).softmax(-1)
    student = torch.randn(5, 7, generator=generator).log_softmax(-1)
    entropy = health.teacher_entropy(teacher)
    same = -(teacher * teacher.log()).sum(-1).mean()
    other = -(teacher * student).sum(-1).mean()
    reference = torch.nn.functional.kl_div(student, teacher, reduction="batchmean")
    assert health.kl_divergence(same, entropy).item() == pytest.approx(0.0, abs=1e-6)
    assert health.kl_divergence(other, entropy).item() == pytest.approx(reference.item(), rel=1e-5)


def test_center_norm_is_fp32_whatever_the_center() -> None:
    norm = health.center_norm(torch.tensor([3.0, 4.0], dtype=torch.bfloat16))
    assert norm.dtype == torch.float32
    assert norm.item() == 5.0


def test_perplexity_and_live_count_by_hand() -> None:
    share = torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert health.perplexity(share).item() == pytest.approx(2.0)
    # 1/(100 K) is 0.0025 here: above, at a little below, above.
    assert health.live_prototypes(torch.tensor([0.99, 0.0024, 0.0026, 0.005])).item() == 3.0


def test_running_share_is_the_bias_corrected_average() -> None:
    usage = health.PrototypeUsage(2, momentum=0.5)
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    usage.update_(first)
    assert usage.share().tolist() == [1.0, 0.0]
    usage.update_(second)
    torch.testing.assert_close(usage.share(), (0.25 * first + 0.5 * second) / 0.75)
    assert usage.statistics()["top_share"].item() == pytest.approx(2 / 3)


def test_many_small_batches_reach_prototypes_that_one_cannot() -> None:
    generator = torch.Generator().manual_seed(1)
    usage = health.PrototypeUsage(1024)
    hits = torch.randint(0, 1024, (100, 128), generator=generator)
    for batch in hits:
        usage.update_(health.mean_assignment(torch.nn.functional.one_hot(batch, 1024).view(2, 64, 1024)))
    one_batch = health.live_prototypes(torch.bincount(hits[0], minlength=1024) / 128).item()
    assert one_batch <= 128
    assert usage.statistics()["live_prototypes"].item() > 1000


def test_usage_resumes_from_its_tensor_and_counter() -> None:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.rand(6, generator=generator).softmax(-1) for _ in range(7)]
    whole, resumed = health.PrototypeUsage(6), health.PrototypeUsage(6)
    for index, batch in enumerate(batches):
        whole.update_(batch)
        if index == 3:
            resumed.average_K.copy_(whole.average_K)
            resumed.updates = whole.updates
        elif index > 3:
            resumed.update_(batch)
    assert torch.equal(resumed.share(), whole.share())
