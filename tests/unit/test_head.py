"""The DINO head and its two layers against torch's own, in float64 and in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_dist.errors import UserError
from dino_dist.models.head import DinoHead, ReducedBatchNorm1d, WeightNormLinear


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max|a - b| / max|b|."""
    assert ours.shape == reference.shape
    return float((ours - reference).detach().abs().max() / reference.detach().abs().max())


@pytest.mark.parametrize("train_norm", [True, False])
def test_weight_norm_is_torchs_parametrization(train_norm: bool) -> None:
    torch.manual_seed(0)
    ours = WeightNormLinear(7, 11, train_norm=train_norm).double()
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(7, 11, bias=False).double(), dim=0)
    norm, direction = reference.parametrizations.weight.original0, reference.parametrizations.weight.original1
    norm.requires_grad_(train_norm)
    with torch.no_grad():
        norm.copy_(torch.rand(11, 1) + 0.5)
        direction.copy_(torch.randn(11, 7))
        ours.weight_g.copy_(norm)
        ours.weight_v.copy_(direction)
    x, weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 11, dtype=torch.float64)
    trained_ours = [x, *(p for p in ours.parameters() if p.requires_grad)]
    trained_reference = [x, *(p for p in (norm, direction) if p.requires_grad)]
    assert relative_error(ours(x), reference(x)) <= 1e-13
    for a, b in zip(
        torch.autograd.grad((ours(x) * weight).sum(), trained_ours),
        torch.autograd.grad((reference(x) * weight).sum(), trained_reference),
        strict=True,
    ):
        assert relative_error(a, b) <= 1e-12


def test_weight_norm_saves_no_normalised_weight() -> None:
    layer = WeightNormLinear(16, 4096, train_norm=False)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 16, requires_grad=True))
    extra = [t.untyped_storage().nbytes() for t in saved if t.untyped_storage().data_ptr() not in own]
    assert max(extra) <= 2 * 4096 * 4, "anything larger than the logits is a copy of the weight"


@pytest.mark.parametrize("num_rows", [5, 33])
def test_batch_norm_is_torchs_in_training(num_rows: int) -> None:
    torch.manual_seed(1)
    ours, reference = ReducedBatchNorm1d(6, world_size=1).double(), nn.BatchNorm1d(6).double().train()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(6))
        ours.bias.copy_(torch.randn(6))
        reference.weight.copy_(ours.weight)
        reference.bias.copy_(ours.bias)
    x = (torch.randn(num_rows, 6, dtype=torch.float64) * 3 + 1).requires_grad_()
    weight = torch.randn(num_rows, 6, dtype=torch.float64)
    assert relative_error(ours(x), reference(x)) <= 1e-12
    for a, b in zip(
        torch.autograd.grad((ours(x) * weight).sum(), [x, ours.weight, ours.bias]),
        torch.autograd.grad((reference(x) * weight).sum(), [x, reference.weight, reference.bias]),
        strict=True,
    ):
        assert relative_error(a, b) <= 1e-11


def test_batch_norm_of_a_constant_column_is_finite() -> None:
    layer = ReducedBatchNorm1d(2, world_size=1)
    x = torch.full((5, 2), 0.1, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert x.grad is not None
    assert bool(output.isfinite().all() & x.grad.isfinite().all())


@pytest.mark.parametrize(
    ("num_layers", "batch_norm", "linear_names"),
    [
        (1, False, ["mlp"]),
        (1, True, ["mlp"]),
        (2, False, ["mlp.0", "mlp.2"]),
        (3, False, ["mlp.0", "mlp.2", "mlp.4"]),
        (3, True, ["mlp.0", "mlp.3", "mlp.6"]),
    ],
)
def test_layers_have_the_published_names(num_layers: int, batch_norm: bool, linear_names: list[str]) -> None:
    head = DinoHead(6, 9, hidden_dim=5, bottleneck_dim=4, num_layers=num_layers, batch_norm=batch_norm)
    linears = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    norms = [name for name, module in head.named_modules() if isinstance(module, ReducedBatchNorm1d)]
    assert linears == linear_names
    assert norms == (["mlp.1", "mlp.4"] if batch_norm and num_layers == 3 else [])
    assert head.state_dict()["last_layer.weight_g"].shape == (9, 1)
    assert head.state_dict()["last_layer.weight_v"].shape == (9, 4)


def test_head_is_its_formula() -> None:
    torch.manual_seed(2)
    head = DinoHead(6, 9, hidden_dim=5, bottleneck_dim=4, batch_norm=True).double()
    assert isinstance(head.mlp, nn.Sequential)
    first, _, _, second, _, _, third = head.mlp
    x = torch.randn(8, 6, dtype=torch.float64)

    def normed(rows: Tensor) -> Tensor:
        return (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()

    bottleneck = third(F.gelu(normed(second(F.gelu(normed(first(x)))))))
    bottleneck = bottleneck / bottleneck.norm(dim=1, keepdim=True)
    prototypes = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
    assert relative_error(head(x), bottleneck @ prototypes.T) <= 1e-12


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_prototype_norms_are_trained_or_not(norm_last_layer: bool) -> None:
    head = DinoHead(6, 9, hidden_dim=5, bottleneck_dim=4, norm_last_layer=norm_last_layer)
    assert head.last_layer.weight_g.requires_grad is not norm_last_layer
    assert bool((head.last_layer.weight_g == 1).all())


def test_meta_construction_then_initialisation() -> None:
    with torch.device("meta"):
        head = DinoHead(64, 96, hidden_dim=80, bottleneck_dim=64, batch_norm=True)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(4)
    head.init_weights()
    for name, parameter in head.named_parameters():
        assert bool(parameter.isfinite().all()), name
    assert float(head.get_parameter("mlp.0.weight").detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(head.last_layer.weight_v.detach().abs().max()) == pytest.approx(64**-0.5, rel=0.05)


def test_bf16_weights_normalise_in_fp32() -> None:
    torch.manual_seed(5)
    head = DinoHead(32, 64, hidden_dim=32, bottleneck_dim=16)
    half = copy.deepcopy(head).bfloat16()
    x = torch.randn(4, 32)
    logits = half(x.bfloat16())
    assert logits.dtype == torch.float32
    assert relative_error(logits, head(x)) <= 5e-2
    # Cosines of unit vectors: a norm taken in bf16 could pass 1 by 2**-8.
    assert float(logits.detach().abs().max()) <= 1 + 2**-7


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"head\.num_layers=0"):
        DinoHead(6, 9, num_layers=0)
