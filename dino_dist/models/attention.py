"""Self-attention over packed crops: the layout of a packed sequence, the backends, and the choice between them.

Every backend computes, for each crop by itself, softmax(Q Kᵀ / √d) V; `explicit` is that line written out. Letters:
T tokens of all crops, N crops of one resolution, L tokens of one crop, H heads, d width of a head, D = H * d.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_dist.errors import UserError

if TYPE_CHECKING:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

AttentionBackend = Literal["auto", "xformers", "sdpa", "explicit"]
ResolvedBackend = Literal["xformers", "sdpa", "explicit"]


@dataclass(frozen=True)
class PackedLayout:
    """How the rows of a packed [T, D] matrix divide into crops: runs of equally long crops, in order."""

    groups: tuple[tuple[int, int], ...]
    """(number of crops, tokens of one crop) of each run."""

    @property
    def num_tokens(self) -> int:
        """T, the rows of the packed matrix."""
        return sum(num_crops * length for num_crops, length in self.groups)

    @property
    def num_crops(self) -> int:
        """Crops of all runs."""
        return sum(num_crops for num_crops, _ in self.groups)

    def split(self, packed: Tensor) -> list[Tensor]:
        """[T, ...] -> one view [N, L, ...] a run."""
        if len(self.groups) == 1:
            return [packed.view(*self.groups[0], *packed.shape[1:])]
        runs = packed.split_with_sizes([num_crops * length for num_crops, length in self.groups])
        return [run.view(*group, *packed.shape[1:]) for run, group in zip(runs, self.groups, strict=True)]


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """The backend that a run uses, and why; to be logged once."""

    name: ResolvedBackend
    reason: str


def choose_backend(
    name: AttentionBackend,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    deterministic: bool = False,
) -> BackendChoice:
    """Resolve `auto` by a tiny forward and backward of xformers with this run's `dtype` and `head_dim` on `device`.

    `deterministic` rules xformers out: its backward kernels add with atomics. `UserError` where xformers is asked for
    by name and cannot work.
    """
    if name == "sdpa" or name == "explicit":
        return BackendChoice(name=name, reason="asked for")
    obstacle = _xformers_obstacle(device, dtype, head_dim, deterministic=deterministic)
    if obstacle is None:
        reason = "asked for" if name == "xformers" else f"xformers works on {device} with {dtype}"
        return BackendChoice(name="xformers", reason=reason)
    if name == "xformers":
        raise UserError(f"model.attention=xformers cannot work here ({obstacle}): use model.attention=auto or sdpa")
    return BackendChoice(name="sdpa", reason=f"xformers cannot work here: {obstacle}")


def _xformers_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, *, deterministic: bool) -> str | None:
    """Why xformers cannot serve, on one line; None if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if deterministic:
        return "its backward is not deterministic and train.deterministic is on"
    layout = PackedLayout(((1, 5), (2, 3)))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            qkv = torch.zeros(layout.num_tokens, 3, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
            torch.autograd.grad(xformers_attention(qkv, layout).sum(), qkv)
            # A kernel that cannot run reports it only when the device is waited for.
            torch.cuda.synchronize(device)
    # What a broken or absent installation raises: a missing module or library, a renamed function, no fitting kernel.
    except (ImportError, OSError, AttributeError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return None


def explicit_probabilities(qkv_NL3Hd: Tensor) -> Tensor:
    """Softmax(Q Kᵀ / √d) of one run's [N, L, 3, H, d] -> [N, H, L, L]; input dtype, the softmax in at least fp32."""
    q, k, _ = qkv_NL3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def explicit_attention(qkv_NL3Hd: Tensor) -> Tensor:
    """The specification: materialised probabilities times V; [N, L, 3, H, d] -> [N * L, H * d]."""
    v_NHLd = qkv_NL3Hd[:, :, 2].transpose(1, 2)
    return (explicit_probabilities(qkv_NL3Hd) @ v_NHLd).transpose(1, 2).flatten(2).flatten(0, 1)


def sdpa_attention(qkv_NL3Hd: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention on views of the packed qkv; [N, L, 3, H, d] -> [N * L, H * d]."""
    num_crops, length, _, num_heads, head_dim = qkv_NL3Hd.shape
    q, k, v = qkv_NL3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    out_NHLd = F.scaled_dot_product_attention(q, k, v)
    # The fused kernels write [N, L, H, d] in memory, so this is a view, not a copy.
    return out_NHLd.transpose(1, 2).reshape(num_crops * length, num_heads * head_dim)


def xformers_attention(qkv_T3Hd: Tensor, layout: PackedLayout) -> Tensor:
    """xformers' memory-efficient attention, all crops in one sequence under a block-diagonal mask; -> [T, H * d]."""
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv_T3Hd.unsqueeze(0).unbind(2)
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=_block_diagonal_mask(layout, qkv_T3Hd.device))
    return out.reshape(qkv_T3Hd.shape[0], -1)


@lru_cache(maxsize=16)
def _block_diagonal_mask(layout: PackedLayout, device: torch.device) -> BlockDiagonalMask:
    """The mask lives on `device` and is kept, so that a later step copies nothing to the device."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [length for num_crops, length in layout.groups for _ in range(num_crops)]
    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens(lengths, device=device)


class _LinearOfRuns(torch.autograd.Function):
    """`F.linear(torch.cat(runs), weight, bias)` that saves the runs, which attention saves anyway.

    One [T, D] matrix a block less than the plain form, and a third of the operators of one linear map a run.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, *runs: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *runs)
        return F.linear(torch.cat(runs), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad_TD,) = grads
        weight, *runs = ctx.saved_tensors
        # Under autocast the saved weight is wider than the gradient; `to` does nothing otherwise.
        grad_weight = (grad_TD.t() @ torch.cat(runs)).to(weight.dtype)
        grad_bias = grad_TD.sum(dim=0).to(weight.dtype)
        grad_runs = (grad_TD @ weight.to(grad_TD.dtype)).split_with_sizes([run.shape[0] for run in runs])
        return grad_weight, grad_bias, *grad_runs


class Attention(nn.Module):
    """Multi-head self-attention of a ViT on packed tokens, each crop attending to itself alone."""

    def __init__(self, dim: int, num_heads: int, backend: ResolvedBackend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend: ResolvedBackend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """[T, D] -> [T, D]."""
        qkv_T3Hd = self._qkv(x_TD)
        if self.backend == "xformers":
            runs = [xformers_attention(qkv_T3Hd, layout)]
        else:
            attend = sdpa_attention if self.backend == "sdpa" else explicit_attention
            runs = [attend(qkv_NL3Hd) for qkv_NL3Hd in layout.split(qkv_T3Hd)]
        if len(runs) == 1:
            out: Tensor = self.proj(runs[0])
            return out
        projected: Tensor = _LinearOfRuns.apply(self.proj.weight, self.proj.bias, *runs)
        return projected

    def probabilities(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """Explicit attention probabilities [N, H, L, L] of a layout with a single run, whatever the backend."""
        (qkv_NL3Hd,) = layout.split(self._qkv(x_TD))
        return explicit_probabilities(qkv_NL3Hd)

    def _qkv(self, x_TD: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x_TD)
        return qkv.view(x_TD.shape[0], 3, self.num_heads, -1)
