"""Objects of a video's first frame found in the others by copying labels between like patches.

The paper's protocol on DAVIS 2017 (arXiv:2104.14294, section 4.2.1, after Jabri et al., arXiv:2006.14613): nothing is
trained. Letters: K frames that labels are copied from, R x W patches a frame, P = R W, D features, C labels (0 is the
background).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.models.vit import MAX_PATCHES, VisionTransformer

_LONG_SIDE_MULTIPLE_PX = 64
_MAX_ELEMENTS = 2**24
"""Similarities held at once: 64 MiB of them."""
_FLAT = 1e-5
"""Largest difference in a flat map, as a share of its greatest value."""


@dataclass(frozen=True, kw_only=True)
class PropagationRules:
    """How labels travel; the defaults are the published ones."""

    last_frames: int = 7
    """Frames just before the one to label that are copied from, beside the first."""
    radius: int = 12
    """A patch copies from patches at most this many rows and columns away; 0: from any."""
    top_k: int = 5
    """Patches that it copies from, over all frames together."""
    temperature: float = 0.1
    """They count with exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        if self.last_frames < 0 or self.radius < 0 or self.top_k < 1 or self.temperature <= 0:
            raise UserError(
                f"last frames {self.last_frames} and radius {self.radius} must be at least 0, top k {self.top_k} at "
                f"least 1, the temperature {self.temperature} above 0"
            )


def frame_size_px(height_px: int, width_px: int, *, short_px: int, patch_size: int) -> tuple[int, int]:
    """Height and width that a frame is resized to: the short side `short_px`, the long one in proportion.

    Both are rounded down: the short side to a multiple of the patch, the long one (the width of a square) to one of
    64 px, as published, where that is a multiple of the patch and not above `short_px`. `UserError` for less than a
    patch, and for more than `MAX_PATCHES`.
    """
    patches_first = _LONG_SIDE_MULTIPLE_PX % patch_size or short_px < _LONG_SIDE_MULTIPLE_PX
    multiple = patch_size if patches_first else _LONG_SIDE_MULTIPLE_PX
    short = short_px // patch_size * patch_size
    if not short:
        raise UserError(f"frames cannot be {short_px} px high: that is less than one patch of {patch_size} px")
    long = short_px * max(height_px, width_px) // min(height_px, width_px) // multiple * multiple
    height, width = (long, short) if height_px > width_px else (short, long)
    patches = height * width // patch_size**2
    if patches > MAX_PATCHES:
        raise UserError(
            f"frames of {width_px} x {height_px} px would be looked at as {width} x {height} px, {patches} patches; "
            f"at most {MAX_PATCHES}: give a smaller --size-px"
        )
    return height, width


def one_hot_labels(mask_RW: Tensor, num_labels: int) -> Tensor:
    """int [R, W] -> float32 [P, C]."""
    return F.one_hot(mask_RW.long().flatten(), num_labels).float()


def patch_features(network: VisionTransformer, frame_3hw: Tensor) -> Tensor:
    """Normed patch tokens of the last block, divided by their length; float32 [R, W, D]; `UserError` if not finite."""
    height_px, width_px = frame_3hw.shape[-2:]
    patch = network.shape.patch_size
    tokens_PD = network.features(frame_3hw.unsqueeze(0).to(network.cls_token.dtype))[-1][0, 1:]
    if not bool(torch.isfinite(tokens_PD).all()):
        raise UserError("the features of a frame are not finite; the model has diverged, judge an earlier checkpoint")
    return F.normalize(tokens_PD.float(), dim=1).view(height_px // patch, width_px // patch, -1)


def copy_labels(
    target_RWD: Tensor, sources: Sequence[tuple[Tensor, Tensor]], rules: PropagationRules, *, max_elements: int
) -> Tensor:
    """Labels of one frame's patches, [P, C]: a weighted mean of those of the patches most like each.

    `sources`: features [R, W, D] (of length 1) and labels [P, C] of each frame to copy from. A patch's weights are
    exp(cosine / temperature) of its `top_k` nearest within the radius (all that equal the last of these), over their
    sum. Rows are taken in turn, each against the rows within its reach: memory is `max_elements` similarities.
    """
    rows, columns, _ = target_RWD.shape
    features = torch.stack([features for features, _ in sources])
    labels = torch.stack([labels.view(rows, columns, -1) for _, labels in sources])
    radius = rules.radius or max(rows, columns)
    step = _rows_at_once(len(sources), rows, columns, radius, max_elements)
    column = torch.arange(columns, device=target_RWD.device)
    near_WW = (column.unsqueeze(1) - column).abs() <= radius
    parts: list[Tensor] = []
    for top in range(0, rows, step):
        mine = slice(top, min(top + step, rows))
        theirs = slice(max(0, top - radius), min(mine.stop + radius, rows))
        cosine = torch.einsum("iwd,kjvd->iwkjv", target_RWD[mine], features[:, theirs])
        row_distance = _distance(mine, theirs, target_RWD.device)
        reachable = (row_distance <= radius)[:, None, None, :, None] & near_WW[None, :, None, None, :]
        weights = _strongest(cosine.masked_fill(~reachable, -torch.inf).flatten(2).flatten(0, 1), rules)
        parts.append(weights @ labels[:, theirs].reshape(-1, labels.shape[-1]))
    return torch.cat(parts)


def _strongest(cosine_PS: Tensor, rules: PropagationRules) -> Tensor:
    """Weights [P, S] of the patches to copy from; 0 for all others."""
    kept = min(rules.top_k, cosine_PS.shape[1])
    nearest = cosine_PS.topk(kept, dim=1).values
    # A patch reaches itself in each frame, so the largest is finite; weights relative to it are the same ones.
    weights = ((cosine_PS - nearest[:, :1]) / rules.temperature).exp()
    weights = weights.masked_fill(cosine_PS < nearest[:, -1:], 0.0)
    return weights / weights.sum(1, keepdim=True)


def _rows_at_once(frames: int, rows: int, columns: int, radius: int, max_elements: int) -> int:
    """As many rows as fit `max_elements` similarities with all patches that they reach; 1 at least."""
    per_pair = frames * columns * columns
    step = 1
    while step < rows and (step + 1) * min(rows, step + 1 + 2 * radius) * per_pair <= max_elements:
        step += 1
    return step


def _distance(mine: slice, theirs: slice, device: torch.device) -> Tensor:
    own, other = (torch.arange(part.start, part.stop, device=device) for part in (mine, theirs))
    return (own.unsqueeze(1) - other).abs()


@torch.no_grad()
def segment(
    features: Iterable[Tensor],
    first_PC: Tensor,
    rules: PropagationRules | None = None,
    *,
    max_elements: int = _MAX_ELEMENTS,
) -> Iterator[Tensor]:
    """Labels [P, C] of each frame after the first, in order, while `features` ([R, W, D] a frame) come in.

    `first_PC`: the first frame's, one-hot. Each frame copies from the first and the last few, whose labels are the
    soft ones that were found.
    """
    rules = rules or PropagationRules()
    frames = iter(features)
    first = (next(frames), first_PC)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=rules.last_frames)
    for target in frames:
        labels = copy_labels(target, [first, *recent], rules, max_elements=max_elements)
        recent.append((target, labels))
        yield labels


def label_map(labels_PC: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """One label a pixel of the resized frame, uint8 [h, w]: bilinear between patches, then the strongest.

    Each label's map is stretched to 0 ... 1 before they are compared, as published, so that a small object is not
    lost to the background; a flat one stays as it is. Equal ones: the lowest.
    """
    maps = labels_PC.T.reshape(1, -1, *grid)
    maps = F.interpolate(maps, scale_factor=float(patch_size), mode="bilinear", align_corners=False)[0]
    low = maps.amin((1, 2), keepdim=True)
    top = maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (top - low).clamp_min(torch.finfo(maps.dtype).tiny)
    # A map that is flat up to rounding has nothing to stretch: an object that fills the frame would become noise.
    return torch.where(top - low > _FLAT * top, stretched, maps).argmax(0).to(torch.uint8)
