"""Judging a network by what it finds: image retrieval from a list or from labelled sets, and copy detection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_dist.config import Config
from dino_dist.data.prepare.sources import walk_images
from dino_dist.data.reading.decode import BadSample, Pixels
from dino_dist.data.shards.image_names import is_image_name
from dino_dist.dist import World
from dino_dist.errors import UserError, reading
from dino_dist.eval.copy_detection import Whitening, copy_average_precision, copy_forward, originals_of
from dino_dist.eval.relevance_list import Box, read_relevance_list
from dino_dist.eval.retrieval import (
    JUNK,
    PUBLISHED_SCALES,
    Area,
    Relation,
    RetrievalScore,
    retrieval_forward,
    retrieval_scores,
    same_label,
)
from dino_dist.judging.evaluator import Tell, tell_nobody
from dino_dist.judging.judge import Judge
from dino_dist.judging.judged_network import together
from dino_dist.judging.listed_images import View, listed_features
from dino_dist.models.vit import MAX_PATCHES, VisionTransformer

STRONG, ORIGINAL = "strong", "original"
_PUBLISHED_PREFIX = 4


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """How images are looked at and scored; the defaults are those of the published figures."""

    size_px: int = 512
    """Larger images are shrunk until the long side has this many px; smaller ones stay as they are."""
    multiscale: bool = True
    """Look at each image at three scales."""
    crop_queries: bool = False
    """Cut the queries' boxes out, as the benchmark says; the published DINO figures look at the whole images."""
    area: Area = "trapezoids"

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise UserError(f"--size-px {self.size_px}: give at least 1")

    @property
    def scales(self) -> tuple[float, ...]:
        """Shares of an image's side."""
        return PUBLISHED_SCALES if self.multiscale else (1.0,)


def retrieval_by_list(
    network: VisionTransformer,
    list_file: Path,
    images: Path | None,
    config: Config,
    world: World,
    options: RetrievalOptions,
    tell: Tell = tell_nobody,
) -> dict[str, Any]:
    """Mean average precision of a list's queries in its gallery (see `relevance_list`); a collective.

    `images`: the folder that names are relative to; None: the list's own. A name may lack its `.jpg`.
    """
    found = world.first(lambda: read_relevance_list(list_file))
    root = list_file.parent if images is None else images
    files = world.first(lambda: {name: _file_of(root, name) for name in {*found.queries, *found.gallery}})
    forward = retrieval_forward(network, options.scales)
    boxes = found.boxes if options.crop_queries else (None,) * len(found.queries)
    patch = network.shape.patch_size
    least_px = int(np.ceil(patch / min(options.scales)))

    def features(names: Sequence[str], boxes: Sequence[Box | None], what: str) -> Tensor:
        view = _shrunk(options.size_px, least_px, MAX_PATCHES * patch**2, boxes)
        return listed_features(forward, [files[name] for name in names], view, config, world, what=what, tell=tell)

    gallery = features(found.gallery, (None,) * len(found.gallery), "gallery images")
    queries = features(found.queries, boxes, "queries")
    scores = _scores(queries, gallery, found.relation, found.protocols, options.area, world)
    return {"queries": len(queries), "gallery": len(gallery)} | _figures(scores, graded=found.graded)


def retrieval_by_label(judge: Judge, area: Area = "trapezoids") -> dict[str, Any]:
    """The same on labelled sets: each image of `data.eval_test` is to find those of its class in `data.eval_train`.

    Where both are the same set, an image does not find itself. Views as k-NN sees them. A collective.
    """
    forward = retrieval_forward(judge.backbone)
    gallery, queries = judge.features(forward, "train"), judge.features(forward, "test")
    relation = same_label(queries.labels_N, gallery.labels_N)
    if judge.evaluator.dataset_hash("train") == judge.evaluator.dataset_hash("test"):
        relation = _without_itself(relation, queries.ids_N, gallery.ids_N)
    scores = _scores(queries.features_ND, gallery.features_ND, relation, ("medium",), area, judge.world)
    return judge.about() | _figures(scores, graded=False)


@dataclass(frozen=True, kw_only=True)
class CopyOptions:
    """Where the images of copy detection lie and how they are looked at."""

    folder: Path
    """Holds `original/` and blocks of copies: `strong/`, and others such as `jpegqual/15/`."""
    whitening: Path | None = None
    """A folder of other images from which whitening is learned; None: none."""
    distractors: Path | None = None
    """A folder of images that join the originals; None: none."""
    size_px: int = 320
    """Side of the square that every image is resized to, whatever its own shape."""
    prefix: int = _PUBLISHED_PREFIX
    """A strong copy belongs to the original whose name begins with the same characters, this many."""

    def __post_init__(self) -> None:
        if self.size_px < 1 or self.prefix < 1:
            raise UserError(f"--size-px {self.size_px} and --prefix {self.prefix}: give at least 1")


def copy_detection(
    network: VisionTransformer, config: Config, world: World, options: CopyOptions, tell: Tell = tell_nobody
) -> dict[str, Any]:
    """Mean average precision of each block of copies, `map_strong` above all; a collective."""
    plan = world.first(lambda: _plan(options, network.shape.patch_size))  # what is wrong is said before any work
    forward, view = copy_forward(network), _square(options.size_px)

    def features(files: Sequence[Path], what: str) -> Tensor:
        return listed_features(forward, files, view, config, world, what=what, tell=tell)

    database = features(plan.originals, "originals")
    result: dict[str, Any] = {"originals": len(plan.originals)}
    if plan.distractors:
        database = torch.cat([database, features(plan.distractors, "distractors")])
        result["distractors"] = len(plan.distractors)
    whitening = None
    if plan.whitening:
        learned_from = features(plan.whitening, "images to learn whitening from")
        whitening = together(world, lambda: Whitening.learned(learned_from))
        database = whitening(database)
    for name, files in plan.copies.items():
        copies = features(files, f"copies in {name}")
        whitened = whitening(copies) if whitening else copies
        precision = together(world, partial(copy_average_precision, whitened, database, plan.wanted[name]))
        result |= {f"copies_{name}": len(files), f"map_{name}": float(precision.mean())}
    return result


@dataclass(frozen=True, kw_only=True)
class _CopyPlan:
    originals: list[Path]
    copies: dict[str, list[Path]]
    """By block, the strong ones first."""
    wanted: dict[str, list[list[int]]]
    """Of each copy in a block: numbers of its originals."""
    whitening: list[Path]
    distractors: list[Path]


def _plan(options: CopyOptions, patch: int) -> _CopyPlan:
    if options.size_px % patch:
        raise UserError(f"--size-px {options.size_px} must be a multiple of the patch size, {patch} px")
    if (options.size_px // patch) ** 2 > MAX_PATCHES:
        most_px = math.isqrt(MAX_PATCHES) * patch
        raise UserError(f"--size-px {options.size_px} is more than {MAX_PATCHES} patches: give at most {most_px}")
    with reading(str(options.folder)):
        return _plan_of_files(options)


def _plan_of_files(options: CopyOptions) -> _CopyPlan:
    apart = [folder for folder in (options.whitening, options.distractors) if folder is not None]
    copies = _blocks(options.folder, apart)
    originals = copies.pop(ORIGINAL)
    names = [file.name for file in originals]
    wanted = {
        block: originals_of([file.name for file in files], names, prefix=options.prefix if block == STRONG else 0)
        for block, files in copies.items()
    }
    return _CopyPlan(
        originals=originals,
        copies=copies,
        wanted=wanted,
        whitening=[] if options.whitening is None else _pictures(options.whitening),
        distractors=[] if options.distractors is None else _pictures(options.distractors),
    )


def _scores(
    queries: Tensor, gallery: Tensor, relation: Relation, protocols: Sequence[str], area: Area, world: World
) -> dict[str, RetrievalScore]:
    """What is wrong with features or relations is so on all ranks: said once."""
    return together(
        world, lambda: retrieval_scores(queries, gallery, relation, protocols=protocols, area=area, world=world)
    )


def _figures(scores: Mapping[str, RetrievalScore], *, graded: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for protocol, score in scores.items():
        suffix = f"_{protocol}" if graded else ""
        figures |= {f"map{suffix}": score.mean_average_precision, f"judged_queries{suffix}": score.num_queries}
        figures |= {f"precision_at_{k}{suffix}": share for k, share in score.precision_at.items()}
    return figures


def _without_itself(relation: Relation, query_ids_Q: Tensor, gallery_ids_N: Tensor) -> Relation:
    def without(queries: slice) -> Tensor:
        return relation(queries).masked_fill(query_ids_Q[queries].unsqueeze(1) == gallery_ids_N, JUNK)

    return without


def _shrunk(size_px: int, least_px: int, most_pixels: int, boxes: Sequence[Box | None]) -> View:
    """Images no larger than `size_px` a side, of their own shape, perhaps cut to a box first.

    `BadSample` for one whose short side is then below `least_px`, or that has more than `most_pixels`.
    """

    def view(number: int, pixels: Pixels) -> Pixels:
        picture = Image.fromarray(pixels)
        box = boxes[number]
        if box is not None:
            left, top, right, bottom = (round(edge) for edge in box)
            inside = left, top, min(right, picture.width), min(bottom, picture.height)
            if inside[0] >= inside[2] or inside[1] >= inside[3]:
                raise BadSample(f"{picture.width} x {picture.height} px, its box {box} is outside")
            picture = picture.crop(inside)
        picture.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
        if min(picture.size) < least_px:
            raise BadSample(
                f"{picture.width} x {picture.height} px to look at; the least is {least_px} px a side, less with "
                "a single scale or a larger --size-px"
            )
        if picture.width * picture.height > most_pixels:
            raise BadSample(
                f"{picture.width} x {picture.height} px to look at, more than {MAX_PATCHES} patches; give a smaller "
                "--size-px"
            )
        return np.array(picture)

    return view


def _square(size_px: int) -> View:
    def view(_: int, pixels: Pixels) -> Pixels:
        return np.array(Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BICUBIC))

    return view


def _file_of(root: Path, name: str) -> Path:
    for file in (root / name, root / f"{name}.jpg"):
        with suppress(OSError):  # such as a name that is too long for the file system
            if file.is_file():
                return file
    raise UserError(f"{root / name} does not exist, nor with .jpg: give the images' folder with --images")


def _blocks(folder: Path, apart: Sequence[Path]) -> dict[str, list[Path]]:
    """The originals, then every folder below that holds images, the strong copies first.

    Links to folders are followed. What lies in one of `apart` is no block: it has a part of its own.
    """
    if not (folder / ORIGINAL).is_dir():
        raise UserError(f"{folder} has no folder {ORIGINAL}: give the folder that holds {ORIGINAL}/ and {STRONG}/")
    folders = {file.parent for file in walk_images(folder) if file.is_file()}
    elsewhere = [part.resolve() for part in apart]
    names = [
        where.relative_to(folder).as_posix()
        for where in folders
        if where == folder / ORIGINAL or not any(where.resolve().is_relative_to(part) for part in elsewhere)
    ]
    order = sorted(names, key=lambda name: (name != ORIGINAL, name != STRONG, name))
    if len(order) < 2 or order[0] != ORIGINAL:
        raise UserError(f"{folder} needs images in {ORIGINAL}/ and in at least one other folder, such as {STRONG}/")
    return {name: _pictures(folder / name) for name in order}


def _pictures(folder: Path) -> list[Path]:
    """Images directly in a folder, by name."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one of images")
    files = sorted(file for file in folder.iterdir() if _is_picture(file))
    if not files:
        raise UserError(f"{folder} holds no images")
    return files


def _is_picture(file: Path) -> bool:
    return is_image_name(file.name) and file.is_file()
