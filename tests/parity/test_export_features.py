"""Exported networks give, in the library that they are for, this project's features: ViT-S/16 at 224 and at 448 px.

The positions were learned at 224 px; what is compared with is this project's network itself, fed images of that size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_dist.data.crops.eval_view import resize_for_eval
from dino_dist.export.exporter import ExportRequest, export_network
from dino_dist.weights.network_weights import build_backbone
from dino_dist.weights.read_network import read_network

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-5
ARCHITECTURE = "vit_small_patch16_224"


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare backbone as published, all of whose tensors matter: none is 0 or 1 throughout."""
    generator = torch.Generator().manual_seed(0)
    state = timm.create_model(ARCHITECTURE, num_classes=0).state_dict()
    for name, tensor in state.items():
        spread = 0.5 if name in ("pos_embed", "cls_token") else 0.05
        tensor += spread * torch.randn(tensor.shape, generator=generator)
    path = tmp_path_factory.mktemp("published") / "vit_small.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def features(weights_file: Path) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Images of a size, other ones than the exporter's own check takes, and the tokens they give here."""
    backbone = build_backbone(read_network(weights_file), torch.device("cpu"))
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def at(image_px: int) -> tuple[Tensor, Tensor]:
        if image_px not in known:
            images = torch.randn(3, 3, image_px, image_px, generator=torch.Generator().manual_seed(image_px))
            with torch.no_grad():
                known[image_px] = images, backbone.features(images)[0]
        return known[image_px]

    return at


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("image_px", [224, 448])
@torch.no_grad()
def test_timm(
    weights_file: Path, features: Callable[[int], tuple[Tensor, Tensor]], tmp_path: Path, image_px: int
) -> None:
    folder = tmp_path / "for timm"
    export_network(ExportRequest(source=weights_file, to="timm", out=folder, image_px=image_px))
    images, tokens = features(image_px)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert relative(model(images), tokens[:, 0]) <= TOLERANCE
    assert relative(model.forward_features(images)[:1, 1:], tokens[:1, 1:]) <= TOLERANCE
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, image_px, image_px)
    if image_px == 224:  # and as a state_dict
        plain = timm.create_model(ARCHITECTURE, num_classes=0, checkpoint_path=folder / "model.safetensors").eval()
        assert torch.equal(plain(images[:1]), model(images[:1]))


@pytest.mark.parametrize("image_px", [224, 448])
@torch.no_grad()
def test_transformers(
    weights_file: Path, features: Callable[[int], tuple[Tensor, Tensor]], tmp_path: Path, image_px: int
) -> None:
    folder = tmp_path / "for transformers"
    export_network(ExportRequest(source=weights_file, to="hf", out=folder, image_px=image_px))
    images, tokens = features(image_px)
    model, loading = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "ViTModel"
    assert not any(loading.values()), loading
    result = model.eval()(pixel_values=images)
    assert relative(result.last_hidden_state[:, 0], tokens[:, 0]) <= TOLERANCE
    assert relative(result.last_hidden_state[:, 1:], tokens[:, 1:]) <= TOLERANCE
    assert torch.equal(result.pooler_output, result.last_hidden_state[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("image_px", [224, 448])
def test_onnxruntime(
    weights_file: Path, features: Callable[[int], tuple[Tensor, Tensor]], tmp_path: Path, image_px: int
) -> None:
    file = tmp_path / "network.onnx"
    export_network(ExportRequest(source=weights_file, to="onnx", out=file, image_px=image_px))
    images, tokens = features(image_px)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        cls, patches = session.run(["cls", "patches"], {"images": images[:count].numpy()})
        assert relative(torch.from_numpy(cls), tokens[:count, 0]) <= TOLERANCE
        assert relative(torch.from_numpy(patches), tokens[:count, 1:]) <= TOLERANCE
    assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()


def test_the_view_that_transformers_makes_is_evaluations_own(weights_file: Path, tmp_path: Path) -> None:
    export_network(ExportRequest(source=weights_file, to="hf", out=tmp_path / "hf"))
    weights = read_network(tmp_path / "hf")
    picture = torch.randint(64, 192, (300, 411, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = processor(picture.permute(2, 0, 1), return_tensors="pt")["pixel_values"]
    mean, std = weights.pixel_mean, weights.pixel_std
    ours = resize_for_eval(
        picture.flatten(), torch.tensor([[300, 411]]), resize_px=256, crop_px=224, mean=mean[:3], std=std[:3]
    )
    assert theirs.shape == ours.shape
    # Theirs is computed and rounded in whole levels; ours is not.
    assert (theirs - ours).abs().max() <= 1.5 / 255 / min(std)
