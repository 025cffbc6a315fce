"""Multi-crop pipelines side by side: images a second, CPU time an image, memory and operators, in one run.

    python tools/bench_data.py [--shards SPEC] [--cores N] [--preset dino_v1] [--rounds 5] [--json]

All contenders read the same files, make the same views (sizes, scales and probabilities of the preset) and run on the
same cores, each in a process of its own. They take turns, round after round, so that whatever else the machine does
falls on all of them; figures are medians over the rounds, ratios are taken within a round. Without --shards it cuts
photographs of 500 x 375 px (see `photograph_shards.py`).
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_data_baselines import Baseline, FilePlace, open_kornia, open_published_pil, open_torchvision_v2
from bench_data_ours import Ours, open_decode_only, open_render
from bench_data_process import Contender, Crashed, NotMeasured, RoundOptions, Stream
from bench_data_report import (
    DECODE_ONLY,
    KORNIA,
    PUBLISHED,
    RENDER_CPU,
    RENDER_CUDA,
    TITLES,
    TORCHVISION,
    Result,
    ratios,
    show,
    summary,
)
from photograph_shards import PhotographOptions, build_photograph_shards
from PIL import Image

from dino_dist.augment_presets import AUGMENT_PRESETS
from dino_dist.config import AugmentSection, Config, DataSection, RunSection, TrainSection
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.errors import UserError
from dino_dist.views import view_recipes

_SIZED = 64
"""Files whose headers tell how large images are."""


def run_rounds(contenders: dict[str, Contender], options: RoundOptions, num_rounds: int) -> dict[str, Result]:
    """Count operators once, then take turns; a contender that cannot run is left out of the rounds that follow."""
    results: dict[str, Result] = {}
    for name, contender in contenders.items():
        try:
            results[name] = Result(operators_per_batch=contender.operators())
        except NotMeasured as reason:
            results[name] = Result(not_measured=str(reason), crashed=isinstance(reason, Crashed))
    for _ in range(num_rounds):
        for name, contender in contenders.items():
            result = results[name]
            if result.not_measured is not None:
                continue
            try:
                results[name] = replace(result, rounds=(*result.rounds, contender.round(options)))
            except NotMeasured as reason:
                results[name] = Result(not_measured=str(reason), crashed=isinstance(reason, Crashed))
    return results


def bench_config(shards: str, preset: str, batch_size: int, index_dir: Path, **augment: Any) -> Config:
    """A run on one rank with the preset; `augment` replaces its values. `UserError` for an unknown preset."""
    if preset not in AUGMENT_PRESETS:
        raise UserError(f"--preset {preset} must be one of {', '.join(AUGMENT_PRESETS)}")
    if batch_size < 1:
        raise UserError(f"--batch {batch_size} must be at least 1")
    values = {**AUGMENT_PRESETS[preset], "preset": preset, **augment}
    return Config(
        run=RunSection(dir=str(index_dir)),
        data=DataSection(train=shards),
        augment=AugmentSection(**values),
        train=TrainSection(batch_size=batch_size),
    )


def contenders_of(config: Config, dataset: DatasetIndex) -> dict[str, tuple[Callable[..., Stream], tuple[Any, ...]]]:
    """By name, what opens each contender's stream in its process, and with what."""
    rules = RenderRules(mean=config.data.mean, std=config.data.std, blur=config.augment.blur_filter)
    baseline = Baseline(
        places=file_places(dataset),
        recipes=tuple(view_recipes(config.augment)),
        rules=rules,
        batch_size=config.train.batch_size,
    )
    ours = Ours(config=config, index_dir=Path(config.run.dir))
    return {
        PUBLISHED: (open_published_pil, (baseline,)),
        TORCHVISION: (open_torchvision_v2, (baseline,)),
        KORNIA: (open_kornia, (baseline,)),
        DECODE_ONLY: (open_decode_only, (ours,)),
        RENDER_CPU: (open_render, (ours, "cpu")),
        RENDER_CUDA: (open_render, (ours, "cuda")),
    }


def file_places(dataset: DatasetIndex) -> tuple[FilePlace, ...]:
    """Where each image of the data set lies; `UserError` for shards behind a URL, which only some contenders read."""
    remote = next((shard.location for shard in dataset.shards if shard.is_remote), None)
    if remote is not None:
        raise UserError(f"{remote}: the contenders read local shards alone; copy some here")
    return tuple(
        FilePlace(path=shard.location, offset=int(record["offset"]), size=int(record["size"]))
        for number, shard in enumerate(dataset.shards)
        for record in dataset.records(number)
    )


def with_small_buffer(config: Config, places: Sequence[FilePlace]) -> Config:
    """With a loader that holds four batches, so that it is full before the first mark, as DataLoader's queue is."""
    largest_bytes = 0
    for place in places[:_SIZED]:
        with Image.open(io.BytesIO(place.read())) as image:
            largest_bytes = max(largest_bytes, 3 * image.width * image.height)
    buffer_mib = 1 + 4 * config.train.batch_size * largest_bytes // 2**20
    return replace(config, data=replace(config.data, buffer_mib=buffer_mib))


def first_cores(count: int) -> list[int]:
    """`count` of the cores that this process may use; `UserError` if there are fewer."""
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(available):
        raise UserError(f"--cores {count} must be 1 to {len(available)}, the cores that this process may use")
    return available[:count]


def bench(
    config: Config, *, only: Sequence[str] = (), cores: int = 1, num_rounds: int = 5, min_s: float = 4.0
) -> dict[str, Any]:
    """Measure contenders (all, or `only` those named) on data.train; the document that --json prints.

    `UserError` for shards that cannot be read, too many cores, or a name that is no contender's.
    """
    pinned = first_cores(cores)
    unknown = set(only) - TITLES.keys()
    if unknown:
        raise UserError(f"--only {sorted(unknown)[0]} must be one of {', '.join(TITLES)}")
    dataset = open_dataset(config.data.train, fallback_dir=Path(config.run.dir))
    places, before = file_places(dataset), machine()
    config = with_small_buffer(config, places)
    options = RoundOptions(num_workers=cores, warmup_batches=cores + 1, min_s=min_s)
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Contender(opener, arguments, pinned))
            for name, (opener, arguments) in contenders_of(config, dataset).items()
            if name in (only or TITLES)
        }
        results = run_rounds(contenders, options, num_rounds)
    crops = 2 + config.augment.local_crops
    return {
        "settings": {
            "shards": config.data.train,
            "images": len(places),
            "mean_bytes_per_image": statistics.mean(place.size for place in places),
            "cores": cores,
            "batch_size": config.train.batch_size,
            "preset": config.augment.preset,
            "crops_per_image": crops,
            "rounds": num_rounds,
        },
        "machine": before,
        "contenders": {
            name: summary(result, None if name == DECODE_ONLY else crops) for name, result in results.items()
        },
        "ratios": ratios(results),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cpu": next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown"),
        "cpus": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "pillow")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpuinfo() -> Sequence[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(
    shards: Annotated[str | None, typer.Option(help="As data.train; default: photographs, cut now.")] = None,
    images: Annotated[int, typer.Option(help="Photographs to cut.")] = 256,
    quality: Annotated[int, typer.Option(help="Of the photographs' JPEG files.")] = 90,
    preset: Annotated[str, typer.Option(help="augment.preset.")] = "dino_v1",
    batch: Annotated[int, typer.Option(help="Images a batch.")] = 32,
    cores: Annotated[int, typer.Option(help="For each contender; so many workers too.")] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each contender.", min=1)] = 5,
    min_s: Annotated[float, typer.Option("--round-s", help="Least length of a round, after warming up.")] = 4.0,
    only: Annotated[list[str] | None, typer.Option(help="A contender; may be repeated. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Measure multi-crop pipelines side by side."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            if shards is None:
                build_photograph_shards(Path(folder) / "photographs", PhotographOptions(images=images, quality=quality))
            where = shards or str(Path(folder) / "photographs")
            config = bench_config(where, preset, batch, Path(folder))
            document = bench(config, only=only or (), cores=cores, num_rounds=rounds, min_s=min_s)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    if as_json:
        print(json.dumps(document))
    else:
        show(document)
    if any(row.get("crashed") for row in document["contenders"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
