"""`dino-dist eval retrieval|copy|video` as a user calls them: on a file of weights, on two ranks, with wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dino_dist.data.reading.index_mask import write_index_mask
from dino_dist.models.vit import VisionTransformer, ViTShape

pytestmark = pytest.mark.e2e

Command = Callable[..., Any]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A backbone under its published names, and nothing else."""
    torch.manual_seed(0)
    shape = ViTShape(embed_dim=64, depth=2, num_heads=1, patch_size=4, image_px=32, init_std=0.1)
    save_file(VisionTransformer(shape, "sdpa").state_dict(), tmp_path / "backbone.safetensors")
    return tmp_path / "backbone.safetensors"


@pytest.fixture
def noted(weights: Path, tmp_path: Path) -> Path:
    """A folder as Hugging Face's libraries write it, whose config says what is not computed here."""
    (tmp_path / "noted").mkdir()
    weights.rename(tmp_path / "noted" / "model.safetensors")
    config = {"model_type": "vit", "num_attention_heads": 1, "layer_norm_eps": 1e-12}
    (tmp_path / "noted" / "config.json").write_text(json.dumps(config))
    return tmp_path / "noted"


def paint(folder: Path, names: list[str], side: int = 40) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(names))
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / name)


@pytest.mark.slow
@pytest.mark.distributed
def test_figures_are_the_same_on_two_ranks(cli: Command, weights: Path, tmp_path: Path) -> None:
    names = [f"{2000 + number}00.png" for number in range(5)]
    paint(tmp_path / "copies" / "original", names)
    paint(tmp_path / "copies" / "strong", names)
    call = ["eval", "copy", str(weights), str(tmp_path / "copies"), "--size-px", "32", "--json", "data.num_workers=0"]
    alone = cli(*call).json()
    assert alone["map_strong"] == 1.0
    assert alone["source"] == str(weights)
    assert cli(*call, "--nproc", "2").json() == alone


def test_a_list_and_a_video(cli: Command, weights: Path, tmp_path: Path) -> None:
    paint(tmp_path / "images", ["b.png", "c.png"])
    (tmp_path / "images" / "a.png").write_bytes((tmp_path / "images" / "b.png").read_bytes())
    lines = ["query\ta.png\tx", "gallery\tb.png\tx", "gallery\tc.png"]
    (tmp_path / "images" / "list.tsv").write_text("\n".join(lines))
    found = cli("eval", "retrieval", str(weights), "--list", str(tmp_path / "images" / "list.tsv"), "--json").json()
    assert found["gallery"] == 2
    assert found["map"] == 1.0
    paint(tmp_path / "frames", [f"{number}.png" for number in range(3)])
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:30, 10:30] = 1
    write_index_mask(tmp_path / "mask.png", mask)
    options = ["--masks", str(tmp_path / "mask.png"), "--size-px", "40", "--out", str(tmp_path / "out")]
    assert cli("eval", "video", str(weights), str(tmp_path / "frames"), *options).code == 0
    assert sorted(file.name for file in (tmp_path / "out" / "frames").iterdir()) == ["0.png", "1.png", "2.png"]


def test_what_is_to_be_known_of_a_network_is_said_once(cli: Command, noted: Path, tmp_path: Path) -> None:
    paint(tmp_path / "copies" / "original", ["200000.png"])
    paint(tmp_path / "copies" / "strong", ["200001.png"])
    picture = tmp_path / "copies" / "strong" / "200001.png"
    out = tmp_path / "own.safetensors"
    for command in (
        ("eval", "copy", noted, tmp_path / "copies", "--size-px", "32", "data.num_workers=0"),
        ("attention", noted, picture, "--out", tmp_path / "looks"),
        ("export", noted, "--to", "safetensors", "--out", out),
    ):
        ended = cli(*map(str, command), "--json")
        assert ended.code == 0, ended.err
        (note,) = ended.json()["notes"]
        assert "layer_norm_eps=1e-12" in note
        assert ended.err.splitlines().count(f"note: {note}") == 1
    ended = cli("export", str(noted), "--to", "safetensors", "--out", str(tmp_path / "again.safetensors"))
    assert "layer_norm_eps" in ended.err
    assert "layer_norm_eps" not in ended.out


def test_wrong_input_is_one_line(cli: Command, weights: Path, tmp_path: Path) -> None:
    paint(tmp_path / "frames", ["0.png", "1.png"])
    frames = str(tmp_path / "frames")
    for call, said in (
        (["copy", str(weights), frames], "has no folder original"),
        (["video", str(weights), frames], "is no DAVIS folder"),
        (["retrieval", str(weights)], "labelled images are needed"),
        (["retrieval", str(weights), "--images", frames], "give it with --list"),
        (["retrieval", str(weights), "--size-px", "64"], "give it with --list"),
        (["retrieval", str(weights), "--list", f"{frames}/list.pkl"], "convert the published pickle"),
    ):
        assert said in cli("eval", *call).refusal()
