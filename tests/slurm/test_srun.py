"""Ranks that srun starts on two nodes find each other, and a signal to their step stops them in good order."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_step_that_is_signalled_saves_and_the_next_goes_on(
    cluster: Any,
    watch: Callable[[Path, str], Any],
    small: Callable[..., list[str]],
    assert_undisturbed: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    train = shlex.join([sys.executable, "-m", "launch.cli", "train", *small(path, "run.requeue=false")])
    # The signal reaches the shell as well, which is to outlive it and tell the rank's exit code.
    each = f"trap : USR2; {train}; echo rank $SLURM_PROCID on $SLURMD_NODENAME ended with $?"
    script = f"srun --kill-on-bad-exit=0 sh -c {shlex.quote(each)}"

    first = watch(path, cluster.sbatch(script, "-N2", folder=tmp_path))
    first.wait_for_step(30)
    cluster.run("scancel", "--signal=USR2", f"{first.job_id}.0")
    first.wait_for_end()
    said = (tmp_path / f"{first.job_id}.out").read_text()
    assert {"rank 0 on n0 ended with 3", "rank 1 on n1 ended with 3"} <= set(said.splitlines()), said
    signals = first.events("signal")
    assert {row["rank"] for row in signals} == {0, 1}
    assert {row["why"] for row in signals} == {"SIGUSR2"}
    assert first.newest_checkpoint() == first.last_logged_step() == signals[0]["step"], "a step was lost"

    second = watch(path, cluster.sbatch(script, "-N2", folder=tmp_path))
    second.wait_for_end()
    assert "rank 1 on n1 ended with 0" in (tmp_path / f"{second.job_id}.out").read_text()
    second.assert_restarted_at_the_saved_steps()
    assert_undisturbed(path)
