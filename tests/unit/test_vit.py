"""The backbone's contracts: sizes, errors, initial weights, meta construction, cost of a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino_dist.errors import UserError
from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VIT_SIZES, VisionTransformer, ViTShape

TINY = ViTShape(embed_dim=24, depth=3, num_heads=3, patch_size=4, image_px=16, drop_path=0.2)


@pytest.mark.parametrize(
    ("arch", "millions"), [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8), ("vit_large", 303.3)]
)
def test_published_sizes(arch: str, millions: float) -> None:
    size = VIT_SIZES[arch]
    shape = ViTShape(embed_dim=size.embed_dim, depth=size.depth, num_heads=size.num_heads, patch_size=16, image_px=224)
    with torch.device("meta"):
        model = VisionTransformer(shape, "sdpa")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_meta_construction_then_initialisation_is_direct_construction() -> None:
    torch.manual_seed(11)
    direct = VisionTransformer(TINY, "sdpa")
    with torch.device("meta"):
        later = VisionTransformer(TINY, "sdpa")
    assert all(p.is_meta for p in later.parameters())
    assert not list(later.buffers()), "a buffer would be left uninitialised by to_empty"
    later.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(11)
    later.init_weights()
    # The order of the draws differs between the constructor of a Conv2d or Linear and `init_weights` alone.
    for name, parameter in later.named_parameters():
        reference = direct.get_parameter(name)
        assert parameter.shape == reference.shape
        assert bool(parameter.isfinite().all()), name
        assert float(parameter.detach().std()) == pytest.approx(float(reference.detach().std()), rel=0.35), name


def test_initial_weights_are_the_published_ones() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(ViTShape(embed_dim=96, depth=2, num_heads=3, patch_size=8, image_px=64), "sdpa")
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name.startswith("patch_embed"):
            bound = (3 * 8 * 8) ** -0.5
            assert float(values.abs().max()) <= bound
            assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.25)
        elif "norm" in name:
            assert torch.equal(values, torch.full_like(values, 1.0 if name.endswith("weight") else 0.0)), name
        elif name.endswith("bias"):
            assert not values.any(), name
        else:
            assert float(values.std()) == pytest.approx(0.02, rel=0.25), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_heads": 5}, "num_heads=5"),
        ({"image_px": 18}, "patch_size=4"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], named: str) -> None:
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 4, "image_px": 16}
    with pytest.raises(UserError) as refused:
        ViTShape(**(sizes | change))
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [(16, 18), (17, 16), (0, 16), (2, 2)])
def test_images_that_patches_do_not_tile_are_refused(size: tuple[int, int]) -> None:
    model = VisionTransformer(TINY, "sdpa")
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} px"):
        model([torch.zeros(1, 3, *size)])


def test_other_bad_calls_are_refused() -> None:
    model = VisionTransformer(TINY, "sdpa")
    images = torch.zeros(2, 3, 16, 16)
    with pytest.raises(UserError, match="no crops"):
        model([])
    with pytest.raises(UserError, match="num_last_blocks=4"):
        model.features(images, num_last_blocks=4)
    with pytest.raises(ValueError, match="3 crops, there are 2"):
        model([images], drop_path=torch.ones(3, 2, 3))


def test_drop_path_rates_grow_linearly() -> None:
    assert TINY.drop_path_rates == pytest.approx((0.0, 0.1, 0.2))
    assert ViTShape(embed_dim=8, depth=1, num_heads=1, patch_size=4, image_px=8, drop_path=0.3).drop_path_rates == (0,)


def test_evaluating_in_inference_mode_leaves_training_possible() -> None:
    """The kept position matrix of a size first seen in inference mode must be usable by autograd."""
    model = VisionTransformer(ViTShape(embed_dim=8, depth=1, num_heads=1, patch_size=4, image_px=44), "sdpa")
    images = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model([images])
    model([images])[:, 0].sum().backward()
    assert model.pos_embed.grad is not None
    assert bool(model.pos_embed.grad.any())


def test_kept_position_matrices_are_bounded_and_not_state() -> None:
    model = VisionTransformer(ViTShape(embed_dim=4, depth=1, num_heads=1, patch_size=2, image_px=4), "sdpa")
    keys = set(model.state_dict())
    for side in range(1, 30):
        model([torch.zeros(1, 3, 2 * side, 2)])
    assert len(model._interpolations) <= 16
    assert set(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    assert torch.equal(copied([torch.ones(1, 3, 8, 2)]), model([torch.ones(1, 3, 8, 2)]))


def test_bf16_weights_take_fp32_drop_path_factors() -> None:
    model = VisionTransformer(TINY, "sdpa").bfloat16()
    crops = [torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16), torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)]
    assert model(crops, drop_path=torch.ones(3, 2, 3)).dtype == torch.bfloat16


class OperatorCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd, and what would make a device wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operators += 1
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "_to_copy")):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_drop_path", [False, True])
def test_operators_of_a_step(with_drop_path: bool) -> None:
    """Student forward and backward plus teacher forward at depth 12 leave room in the step's 1,900 operators."""
    shape = ViTShape(embed_dim=24, depth=12, num_heads=3, patch_size=4, image_px=16)
    student, teacher = VisionTransformer(shape, "sdpa"), VisionTransformer(shape, "sdpa")
    student_head, teacher_head = DinoHead(24, 32, hidden_dim=16, bottleneck_dim=8), DinoHead(24, 32, hidden_dim=16)
    crops = [torch.randn(4, 3, 16, 16), torch.randn(16, 3, 8, 8)]
    factors = torch.ones(12, 2, 20) if with_drop_path else None

    def step() -> Tensor:
        with torch.no_grad():
            teacher_head(teacher(crops[:1]))
        return student_head(student(crops, drop_path=factors)).sum()

    step()  # position matrices are made once
    with OperatorCounter() as counter:
        step().backward()
    assert counter.operators <= (1650 if with_drop_path else 1600)
    assert not counter.waits


def test_saved_activations_are_the_sixteen_units_of_a_block() -> None:
    """Per block: q, k, v (one storage), attention out, two LN inputs and outputs, the MLP before and after GELU."""
    shape = ViTShape(embed_dim=64, depth=4, num_heads=1, patch_size=4, image_px=32)
    model = VisionTransformer(shape, "sdpa")
    crops = [torch.randn(2, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    model(crops)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # Holding each saved tensor keeps its storage alive, so an address names one storage.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(crops)
    floats = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own) / 4
    num_tokens = 2 * 65 + 6 * 17
    units = floats / (num_tokens * shape.embed_dim)
    assert output.requires_grad
    # Besides: the images (3/4 of a unit here), the statistics of norms and softmax (5 of 64 a block), the CLS rows.
    assert 16 * shape.depth <= units <= 16 * shape.depth + 1.5


@pytest.mark.parametrize("init_std", [0.02, 0.1])
def test_initial_weights_have_the_asked_spread(init_std: float) -> None:
    torch.manual_seed(0)
    shape = ViTShape(embed_dim=64, depth=2, num_heads=2, patch_size=4, image_px=16, init_std=init_std)
    model = VisionTransformer(shape, "sdpa")
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "pos_embed"):
        assert model.get_parameter(name).std().item() == pytest.approx(init_std, rel=0.1)
    assert model.get_parameter("blocks.0.mlp.fc1.bias").abs().max().item() == 0.0
