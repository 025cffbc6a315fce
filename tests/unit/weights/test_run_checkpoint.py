"""Whose settings a network is judged by: those of the run that it lies in, and of no other folder above it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_dist.manifest import MANIFEST
from dino_dist.weights.run_checkpoint import run_of


def laid_out(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_a_run_and_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000002"
    laid_out(run / "config.yaml", checkpoint / MANIFEST)
    assert run_of(run) == run_of(checkpoint) == run
    monkeypatch.chdir(checkpoint)
    assert run_of(Path()) == run


def test_another_file_below_a_config_belongs_to_no_run(tmp_path: Path) -> None:
    elsewhere, beside = tmp_path / "models" / "vit", tmp_path / "checkpoints" / "vit.safetensors"
    laid_out(tmp_path / "config.yaml", elsewhere / "model.safetensors", elsewhere / MANIFEST, beside)
    for source in (elsewhere, elsewhere / "model.safetensors", beside, beside.with_name("gone"), Path("x" * 300)):
        assert run_of(source) is None
