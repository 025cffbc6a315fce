"""A training run: what it is made of, and the loop, which reads as the paper's algorithm 1 (arXiv:2104.14294)."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dino_dist import __version__
from dino_dist.build import attention_backend, build_step, check_strategy, compute_dtype, vit_shape
from dino_dist.checkpoint import Checkpointer
from dino_dist.config import Config, check_for_world, leaves
from dino_dist.config_file import to_plain
from dino_dist.data.index import DatasetIndex, open_dataset
from dino_dist.data.loader import Batch, make_loader
from dino_dist.data.order import Order
from dino_dist.data.stream import BadRecord, SampleReader
from dino_dist.dist import ProcessEnvironment, World, joined_world, shorten_timeout
from dino_dist.durations import Duration
from dino_dist.errors import RunFailed, UserError
from dino_dist.evaluate import Evaluator, cls_forward, decode_rules
from dino_dist.health import center_norm
from dino_dist.manifest import VerifiedCheckpoint
from dino_dist.monitor import Monitor
from dino_dist.optim import group_settings
from dino_dist.preemption import AgreedWord, StopSignals
from dino_dist.run_session import RunSession, open_session, said_by_rank_zero
from dino_dist.schedules import Schedules, StepSettings, build_schedules
from dino_dist.step import DinoStep, StepResult
from dino_dist.throughput import ThroughputMeter
from dino_dist.views import ViewDescription, ViewRenderer, view_recipes

_log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
DONE, STOPPED = 0, 3
"""Exit codes: the run reached its length; a signal stopped it and everything is saved."""


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

    introduction: tuple[str, ...]
    """Lines for the person at the terminal, said once nothing stands in the run's way."""
    config: Config
    world: World
    session: RunSession
    dataset: DatasetIndex
    order: Order
    schedules: Schedules
    every: Every
    step: DinoStep
    render: ViewRenderer
    checkpointer: Checkpointer
    monitor: Monitor
    evaluator: Evaluator | None
    signals: StopSignals
    word: AgreedWord = field(default_factory=AgreedWord)
    meter: ThroughputMeter = field(default_factory=ThroughputMeter)
    steps_done: int = 0
    evaluated_at: int = 0
    """Steps done at the last k-NN evaluation."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    bad_samples: int = 0
    drift_checked: int = 0


def train(config: Config, environment: ProcessEnvironment, *, accept_changes: bool = False) -> int:
    """Train, or go on with, the run of `config.run.dir`; returns the exit code.

    `UserError` for input that cannot work, `RunFailed` where a run must not go on, `Superseded` if a newer start took
    the folder over.
    """
    with (
        StopSignals(deadline_s=environment.deadline_s) as signals,
        joined_world(environment, timeout_s=config.parallel.timeout_start_s, device=config.train.device) as world,
    ):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)  # a starter may hold them back until they are caught
        world.first(lambda: check_for_world(config, world.size))
        world.first(lambda: check_strategy(config))
        torch.set_num_threads(config.parallel.threads_per_rank)
        torch.use_deterministic_algorithms(config.train.deterministic)
        with open_session(config, world, environment, accept_changes=accept_changes) as session:
            run = build_run(config, world, session, signals)
            with ExitStack() as closing:  # each is closed even if another cannot be
                closing.callback(run.checkpointer.close)
                closing.callback(run.monitor.close)
                with faults_told(run):
                    restore(run)
                    return loop(run)


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or hangs, rather than for its own arguments."""
    # gloo has no type of its own for it, but names its transport.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


@contextmanager
def faults_told(run: Run) -> Iterator[None]:
    """An error inside goes into the ledger; a broken connection becomes one line, since its cause is another rank's."""
    try:
        yield
    except Exception as error:
        run.session.report_fault(run.steps_done, error)
        if is_lost_contact(error):
            raise RunFailed(
                f"rank {run.world.rank} lost contact with another rank after step {run.steps_done}: see what that rank "
                f"says; the same command goes on from the last checkpoint ({' '.join(str(error).split())[:200]})"
            ) from error
        raise


def loop(run: Run) -> int:
    """The steps that are left; returns the exit code."""
    config, schedules = run.config, run.schedules
    if evaluation_due(run):  # the last start ended before it
        evaluate(run)
    batches = loader(run)
    while run.steps_done < schedules.total_steps:
        with run.meter.waiting():
            micro_batches = next(batches)
        settings = schedules.at(run.steps_done)
        result = run.step([partial(run.render, batch) for batch in micro_batches], settings, flags(run, micro_batches))
        run.steps_done += 1
        run.meter.step_done(images=config.train.batch_size)

        stop = agree(run, result)
        log(run, settings, result, micro_batches)
        if stop:
            return stop_early(run)
        if evaluation_due(run):
            evaluate(run)
        if run.steps_done % run.every.save == 0 and run.steps_done < schedules.total_steps:
            save(run, wait=False)
        if run.steps_done == run.session.first_step + 1:
            shorten_timeout(config.parallel.timeout_s)
    return finish(run)


def build_run(config: Config, world: World, session: RunSession, signals: StopSignals) -> Run:
    """Open the data and build the parts of a run at step 0."""
    index_dir = session.folder.path / "index"
    dataset = world.first(lambda: open_dataset(config.data.train, fallback_dir=index_dir))
    schedules = build_schedules(config, dataset.num_samples)
    every = resolve_every(config, dataset.num_samples)
    with said_by_rank_zero(world):
        backend = attention_backend(config, world.device)
    dtype = compute_dtype(config, world.device)
    introduction = (
        f"{world.size} ranks on {world.device.type}, {config.parallel.strategy}, {dtype}, attention {backend.name} "
        f"({backend.reason}); {dataset.num_samples} images, {schedules.total_steps} steps of {config.train.batch_size}"
    )
    run = Run(
        introduction=(introduction, *schedules.notes),
        config=config,
        world=world,
        session=session,
        dataset=dataset,
        order=Order(
            shard_counts=dataset.shard_counts, seed=config.run.seed, shards_per_block=config.data.shards_per_block
        ),
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
        evaluator=Evaluator(config, world, index_dir) if config.data.eval_train is not None else None,
        signals=signals,
        monitor=Monitor(config, world, session, schedules, every_pictures=every.pictures),
    )
    return run


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


def loader(run: Run) -> Iterator[list[Batch]]:
    """The micro-batches of every step that is left, for this rank."""
    config, world = run.config, run.world
    describe = ViewDescription(
        recipes=tuple(view_recipes(config.augment)),
        seed=config.run.seed,
        drop_path_rates=vit_shape(config).drop_path_rates,
    )
    return make_loader(
        SampleReader(dataset=run.dataset, rules=decode_rules(config.data)),
        run.order,
        batch_size=config.train.batch_size,
        rank=world.rank,
        size=world.size,
        accumulate=config.train.accumulate,
        start_step=run.steps_done,
        stop_step=run.schedules.total_steps,
        num_workers=config.data.num_workers,
        prefetch=config.data.prefetch_steps,
        pin=world.device.type == "cuda",
        describe=describe,
    )


def flags(run: Run, micro_batches: list[Batch]) -> torch.Tensor:
    """What this rank tells all others with its loss: it wants to stop [requeue, exit]; its new bad samples."""
    run.session.check_superseded()
    bad = [record for batch in micro_batches for record in replaced_samples(batch)]
    run.session.list_bad_samples(run.steps_done + 1, bad)
    word = run.signals.word
    return word_tensor(run, [float(word == 1), float(word == 2), float(len(bad))])


def replaced_samples(batch: Batch) -> list[BadRecord]:
    """A record for each image of the batch that stands in for another, not for those that could not stand in either."""
    records = {record.sample_id: record for record in batch.bad}
    return [records[sample_id] for sample_id in batch.sample_ids.tolist() if sample_id in records] if records else []


def word_tensor(run: Run, values: list[float]) -> torch.Tensor:
    """Numbers of the CPU in the type and place of a step's word."""
    on_cuda = run.world.device.type == "cuda"
    dtype = run.step.centering.center_1K.dtype
    return torch.tensor(values, dtype=dtype, pin_memory=on_cuda).to(run.world.device, non_blocking=True)


def agree(run: Run, result: StepResult) -> bool:
    """What all ranks said at the step before, read now by all alike: whether to stop; bad steps and samples counted."""
    run.word.post(torch.cat([result.flags_F, result.accepted[None]]))
    said = run.word.read()
    return said is not None and take_in(run, run.steps_done - 1, said)


def unread_word(run: Run) -> list[float] | None:
    """What all ranks said at the last step, for the checkpoint: nobody has read it yet. Waits for the device."""
    said = run.word.latest()
    return None if said is None else [0.0, 0.0, *said[2:]]  # the wish to stop is no wish of the resumed run


def take_in(run: Run, step: int, said: list[float]) -> bool:
    """Count what all ranks said at a step; True if one of them wants to stop."""
    requeue, leave, bad_samples, accepted = said
    count_bad_samples(run, step, int(bad_samples))
    count_skipped(run, step, bool(accepted))
    return requeue + leave > 0


def count_skipped(run: Run, step: int, accepted: bool) -> None:
    """Count a refused step; `RunFailed` after too many in a row, with the samples of the last in the ledger."""
    run.skipped_in_a_row = 0 if accepted else run.skipped_in_a_row + 1
    if accepted:
        return
    run.skipped_steps += 1
    batch_size = run.config.train.batch_size
    _, sample_ids = run.order.ids((step - 1) * batch_size, step * batch_size)
    why = f"loss or gradient not finite at step {step}: weights, center and teacher left as they were"
    run.session.ledger_row("fault", step, why, sample_ids=sample_ids.tolist())
    run.monitor.say(why)
    if run.skipped_in_a_row >= run.config.train.non_finite_patience:
        raise RunFailed(
            f"{run.skipped_in_a_row} steps in a row were not finite, the last step {step}: the run stops before it "
            f"wastes more; see {run.session.folder.ledger} for the samples, lower optim.lr or use train.precision=fp32"
        )


def count_bad_samples(run: Run, step: int, new: int) -> None:
    """Count undecodable samples of all ranks; `UserError` over the threshold."""
    if not new:
        return
    run.bad_samples += new
    seen = max(run.dataset.num_samples, step * run.config.train.batch_size)
    share = run.config.data.max_bad_fraction
    if run.bad_samples > share * seen:
        with said_by_rank_zero(run.world):
            raise UserError(
                f"{run.bad_samples} samples could not be decoded, more than data.max_bad_fraction={share:g} of {seen}: "
                f"see {run.session.bad_samples_file}, mend the shards or raise the limit"
            )


def log(run: Run, settings: StepSettings, result: StepResult, micro_batches: list[Batch]) -> None:
    """On log steps, read what the step left on the device and write a row; on others nothing waits."""
    step = run.steps_done
    if step == run.session.first_step + 1:
        run.monitor.first_crops(step, run.render(micro_batches[0]))
    run.monitor.profile(step, run.every.profile)
    if step % run.every.log and step != run.schedules.total_steps:
        return
    usage = run.step.usage.statistics()
    device_values = {
        "loss": result.loss,
        "teacher_entropy": result.teacher_entropy,
        "grad_norm": torch.linalg.vector_norm(result.grad_norms_P),
        "center_norm": center_norm(run.step.centering.center_1K),
        **usage,
    }
    numbers = torch.stack([value.double() for value in device_values.values()]).tolist()
    row: dict[str, float | int | None] = dict(zip(device_values, numbers, strict=True))
    images_seen = step * run.config.train.batch_size
    row |= {
        "images_seen": images_seen,
        "epoch": images_seen / run.dataset.num_samples,
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "momentum": settings.momentum,
        "teacher_temp": settings.teacher_temp,
        "kl": numbers[0] - numbers[1],
        "skipped_steps": run.skipped_steps,
        "bad_samples": run.bad_samples,
        "teacher_drift": teacher_drift(run),
        "host_memory_gib": psutil.Process().memory_info().rss / 2**30,
        "save_s": run.checkpointer.last_save_s,
        **run.meter.read(),
    }
    if run.world.device.type == "cuda":
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated(run.world.device) / 2**30
    run.monitor.row(step, row)
    with run.meter.paused():
        run.monitor.pictures(step, run.step, run.evaluator)


def teacher_drift(run: Run) -> float | None:
    """Compare the replicas' teachers if that is due; a difference is repaired and goes into the ledger."""
    if run.steps_done // run.every.drift == run.drift_checked:
        return None
    run.drift_checked = run.steps_done // run.every.drift
    drift = run.step.networks.teacher_drift()
    if drift is None:
        return None
    value = float(drift.item())
    if value != 0.0:
        run.step.networks.take_first_replica()
        run.session.ledger_row(
            "fault", run.steps_done, f"replicas' teachers differed by {value:g}: all took replica 0's"
        )
    return value


def save(run: Run, *, wait: bool) -> bool:
    """Save everything that the next step depends on."""
    with run.meter.paused():
        saved = run.checkpointer.save(run.step.tensors(), state(run), step=run.steps_done, wait=wait)
    run.signals.save_s = run.checkpointer.last_save_s or 0.0
    return saved


def state(run: Run) -> dict[str, Any]:
    """What a checkpoint holds besides tensors; nothing of it belongs to one rank."""
    return {
        "step": run.steps_done,
        "samples_consumed": run.steps_done * run.config.train.batch_size,
        "skipped_steps": run.skipped_steps,
        "skipped_in_a_row": run.skipped_in_a_row,
        "bad_samples": run.bad_samples,
        "unread_word": unread_word(run),
        "alarms": run.monitor.watch.state_dict(),
        "optimizer_groups": group_settings(run.step.update.outer),
        "config": to_plain(run.config),
        "dataset_hash": run.dataset.hash,
        "dataset_samples": run.dataset.num_samples,
        "world_size": run.world.size,
        "versions": {"dino_dist": __version__, "torch": torch.__version__},
    }


def restore(run: Run) -> None:
    """Take up the newest checkpoint that verifies, if there is one; rows that were written after it are cut."""
    with said_by_rank_zero(run.world):
        choice = run.checkpointer.newest()
    if choice is not None:
        load(run, choice)
    run.session.begin(run.steps_done)
    run.evaluated_at = run.session.last_logged("knn_top1")
    run.monitor.begin(run.steps_done, {key: value for key, value, _ in leaves(run.config)})
    for line in run.introduction:
        run.monitor.say(line)


def load(run: Run, choice: VerifiedCheckpoint) -> None:
    """Take up a checkpoint of this data set."""
    with said_by_rank_zero(run.world):
        saved = choice.state
        if saved["dataset_hash"] != run.dataset.hash:
            raise UserError(
                f"data.train={run.config.data.train} is not the data set of this run (it had "
                f"{saved['dataset_samples']} samples, now {run.dataset.num_samples}, or other ones): put the old "
                "shards back or choose another run.dir"
            )
        saved = run.checkpointer.load(choice, run.step.tensors())
    run.steps_done = choice.step
    run.step.usage.updates = choice.step
    run.skipped_steps = saved["skipped_steps"]
    run.skipped_in_a_row = saved["skipped_in_a_row"]
    run.bad_samples = saved["bad_samples"]
    if saved["unread_word"] is not None:
        run.word.post(word_tensor(run, saved["unread_word"]))
    # It is looked at on log steps: what fell due since the last one is still to be done.
    run.drift_checked = run.steps_done // run.every.log * run.every.log // run.every.drift
    run.monitor.watch.load_state_dict(saved["alarms"])
    if saved["world_size"] != run.world.size:
        run.monitor.say(f"resuming on {run.world.size} ranks what {saved['world_size']} ranks saved")


def evaluation_due(run: Run) -> bool:
    """Whether the steps done call for an evaluation that was not made yet."""
    return bool(run.every.knn) and run.steps_done % (run.every.knn or 1) == 0 and run.evaluated_at != run.steps_done


def evaluate(run: Run) -> dict[str, float]:
    """k-NN of the teacher, logged; empty without labelled shards."""
    run.evaluated_at = run.steps_done
    if run.evaluator is None:
        return {}
    with run.meter.paused():
        accuracies = run.evaluator.knn(cls_forward(run.step.networks.teacher))
    row: dict[str, float | int | None] = {}
    best = max(accuracies.values(), key=lambda accuracy: accuracy.k)
    for k, accuracy in accuracies.items():
        row[f"knn_top1_k{k}"] = accuracy.top1
    row["knn_top1"] = best.top1
    run.monitor.row(run.steps_done, row)
    run.monitor.embedding(run.steps_done, run.step, run.evaluator)
    return {key: float(value) for key, value in row.items() if value is not None}


def stop_early(run: Run) -> int:
    """Save at this step, on all ranks, and leave."""
    run.session.signal_row(run.steps_done, run.signals.reason)
    if not save(run, wait=True):
        raise RunFailed(f"stopped at step {run.steps_done} but its checkpoint could not be written: see the ledger")
    run.session.ledger_row("stop", run.steps_done, "stopped early, everything saved")
    run.monitor.say(f"stopped at step {run.steps_done}, saved; the same command goes on from here")
    return STOPPED


def finish(run: Run) -> int:
    """The last evaluation and checkpoint."""
    last = run.word.latest()
    if last is not None:
        take_in(run, run.steps_done, last)
        run.word = AgreedWord()
    if run.evaluated_at != run.steps_done:
        evaluate(run)
    if not save(run, wait=True):
        raise RunFailed(f"the last checkpoint, of step {run.steps_done}, could not be written: see the ledger")
    run.session.ledger_row("stop", run.steps_done, "reached train.length")
    run.monitor.say(f"done: {run.steps_done} steps")
    return DONE
