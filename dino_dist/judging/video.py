"""Judging a network by video object segmentation: DAVIS, or one's own frames with a first mask; masks and J&F."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_dist.config import Config
from dino_dist.data.reading.decode import BadSample
from dino_dist.data.reading.index_mask import VOID, IndexMask, read_index_mask, write_index_mask
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.region_and_boundary import boundary_similarity, over_time, region_similarity
from dino_dist.eval.video_segmentation import (
    PropagationRules,
    frame_size_px,
    label_map,
    one_hot_labels,
    patch_features,
    segment,
)
from dino_dist.judging.evaluator import Tell, tell_nobody
from dino_dist.judging.judged_network import together
from dino_dist.judging.listed_images import normalised, read_pixels
from dino_dist.judging.video_files import Video
from dino_dist.models.vit import VisionTransformer

_MAX_OBJECTS = 100


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """How videos are looked at, and where found masks go."""

    short_px: int = 480
    """Short side of the frames that the network sees."""
    rules: PropagationRules = field(default_factory=PropagationRules)
    out: Path | None = None
    """A folder for the found masks, OUT/VIDEO/FRAME.png; it must not exist or be empty. None: none are written."""


@dataclass(frozen=True, kw_only=True)
class ObjectScore:
    """Of one object in one video, over its judged frames."""

    video: str
    number: int
    region: dict[str, float]
    boundary: dict[str, float]


def segment_videos(
    network: VisionTransformer,
    videos: Sequence[Video],
    config: Config,
    world: World,
    options: VideoOptions,
    tell: Tell = tell_nobody,
) -> dict[str, Any]:
    """Segment each video from its first mask, ranks taking turns; J&F of the frames that have masks; a collective.

    As the benchmark counts: the first and last frame are not judged, each object is the mean over its frames, the
    figures are means over all objects. Keys: `jf_mean`, `j_mean`, `j_recall`, `j_decay`, `f_...`, and `objects`.
    """
    if options.out is not None:
        out = options.out
        world.first(lambda: _prepare(out))
    mine = videos[world.rank :: world.size]
    share, total = (sum(len(video.frames) for video in some) for some in (mine, videos))
    scores: list[ObjectScore] = []

    def segment_share() -> None:
        done = 0
        for video in mine:
            tell("frames", done * total // share, total)
            scores.extend(_segment_one(network, video, config, world.device, options))
            done += len(video.frames)

    together(world, segment_share)
    tell("frames", total, total)
    objects = sorted((score for part in world.gather(scores) for score in part), key=lambda s: (s.video, s.number))
    counts = {
        "videos": len(videos),
        "frames": total,
        "judged_frames": sum(len(video.judged) for video in videos),
    }
    return counts | _figures(objects)


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: give an empty or new folder with --out")
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): give another --out") from None


def _segment_one(
    network: VisionTransformer, video: Video, config: Config, device: torch.device, options: VideoOptions
) -> list[ObjectScore]:
    first = _mask(video.masks[0], None, config)
    numbers = _object_numbers(first, video.masks[0])
    judged: dict[int, list[tuple[float, float]]] = {}
    for number, mask in enumerate(found_masks(network, video, first, config, device, options)):
        if options.out is not None:
            _write(options.out / video.name, f"{video.frames[number].stem}.png", mask)
        if number in video.judged:
            true = _mask(video.masks[number], mask.shape, config)
            for label, pair in compare(mask, true, numbers, device).items():
                judged.setdefault(label, []).append(pair)
    return [
        ObjectScore(
            video=video.name,
            number=label,
            region=asdict(over_time([region for region, _ in pairs])),
            boundary=asdict(over_time([edge for _, edge in pairs])),
        )
        for label, pairs in sorted(judged.items())
    ]


def found_masks(
    network: VisionTransformer,
    video: Video,
    first: IndexMask,
    config: Config,
    device: torch.device,
    options: VideoOptions,
) -> Iterator[IndexMask]:
    """A mask for each frame, at its own size: `first`, which is the first one's, then those found, with its numbers."""
    yield first
    numbers = np.append(np.uint8(0), _object_numbers(first, video.masks[0]))
    patch = network.shape.patch_size
    size_px = frame_size_px(*first.shape, short_px=options.short_px, patch_size=patch)
    grid = size_px[0] // patch, size_px[1] // patch
    # Labels are the objects' places among their numbers; what belongs to no one is background.
    places = np.searchsorted(numbers, np.where(first == VOID, 0, first)).astype(np.uint8)
    labels = one_hot_labels(torch.from_numpy(_nearest(places, grid)).to(device), len(numbers))
    features = (patch_features(network, _frame(file, first.shape, size_px, config, device)) for file in video.frames)
    for labels_PC in segment(features, labels, options.rules):
        mask: IndexMask = label_map(labels_PC, grid, patch).cpu().numpy()
        yield numbers[_nearest(mask, first.shape)]


def compare(
    found: IndexMask, true: IndexMask, numbers: IndexMask, device: torch.device
) -> Mapping[int, tuple[float, float]]:
    """J and F of each of these objects in one frame; void pixels of `true` count nowhere."""
    true_hw = torch.from_numpy(true).to(device)
    labels = torch.from_numpy(numbers).to(device).view(-1, 1, 1)
    found_Mhw, true_Mhw = torch.from_numpy(found).to(device) == labels, true_hw == labels
    regions = region_similarity(found_Mhw, true_Mhw, true_hw == VOID).tolist()
    edges = boundary_similarity(found_Mhw, true_Mhw, true_hw == VOID).tolist()
    return dict(zip(numbers.tolist(), zip(regions, edges, strict=True), strict=True))


def _nearest(mask: IndexMask, shape: tuple[int, ...]) -> IndexMask:
    return np.array(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


def _write(folder: Path, name: str, mask: IndexMask) -> None:
    try:
        folder.mkdir(exist_ok=True)
        write_index_mask(folder / name, mask)
    except OSError as error:
        raise UserError(f"{folder / name} cannot be written ({error.strerror}): give another --out") from None


def _object_numbers(first: IndexMask, file: Path) -> IndexMask:
    """Which objects the first mask shows, in ascending order."""
    numbers = np.unique(first[(first != VOID) & (first != 0)])
    if not 1 <= len(numbers) <= _MAX_OBJECTS:
        raise UserError(f"{file} shows {len(numbers)} objects: a first mask needs 1 to {_MAX_OBJECTS}")
    return numbers


def _mask(file: Path, shape: tuple[int, ...] | None, config: Config) -> IndexMask:
    mask = read_index_mask(file, max_pixels=int(config.data.max_image_mpx * 1e6))
    if shape is not None and mask.shape != shape:
        raise UserError(
            f"{file} has {mask.shape[1]} x {mask.shape[0]} px, the first mask of its video {shape[1]} x {shape[0]}: "
            "give masks of one size"
        )
    return mask


def _frame(
    file: Path, shape: tuple[int, ...], size_px: tuple[int, int], config: Config, device: torch.device
) -> Tensor:
    """[3, h, w], normalised. Bilinear without antialiasing, rounded to whole levels: as the published code resizes."""
    try:
        pixels = read_pixels(file, config.data)
    except BadSample as error:
        raise UserError(f"{file} cannot be used ({error}): mend it") from None
    if pixels.shape[:2] != shape:
        raise UserError(
            f"{file} has {pixels.shape[1]} x {pixels.shape[0]} px, the first mask {shape[1]} x {shape[0]}: give frames "
            "and masks of one size"
        )
    levels = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float()
    resized = F.interpolate(levels, size=size_px, mode="bilinear", align_corners=False).round().byte()
    return normalised(resized.permute(0, 2, 3, 1).numpy(), config, device)[0]


def _figures(objects: Sequence[ObjectScore]) -> dict[str, Any]:
    if not objects:
        return {"objects": []}
    figures: dict[str, Any] = {}
    for letter, part in (("j", "region"), ("f", "boundary")):
        for measure in ("mean", "recall", "decay"):
            figures[f"{letter}_{measure}"] = float(np.mean([getattr(score, part)[measure] for score in objects]))
    mean = (figures["j_mean"] + figures["f_mean"]) / 2
    return {"jf_mean": mean} | figures | {"objects": [asdict(score) for score in objects]}
