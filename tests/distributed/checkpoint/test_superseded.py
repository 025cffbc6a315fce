"""An attempt that another one has superseded saves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dino_dist.checkpoint import Checkpointer
from dino_dist.errors import Superseded
from dino_dist.fencing import file_lock
from dino_dist.run_folder import RunFolder

# Torch warns of each save without a process group, which is what the tests in this process mean to do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_superseded_attempt_cannot_begin_a_save(
    contents: Any, folder: RunFolder, checkpointer: Callable[..., Checkpointer], names: Callable[[], list[str]]
) -> None:
    old = folder.begin_attempt(job_id="7", restarts=0)
    saver = checkpointer(old)
    with folder.begin_attempt(job_id="7", restarts=1):
        with pytest.raises(Superseded):
            saver.save(contents.values(1), contents.state, step=1)
        assert names() == []
    old.close()


def test_attempt_superseded_during_a_save_cannot_commit(
    contents: Any, folder: RunFolder, checkpointer: Callable[..., Checkpointer], names: Callable[[], list[str]]
) -> None:
    old = folder.begin_attempt()
    saver = checkpointer(old)
    assert saver.save(contents.values(1), contents.state, step=1, wait=True)
    before = folder.ledger.read_bytes()
    with file_lock(folder.attempts / "lock"):
        assert saver.save(contents.values(2), contents.state, step=2)
        folder.attempt_file(2).write_text("{}")
    with pytest.raises(Superseded):
        saver.finish()
    with pytest.raises(Superseded):
        saver.save(contents.values(3), contents.state, step=3)
    assert [name for name in names() if "tmp" not in name] == ["step-00000001"]
    assert folder.ledger.read_bytes() == before
    old.close()
