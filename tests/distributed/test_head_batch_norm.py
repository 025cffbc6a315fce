"""The head's batch norm over several ranks equals one rank with all rows, however unequally they are divided."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dino_dist.models.head import DinoHead

NUM_ROWS, NUM_FEATURES = 11, 6


def build_head(world_size: int) -> DinoHead:
    torch.manual_seed(0)
    return DinoHead(
        NUM_FEATURES, 9, hidden_dim=8, bottleneck_dim=5, batch_norm=True, norm_last_layer=False, world_size=world_size
    ).double()


def run_head(head: DinoHead, rows: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits and gradients of this slice's part of one loss, a sum over all rows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, NUM_FEATURES, dtype=torch.float64, generator=generator)[rows].requires_grad_()
    weight = torch.randn(NUM_ROWS, 9, dtype=torch.float64, generator=generator)[rows]
    logits = head(x)
    x_grad, *grads = torch.autograd.grad((logits * weight).sum(), [x, *head.parameters()])
    return logits.detach(), x_grad, grads


def rank_main(rank: int, slices: list[slice], store_path: str, results: Connection) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(store_path, len(slices))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=len(slices))
        logits, x_grad, grads = run_head(build_head(len(slices)), slices[rank])
        for grad in grads:
            dist.all_reduce(grad)
        results.send([t.numpy() for t in (logits, x_grad, *grads)])
        dist.destroy_process_group()
    except Exception:
        results.send(traceback.format_exc())
        raise


@pytest.mark.distributed
@pytest.mark.parametrize("counts", [(4, 7), (1, 10), (5, 1, 5)])
def test_unequal_ranks_are_one_rank(counts: tuple[int, ...], tmp_path: Path) -> None:
    stops = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    slices = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in counts]
    ranks = [
        context.Process(target=rank_main, args=(rank, slices, str(tmp_path / "store"), pipes[rank][1]))
        for rank in range(len(counts))
    ]
    for process in ranks:
        process.start()
    try:
        answers = []
        for receiver, _ in pipes:
            assert receiver.poll(60), "a rank did not answer"
            answer = receiver.recv()
            assert not isinstance(answer, str), answer
            answers.append([torch.from_numpy(array) for array in answer])
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    logits, x_grad, grads = run_head(build_head(1), slice(None))
    torch.testing.assert_close(torch.cat([answer[0] for answer in answers]), logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([answer[1] for answer in answers]), x_grad, rtol=0, atol=1e-12)
    for answer in answers:
        for ours, reference in zip(answer[2:], grads, strict=True):
            torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
