"""The attention module: layouts, the choice of a backend, and its behaviour under compile and autograd."""

from __future__ import annotations

import pytest
import torch

from dino_dist.errors import UserError
from dino_dist.models.attention import Attention, PackedLayout, choose_backend
from dino_dist.models.layers import Block

CPU = torch.device("cpu")


def test_layout_splits_into_views_of_the_packed_rows() -> None:
    layout = PackedLayout(((2, 5), (3, 2), (1, 4)))
    packed = torch.arange(layout.num_tokens * 3).view(-1, 3)
    runs = layout.split(packed)
    assert (layout.num_tokens, layout.num_crops) == (20, 6)
    assert [tuple(run.shape) for run in runs] == [(2, 5, 3), (3, 2, 3), (1, 4, 3)]
    assert torch.equal(torch.cat([run.flatten(0, 1) for run in runs]), packed)
    assert all(run.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for run in runs)


@pytest.mark.parametrize("name", ["sdpa", "explicit"])
def test_a_backend_asked_for_is_taken(name: str) -> None:
    assert choose_backend(name, CPU).name == name  # type: ignore[arg-type]


def test_auto_on_cpu_is_sdpa_and_says_why() -> None:
    choice = choose_backend("auto", CPU)
    assert choice.name == "sdpa"
    assert "CUDA" in choice.reason


def test_xformers_on_cpu_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"model\.attention=xformers cannot work here") as refused:
        choose_backend("xformers", CPU)
    assert "\n" not in str(refused.value)


def test_deterministic_training_rules_xformers_out() -> None:
    cuda = torch.device("cuda")  # never touched: determinism is asked first
    assert choose_backend("auto", cuda, deterministic=True).name == "sdpa"
    with pytest.raises(UserError, match="deterministic"):
        choose_backend("xformers", cuda, deterministic=True)


@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
def test_crops_do_not_see_each_other(backend: str) -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, backend).double()  # type: ignore[arg-type]
    layout = PackedLayout(((2, 3), (1, 4)))
    x_TD = torch.randn(layout.num_tokens, 8, dtype=torch.float64)
    before = attention(x_TD, layout)
    x_TD[3:6] += 1.0
    after = attention(x_TD, layout)
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 4


def test_block_compiles_whole() -> None:
    """A graph break in a block would cost every layer of every step; the layout is a constant to the compiler."""
    torch.manual_seed(0)
    block = Block(dim=8, num_heads=2, mlp_hidden_dim=16, attention="sdpa")
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    layout = PackedLayout(((2, 3), (1, 4)))
    x_TD, factor = torch.randn(10, 8), torch.rand(10, 1)
    assert torch.equal(compiled(x_TD, layout, factor, factor), block(x_TD, layout, factor, factor))
    assert torch.equal(compiled(x_TD, layout), block(x_TD, layout))


def test_linear_of_runs_under_autocast_gives_full_precision_gradients() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, "sdpa")
    layout = PackedLayout(((2, 3), (1, 4)))
    x_TD = torch.randn(layout.num_tokens, 16)
    parameters = list(attention.parameters())
    exact = torch.autograd.grad(attention(x_TD, layout).square().sum(), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(x_TD, layout)
    assert output.dtype == torch.bfloat16
    rounded = torch.autograd.grad(output.float().square().sum(), parameters)
    for ours, reference in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - reference).abs().max()) <= 0.05 * float(reference.abs().max())


@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
def test_gradients_are_the_numerical_ones(backend: str) -> None:
    torch.manual_seed(0)
    attention = Attention(4, 2, backend).double()  # type: ignore[arg-type]
    layout = PackedLayout(((2, 3), (1, 2)))
    x_TD = torch.randn(layout.num_tokens, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*attention.named_parameters(), strict=True)

    def output(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (x, layout))

    assert torch.autograd.gradcheck(output, (x_TD, *values))
