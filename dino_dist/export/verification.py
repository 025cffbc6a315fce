"""What an export has to give: the network's own outputs on fixed images, and the bytes of its tensors.

Taken from the network before it is written, so that its weights need not stay in memory beside what is read back.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from dino_dist.errors import RunFailed, UserError
from dino_dist.models.vit import VisionTransformer
from dino_dist.weights.network_weights import NetworkWeights

TOLERANCE: Final = 1e-5
"""Of `relative_difference`: some ten roundings of fp32 at each of 24 layers stay below it."""
NUM_IMAGES: Final = 2
_SEED: Final = 0

Outputs = Mapping[str, Tensor]
"""`cls` [N, D] and `patches` [N, P, D], normed; `logits` [N, K] where the head is exported and can be run."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one network gives, and what it is made of."""

    network: str
    images: Tensor
    outputs: Outputs
    digests: Mapping[str, str]
    """sha256 of every tensor's bytes; only for formats that keep the tensors as they are."""


def probe_images(in_channels: int, image_px: int) -> Tensor:
    """Fixed images [2, C, px, px] of the spread that normalised pixels have, fp32."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(NUM_IMAGES, in_channels, image_px, image_px, generator=generator)


@torch.no_grad()
def outputs_of(backbone: VisionTransformer, head: nn.Module | None, images: Tensor) -> dict[str, Tensor]:
    """What this project's network gives, in the type of its weights."""
    (tokens,) = backbone.features(images.to(backbone.cls_token.dtype))
    outputs = {"cls": tokens[:, 0], "patches": tokens[:, 1:]}
    return outputs if head is None else outputs | {"logits": head(tokens[:, 0])}


def refuse_non_finite(source: str, outputs: Outputs) -> None:
    """`UserError` for a network that has diverged: nothing it is compared with would be close to it."""
    if not all(bool(torch.isfinite(output).all()) for output in outputs.values()):
        raise UserError(f"{source} gives features that are not finite numbers: export an earlier checkpoint")


def relative_difference(found: Outputs, expected: Outputs) -> float:
    """Largest max|a - b| / max|b| over the outputs, in float64; infinity where shapes differ or numbers are not."""
    worst = 0.0
    for name, right in expected.items():
        if name not in found or found[name].shape != right.shape:
            return math.inf
        difference = (found[name].double() - right.double()).abs().max()
        share = (difference / right.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()
        worst = max(worst, share if math.isfinite(share) else math.inf)
    return worst


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_of(weights: NetworkWeights, *, with_head: bool) -> dict[str, Tensor]:
    """All tensors under flat names: `backbone.*`, and with the head `head.*` and `center`."""
    tensors = {f"backbone.{name}": tensor for name, tensor in weights.backbone.items()}
    if with_head:
        tensors |= {f"head.{name}": tensor for name, tensor in weights.head.items()}
        if weights.center_1K is not None:
            tensors["center"] = weights.center_1K
    return tensors


def digests_of(weights: NetworkWeights, *, with_head: bool) -> dict[str, str]:
    """`tensor_digest` of each of `tensors_of`."""
    return {name: tensor_digest(tensor) for name, tensor in tensors_of(weights, with_head=with_head).items()}


def refuse_other_bytes(read: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """`RunFailed` if a tensor is not read back bit for bit."""
    different = sorted(name for name in read.keys() | expected.keys() if read.get(name) != expected.get(name))
    if different:
        raise RunFailed(f"nothing was exported: {different[0]} is not read back as written (of {len(different)})")


def refuse_other_features(difference: float, reader: str) -> None:
    """`RunFailed` above the tolerance; `reader`: the library, with its version, that read the export back."""
    if not difference <= TOLERANCE:
        raise RunFailed(
            f"nothing was exported: {reader} gives features with a relative difference of {difference:.1e} from this "
            f"network's, {TOLERANCE:.0e} is allowed; try another version of it and report this"
        )
