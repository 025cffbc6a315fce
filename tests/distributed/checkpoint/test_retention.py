"""Which checkpoints are kept, and that leftovers of older attempts are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dino_dist.checkpoint import Checkpointer
from dino_dist.run_folder import Attempt, RunFolder

# Torch warns of each save without a process group, which is what the tests in this process mean to do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize(
    ("keep", "every", "kept"),
    [
        (1, None, [70]),
        (2, None, [60, 70]),
        (2, 30, [30, 60, 70]),
        (1, 20, [20, 40, 60, 70]),
        (1, 25, [30, 50, 70]),  # saves need not fall on the multiples
        (9, None, range(10, 71, 10)),
    ],
)
def test_retention(
    attempt: Attempt,
    checkpointer: Callable[..., Checkpointer],
    names: Callable[[], list[str]],
    keep: int,
    every: int | None,
    kept: list[int],
) -> None:
    saver = checkpointer(attempt, keep=keep, keep_every_steps=every)
    tensors = {"weight": torch.ones(3)}
    for step in range(10, 71, 10):
        assert saver.save(tensors, {}, step=step)
    assert saver.finish()
    assert names() == [f"step-{step:08d}" for step in kept]


def test_leftovers_of_older_attempts_go_at_the_start(
    folder: RunFolder, checkpointer: Callable[..., Checkpointer], names: Callable[[], list[str]]
) -> None:
    for name in ("step-00000010.tmp-1", ".trash-1-step-00000005"):
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "file").write_text("half")
    with folder.begin_attempt() as attempt:
        checkpointer(attempt)
        assert names() == []
