"""Files of torch and safetensors are read without running them, and refused in one line where they are not weights."""

from __future__ import annotations

import argparse
import errno
import json
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dino_dist.errors import UserError
from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VisionTransformer, ViTShape
from dino_dist.weights.read_network import open_weights, read_network
from dino_dist.weights.torch_file import read_torch_file
from dino_dist.weights.weights_file import ReadOptions

SHAPE = ViTShape(embed_dim=128, depth=2, num_heads=2, patch_size=4, image_px=16)


def backbone(shape: ViTShape = SHAPE, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return VisionTransformer(shape, "sdpa").state_dict()


def refusal(path: Path, **how: Any) -> str:
    """The one line."""
    with pytest.raises(UserError) as caught:
        read_network(path, **how)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path.name) in line
    return line


class _RunsSomething:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_nothing_in_a_file_runs(zipped: bool, tmp_path: Path) -> None:
    trace, file = tmp_path / "it_ran", tmp_path / "hostile.pth"
    content = {**backbone(), "args": _RunsSomething(trace)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    line = refusal(file)
    assert "is refused" in line
    assert "Path.touch" in line or "getattr" in line, "it names what would have run"
    assert not trace.exists()


def test_a_whole_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "module.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_what_published_checkpoints_keep_beside_tensors_is_read(zipped: bool, tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        lr=np.float64(0.1), epochs=np.int64(3), fp16=np.bool_(True), output_dir=Path("/runs/x"), scale=(0.4, 1.0)
    )
    content = {"args": arguments, "epoch": 3, "student": OrderedDict(weight=torch.arange(3.0))}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_torch_file(tmp_path / "a.pth")
    assert read["args"] == arguments
    assert torch.equal(read["student"]["weight"], torch.arange(3.0))


def test_what_cannot_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a path whether it is a file fails where its folder may not be entered."""

    def is_file(self: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", is_file)
    assert "Permission denied" in refusal(tmp_path)


def test_the_allow_list_is_no_longer_in_force_afterwards(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pth")
    before = set(torch.serialization.get_safe_globals())
    read_torch_file(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_damaged_files_are_one_line(zipped: bool, tmp_path: Path, rng: random.Random) -> None:
    sound = tmp_path / "sound.pth"
    small = {name: tensor for name, tensor in backbone().items() if "mlp" not in name}
    torch.save(small, sound, _use_new_zipfile_serialization=zipped)
    data = sound.read_bytes()
    cuts = [0, 1, 100, len(data) // 2, len(data) - 1, *(rng.randrange(len(data)) for _ in range(10))]
    for cut in cuts:
        (tmp_path / "cut.pth").write_bytes(data[:cut])
        refusal(tmp_path / "cut.pth")
    (tmp_path / "text.pth").write_bytes(b"this is no checkpoint\n" * 10)
    assert "damaged" in refusal(tmp_path / "text.pth")


def test_damaged_safetensors_are_one_line(tmp_path: Path) -> None:
    save_file(backbone(), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    for cut in (0, 5, 200, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:cut])
        assert "damaged" in refusal(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "list"),
        (torch.ones(3), "Tensor"),
        ({"epoch": 3}, "no tensors"),
        ({"teacher": {}}, "no tensors under teacher"),
        ({"state_dict": {"module.linear.weight": torch.ones(2, 3)}}, "cls_token"),
        ({"conv1.weight": torch.ones(3)}, "ResNet"),
        ({**backbone(), "extra.weight": torch.ones(3)}, "extra.weight"),
        ({**backbone(), "norm.weight": torch.full((128,), torch.nan)}, "not finite"),
        ({**backbone(), "norm.weight": torch.ones(128, dtype=torch.int32)}, "int32"),
        ({**backbone(), "norm.weight": torch.ones(128).to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        ({**backbone(), "norm.weight": torch.ones(128).to_sparse()}, "sparse_coo"),
        ({**backbone(), "norm.weight": torch.ones(128, device="meta")}, "without numbers"),
        ({**backbone(), "pos_embed": torch.zeros(1).expand(1, 1 + 10**12, 128)}, "fewer numbers than its shape says"),
        ({**backbone(), "module.norm.weight": torch.ones(128)}, "norm.weight and module.norm.weight"),
        ({**backbone(), "norm.weight": torch.ones(64)}, "[64] instead of [128]"),
        ({**backbone(), "pos_embed": torch.ones(1, 16, 128)}, "class token"),
        ({**backbone(), "cls_token": torch.ones(128)}, "dimensions"),
        ({**backbone(), "cls_token": torch.tensor(1.0)}, "dimensions"),
        ({**backbone(), "pos_embed": torch.ones(2, 17, 128)}, "dimensions"),
        ({"teacher": backbone(), "dino_loss": {"center": torch.full((1, 7), torch.nan)}}, "center holds numbers"),
        ({name: value for name, value in backbone().items() if "blocks.1.attn" not in name}, "blocks.1.attn.qkv"),
        ({name: value for name, value in backbone().items() if "blocks.0." not in name}, "blocks.0"),
        ({**backbone(), "blocks.0.ls1.gamma": torch.ones(128)}, "LayerScale"),
        ({**backbone(), "register_tokens": torch.ones(1, 4, 128)}, "register tokens"),
        ({**backbone(), "mask_token": torch.ones(1, 128)}, "mask token"),
        ({**backbone(), "blocks.0.local_mp.conv1.weight": torch.ones(2)}, "XCiT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_network_of_this_architecture(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert words in refusal(tmp_path / "a.pth")


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "gone.pth")
    assert "File name too long" in refusal(tmp_path / f"{'x' * 300}.pth")
    (tmp_path / "a.onnx").write_bytes(b"x")
    assert ".safetensors" in refusal(tmp_path / "a.onnx")
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refusal(tmp_path / "empty")
    torch.save(backbone(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="teacher or student"):
        read_network(tmp_path / "a.pth", network="pupil")


def test_the_number_of_heads(tmp_path: Path) -> None:
    torch.save(backbone(), tmp_path / "a.pth")
    assert read_network(tmp_path / "a.pth").shape.num_heads == 2, "width over 64"
    assert read_network(tmp_path / "a.pth", num_heads=4).shape.num_heads == 4
    torch.save(backbone(ViTShape(embed_dim=24, depth=1, num_heads=3, patch_size=4, image_px=8)), tmp_path / "b.pth")
    assert "number of heads" in refusal(tmp_path / "b.pth")
    assert read_network(tmp_path / "b.pth", num_heads=3).shape.num_heads == 3
    assert "5 attention heads" in refusal(tmp_path / "b.pth", num_heads=5)
    assumed = ReadOptions(assumed_heads=2)
    assert open_weights(tmp_path / "b.pth", assumed).read("only").shape.num_heads == 2
    assert open_weights(own_file(tmp_path / "c.safetensors"), assumed).read("student").shape.num_heads == 4


def test_the_width_of_a_huge_vit_does_not_tell_its_heads(tmp_path: Path) -> None:
    """Its 16 heads are 80 wide: width / 64 would give features of no network."""
    huge = backbone(ViTShape(embed_dim=1280, depth=1, num_heads=16, patch_size=2, image_px=2, mlp_ratio=0.1))
    torch.save(huge, tmp_path / "pytorch_model.bin")
    assert "give the number of heads" in refusal(tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_huge_patch14_224"}))
    assert read_network(tmp_path).shape.num_heads == 16


@pytest.mark.parametrize("missing", ["last_layer.weight_v", "last_layer.weight_g", "mlp.0.weight", "mlp.2.bias"])
def test_part_of_a_head_is_none(missing: str, tmp_path: Path) -> None:
    tensors = {f"backbone.{name}": tensor for name, tensor in backbone().items()}
    head = DinoHead(128, 7, hidden_dim=12, bottleneck_dim=6).state_dict()
    tensors |= {f"head.{name}": tensor for name, tensor in head.items() if name != missing}
    torch.save(tensors, tmp_path / "a.pth")
    weights = read_network(tmp_path / "a.pth")
    assert weights.head == {}
    assert set(weights.left_out) == {name for name in tensors if name.startswith("head.")}


def own_file(path: Path, **changes: Any) -> Path:
    """An export of this project, written by hand after its description."""
    torch.manual_seed(1)
    head = DinoHead(128, 7, hidden_dim=12, bottleneck_dim=6).state_dict()
    tensors = {f"backbone.{name}": tensor for name, tensor in backbone().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in head.items()} | {"center": torch.arange(7.0)[None]}
    shape = {"embed_dim": 128, "depth": 2, "num_heads": 4, "patch_size": 4, "image_px": 16, "mlp_ratio": 4.0}
    header = {"format": 1, "network": "student", "step": 12, "shape": shape | {"in_channels": 3}} | changes
    save_file(tensors, path, metadata={"dino_dist": json.dumps(header)})
    return path


def test_an_export_of_this_project(tmp_path: Path) -> None:
    file = own_file(tmp_path / "a.safetensors", epoch=2, pixel_mean=[0.5] * 3, pixel_std=[0.25] * 3)
    weights = read_network(file, network="student")
    assert (weights.network, weights.step, weights.epoch) == ("student", 12, 2)
    assert weights.shape.num_heads == 4, "the file's own word, not width over 64"
    assert weights.pixel_mean == (0.5, 0.5, 0.5)
    assert weights.center_1K is not None
    assert torch.equal(weights.center_1K, torch.arange(7.0)[None])
    assert weights.head["last_layer.weight_v"].shape == (7, 6)
    assert all(torch.equal(weights.backbone[name], tensor) for name, tensor in backbone().items())
    assert "--network student" in refusal(file, network="teacher")
    assert "4 attention heads, not 2" in refusal(file, network="student", num_heads=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 2"),
        ({"network": "pupil"}, "pupil"),
        ({"shape": {}}, "num_heads"),
        ({"shape": []}, "broken"),
        ({"shape": {"num_heads": 4, "depth": 9}}, "depth=9"),
        ({"step": "ten"}, "ten"),
        ({"pixel_mean": [0.5], "pixel_std": "x"}, "lists of numbers"),
        ({"pixel_mean": [0.5] * 3, "pixel_std": [0.5]}, "as many"),
        ({"pixel_mean": [0.5] * 2, "pixel_std": [0.5] * 2}, "hold 2 numbers each: they must be 3"),
        ({"pixel_mean": [float("nan")] * 3, "pixel_std": [0.5] * 3}, "lists of numbers"),
        ({"pixel_mean": [10**400] * 3, "pixel_std": [0.5] * 3}, "lists of numbers"),
        ({"pixel_mean": [0.5] * 3, "pixel_std": [0] * 3}, "above 0"),
        ({"shape": {"num_heads": True}}, "num_heads=True"),
    ],
)
def test_a_broken_header_of_an_export(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = own_file(tmp_path / "a.safetensors", **changes)
    assert words in refusal(file, network="student")


def test_what_was_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save(backbone(), file)
    weights = read_network(file)
    file.write_bytes(b"")
    assert all(torch.equal(weights.backbone[name], tensor) for name, tensor in backbone().items())
