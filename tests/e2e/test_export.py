"""`dino-dist export`: a run's network in every format, and one line for what cannot be done."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_dist.errors import UserError
from dino_dist.exit_codes import TERMINATED
from dino_dist.export import exporter
from dino_dist.weights.network_weights import build_backbone
from dino_dist.weights.read_network import open_weights, read_network
from dino_dist.weights.weights_file import ReadOptions
from launch.cli import _exit_code, app

pytestmark = pytest.mark.e2e

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 60.0


@pytest.fixture
def run(cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path) -> Path:
    """Four steps, and pixels that are normalised in another way than ImageNet's."""
    settings = tiny(tmp_path / "run", "train.length=4st", "data.mean=[0.3,0.4,0.5]", "head.batch_norm=false")
    assert cli("train", *settings).code == 0
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_in_every_format(cli: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = build_backbone(read_network(run), torch.device("cpu")).features(images)[0]
    formats = {
        "safetensors": ("own.safetensors", ["--with-head"], None),
        "torch": ("original.pth", [], None),
        "timm": ("timm", [], "timm"),
        "hf": ("hf", [], "transformers"),
        "onnx": ("network.onnx", ["--with-head"], "onnxruntime"),
    }
    for to, (name, more, library) in formats.items():
        if library is not None and importlib.util.find_spec(library) is None:
            continue
        out = tmp_path / "exports" / name
        ended = cli("export", str(run), "--to", to, "--out", str(out), "--image-px", "24", *more, "--json")
        assert ended.code == 0, ended
        report = ended.json()
        assert report["networks"] == (["teacher", "student"] if to == "torch" else ["teacher"])
        assert (report["step"], report["image_px"], report["has_head"]) == (4, 24, to not in ("timm", "hf"))
        assert report["relative_difference"] <= 1e-5
        assert report["bytes"] > 10_000
        if to == "onnx":
            continue
        weights = read_network(out, num_heads=2)
        assert weights.shape.image_px == 24
        assert weights.pixel_mean == ((0.485, 0.456, 0.406) if to == "torch" else (0.3, 0.4, 0.5))
        with torch.no_grad():
            found = build_backbone(weights, torch.device("cpu")).features(images)[0]
        assert torch.equal(found, tokens)
    assert {path.name for path in (tmp_path / "exports").iterdir()} <= {name for name, _, _ in formats.values()}
    usual = tmp_path / "usual"
    usual.touch()
    assert {path.stat().st_mode for path in (tmp_path / "exports").rglob("*") if path.is_file()} == {
        usual.stat().st_mode
    }


def test_what_cannot_be_exported(cli: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"

    def line(*arguments: str, source: Path = run) -> str:
        said: str = cli("export", str(source), *arguments).refusal()
        assert not out.exists()
        return said

    file = str(out.with_suffix(".safetensors"))
    own = ("--to", "safetensors", "--out", file)
    assert "choose one of safetensors, timm, hf, onnx, torch" in line("--to", "jax", "--out", str(out))
    assert "choose teacher or student" in line(*own, "--network", "both")
    assert "*.safetensors" in line("--to", "safetensors", "--out", str(out))
    assert "*.pth or *.pt" in line("--to", "torch", "--out", str(out))
    assert "no place for a head" in line("--to", "timm", "--out", str(out), "--with-head")
    for size in ("0", "-16", "18", "516", "1000000000"):
        assert "multiple of the patch's 4 px, up to 512 px" in line(*own, "--image-px", size)
    assert str(tmp_path / "gone") in line(*own, source=tmp_path / "gone")
    (tmp_path / "text.pth").write_text("no weights")
    assert "text.pth" in line(*own, source=tmp_path / "text.pth")
    assert not Path(file).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "text.pth"}


def test_where_nothing_can_be_written(cli: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "nowhere")
    places = {
        ("safetensors", "file.safetensors"): "exists already",
        ("timm", "folder"): "new name or an empty folder",
        ("timm", "file.safetensors"): "new name or an empty folder",
        ("torch", "dangling.pth"): "exists already",
        (
            "safetensors",
            "file.safetensors/below.safetensors",
        ): "cannot be written (Not a directory)",
        ("safetensors", f"{'x' * 300}.safetensors"): "cannot be written (File name too long)",
        ("safetensors", f"{'x' * 300}/below.safetensors"): "cannot be written (File name too long)",
    }
    for (to, name), words in places.items():
        said = cli("export", str(run), "--to", to, "--out", str(tmp_path / name)).refusal()
        assert words in said
        assert name in said
    assert (tmp_path / "file.safetensors").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file.safetensors", "folder", "dangling.pth"}


def _export_that_writes_for_long(run: Path, out: Path, writes: Connection) -> None:
    def write(weights: object, path: Path, **_: object) -> None:
        path.write_bytes(b"the first of many")
        writes.send(True)
        signal.pause()

    exporter.write_safetensors = write  # type: ignore[assignment]
    os._exit(_exit_code(lambda: app(["export", str(run), "--to", "safetensors", "--out", str(out)])))


def test_an_export_that_is_stopped_leaves_nothing(run: Path, tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_export_that_writes_for_long, args=(run, tmp_path / "out.safetensors", theirs))
    process.start()
    assert ours.poll(PATIENCE_S)
    process.terminate()
    process.join(PATIENCE_S)
    assert process.exitcode == TERMINATED
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_stays_sound(cli: Callable[..., Any], run: Path) -> None:
    """A file of tensors that its manifest does not name would cost the run this checkpoint."""
    folder = run / "checkpoints" / "step-00000004"
    said = cli("export", str(run), "--to", "safetensors", "--out", str(folder / "teacher.safetensors")).refusal()
    assert "choose another folder" in said
    assert read_network(folder).step == 4


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_told_in_one_line(run: Path) -> None:
    opened = open_weights(run, ReadOptions())
    shutil.rmtree(opened.source)
    with pytest.raises(UserError) as raised:
        opened.network("teacher")
    assert "cannot be read" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_network_that_has_diverged(cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    settings = tiny(tmp_path / "run", "train.length=4st", "optim.lr=1.0e30", "optim.warmup=0st")
    cli("train", *settings)
    said = cli("export", str(tmp_path / "run"), "--to", "safetensors", "--out", str(tmp_path / "x.safetensors"))
    assert "not finite" in said.refusal()
