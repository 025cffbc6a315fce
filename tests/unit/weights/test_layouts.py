"""One network under the names of DINO, timm and Hugging Face is read as the same network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VisionTransformer, ViTShape
from dino_dist.weights.layouts import map_names
from dino_dist.weights.network_weights import build_backbone
from dino_dist.weights.read_network import read_network

CPU = torch.device("cpu")
SHAPE = ViTShape(embed_dim=96, depth=2, num_heads=3, patch_size=4, image_px=16)


def network(seed: int) -> dict[str, Tensor]:
    """`backbone.*` and `head.*`, every tensor its own random numbers."""
    with torch.device("meta"):
        backbone = VisionTransformer(SHAPE, "sdpa").state_dict()
        head = DinoHead(96, 11, hidden_dim=12, bottleneck_dim=6).state_dict()
    generator = torch.Generator().manual_seed(seed)
    named = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    named |= {f"head.{name}": tensor for name, tensor in head.items()}
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in named.items()}


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def assert_equal(read: Any, tensors: dict[str, Tensor]) -> None:
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_an_original_training_checkpoint(zipped: bool, tmp_path: Path) -> None:
    student, teacher, center_1K = network(0), network(1), torch.randn(1, 11)
    content = {
        "student": {f"module.{name}": tensor for name, tensor in student.items()},
        "teacher": teacher,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": center_1K},
    }
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    for role, tensors in (("student", student), ("teacher", teacher)):
        weights = read_network(tmp_path / "checkpoint.pth", network=role, num_heads=3)
        assert (weights.network, weights.epoch, weights.left_out) == (role, 100, ())
        assert weights.shape == SHAPE
        assert_equal(weights.backbone, below(tensors, "backbone."))
        assert_equal(weights.head, below(tensors, "head."))
        assert weights.center_1K is not None
        assert torch.equal(weights.center_1K, center_1K)


def test_a_checkpoint_of_one_network(tmp_path: Path) -> None:
    torch.save({"student": network(0)}, tmp_path / "a.pth")
    assert read_network(tmp_path / "a.pth", network="student", num_heads=3).network == "student"
    with pytest.raises(UserError, match="add --network student"):
        read_network(tmp_path / "a.pth", num_heads=3)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "backbone.", "module.backbone."])
def test_a_backbone_alone_whatever_stands_before_its_names(prefix: str, wrapper: str | None, tmp_path: Path) -> None:
    tensors = below(network(0), "backbone.")
    renamed = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    torch.save({wrapper: renamed, "epoch": 3} if wrapper else renamed, tmp_path / "a.pt")
    weights = read_network(tmp_path / "a.pt", num_heads=3)
    assert (weights.network, weights.head) == ("only", {})
    assert_equal(weights.backbone, tensors)


def test_a_head_of_a_newer_weight_norm_and_one_with_batch_norm() -> None:
    names = [f"backbone.{name}" for name in below(network(0), "backbone.")]
    names += ["head.mlp.0.weight", "head.mlp.1.weight", "head.mlp.1.running_mean", "head.mlp.1.num_batches_tracked"]
    names += ["head.last_layer.parametrizations.weight.original0", "head.last_layer.parametrizations.weight.original1"]
    found = map_names(names, "it")
    assert found.unknown == []
    assert set(found.head) == {"mlp.0.weight", "mlp.1.weight", "last_layer.weight_g", "last_layer.weight_v"}
    assert found.head["last_layer.weight_g"] == ["head.last_layer.parametrizations.weight.original0"]
    assert set(found.left_out) == {"head.mlp.1.running_mean", "head.mlp.1.num_batches_tracked"}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def test_timm(images: Tensor, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=5, **sizes).eval()
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    cfg = dict(model.pretrained_cfg, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    model.pretrained_cfg = cfg
    timm.models.save_for_hf(model, tmp_path / "folder", model_args=sizes)
    theirs = model.forward_features(images)
    for path, heads in ((tmp_path / "plain.pth", 4), (tmp_path / "folder", None)):
        weights = read_network(path, num_heads=heads)
        assert set(weights.left_out) == {"head.weight", "head.bias"}, "its classifier"
        assert weights.shape.num_heads == 4, "the folder's config.json tells, where width over 64 would not"
        assert relative_error(build_backbone(weights, CPU).features(images)[0], theirs) <= 1e-5
    folder = read_network(tmp_path / "folder")
    assert folder.pixel_mean == (0.5, 0.5, 0.5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["folder", "several files", "names in memory", "classifier"])
def test_hugging_face(kind: str, images: Tensor, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=200,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    classifier = transformers.ViTForImageClassification(config).eval()
    model = classifier.vit if kind == "classifier" else transformers.ViTModel(config).eval()
    path = tmp_path / "folder"
    if kind == "names in memory":
        path = tmp_path / "a.bin"
        torch.save(model.state_dict(), path)
    else:
        saved = classifier if kind == "classifier" else model
        saved.save_pretrained(path, max_shard_size="300KB" if kind == "several files" else "1GB")
        assert (path / "model.safetensors.index.json").exists() == (kind == "several files")
    weights = read_network(path, num_heads=4 if kind == "names in memory" else None)
    assert all(name.split(".")[0] in ("pooler", "classifier") for name in weights.left_out)
    theirs = model(images).last_hidden_state
    assert relative_error(build_backbone(weights, CPU).features(images)[0], theirs) <= 1e-5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "dinov2"}, "model_type='dinov2'"),
        ({"model_type": "vit", "hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ({"model_type": "vit", "num_attention_heads": "many"}, "num_attention_heads='many'"),
        ({"architecture": "resnet50"}, "architecture='resnet50'"),
        ([1], "no JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_folder_whose_config_says_otherwise(config: Any, words: str, tmp_path: Path) -> None:
    torch.save(below(network(0), "backbone."), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError) as caught:
        read_network(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/secret.safetensors", "..", "", "a\0b", "\ud800"])
def test_an_index_reads_only_its_own_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    index = {"weight_map": {"cls_token": place}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="only files of its own folder"):
        read_network(tmp_path / "in")


@pytest.mark.parametrize("heights", [(100, 92, 96), (96, 96, 90)])
def test_queries_keys_and_values_of_other_heights_are_not_joined(heights: tuple[int, int, int], tmp_path: Path) -> None:
    tensors = {"embeddings.cls_token": torch.ones(1, 1, 96)}
    for part, height in zip(("query", "key", "value"), heights, strict=True):
        tensors[f"encoder.layer.0.attention.attention.{part}.weight"] = torch.ones(height, 96)
    torch.save(tensors, tmp_path / "a.bin")
    with pytest.raises(UserError, match="do not belong together"):
        read_network(tmp_path / "a.bin")


def test_a_note_on_another_layer_norm(tmp_path: Path) -> None:
    torch.save(below(network(0), "backbone."), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 1e-12})
    )
    (note,) = read_network(tmp_path).notes
    assert "1e-12" in note
    assert "1e-06" in note
