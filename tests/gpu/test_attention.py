"""xformers on a CUDA device equals the specification."""

from __future__ import annotations

import pytest
import torch

from dino_dist.models.attention import Attention, PackedLayout, choose_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYOUT = PackedLayout(((4, 197), (16, 37)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["xformers", "sdpa"])
def test_backend_is_explicit(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    device = torch.device("cuda")
    if backend == "xformers":
        pytest.importorskip("xformers")
        assert choose_backend("xformers", device, dtype=dtype).name == "xformers"
    torch.manual_seed(0)
    fast = Attention(384, 6, backend).to(device)  # type: ignore[arg-type]
    slow = Attention(384, 6, "explicit").to(device)
    slow.load_state_dict(fast.state_dict())
    slow.double()
    fast.to(dtype)
    x_TD = torch.randn(LAYOUT.num_tokens, 384, device=device)
    results = []
    for attention, x in ((fast, x_TD.to(dtype)), (slow, x_TD.double())):
        x.requires_grad_()
        output = attention(x, LAYOUT)
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *attention.parameters()])))
    for ours, reference in zip(*results, strict=True):
        assert (ours.double() - reference).abs().max() <= tolerance * reference.abs().max()


def test_auto_takes_xformers_where_it_works() -> None:
    pytest.importorskip("xformers")
    choice = choose_backend("auto", torch.device("cuda"))
    assert choice.name == "xformers", choice.reason
