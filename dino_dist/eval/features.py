"""Features of a labelled set: the model's outputs for every image, on every rank, in the order of the image ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_dist.dist import World
from dino_dist.errors import StopAsked, UserError, for_rank
from dino_dist.polling import StopWord, go_on

Batch = tuple[Tensor, Tensor, Tensor]
"""Images [b, 3, h, w], labels [b] int64, ids [b] int64."""


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures:
    """One row an image, ordered by id; the same on all ranks."""

    features_ND: Tensor
    labels_N: Tensor
    ids_N: Tensor


@torch.no_grad()
def extract(
    model_forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    world: World,
    stop_word: StopWord = go_on,
) -> LabelledFeatures:
    """Run `model_forward` ([b, 3, h, w] -> [b, D]) over this rank's batches and gather all ranks' rows.

    Ranks may hold different numbers of batches, none included: the forward of a sharded model is a collective, so a
    rank that has run out takes part with one blank image and drops the result. Features are fp32 on `world.device`,
    fp64 if the model's are. `ValueError` if there is no image at all or an id comes twice; `StopAsked` on all ranks as
    soon as `stop_word` is not 0 on one; a `UserError` of one rank's batches becomes one of all, said by rank 0.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    ids: list[Tensor] = []
    rows = iter(batches)
    while True:
        batch: Batch | None = None
        problem: UserError | None = None
        try:
            batch = next(rows, None)
        except UserError as error:
            problem = error
        shape = None if batch is None else (tuple(batch[0].shape[1:]), batch[0].dtype)
        shapes, words, problems = zip(*world.gather((shape, stop_word(), problem)), strict=True)
        if any(words):
            raise StopAsked(max(words))
        if any(problems):
            raise for_rank(next(filter(None, problems)), is_first=world.is_first)
        blank = next((shape for shape in shapes if shape is not None), None)
        if blank is None:
            break
        if batch is None:
            model_forward(torch.zeros((1, *blank[0]), dtype=blank[1], device=world.device))
            continue
        output = model_forward(batch[0].to(world.device, non_blocking=True))
        features.append(output if output.dtype == torch.float64 else output.float())
        labels.append(batch[1].to(world.device, torch.int64))
        ids.append(batch[2].to(world.device, torch.int64))
    return _gather_by_id(features, labels, ids, world)


def _gather_by_id(features: list[Tensor], labels: list[Tensor], ids: list[Tensor], world: World) -> LabelledFeatures:
    count = sum(len(part) for part in ids)
    described = world.gather((count, (features[0].shape[1], features[0].dtype) if features else None))
    total = sum(other_count for other_count, _ in described)
    layout = next((layout for _, layout in described if layout is not None), None)
    if layout is None or not total:
        raise ValueError("no image to extract features of")
    start = sum(other_count for other_count, _ in described[: world.rank])

    def gathered(parts: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Zeros elsewhere make a sum over ranks a gather of unequal parts, exact and without pickling.
        whole = torch.zeros((total, *shape), dtype=dtype, device=world.device)
        if parts:
            whole[start : start + count] = torch.cat(parts)
        return world.all_reduce_sum_(whole)

    ids_N = gathered(ids, (), torch.int64)
    order = ids_N.argsort()
    ids_N = ids_N[order]
    if bool((ids_N[1:] == ids_N[:-1]).any()):
        twice = int(ids_N[1:][ids_N[1:] == ids_N[:-1]][0])
        raise ValueError(f"image id {twice} came twice: the ranks' batches overlap")
    return LabelledFeatures(
        features_ND=gathered(features, (layout[0],), layout[1])[order],
        labels_N=gathered(labels, (), torch.int64)[order],
        ids_N=ids_N,
    )
