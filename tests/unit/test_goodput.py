"""Young's and Daly's intervals, and the goodput that they promise, against a simulated run and a plain search."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "goodput.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = spec_from_file_location("goodput", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["goodput"] = module
    spec.loader.exec_module(module)
    return module


def fleet(tool: ModuleType, **changes: Any) -> Any:
    costs = tool.Costs(
        save_s=5.0,
        commit_s=5.0,
        restart_s=120.0,
        detect_s=60.0,
        node_mtbf_s=30 * tool.DAY_S,
        preemptions_per_s=0.0,
        nodes=32,
    )
    return replace(costs, **changes)


def test_worked_numbers(tool: ModuleType) -> None:
    """32 nodes, a fault a node in 30 days: 81,000 s between faults; a save of 5 s every 900 s by Young."""
    assert fleet(tool).mtbf_s == 81_000
    assert tool.young_interval_s(5, 81_000) == 900
    assert tool.daly_interval_s(5, 81_000) == pytest.approx(900 * (1 + 1 / 540 + 1 / 291_600) - 5)
    assert tool.daly_interval_s(200, 100) == 100


def test_the_goodput_at_its_best_interval_beats_all_others(tool: ModuleType) -> None:
    for nodes in (1, 32, 2000, 20_000):
        costs = fleet(tool, nodes=nodes)
        best = tool.daly_interval_s(costs.save_s, costs.mtbf_s)
        tried = [tool.goodput(costs, best * 1.1**power) for power in range(-30, 31)]
        assert tool.goodput(costs, best) >= max(tried) * (1 - 1e-3)
        assert (
            tool.goodput(costs, best) >= tool.goodput(costs, tool.young_interval_s(costs.save_s, costs.mtbf_s)) - 1e-3
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nodes": 1},
        {"nodes": 128, "preemptions_per_s": 24 / 86400},
        {"nodes": 32, "save_s": 0.4, "commit_s": 90.0},
        {"nodes": 2000, "commit_s": 30.0},
        {"nodes": 2000, "preemptions_per_s": 4 / 86400, "commit_s": 30.0},
    ],
)
def test_a_simulated_run_confirms_the_formula(tool: ModuleType, changes: dict[str, Any]) -> None:
    costs = fleet(tool, **changes)
    for interval_s in (tool.daly_interval_s(costs.save_s, costs.mtbf_s), 300.0):
        counted = tool.simulate(costs, interval_s, seed=11, events=100_000)
        assert counted == pytest.approx(tool.goodput(costs, interval_s), rel=0.01), (changes, interval_s)


def test_the_simulation_is_of_its_seed(tool: ModuleType) -> None:
    costs = fleet(tool)
    assert tool.simulate(costs, 900, seed=1, events=100) == tool.simulate(costs, 900, seed=1, events=100)
    assert tool.simulate(costs, 900, seed=1, events=100) != tool.simulate(costs, 900, seed=2, events=100)


def test_everything_that_costs_lowers_the_goodput(tool: ModuleType) -> None:
    before = tool.goodput(fleet(tool), 900)
    assert 0 < before < 1
    dearer = {"save_s": 50.0, "commit_s": 500.0, "restart_s": 1200.0, "detect_s": 600.0}
    for name, value in dearer.items():
        assert tool.goodput(fleet(tool, **{name: value}), 900) < before, name
    assert tool.goodput(fleet(tool, nodes=64), 900) < before
    assert tool.goodput(fleet(tool, preemptions_per_s=1e-3), 900) < before
    assert tool.goodput(fleet(tool, preemptions_per_s=1.0), 900) == 0
    assert tool.goodput(fleet(tool, nodes=10**9), 900) == 0


def test_without_faults_only_the_saves_cost(tool: ModuleType) -> None:
    assert math.isclose(tool.goodput(fleet(tool, node_mtbf_s=1e15), 95), 0.95, rel_tol=1e-6)


def test_command_line_shows_every_input() -> None:
    command = [sys.executable, str(TOOL), "--save-s", "5", "--restart-s", "120", "--nodes", "32", "--nodes", "64"]
    printed = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    result = json.loads(printed)
    assert [one["nodes"] for one in result["fleets"]] == [32, 64]
    assert result["fleets"][0]["young_s"] == pytest.approx(900)
    inputs = result["inputs"]
    assert (inputs["save_s"], inputs["commit_s"], inputs["restart_s"]) == (5, 5, 120)
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for shown in ("inputs", "save to commit", "detection", "preemptions a day", "900.0"):
        assert shown in table, shown
