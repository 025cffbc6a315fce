"""`model.init_from` with what cannot be a start ends `train` with 2 and one line, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_dist.models.vit import VisionTransformer, ViTShape
from dino_dist.run_folder import RunFolder

pytestmark = pytest.mark.e2e


def backbone(**changes: int) -> dict[str, Tensor]:
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "image_px": 16}
    return VisionTransformer(ViTShape(**(sizes | changes)), "sdpa").state_dict()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["model.init_from=", "does not exist"]),
        (b"no file of weights", ["damaged"]),
        ({"layer1.0.conv1.weight": torch.ones(1)}, ["ResNet"]),
        ({**backbone(), "blocks.0.ls1.gamma": torch.ones(16)}, ["LayerScale"]),
        (backbone(patch_size=8), ["model.init_from=", "set model.patch_size=8, which is 4 here"]),
        (backbone(embed_dim=128), ["model.init_from=", "set model.embed_dim=128, which is 16 here"]),
    ],
    ids=["missing", "damaged", "resnet", "dinov2", "patch size", "width"],
)
def test_no_start(
    content: Any, words: list[str], cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    source = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    line = cli("train", *tiny(tmp_path / "run", f"model.init_from={source}")).refusal()
    for word in [str(source), *words]:
        assert word in line
    assert not RunFolder(tmp_path / "run").metrics.exists()


def test_told_otherwise_it_starts_with_what_fits(
    cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    source = tmp_path / "weights.pth"
    torch.save(backbone(depth=3), source)
    settings = tiny(tmp_path / "run", f"model.init_from={source}", "train.length=2st")
    assert "set model.depth=3, which is 2 here" in cli("train", *settings).refusal()
    ended = cli("train", *settings, "model.init_from_strict=false")
    assert ended.code == 0, ended.err
    said = " ".join((ended.out + ended.err).split())
    assert "student <- only" in said
    assert "left as drawn: the head" in said
    assert "left out: backbone.blocks.2." in said
