"""The fault drill on a real Slurm: nobody starts the job again but Slurm and the job itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fault_drill.py"


@pytest.mark.drill
@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_drill_on_a_slurm_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--on", "slurm", "--faults", "21", "--json", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stderr)  # the seed, and what became of each fault
    result = json.loads(done.stdout)
    assert done.returncode == 0, result
    assert result["injected"] == 21
    assert (result["runs_lost"], result["wrong_resumes"], result["losses_differ"]) == (0, 0, 0)
