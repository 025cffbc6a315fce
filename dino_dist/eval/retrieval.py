"""Image retrieval: mean average precision of a ranked gallery, with junk and grades of difficulty.

The measure of Oxford and Paris (Philbin et al., CVPR 2007; Holidays counts alike) and the three protocols of their
revision (Radenovic et al., CVPR 2018, arXiv:1803.11285). Letters: Q queries, N gallery images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.knn import unit_rows
from dino_dist.models.vit import VisionTransformer

UNRELATED, EASY, HARD, JUNK = range(4)
"""What a gallery image is to a query. Junk is taken out of the ranking as if it were not in the gallery."""

Area = Literal["trapezoids", "steps"]
"""How the area under the precision-recall curve is taken: trapezoids as published, or steps as scikit-learn does."""

Relation = Callable[[slice], Tensor]
"""Of some queries to the whole gallery: int8 [q, N] of the codes above."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which relations are to be found, and which are not to count."""

    wanted: tuple[int, ...]
    ignored: tuple[int, ...]


PROTOCOLS: Final[Mapping[str, Protocol]] = MappingProxyType(
    {
        "easy": Protocol(wanted=(EASY,), ignored=(HARD, JUNK)),
        "medium": Protocol(wanted=(EASY, HARD), ignored=(JUNK,)),
        "hard": Protocol(wanted=(HARD,), ignored=(EASY, JUNK)),
    }
)
"""The revised benchmark's. Where nothing is hard, `medium` is the plain mean average precision."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalScore:
    """Of one protocol; fractions from 0 to 1."""

    mean_average_precision: float
    precision_at: Mapping[int, float]
    """Mean over the queries of the share of wanted images among the first k (see `precision_at`)."""
    num_queries: int
    """Queries that have something to find; the others are in no mean."""
    average_precision_Q: Tensor
    """float64 on the CPU; NaN for a query without anything to find."""


PUBLISHED_SCALES = (1.0, 0.5**0.5, 0.5)
"""Sizes at which the published evaluation looks at each image, as shares of its side."""


def retrieval_forward(network: VisionTransformer, scales: Sequence[float] = (1.0,)) -> Callable[[Tensor], Tensor]:
    """Images [n, 3, h, w] of any size -> the mean of the normed class tokens at these scales, [n, D].

    What does not fill a patch at the right and at the bottom is cut off, as the published patch embedding does.
    """

    def forward(images: Tensor) -> Tensor:
        images = images.to(network.cls_token.dtype)
        tokens = [network.features(_whole_patches(images, scale, network))[-1][:, 0] for scale in scales]
        return torch.stack(tokens).mean(0)

    return forward


def _whole_patches(images: Tensor, scale: float, network: VisionTransformer) -> Tensor:
    if scale != 1.0:
        images = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
    patch = network.shape.patch_size
    height_px, width_px = (side // patch * patch for side in images.shape[-2:])
    return images[..., :height_px, :width_px]


def average_precision(
    wanted_QN: Tensor, ignored_QN: Tensor, *, num_wanted_Q: Tensor | None = None, area: Area = "trapezoids"
) -> Tensor:
    """Average precision of ranked lists, float64 [Q]; NaN where nothing is wanted.

    `wanted_QN` and `ignored_QN` are bool, best first. The n-th wanted image at place r (from 1, ignored ones not
    counted) adds 1 / num_wanted times (n / r + (n - 1) / (r - 1)) / 2 by trapezoids, with 1 for 0 / 0, or n / r by
    steps. `num_wanted_Q`: where the lists end before all wanted images have come; the missing ones add nothing.
    """
    place_QN = (~ignored_QN).cumsum(1).double()
    found_QN = wanted_QN.cumsum(1).double()
    precision = found_QN / place_QN.clamp_min(1)
    if area == "trapezoids":
        before = torch.where(place_QN > 1, (found_QN - 1) / (place_QN - 1).clamp_min(1), 1.0)
        precision = (precision + before) / 2
    total = found_QN[:, -1] if num_wanted_Q is None else num_wanted_Q.double()
    return (precision * wanted_QN).sum(1) / total  # 0 / 0 is NaN


def precision_at(wanted_QN: Tensor, ignored_QN: Tensor, *, k: int) -> Tensor:
    """Share of wanted images among the first k that are not ignored, float64 [Q]; NaN where nothing is wanted.

    As published, k ends at the last wanted image where that stands before it: a query with three images to find can
    have a precision of 1 at 10.
    """
    place_QN = (~ignored_QN).cumsum(1)
    last_Q = (place_QN * wanted_QN).amax(1)
    places_Q = last_Q.clamp_max(k)
    hits_Q = (wanted_QN & (place_QN <= places_Q.unsqueeze(1))).sum(1)
    return hits_Q.double() / places_Q.double()  # 0 / 0 is NaN


def rank_gallery(query_QD: Tensor, gallery_ND: Tensor) -> Tensor:
    """Gallery indices [Q, N] of each query, largest dot product first, equal ones by index."""
    return (query_QD @ gallery_ND.T).sort(dim=1, descending=True, stable=True).indices


def retrieval_scores(
    query_features: Tensor,
    gallery_features: Tensor,
    relation: Relation,
    *,
    protocols: Sequence[str] = tuple(PROTOCOLS),
    at: Sequence[int] = (1, 5, 10),
    area: Area = "trapezoids",
    world: World | None = None,
    max_elements: int = 2**22,
) -> dict[str, RetrievalScore]:
    """Rank the gallery by cosine for each query and score it by each protocol; the same on all ranks, a collective.

    Features [Q, D] and [N, D], not normalised by the caller, all of them on all ranks; each rank takes a share of the
    queries, `max_elements` similarities at a time. `UserError` for features that are not finite, no query, no gallery,
    or a protocol by which no query has anything to find.
    """
    world = world or World()
    queries = unit_rows(query_features, "query")
    gallery = unit_rows(gallery_features, "gallery")
    columns = 1 + len(at)
    # One row a query: average precision, then the precisions; zeros elsewhere make the sum over ranks a gather.
    rows = torch.zeros(len(protocols), len(queries), columns, dtype=torch.float64, device=world.device)
    step = max(1, max_elements // len(gallery))
    starts = range(0, len(queries), step)
    for start in starts[world.rank :: world.size]:
        mine = slice(start, min(start + step, len(queries)))
        order = rank_gallery(queries[mine], gallery)
        ranked = relation(mine).to(order.device).gather(1, order)
        for number, name in enumerate(protocols):
            rows[number, mine] = _scored(ranked, PROTOCOLS[name], at, area).to(world.device)
    world.all_reduce_sum_(rows)
    return {name: _summary(name, rows[number].cpu(), at) for number, name in enumerate(protocols)}


def _scored(ranked: Tensor, protocol: Protocol, at: Sequence[int], area: Area) -> Tensor:
    wanted = torch.isin(ranked, ranked.new_tensor(protocol.wanted))
    ignored = torch.isin(ranked, ranked.new_tensor(protocol.ignored))
    parts = [average_precision(wanted, ignored, area=area)]
    parts += [precision_at(wanted, ignored, k=k) for k in at]
    return torch.stack(parts, dim=1)


def _summary(name: str, rows: Tensor, at: Sequence[int]) -> RetrievalScore:
    counted = rows[~rows[:, 0].isnan()]
    if not len(counted):
        raise UserError(
            f"none of the {len(rows)} queries has an image to find by the {name} protocol: give relevant gallery images"
        )
    means = counted.mean(0).tolist()
    return RetrievalScore(
        mean_average_precision=means[0],
        precision_at=dict(zip(at, means[1:], strict=True)),
        num_queries=len(counted),
        average_precision_Q=rows[:, 0],
    )


def same_label(query_labels_Q: Tensor, gallery_labels_N: Tensor) -> Relation:
    """The relation of labelled images: easy where the labels are equal, else unrelated."""

    def relation(queries: slice) -> Tensor:
        return (query_labels_Q[queries].unsqueeze(1) == gallery_labels_N).to(torch.int8) * EASY

    return relation
