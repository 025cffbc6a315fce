"""A training run from its start to its end; the loop reads as the paper's algorithm 1 (arXiv:2104.14294)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from dino_dist.agreement import agree, flags, take_in
from dino_dist.build import check_strategy
from dino_dist.config import Config, check_for_world
from dino_dist.data.loader import Batch
from dino_dist.data.stream import SampleReader
from dino_dist.dist import ProcessEnvironment, joined_world, set_timeout
from dino_dist.errors import FailedTogether, RunFailed
from dino_dist.evaluate import cls_forward, decode_rules, fixed_images
from dino_dist.health import center_norm
from dino_dist.preemption import AgreedWord, StopSignals
from dino_dist.resume import restore, save
from dino_dist.run import Run, build_run, loader
from dino_dist.run_session import open_session
from dino_dist.schedules import StepSettings
from dino_dist.step import StepResult

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
PICTURED_IMAGES = 4
DONE, STOPPED = 0, 3
"""Exit codes: the run reached its length; a signal stopped it and everything is saved."""


def train(config: Config, environment: ProcessEnvironment, *, accept_changes: bool = False) -> int:
    """Train, or go on with, the run of `config.run.dir`; returns the exit code.

    `UserError` for input that cannot work, `RunFailed` where a run must not go on, `Superseded` if a newer start took
    the folder over.
    """
    with (
        StopSignals(deadline_s=environment.deadline_s) as signals,
        joined_world(
            environment,
            timeout_s=config.parallel.timeout_start_s,
            device=config.train.device,
            deterministic=config.train.deterministic,
        ) as world,
    ):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)  # a starter may hold them back until they are caught
        local_sizes = world.gather(world.local_size)
        world.first(lambda: check_for_world(config, local_sizes))
        world.first(lambda: check_strategy(config, world.device))
        torch.set_num_threads(config.parallel.threads_per_rank)
        torch.use_deterministic_algorithms(config.train.deterministic)
        with open_session(config, world, environment, accept_changes=accept_changes) as session:
            run = build_run(config, world, session, signals)
            set_timeout(config.parallel.timeout_start_s, run.step.networks.mesh_groups())
            with ExitStack() as ending:  # each is closed even if another cannot be
                ending.callback(run.checkpointer.close)
                ending.callback(run.monitor.close)
                with faults_told(run):
                    restore(run)
                    with closing(loader(run)) as batches:
                        return loop(run, batches)


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


def loop(run: Run, batches: Iterator[list[Batch]]) -> int:
    """The steps that are left; returns the exit code."""
    config, schedules = run.config, run.schedules
    if evaluation_due(run):  # the last start ended before it
        evaluate(run)
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
        if run.steps_done % run.every.save == 0 and run.steps_done < schedules.total_steps:
            save(run, wait=False)
        if evaluation_due(run):  # after the save: an evaluation takes long, and a kill in it costs no step then
            evaluate(run)
        if run.steps_done == run.session.first_step + 1:
            set_timeout(config.parallel.timeout_s, run.step.networks.mesh_groups())
    return finish(run)


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
        run.monitor.pictures(step, run.step, partial(pictured_images, run))


def pictured_images(run: Run) -> Tensor:
    """The first images of the training set as evaluation sees them: those whose attention is shown over time."""
    reader = SampleReader(dataset=run.dataset, rules=decode_rules(run.config.data))
    ids = list(range(min(PICTURED_IMAGES, run.dataset.num_samples)))
    return fixed_images(reader, ids, run.config, run.world.device)


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


def evaluation_due(run: Run) -> bool:
    """Whether the steps done call for an evaluation that was not made yet."""
    return bool(run.every.knn) and run.steps_done % (run.every.knn or 1) == 0 and run.evaluated_at != run.steps_done


def evaluate(run: Run) -> dict[str, float]:
    """k-NN of the teacher, logged; empty without labelled shards."""
    run.evaluated_at = run.steps_done
    if run.evaluator is None:
        return {}
    with run.meter.paused():
        accuracies, features = run.evaluator.knn(cls_forward(run.step.networks.teacher, run.step.autocast))
    row: dict[str, float | int | None] = {}
    best = max(accuracies.values(), key=lambda accuracy: accuracy.k)
    for k, accuracy in accuracies.items():
        row[f"knn_top1_k{k}"] = accuracy.top1
    row["knn_top1"] = best.top1
    run.monitor.row(run.steps_done, row)
    run.monitor.embedding(run.steps_done, features, run.evaluator)
    return {key: float(value) for key, value in row.items() if value is not None}


def stop_early(run: Run) -> int:
    """Save at this step, on all ranks, and leave."""
    run.session.signal_row(run.steps_done, run.signals.reason)
    if not save(run, wait=True):
        raise FailedTogether(
            f"stopped at step {run.steps_done} but its checkpoint could not be written: see the ledger"
        )
    run.session.ledger_row("stop", run.steps_done, "stopped early, everything saved")
    run.monitor.say(f"stopped at step {run.steps_done}, saved; the same command goes on from here")
    return STOPPED


def finish(run: Run) -> int:
    """The last checkpoint and evaluation."""
    last = run.word.latest()
    if last is not None:
        take_in(run, run.steps_done, last)
        run.word = AgreedWord()
    if not save(run, wait=True):
        raise FailedTogether(f"the last checkpoint, of step {run.steps_done}, could not be written: see the ledger")
    if run.evaluated_at != run.steps_done:
        evaluate(run)
    run.session.ledger_row("stop", run.steps_done, "reached train.length")
    run.monitor.say(f"done: {run.steps_done} steps")
    return DONE
