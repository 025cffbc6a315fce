"""Which tensors of a network that was read go where in a network that is to be trained, and which do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.models.vit import ViTShape, position_interpolation
from dino_dist.weights.network_weights import NetworkWeights
from dino_dist.weights.shapes import in_few_words

_BACKBONE, _HEAD = "backbone.", "head."
_POSITIONS = "pos_embed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """The tensors of one network that are to be taken over, and the report."""

    tensors: Mapping[str, Tensor]
    """By the name in the network to be trained (`backbone.*`, `head.*`), of its shapes."""
    resized: tuple[str, ...]
    """What was resampled, from what to what."""
    missing: tuple[str, ...]
    """Names that stay as they were drawn."""
    misshapen: tuple[str, ...]
    """Those of them for which the file has a tensor of another shape, with both shapes."""
    left_out: tuple[str, ...]
    """Names of the file that go nowhere."""

    @property
    def has_head(self) -> bool:
        """Whether the head is taken over; it is, whole or not at all."""
        return any(name.startswith(_HEAD) for name in self.tensors)

    def describe(self) -> str:
        """One line."""
        parts = [f"{len(self.tensors)} tensors matched"]
        for words, items in (
            ("resized", self.resized),
            ("of another shape", self.misshapen),
            ("left as drawn", _grouped(self.missing)),
            ("left out", self.left_out),
        ):
            if items:
                parts.append(f"{words}: {in_few_words(list(items))}")
        return "; ".join(parts)


def fit(weights: NetworkWeights, wanted: Mapping[str, torch.Size], shape: ViTShape, *, key: str, strict: bool) -> Fit:
    """Compare what was read with the shapes of a network, `backbone.*` and `head.*`.

    Positions are resampled to the grid of `shape` by the published rule. The head is taken over where it has the same
    shapes, else left. `UserError`, which names the setting `key`, if the backbone does not fit as a whole (`strict`),
    or if nothing of it fits.
    """
    if strict and (unequal := _unequal_sizes(weights.shape, shape)):
        raise UserError(f"{key}={weights.source} is another network than this run's: {'; '.join(unequal)}")
    backbone = dict(weights.backbone)
    resized: tuple[str, ...] = ()
    if _POSITIONS in backbone and weights.shape.grid != shape.grid:
        backbone[_POSITIONS] = resample_positions(backbone[_POSITIONS], weights.shape.grid, shape.grid)
        sides = f"from {weights.shape.grid} x {weights.shape.grid} to {shape.grid} x {shape.grid} patches"
        resized = (f"{_BACKBONE}{_POSITIONS} {sides}",)
    found = {f"{_BACKBONE}{name}": tensor for name, tensor in backbone.items()}
    found |= {f"{_HEAD}{name}": tensor for name, tensor in weights.head.items()}
    tensors = {name: tensor for name, tensor in found.items() if wanted.get(name) == tensor.shape}
    if not _is_whole(tensors, found, wanted, _HEAD):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
    misshapen = tuple(
        f"{name} {list(tensor.shape)} instead of {list(wanted[name])}"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != wanted[name]
    )
    report = Fit(
        tensors=tensors,
        resized=resized if f"{_BACKBONE}{_POSITIONS}" in tensors else (),
        missing=tuple(name for name in wanted if name not in tensors),
        misshapen=misshapen,
        left_out=(*weights.left_out, *(name for name in found if name not in wanted)),
    )
    if not any(name.startswith(_BACKBONE) for name in tensors):
        raise UserError(
            f"{key}={weights.source}: nothing of it fits this run's backbone ({in_few_words([*misshapen])})"
        )
    if strict and not _is_whole(tensors, found, wanted, _BACKBONE):
        raise UserError(f"{key}={weights.source} does not fit this run's backbone: {report.describe()}")
    return report


def resample_positions(positions: Tensor, grid: int, new_grid: int) -> Tensor:
    """[1, 1 + grid², D] -> [1, 1 + new_grid², D], float64: what the network itself computes for images of that size."""
    matrix = position_interpolation(grid, new_grid, new_grid)
    wide = positions.to(torch.float64)
    return torch.cat([wide[:, :1], (matrix @ wide[0, 1:]).unsqueeze(0)], dim=1)


def _is_whole(
    taken: Mapping[str, Tensor], found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], prefix: str
) -> bool:
    """Whether all tensors of a part have a place and all places a tensor."""
    parts = [{name for name in names if name.startswith(prefix)} for names in (taken, found, wanted)]
    return parts[0] == parts[1] == parts[2]


def _unequal_sizes(theirs: ViTShape, ours: ViTShape) -> list[str]:
    sizes = (
        ("model.embed_dim", theirs.embed_dim, ours.embed_dim),
        ("model.depth", theirs.depth, ours.depth),
        ("model.num_heads", theirs.num_heads, ours.num_heads),
        ("model.patch_size", theirs.patch_size, ours.patch_size),
    )
    return [f"set {name}={their}, which is {our} here" for name, their, our in sizes if their != our]


def _grouped(names: tuple[str, ...]) -> tuple[str, ...]:
    """A whole head in one word."""
    head = [name for name in names if name.startswith(_HEAD)]
    rest = tuple(name for name in names if not name.startswith(_HEAD))
    return (*rest, "the head") if head else rest
