"""The fault drill itself, short: every kind of fault of local ranks strikes a run, which loses nothing by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fault_drill.py"


@pytest.mark.drill
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_drill_of_local_ranks_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--on", "local", "--faults", "16", "--signal-trials", "3", "--json"]
    done = subprocess.run([*command, "--dir", str(tmp_path)], capture_output=True, text=True, check=False)
    print(done.stderr)  # the seed, and what became of each fault
    result = json.loads(done.stdout)
    assert done.returncode == 0, result
    assert result["injected"] == 19
    assert (result["runs_lost"], result["wrong_resumes"], result["losses_differ"]) == (0, 0, 0)
    assert all(one["equal"] for one in result["faults"])
    assert all(one["commit_s"] is not None and one["steps_lost"] == 0 for one in result["trials"])
    assert [one["nodes"] for one in result["goodput"]["fleets"]] == [1, 8, 32, 128]


@pytest.mark.drill
@pytest.mark.distributed
def test_a_kind_that_does_not_exist_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--kinds", "kill-none", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "kill-none" in done.stderr
