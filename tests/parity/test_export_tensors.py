"""What an export keeps bit for bit: original checkpoints through this project and back, and this project's own file."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dino_dist.errors import RunFailed, UserError
from dino_dist.export import exporter, timm_folder
from dino_dist.export.exporter import ExportRequest, export_network
from dino_dist.weights.network_weights import NetworkWeights, build_backbone
from dino_dist.weights.read_network import read_network

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
DIM, PROTOTYPES = 128, 40


class OriginalHead(nn.Module):
    """Modules in the order and under the names that the published code gives them."""

    def __init__(self, *, batch_norm: bool) -> None:
        super().__init__()
        norms = [nn.BatchNorm1d(48)] * batch_norm
        self.mlp = nn.Sequential(nn.Linear(DIM, 48), *norms, nn.GELU(), nn.Linear(48, 24))
        self.last_layer = nn.utils.weight_norm(nn.Linear(24, PROTOTYPES, bias=False))


def original_network(seed: int, *, batch_norm: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    backbone = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=DIM, depth=3, num_heads=2, patch_size=8, img_size=32, num_classes=0
    )
    network = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    head = OriginalHead(batch_norm=batch_norm)
    network |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    return {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in network.items()}


def original_checkpoint(path: Path) -> Path:
    student = {f"module.{name}": tensor for name, tensor in original_network(1).items()}
    torch.save(
        {
            "student": student,
            "teacher": original_network(2),
            "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3}]},
            "epoch": 17,
            "args": argparse.Namespace(arch="vit_tiny", patch_size=8),
            "dino_loss": {"center": torch.randn(1, PROTOTYPES)},
            "fp16_scaler": None,
        },
        path,
    )
    return path


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


def test_an_original_checkpoint_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source = original_checkpoint(tmp_path / "checkpoint.pth")
    report = export_network(ExportRequest(source=source, to="torch", out=tmp_path / "again.pth"))
    before = torch.load(source, weights_only=False)
    after = torch.load(tmp_path / "again.pth", weights_only=True)
    for role in ("student", "teacher"):
        assert_same(after[role], before[role])
    assert_same(after["dino_loss"], before["dino_loss"])
    assert after["epoch"] == 17
    assert report.networks == ("teacher", "student")
    assert report.relative_difference == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_kept_where_tensors_are(tmp_path: Path, dtype: torch.dtype) -> None:
    bare = {name: tensor.to(dtype) for name, tensor in original_network(3).items() if name.startswith("backbone.")}
    torch.save(bare, tmp_path / "half.pth")
    export_network(ExportRequest(source=tmp_path / "half.pth", to="torch", out=tmp_path / "again.pth"))
    assert_same(torch.load(tmp_path / "again.pth", weights_only=True)["teacher"], bare)
    # Elsewhere they become fp32, which is what those features are compared in.
    export_network(ExportRequest(source=tmp_path / "half.pth", to="timm", out=tmp_path / "timm"))
    assert read_network(tmp_path / "timm").dtype == torch.float32


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("network", ["teacher", "student"])
def test_own_file(tmp_path: Path, network: str, with_head: bool) -> None:
    source = original_checkpoint(tmp_path / "checkpoint.pth")
    out = tmp_path / "network.safetensors"
    export_network(
        ExportRequest(source=source, to="safetensors", out=out, network=network, with_head=with_head, num_heads=2)
    )
    before, after = read_network(source, network=network), read_network(out, network=network)
    assert_same(dict(after.backbone), dict(before.backbone))
    assert_same(dict(after.head), dict(before.head) if with_head else {})
    assert (after.center_1K is not None) == with_head
    assert (after.network, after.epoch, after.shape) == (network, 17, before.shape)
    with safe_open(out, "pt") as file:
        header = json.loads(file.metadata()["dino_dist"])
        assert {name.split(".")[0] for name in file.keys()} == {"backbone", *(("head", "center") if with_head else ())}
    assert header["shape"]["patch_size"] == 8
    other = "student" if network == "teacher" else "teacher"
    with pytest.raises(UserError, match=f"holds the {network} only"):
        read_network(out, network=other)


@torch.no_grad()
def test_resampled_positions_give_the_features_that_resampling_gave(tmp_path: Path) -> None:
    source = original_checkpoint(tmp_path / "checkpoint.pth")
    out = tmp_path / "network.safetensors"
    export_network(ExportRequest(source=source, to="safetensors", out=out, image_px=56))
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    before, after = read_network(source), read_network(out)
    assert (before.shape.image_px, after.shape.image_px) == (32, 56)
    expected, found = (build_backbone(one, torch.device("cpu")).features(images)[0] for one in (before, after))
    assert torch.equal(found, expected)


def test_a_head_with_batch_norms_goes_out_under_the_names_that_the_original_looks_for(tmp_path: Path) -> None:
    student = {f"module.{name}": tensor for name, tensor in original_network(4, batch_norm=True).items()}
    teacher = {f"module.{name}": tensor for name, tensor in original_network(5, batch_norm=True).items()}
    torch.save({"student": student, "teacher": teacher}, tmp_path / "in.pth")
    export_network(ExportRequest(source=tmp_path / "in.pth", to="torch", out=tmp_path / "out.pth"))
    after = torch.load(tmp_path / "out.pth", weights_only=True)
    for role, before in (("student", student), ("teacher", teacher)):
        assert after[role].keys() == before.keys()
        learned = {name for name in before if "running_" not in name and "num_batches" not in name}
        assert_same({name: after[role][name] for name in learned}, {name: before[name] for name in learned})
        head = {name.removeprefix("module.head."): t for name, t in after[role].items() if ".head." in name}
        OriginalHead(batch_norm=True).load_state_dict(head, strict=True)


def test_one_network_alone_is_a_teacher_and_has_no_center(tmp_path: Path) -> None:
    torch.save(original_network(6), tmp_path / "one.pth")
    export_network(ExportRequest(source=tmp_path / "one.pth", to="torch", out=tmp_path / "out.pth"))
    after = torch.load(tmp_path / "out.pth", weights_only=True)
    assert_same(after.pop("teacher"), original_network(6))
    assert after.keys() == {"args"}
    assert after["args"]["num_heads"] == 2


def test_nothing_appears_that_does_not_give_the_same_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be if a version of the library resampled positions by itself, or used another epsilon."""
    torch.save(original_network(7), tmp_path / "one.pth")
    monkeypatch.setattr(timm_folder, "timm_config", _with_other_heads(timm_folder.timm_config))
    with pytest.raises(RunFailed, match=r"nothing was exported: timm \S+ gives features with a relative difference"):
        export_network(ExportRequest(source=tmp_path / "one.pth", to="timm", out=tmp_path / "timm"))
    assert [path.name for path in tmp_path.iterdir()] == ["one.pth"]


@pytest.mark.parametrize("name", ["last_layer.weight_v", "mlp.0.bias", "center"])
@pytest.mark.parametrize(("to", "suffix"), [("torch", "pth"), ("safetensors", "safetensors")])
def test_nothing_appears_that_is_not_read_back_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, suffix: str, name: str
) -> None:
    """One value of the head or the center, of which no feature tells, is written as its neighbour in fp32."""
    for writer in ("write_dino", "write_safetensors"):
        monkeypatch.setattr(exporter, writer, _with_another_bit(getattr(exporter, writer), name))
    source = original_checkpoint(tmp_path / "in.pth")
    request = ExportRequest(source=source, to=to, out=tmp_path / f"out.{suffix}", with_head=True)
    with pytest.raises(RunFailed, match=rf"nothing was exported: (head\.)?{re.escape(name)} is not read back"):
        export_network(request)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def _with_another_bit(write, name):  # type: ignore[no-untyped-def]
    def changed(tensor: Tensor) -> Tensor:
        other = tensor.clone()
        other.view(-1)[0] = torch.nextafter(other.view(-1)[0], torch.tensor(torch.inf))
        return other

    def one(weights: NetworkWeights) -> NetworkWeights:
        if name == "center":
            assert weights.center_1K is not None
            return replace(weights, center_1K=changed(weights.center_1K))
        return replace(weights, head={**weights.head, name: changed(weights.head[name])})

    def wrong(weights, *arguments, **options):  # type: ignore[no-untyped-def]
        weights = one(weights) if isinstance(weights, NetworkWeights) else [one(each) for each in weights]
        write(weights, *arguments, **options)

    return wrong


def _with_other_heads(config):  # type: ignore[no-untyped-def]
    def wrong(weights):  # type: ignore[no-untyped-def]
        content = config(weights)
        content["model_args"]["num_heads"] = 4
        return content

    return wrong
