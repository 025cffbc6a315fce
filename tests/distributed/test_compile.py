"""Compiled blocks, sharded and recomputed, train like eager ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import importlib.util, sys
from dataclasses import replace
from dino_dist.dist import ProcessEnvironment, joined_world

spec = importlib.util.spec_from_file_location("equalities", sys.argv[1])
equalities = importlib.util.module_from_spec(spec)
spec.loader.exec_module(equalities)
with joined_world(ProcessEnvironment(), timeout_s=60, device="cpu") as world:
    expected = equalities.trajectory(world, equalities.small_config(strategy="none"))
    for kind in ("none", "torch"):
        config = equalities.small_config(strategy="fsdp", activation_checkpointing=kind)
        config = replace(config, train=replace(config.train, compile=True))
        equalities.assert_same(equalities.trajectory(world, config), expected)
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_compiled_blocks_train_like_eager_ones() -> None:
    # A process of its own: the compiler's workers and forked ranks do not go together.
    steps = Path(__file__).with_name("test_step_equalities.py")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(steps)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
