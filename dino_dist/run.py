"""The parts of a run on one rank: data, networks, monitor, checkpointer, built from the config at step 0."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field

import torch

from dino_dist.augment_presets import AUGMENT_PRESETS
from dino_dist.build import attention_backend, build_step, compute_dtype, vit_shape
from dino_dist.checkpoint import Checkpointer
from dino_dist.config import AugmentSection, Config
from dino_dist.data.loading.batch import Batch
from dino_dist.data.loading.loader import make_loader
from dino_dist.data.loading.loader_limits import limits_line, measure_images, usable_cores
from dino_dist.data.order.order import SampleOrder
from dino_dist.data.order.training_set import TrainingSet
from dino_dist.dist import World
from dino_dist.durations import Duration
from dino_dist.init_from import check_source
from dino_dist.inputs import sample_reader, training_set
from dino_dist.judging.evaluator import Evaluator
from dino_dist.liveness import Pulse
from dino_dist.monitor import Monitor
from dino_dist.preemption import AgreedWord, StopSignals
from dino_dist.run_session import RunSession, said_by_rank_zero
from dino_dist.schedules import Schedules, build_schedules
from dino_dist.step import DinoStep
from dino_dist.throughput import ThroughputMeter
from dino_dist.views import ViewDescription, ViewRenderer, view_recipes


@dataclass(frozen=True, kw_only=True)
class Every:
    """The steps at which something is due, from the config's durations; None: never."""

    log: int
    pictures: int
    save: int
    keep: int | None
    knn: int | None
    drift: int
    profile: int | None


@dataclass(kw_only=True)
class Run:
    """The parts of a run on this rank, and how far it is."""

    introduction: list[str]
    """Lines for the person at the terminal, said once nothing stands in the run's way."""
    computed_with: dict[str, str]
    """What `auto` settings came to here: device, precision, attention."""
    config: Config
    world: World
    session: RunSession
    training_set: TrainingSet
    order: SampleOrder
    schedules: Schedules
    every: Every
    step: DinoStep
    render: ViewRenderer
    checkpointer: Checkpointer
    monitor: Monitor
    evaluator: Evaluator | None
    signals: StopSignals
    pulse: Pulse
    """What the watchdog sees of this rank's main thread."""
    word: AgreedWord = field(default_factory=AgreedWord)
    meter: ThroughputMeter = field(default_factory=ThroughputMeter)
    steps_done: int = 0
    evaluated_at: int = 0
    """Steps done at the last k-NN evaluation."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    bad_samples: int = 0
    drift_checked: int = 0

    @property
    def under_way(self) -> bool:
        """Whether this start has done a step: its first one compiles, and warms what is cached."""
        return self.steps_done > self.session.first_step


def build_run(config: Config, world: World, session: RunSession, signals: StopSignals, pulse: Pulse) -> Run:
    """Open the data and build the parts of a run at step 0."""
    index_dir = session.folder.path / "index"

    def poll() -> None:
        pulse.tick()  # indexing reads every image once
        signals.raise_if_asked()

    world.first(lambda: check_source(config, session.folder))
    samples = world.first(lambda: training_set(config.data, index_dir, poll))
    schedules = build_schedules(config, samples.num_samples)
    every = resolve_every(config, samples.num_samples)
    with said_by_rank_zero(world):
        backend = attention_backend(config, world.device)
    dtype = compute_dtype(config, world.device)
    introduction = (
        f"{world.size} ranks on {world.device.type}, {config.parallel.strategy}, {dtype}, attention {backend.name} "
        f"({backend.reason}); crops {described_crops(config.augment)}; {samples.num_samples} images, "
        f"{schedules.total_steps} steps of {config.train.batch_size}"
    )

    def stop_word() -> int:
        pulse.tick()  # an evaluation takes long, and shows by this that it goes on
        return signals.word

    evaluator = None
    if config.data.eval_train is not None:
        evaluator = Evaluator(config, world, index_dir, stop_word)
    run = Run(
        introduction=[introduction, *samples.shares(), *schedules.notes],
        computed_with={"device": world.device.type, "precision": str(dtype), "attention": backend.name},
        config=config,
        world=world,
        session=session,
        training_set=samples,
        order=samples.order(seed=config.run.seed, shards_per_block=config.data.shards_per_block),
        schedules=schedules,
        every=every,
        step=build_step(config, world, backend.name),
        render=ViewRenderer(config, world.device, torch.float64 if dtype == torch.float64 else torch.float32),
        checkpointer=Checkpointer(
            session.folder,
            session.attempt,
            world,
            keep=config.checkpoint.keep,
            keep_every_steps=every.keep,
            async_save=config.checkpoint.async_save,
        ),
        evaluator=evaluator,
        signals=signals,
        pulse=pulse,
        monitor=Monitor(config, world, session, schedules, every_pictures=every.pictures),
    )
    return run


def described_crops(augment: AugmentSection) -> str:
    """The preset's name, and which of its values were replaced."""
    preset = AUGMENT_PRESETS[augment.preset]
    changed = [name for name, value in preset.items() if getattr(augment, name) != value]
    return augment.preset + (f" but {', '.join(changed)}" if changed else "")


def resolve_every(config: Config, dataset_size: int) -> Every:
    """All `every` durations in steps, at least one each."""

    def steps(text: str) -> int:
        return max(Duration.parse(text).steps(batch_size=config.train.batch_size, dataset_size=dataset_size), 1)

    def optional(text: str | None) -> int | None:
        return None if text is None else steps(text)

    return Every(
        log=steps(config.metrics.every),
        pictures=steps(config.metrics.pictures_every),
        save=steps(config.checkpoint.every),
        keep=optional(config.checkpoint.keep_every),
        knn=optional(config.eval.knn_every),
        drift=steps(config.ema.all_reduce_every),
        profile=optional(config.metrics.profile_at),
    )


def data_limits(run: Run) -> str:
    """One line on what limits the loaders of this run, from a few images; a collective."""
    config, world = run.config, run.world
    cores = world.gather((world.host, usable_cores()))
    own_cores = set().union(*(each for host, each in cores if host == world.host))

    def measured() -> str:
        with closing(sample_reader(run.training_set, config.data)) as reader:
            cost = measure_images(reader, run.order, position=run.steps_done * config.train.batch_size)
        return limits_line(
            cost,
            num_workers=config.data.num_workers,
            cores=len(own_cores),
            ranks=world.local_size,
            images_per_step=config.train.batch_size / world.size,
            buffer_bytes=config.data.buffer_mib * 2**20,
        )

    return world.first(measured)


def loader(run: Run) -> Generator[list[Batch]]:
    """The micro-batches of every step that is left, for this rank."""
    config, world = run.config, run.world
    describe = ViewDescription(
        recipes=tuple(view_recipes(config.augment)),
        seed=config.run.seed,
        share_jitter=config.augment.share_jitter,
        drop_path_rates=vit_shape(config).drop_path_rates,
    )
    return make_loader(
        reader=sample_reader(run.training_set, config.data),
        order=run.order,
        batch_size=config.train.batch_size,
        rank=world.rank,
        size=world.size,
        accumulate=config.train.accumulate,
        start_step=run.steps_done,
        stop_step=run.schedules.total_steps,
        num_workers=config.data.num_workers,
        buffer_bytes=config.data.buffer_mib * 2**20,
        device=world.device,
        describe=describe,
    )
