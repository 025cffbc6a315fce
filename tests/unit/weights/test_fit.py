"""What of a network that was read a run takes over: all that fits, resampled positions, and a report of the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VisionTransformer, ViTShape
from dino_dist.weights.fit import Fit, fit, resample_positions
from dino_dist.weights.network_weights import NetworkWeights, build_backbone

SHAPE = ViTShape(embed_dim=24, depth=2, num_heads=2, patch_size=4, image_px=16)


def weights(shape: ViTShape = SHAPE, prototypes: int = 7, **changes: object) -> NetworkWeights:
    torch.manual_seed(0)
    read = NetworkWeights(
        source="a.pth",
        network="teacher",
        shape=shape,
        backbone=VisionTransformer(shape, "sdpa").state_dict(),
        head=DinoHead(shape.embed_dim, prototypes, hidden_dim=12, bottleneck_dim=6).state_dict(),
    )
    return replace(read, **changes)  # type: ignore[arg-type]


def wanted(shape: ViTShape = SHAPE, prototypes: int = 7) -> dict[str, torch.Size]:
    read = weights(shape, prototypes)
    named = {f"backbone.{name}": tensor for name, tensor in read.backbone.items()}
    named |= {f"head.{name}": tensor for name, tensor in read.head.items()}
    return {name: tensor.shape for name, tensor in named.items()}


def without(tensors: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if word not in name}


def fitted(read: NetworkWeights, shape: ViTShape = SHAPE, prototypes: int = 7, *, strict: bool = True) -> Fit:
    return fit(read, wanted(shape, prototypes), shape, key="model.init_from", strict=strict)


def test_the_same_network_fits_as_a_whole() -> None:
    found = fitted(weights())
    assert found.tensors.keys() == wanted().keys()
    assert all(torch.equal(found.tensors[f"backbone.{name}"], value) for name, value in weights().backbone.items())
    assert found.has_head
    assert found.resized == found.missing == found.misshapen == found.left_out == ()
    assert found.describe() == f"{len(wanted())} tensors matched"


def test_a_head_is_taken_over_whole_or_not_at_all() -> None:
    found = fitted(weights(prototypes=9))
    assert not found.has_head
    assert found.tensors.keys() == {name for name in wanted() if name.startswith("backbone.")}
    assert "head.last_layer.weight_v [9, 6] instead of [7, 6]" in found.describe()
    assert "left as drawn: the head" in found.describe()
    no_head = fitted(weights(head={}))
    assert not no_head.has_head
    assert "left as drawn: the head" in no_head.describe()


@torch.no_grad()
def test_resampled_positions_are_what_the_network_itself_would_use() -> None:
    read = weights()
    large = replace(SHAPE, image_px=28)
    found = fitted(read, large)
    assert found.resized == ("backbone.pos_embed from 4 x 4 to 7 x 7 patches",)
    taken = {name.removeprefix("backbone."): value for name, value in found.tensors.items() if "backbone." in name}
    moved = build_backbone(replace(read, shape=large, backbone=taken), torch.device("cpu"))
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    before = build_backbone(read, torch.device("cpu")).features(images)[0]
    torch.testing.assert_close(moved.features(images)[0], before, rtol=1e-5, atol=1e-6)


def test_resampling_keeps_the_class_token_and_constants() -> None:
    positions = torch.cat([torch.full((1, 1, 3), 5.0), torch.full((1, 16, 3), 2.0)], dim=1)
    moved = resample_positions(positions, 4, 9)
    assert moved.shape == (1, 82, 3)
    assert torch.equal(moved[:, 0], torch.full((1, 3), 5.0, dtype=torch.float64))
    torch.testing.assert_close(moved[:, 1:], torch.full((1, 81, 3), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (replace(SHAPE, patch_size=8), "set model.patch_size=8, which is 4 here"),
        (replace(SHAPE, depth=3), "set model.depth=3, which is 2 here"),
        (replace(SHAPE, num_heads=3), "set model.num_heads=3, which is 2 here"),
        (replace(SHAPE, embed_dim=32), "set model.embed_dim=32, which is 24 here"),
    ],
)
def test_another_network_is_refused_and_the_setting_named(shape: ViTShape, words: str) -> None:
    with pytest.raises(UserError) as caught:
        fitted(weights(shape))
    assert words in str(caught.value)
    assert "a.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_mlp_of_another_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"blocks.0.mlp.fc1.weight \[48, 24\] instead of \[96, 24\]"):
        fitted(weights(replace(SHAPE, mlp_ratio=2.0)))


def test_told_otherwise_it_takes_what_fits_and_says_what_does_not() -> None:
    deeper = fitted(weights(replace(SHAPE, depth=3)), strict=False)
    assert deeper.missing == ()
    assert all(name.startswith("backbone.blocks.2.") for name in deeper.left_out)
    assert len(deeper.left_out) == 12
    shallower = fitted(weights(replace(SHAPE, depth=1)), strict=False)
    assert {name.split(".")[2] for name in shallower.missing} == {"1"}
    patches = fitted(weights(replace(SHAPE, patch_size=8)), strict=False)
    assert patches.missing == ("backbone.patch_embed.proj.weight",)
    assert patches.resized == ("backbone.pos_embed from 2 x 2 to 4 x 4 patches",)
    read = weights()
    fewer = replace(read, backbone=without(dict(read.backbone), "blocks.1.attn"), left_out=("pooler.weight",))
    assert fitted(fewer, strict=False).left_out == ("pooler.weight",)
    with pytest.raises(UserError, match=r"blocks.1.attn.qkv"):
        fitted(fewer)


def test_nothing_at_all_that_fits_is_refused_even_so() -> None:
    read = weights(replace(SHAPE, embed_dim=32, patch_size=8))
    with pytest.raises(UserError, match="nothing of it fits"):
        fitted(read, strict=False)
