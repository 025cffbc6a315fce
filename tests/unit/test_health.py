"""The health statistics equal numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from dino_dist import health


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


def test_share_before_the_first_update_is_zero() -> None:
    assert health.PrototypeUsage(3).share().tolist() == [0.0, 0.0, 0.0]


def test_many_small_batches_reach_prototypes_that_one_cannot() -> None:
    generator = torch.Generator().manual_seed(1)
    usage = health.PrototypeUsage(1024)
    hits = torch.randint(0, 1024, (100, 128), generator=generator)
    for batch in hits:
        usage.update_(torch.bincount(batch, minlength=1024) / len(batch))
    one_batch = health.live_prototypes(torch.bincount(hits[0], minlength=1024) / 128).item()
    assert one_batch <= 128
    assert usage.statistics()["live_prototypes"].item() > 1000


def test_usage_resumes_from_its_tensor() -> None:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.rand(6, generator=generator).softmax(-1) for _ in range(7)]
    whole, resumed = health.PrototypeUsage(6), health.PrototypeUsage(6)
    for index, batch in enumerate(batches):
        whole.update_(batch)
        if index == 3:
            resumed.average_K.copy_(whole.average_K)
        elif index > 3:
            resumed.update_(batch)
    assert torch.equal(resumed.share(), whole.share())
