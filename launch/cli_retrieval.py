"""`dino-dist eval retrieval|copy|video`: what a network finds again, in other images and in the frames of a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_dist.errors import UserError
from launch.judging import Checkpoint, Network, NumRanks, judging, start_ranks
from launch.results import AsJson, Overrides, print_result

if TYPE_CHECKING:
    from dino_dist.eval.retrieval import Area
    from dino_dist.judging.evaluator import Tell
    from dino_dist.judging.judged_network import JudgedNetwork

retrieval_app = typer.Typer()


@retrieval_app.command("retrieval")
def eval_retrieval(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    list_file: Annotated[
        Path | None,
        typer.Option("--list", help="Queries and gallery, .json or .tsv; default: data.eval_test in data.eval_train."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the list's images; default: the list's own.")] = None,
    size_px: Annotated[
        int | None, typer.Option(help="Long side to which larger images of a list are shrunk; default: 512.", min=1)
    ] = None,
    single_scale: Annotated[
        bool, typer.Option("--single-scale", help="Look at each image of a list once; default: at three sizes.")
    ] = False,
    crop_queries: Annotated[
        bool, typer.Option("--crop-queries", help="Cut out the boxes of a .json list's queries.")
    ] = False,
    steps: Annotated[
        bool, typer.Option("--steps", help="Average precision by steps; default: by trapezoids, as published.")
    ] = False,
    network: Network = "teacher",
    nproc: NumRanks = 1,
    as_json: AsJson = False,
) -> None:
    """Mean average precision: by the revised Oxford and Paris protocols, of one's own list, or of labelled images."""
    if list_file is None and (images is not None or size_px is not None or single_scale or crop_queries):
        raise UserError("--images, --size-px, --single-scale and --crop-queries are about a list: give it with --list")

    def judge(judged: JudgedNetwork, tell: Tell) -> dict[str, Any]:
        from dino_dist.judging.judge import labelled_judge
        from dino_dist.judging.retrieval import RetrievalOptions, retrieval_by_label, retrieval_by_list

        area: Area = "steps" if steps else "trapezoids"
        if list_file is None:
            return retrieval_by_label(labelled_judge(judged, tell), area)
        options = RetrievalOptions(multiscale=not single_scale, crop_queries=crop_queries, area=area)
        if size_px is not None:
            options = replace(options, size_px=size_px)
        return retrieval_by_list(judged.backbone, list_file, images, judged.config, judged.world, options, tell)

    options = {
        "--list": list_file,
        "--images": images,
        "--size-px": size_px,
        "--single-scale": single_scale,
        "--crop-queries": crop_queries,
        "--steps": steps,
    }
    _judge(["retrieval"], options, judge, checkpoint, overrides, network, nproc, as_json)


@retrieval_app.command("copy")
def eval_copy(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(help="Laid out as Copydays: original/, strong/, and other blocks.")],
    overrides: Overrides = None,
    whitening: Annotated[Path | None, typer.Option(help="Folder of other images to learn whitening from.")] = None,
    distractors: Annotated[Path | None, typer.Option(help="Folder of images to hide the originals among.")] = None,
    size_px: Annotated[int, typer.Option(help="Side of the square that images are resized to.", min=1)] = 320,
    prefix: Annotated[int, typer.Option(help="Characters that name a strong copy's original.", min=1)] = 4,
    network: Network = "teacher",
    nproc: NumRanks = 1,
    as_json: AsJson = False,
) -> None:
    """Copy detection: mean average precision with which copies find their originals (Copydays)."""

    def judge(judged: JudgedNetwork, tell: Tell) -> dict[str, Any]:
        from dino_dist.judging.retrieval import CopyOptions, copy_detection

        options = CopyOptions(
            folder=folder, whitening=whitening, distractors=distractors, size_px=size_px, prefix=prefix
        )
        return copy_detection(judged.backbone, judged.config, judged.world, options, tell)

    options = {"--whitening": whitening, "--distractors": distractors, "--size-px": size_px, "--prefix": prefix}
    _judge(["copy", str(folder)], options, judge, checkpoint, overrides, network, nproc, as_json)


@retrieval_app.command("video")
def eval_video(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Argument(help="A DAVIS 2017 folder, or a folder with the frames of one video.")],
    overrides: Overrides = None,
    masks: Annotated[
        Path | None, typer.Option(help="Of one video: the first frame's mask, or a folder of masks named as frames.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the masks that are found.")] = None,
    split: Annotated[str, typer.Option(help="Of DAVIS.")] = "val",
    video: Annotated[list[str] | None, typer.Option(help="Of DAVIS: this video alone; may be repeated.")] = None,
    size_px: Annotated[int, typer.Option(help="Short side of the frames.", min=1)] = 480,
    last_frames: Annotated[int, typer.Option(help="Frames to copy labels from, beside the first.", min=0)] = 7,
    radius: Annotated[int, typer.Option(help="Farthest patch to copy from, in patches; 0: any.", min=0)] = 12,
    top_k: Annotated[int, typer.Option(help="Patches that each patch copies from.", min=1)] = 5,
    network: Network = "teacher",
    nproc: NumRanks = 1,
    as_json: AsJson = False,
) -> None:
    """Video object segmentation by label propagation from a first mask (DAVIS 2017), judged by J and F."""

    def judge(judged: JudgedNetwork, tell: Tell) -> dict[str, Any]:
        from dino_dist.eval.video_segmentation import PropagationRules
        from dino_dist.judging.video import VideoOptions, segment_videos
        from dino_dist.judging.video_files import chosen_videos

        rules = PropagationRules(last_frames=last_frames, radius=radius, top_k=top_k)
        options = VideoOptions(short_px=size_px, rules=rules, out=out)
        videos = judged.world.first(lambda: chosen_videos(data, masks, split=split, names=video or []))
        return segment_videos(judged.backbone, videos, judged.config, judged.world, options, tell)

    options = {
        "--masks": masks,
        "--out": out,
        "--split": split,
        "--video": video,
        "--size-px": size_px,
        "--last-frames": last_frames,
        "--radius": radius,
        "--top-k": top_k,
    }
    _judge(["video", str(data)], options, judge, checkpoint, overrides, network, nproc, as_json)


def _judge(
    command: Sequence[str],
    options: Mapping[str, object],
    judge: Callable[[JudgedNetwork, Tell], dict[str, Any]],
    checkpoint: Path,
    overrides: list[str] | None,
    network: str,
    nproc: int,
    as_json: bool,
) -> None:
    """Be one of the ranks, after starting them if that is asked for; rank 0 prints what all have found."""
    settings = [*(overrides or []), *_as_arguments({"--network": network, "--json": as_json} | dict(options))]
    start_ranks(["eval", command[0], str(checkpoint), *command[1:], *settings], nproc)
    with judging(checkpoint, overrides, network) as (judged, tell):
        result = judged.described() | judge(judged, tell)
    if judged.world.is_first:
        print_result(result if as_json else _for_people(result), as_json)


def _for_people(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("objects", "notes") and value is not None}


def _as_arguments(options: Mapping[str, object]) -> list[str]:
    """Options as a shell would give them: what is None or false is left out, a list is repeated."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is True:
            arguments.append(name)
        elif isinstance(value, list):
            arguments += [text for one in value for text in (name, str(one))]
        elif value is not None and value is not False:
            arguments += [name, str(value)]
    return arguments
