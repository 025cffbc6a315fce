"""`dino-dist doctor --data SHARDS`: what one's own shards cost to read, decode and render, and the cores a GPU needs.

Costs are CPU times of one core, which a busy machine does not spoil; reads and the loader go by the wall clock.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dino_dist.config import AugmentSection, Config, DataSection, HeadSection, TrainSection
from dino_dist.data.order.training_set import open_training_set
from dino_dist.data.reading.stream import BadRecord
from dino_dist.data.shards.index import DatasetIndex
from dino_dist.errors import UserError
from dino_dist.inputs import store_options
from launch.data_costs import look_at, measure_loader, render_core_s
from launch.gpu_demand import GpuAssumption, GpuDemand, estimated_demands, given_demand

_BAD_LISTED = 10
_BUSY = 0.5
"""Load average a core, from which on somebody else's work is felt."""
_LARGE_SHORT_PX = 1024
"""Above this short side most of the decoded pixels are thrown away by crops of 224 px."""


@dataclass(frozen=True, kw_only=True)
class DataQuestions:
    """What is to be found out, and under which assumptions."""

    sample: int = 128
    """Images of an epoch that are read and decoded, drawn at random."""
    batch_size: int = 64
    """Images a rank takes a step."""
    num_threads: int | None = None
    """Decode threads of the loader, as data.num_workers; None: as many as there are cores."""
    loader_s: float = 2.0
    """For how long the loader is watched, at least."""
    augment: AugmentSection = field(default_factory=AugmentSection)
    gpu: GpuAssumption = field(default_factory=GpuAssumption)
    images_per_s: float | None = None
    """What one GPU trains on; None: estimated for a few models."""

    def __post_init__(self) -> None:
        for name, least in (("sample", 1), ("batch_size", 1), ("num_threads", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if self.images_per_s is not None:
            given_demand(self.images_per_s)  # refuses what is not above 0

    @property
    def demands(self) -> list[GpuDemand]:
        """What one GPU asks for."""
        if self.images_per_s is not None:
            return [given_demand(self.images_per_s)]
        return estimated_demands(self.augment, HeadSection(), self.gpu)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of some measured numbers."""

    mean: float
    median: float
    p95: float


@dataclass(frozen=True, kw_only=True)
class CoresPerGpu:
    """What keeps one GPU busy."""

    demand: GpuDemand
    decode_cores: int
    """Where the GPU renders its crops."""
    render_cores: int
    """Where the CPU does that too."""
    gpus_fed: float
    """How many such GPUs this machine's loader keeps busy, where they render."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was found; `dataclasses.asdict` of it is what --json prints."""

    spec: str
    num_shards: int
    num_samples: int
    """Of an epoch."""
    num_bytes: int
    """Of the shards."""
    looked_at: int
    """Images that were read and decoded."""
    num_bad: int
    bad: tuple[BadRecord, ...]
    """The first of those that cannot be used."""
    formats: dict[str, int]
    image_bytes: Spread
    height_px: Spread
    width_px: Spread
    read_ms: Spread
    """Wall time of an image's read, at random places; what the system has cached reads faster than a cold disk."""
    decode_ms: Spread
    """CPU time."""
    render_ms: float
    """CPU time of all views of an image."""
    batch_size: int
    batch_bytes: int
    """Decoded bytes of a rank's batch, which wait in memory and go to the GPU."""
    images_per_s_per_core: float
    """Reading and decoding."""
    num_threads: int
    loader_images_per_s: float
    """Of this machine's loader with this many decode threads, by the wall clock."""
    load_before: float
    """Processes that wanted a core in the minute before (the load average)."""
    gpu: GpuAssumption
    cores_per_gpu: tuple[CoresPerGpu, ...]
    advice: tuple[str, ...]


def examine_data(spec: str, questions: DataQuestions, *, fallback_dir: Path) -> DataReport:
    """Measure what `spec` names (as data.train); indexes go below `fallback_dir` where its folder is read-only.

    `UserError` for shards that cannot be opened, a question out of range, or no usable image among those looked at.
    """
    config = Config(
        data=DataSection(train=spec), augment=questions.augment, train=TrainSection(batch_size=questions.batch_size)
    )
    load_before = os.getloadavg()[0]
    training = open_training_set(spec, fallback_dir=fallback_dir, store=store_options(config.data))
    dataset = training.dataset
    looked = look_at(training, config, count=questions.sample)
    if not looked.pixels:
        raise UserError(
            f"{spec}: none of the {len(looked.bad)} images looked at can be used (first: {looked.bad[0].reason}); "
            "`dino-dist shards check` lists all"
        )
    heights_px, widths_px = np.array(looked.sizes_px, dtype=np.int64).T
    decoded_bytes = _spread((3 * heights_px * widths_px).tolist())
    render_s = render_core_s(looked.pixels, config)
    core_s = float(np.mean(looked.core_s))
    num_threads = questions.num_threads
    if num_threads is None:
        num_threads = len(os.sched_getaffinity(0))
    rate = measure_loader(training, config, num_threads, image_bytes=decoded_bytes.p95, least_s=questions.loader_s)
    return DataReport(
        spec=spec,
        num_shards=len(dataset.shards),
        num_samples=training.num_samples,
        num_bytes=sum(shard.row.bytes for shard in dataset.shards),
        looked_at=len(looked.sizes_px) + len(looked.bad),
        num_bad=len(looked.bad),
        bad=tuple(looked.bad[:_BAD_LISTED]),
        formats=dict(looked.formats.most_common()),
        image_bytes=_spread(looked.image_bytes),
        height_px=_spread(heights_px.tolist()),
        width_px=_spread(widths_px.tolist()),
        read_ms=_spread([1000 * value for value in looked.read_s]),
        decode_ms=_spread([1000 * value for value in looked.decode_s]),
        render_ms=1000 * render_s,
        batch_size=questions.batch_size,
        batch_bytes=round(questions.batch_size * decoded_bytes.mean),
        images_per_s_per_core=1 / core_s,
        num_threads=num_threads,
        loader_images_per_s=rate,
        load_before=load_before,
        gpu=questions.gpu,
        cores_per_gpu=tuple(
            cores_for(demand, decode_core_s=core_s, render_core_s=render_s, loader_images_per_s=rate)
            for demand in questions.demands
        ),
        advice=tuple(
            _advice(
                median_short_px=float(np.median(np.minimum(heights_px, widths_px))),
                num_bad=len(looked.bad),
                request_ms=1000 * float(np.median(looked.read_s)) if _is_remote(dataset) else 0.0,
                is_busy=load_before > _BUSY * len(os.sched_getaffinity(0)),
                buffer_holds=config.data.buffer_mib * 2**20 / (questions.batch_size * decoded_bytes.p95),
                config=config,
            )
        ),
    )


def cores_for(
    demand: GpuDemand, *, decode_core_s: float, render_core_s: float, loader_images_per_s: float
) -> CoresPerGpu:
    """Whole cores for the images a second that are asked for, each of which takes so many core-seconds."""
    return CoresPerGpu(
        demand=demand,
        decode_cores=math.ceil(demand.images_per_s * decode_core_s),
        render_cores=math.ceil(demand.images_per_s * (decode_core_s + render_core_s)),
        gpus_fed=loader_images_per_s / demand.images_per_s,
    )


def _is_remote(dataset: DatasetIndex) -> bool:
    return any(shard.is_remote for shard in dataset.shards)


def _advice(
    *, median_short_px: float, num_bad: int, request_ms: float, is_busy: bool, buffer_holds: float, config: Config
) -> list[str]:
    """`request_ms`: of a read from a store, else 0; `buffer_holds`: batches of large images that the buffer takes."""
    advice = []
    if is_busy:
        advice.append("this machine was busy with other work: alone, its loader gives more images a second")
    if request_ms > 0:
        advice.append(
            f"each image is a request to the store ({request_ms:.0f} ms): set data.cache_dir to a folder on a disk of "
            "the node to fetch whole shards ahead"
        )
    if median_short_px > _LARGE_SHORT_PX:
        advice.append(
            f"images are large (median short side {median_short_px:.0f} px): shards made smaller once "
            "(`dino-dist shards build --resize-short-px 512`) decode several times faster in every epoch"
        )
    if buffer_holds < 2:
        advice.append(
            f"data.buffer_mib={config.data.buffer_mib} holds {buffer_holds:.1f} batches of {config.train.batch_size} "
            f"images: two at least let decoding go on while a batch is used; raise it or train.accumulate"
        )
    if num_bad:
        advice.append("some images cannot be used: `dino-dist shards check` lists all of them")
    return advice


def _spread(values: Sequence[float]) -> Spread:
    return Spread(mean=float(np.mean(values)), median=float(np.median(values)), p95=float(np.percentile(values, 95)))


def table(report: DataReport) -> None:
    """Print the report for a person."""
    console, facts = Console(markup=False, highlight=False), Table("", "", title=report.spec, show_header=False)
    for name, value in _facts(report):
        facts.add_row(name, value)
    console.print(facts)
    rows = Table()
    rows.add_column("one GPU trains", no_wrap=True)
    for heading in ("images/s", "basis", "decode cores", "with CPU crops", "GPUs fed here"):
        rows.add_column(heading, justify="right")
    for row in report.cores_per_gpu:
        rate = f"{row.demand.images_per_s:.0f}"
        cores = (str(row.decode_cores), str(row.render_cores))
        rows.add_row(row.demand.model, rate, row.demand.basis, *cores, f"{row.gpus_fed:.2g}")
    console.print(rows)
    console.print("Cores are for the data of one GPU alone; its training process takes one more.")
    if any(row.demand.basis == "estimate" for row in report.cores_per_gpu):
        console.print(
            f"Estimates: images/s = {report.gpu.peak_tflops:g} TFLOP/s x {report.gpu.utilization:.0%} / operations an "
            "image; --images-per-s takes what you have measured."
        )
    for record in report.bad:
        console.print(f"bad: {record.shard} {record.key}: {record.reason}")
    for line in report.advice:
        console.print(f"advice: {line}")


def _facts(report: DataReport) -> list[tuple[str, str]]:
    def both(spread: Spread, unit: str, digits: int = 0) -> str:
        return f"{spread.median:.{digits}f} {unit} (95 %: {spread.p95:.{digits}f})"

    kilobytes = Spread(**{name: value / 1000 for name, value in vars(report.image_bytes).items()})
    size = f"{report.num_bytes / 1e9:.1f} GB" if report.num_bytes >= 1e9 else f"{report.num_bytes / 1e6:.1f} MB"
    formats = ", ".join(f"{name} {count}" for name, count in report.formats.items())
    return [
        ("samples of an epoch", f"{report.num_samples} in {report.num_shards} shards, {size}"),
        ("looked at", f"{report.looked_at} at random: {formats}; {report.num_bad} bad"),
        ("file", both(kilobytes, "KB", 1)),
        ("height, width", f"{both(report.height_px, 'px')}, {both(report.width_px, 'px')}"),
        ("read an image", both(report.read_ms, "ms", 2)),
        ("decode an image", f"{both(report.decode_ms, 'ms', 2)} of one core"),
        ("render its crops on the CPU", f"{report.render_ms:.1f} ms of one core"),
        ("decoded batch", f"{report.batch_bytes / 2**20:.1f} MiB for {report.batch_size} images"),
        ("one core decodes", f"{report.images_per_s_per_core:.0f} images/s"),
        ("this machine decodes", f"{report.loader_images_per_s:.0f} images/s with {report.num_threads} threads"),
    ]
