"""A training run from its start to its end; the loop reads as the paper's algorithm 1 (arXiv:2104.14294)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from dino_dist.agreement import agree, flags, take_in
from dino_dist.build import check_strategy
from dino_dist.config import Config
from dino_dist.config_checks import check_for_world
from dino_dist.data.loading.batch import Batch
from dino_dist.data.stores.store_options import StoreCounts
from dino_dist.dist import ProcessEnvironment, World, joined_world, set_timeout
from dino_dist.errors import FailedTogether, RunFailed, StopAsked
from dino_dist.exit_codes import DONE
from dino_dist.health import center_norm
from dino_dist.inputs import sample_reader
from dino_dist.judging.evaluator import cls_forward, fixed_images
from dino_dist.liveness import Limits, Pulse
from dino_dist.preemption import GO_ON, AgreedWord, StopSignals, job_time_limit
from dino_dist.resume import restore, save
from dino_dist.run import Run, build_run, data_limits, loader
from dino_dist.run_session import RunSession, open_session
from dino_dist.schedules import StepSettings
from dino_dist.step import StepResult
from dino_dist.stopping import leave_together, stop_before_meeting, stop_early
from dino_dist.watchdog import Watchdog

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
PICTURED_IMAGES = 4
_LOOKED_THROUGH = 64
COLLECTIVES_FAIL_LATER = 1.2
"""Times `timeout_s`: the watchdog speaks first, since it can name who is missing and show the stacks."""


def train(config: Config, environment: ProcessEnvironment, *, accept_changes: bool = False) -> int:
    """Train, or go on with, the run of `config.run.dir`; returns the exit code.

    `UserError` for input that cannot work, `RunFailed` where a run must not go on, `Superseded` if a newer start took
    the folder over.
    """
    with StopSignals(at_a_terminal=environment.job_id is None) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)  # a starter may hold them back until they are caught
        try:
            with joined_world(
                environment,
                timeout_s=config.parallel.timeout_start_s,
                join_timeout_s=config.parallel.timeout_join_s,
                run_dir=Path(config.run.dir).absolute(),
                device=config.train.device,
                deterministic=config.train.deterministic,
                poll=signals.raise_if_asked,
            ) as world:
                return train_in(world, config, environment, signals, accept_changes=accept_changes)
        except StopAsked as asked:  # before the ranks have met
            job_id = environment.job_id if config.run.requeue else None
            return stop_before_meeting(asked, signals.reason, job_id, is_first=environment.rank == 0)


def train_in(
    world: World, config: Config, environment: ProcessEnvironment, signals: StopSignals, *, accept_changes: bool
) -> int:
    """Train in a world whose ranks have met; returns the exit code."""
    placed = world.gather((world.local_size, world.local_rank))
    world.first(lambda: check_for_world(config, [size for size, _ in placed], [rank for _, rank in placed]))
    world.first(lambda: check_strategy(config, world.device))
    torch.set_num_threads(config.parallel.threads_per_rank)
    torch.use_deterministic_algorithms(config.train.deterministic)
    if world.is_first and environment.job_id is not None:
        signals.time_limit = job_time_limit(environment.job_id)
    pulse = Pulse()
    with (
        open_session(config, world, environment, accept_changes=accept_changes) as session,
        watchdog(world, config, pulse, session) as watch,
    ):
        try:
            run = build_run(config, world, session, signals, pulse)
            set_timeout(config.parallel.timeout_start_s, run.step.networks.mesh_groups())
            with ExitStack() as ending:  # each is closed even if another cannot be
                ending.callback(run.checkpointer.close)
                ending.callback(run.monitor.close)
                with faults_told(run, watch):
                    restore(run)
                    run.monitor.say(data_limits(run))
                    stop_together(run)
                    with closing(loader(run)) as batches:
                        return loop(run, batches)
        except StopAsked as asked:  # while the data were indexed, or just before the first step
            session.signal_row(session.first_step, signals.reason)
            return leave_together(world, session, asked.word, session.first_step, pulse)


def watchdog(world: World, config: Config, pulse: Pulse, session: RunSession) -> Watchdog:
    """Watches all ranks by heartbeats through the rendezvous store; what it finds goes into the ledger."""
    return Watchdog(
        world.connect_store(),
        rank=world.rank,
        size=world.size,
        host=world.host,
        pulse=pulse,
        limits=Limits(timeout_s=config.parallel.timeout_s, timeout_start_s=config.parallel.timeout_start_s),
        report=session.report_hang,
    )


def stop_together(run: Run) -> None:
    """Before the first step: `StopAsked` on all ranks if one of them is asked to stop."""
    word = max(run.world.gather(run.signals.signalled))
    if word:
        raise StopAsked(word)


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or hangs, rather than for its own arguments."""
    # gloo has no type of its own for it, but names its transport.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


@contextmanager
def faults_told(run: Run, watch: Watchdog) -> Iterator[None]:
    """An error inside goes into the ledger; a broken connection becomes one line, since its cause is another rank's."""
    try:
        yield
    except Exception as error:
        if not is_lost_contact(error):
            run.session.report_fault(run.steps_done, error)
            raise
        suspects = watch.suspects()
        lost = RunFailed(
            f"rank {run.world.rank} on {run.world.host} lost contact after step {run.steps_done}: "
            f"{suspects or 'see what the other ranks say'}; the same command goes on from the last checkpoint "
            f"({' '.join(str(error).split())[:200]})"
        )
        run.session.report_fault(run.steps_done, lost)
        raise lost from error


def loop(run: Run, batches: Iterator[list[Batch]]) -> int:
    """The steps that are left, or those until somebody asks to stop; returns the exit code."""
    try:
        word = steps(run, batches)
        if not word:
            return finish(run)
    except StopAsked as asked:  # within an evaluation
        word = asked.word
    return stop_early(run, word)


def steps(run: Run, batches: Iterator[list[Batch]]) -> int:
    """The steps that are left; returns the word on stopping, 0 once all are done."""
    config, schedules, pulse = run.config, run.schedules, run.pulse
    if evaluation_due(run):  # the last start ended before it
        evaluate(run)
    while run.steps_done < schedules.total_steps:
        pulse.enter("data" if run.under_way else "starting", run.steps_done + 1)
        with run.meter.waiting():
            micro_batches = next(batches)
        pulse.enter("step" if run.under_way else "starting", run.steps_done + 1)
        settings = schedules.at(run.steps_done)
        result = run.step([partial(run.render, batch) for batch in micro_batches], settings, flags(run, micro_batches))
        run.steps_done += 1
        run.meter.step_done(images=config.train.batch_size)

        word = agree(run, result)
        pulse.enter("log", run.steps_done)
        log(run, settings, result, micro_batches)
        if word:
            return word
        if run.steps_done % run.every.save == 0 and run.steps_done < schedules.total_steps:
            pulse.enter("save", run.steps_done)
            save(run, wait=False)
        if evaluation_due(run):  # after the save: an evaluation takes long, and a kill in it costs no step then
            evaluate(run)
        if run.steps_done == run.session.first_step + 1:
            set_timeout(COLLECTIVES_FAIL_LATER * config.parallel.timeout_s, run.step.networks.mesh_groups())
    return GO_ON


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
        "epoch": images_seen / run.training_set.num_samples,
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
    row |= store_row(micro_batches[-1].store)
    if run.world.device.type == "cuda":
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated(run.world.device) / 2**30
    run.monitor.row(step, row)
    with run.meter.paused():
        run.monitor.pictures(step, run.step, partial(pictured_images, run))


def store_row(counts: StoreCounts) -> dict[str, float | int]:
    """What the loader of the rank that logs has asked of stores since this start; nothing where shards are local."""
    if not counts.requests and not counts.cache_hits:
        return {}
    return {
        "rank0_store_retries": counts.retries,
        "rank0_store_read_gib": counts.bytes_received / 2**30,
        "rank0_cache_hits": counts.cache_hits,
        "rank0_cache_fills": counts.cache_fills,
        "rank0_cache_evictions": counts.cache_evictions,
        "rank0_uncached_reads": counts.direct_reads,
    }


def pictured_images(run: Run) -> Tensor:
    """Some of the first images that are trained on, as evaluation sees them: their attention is shown over time."""
    first = run.order.ids(0, min(_LOOKED_THROUGH, run.training_set.num_samples)).sample_ids
    with closing(sample_reader(run.training_set, run.config.data)) as reader:
        return fixed_images(reader, np.unique(first)[:PICTURED_IMAGES].tolist(), run.config, run.world.device)


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
            "fault", run.steps_done, f"replicas' teachers differed by {value:g}: all took replica 0's weights"
        )
    return value


def evaluation_due(run: Run) -> bool:
    """Whether the steps done call for an evaluation that was not made yet."""
    return bool(run.every.knn) and run.steps_done % (run.every.knn or 1) == 0 and run.evaluated_at != run.steps_done


def evaluate(run: Run) -> dict[str, float]:
    """k-NN of the teacher, logged; empty without labelled shards."""
    if run.evaluator is None:
        run.evaluated_at = run.steps_done
        return {}
    run.pulse.enter("evaluate", run.steps_done)
    with run.meter.paused():
        accuracies, features = run.evaluator.knn(cls_forward(run.step.networks.teacher, run.step.autocast))
    run.evaluated_at = run.steps_done
    row: dict[str, float | int | None] = {}
    best = max(accuracies.values(), key=lambda accuracy: accuracy.k)
    for k, accuracy in accuracies.items():
        row[f"knn_top1_k{k}"] = accuracy.top1
    row["knn_top1"] = best.top1
    run.monitor.row(run.steps_done, row)
    with run.meter.paused():
        run.monitor.embedding(run.steps_done, features, run.evaluator)
    return {key: float(value) for key, value in row.items() if value is not None}


def finish(run: Run) -> int:
    """The last checkpoint and evaluation."""
    last = run.word.latest()
    if last is not None:
        take_in(run, run.steps_done, last)
        run.word = AgreedWord()
    run.pulse.enter("save", run.steps_done)
    if not save(run, wait=True):
        raise FailedTogether(f"the last checkpoint, of step {run.steps_done}, could not be written: see the ledger")
    if run.evaluated_at != run.steps_done:
        evaluate(run)
    run.session.ledger_row("stop", run.steps_done, "reached train.length", exit_code=DONE)
    run.monitor.say(f"done: {run.steps_done} steps")
    return DONE
