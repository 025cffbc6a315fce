"""What ranks tell each other with every step, and what all of them make of it one step later, alike."""

from __future__ import annotations

import torch

from dino_dist.data.loading.loader import Batch
from dino_dist.data.reading.stream import BadRecord
from dino_dist.errors import NoRestartHelps, UserError
from dino_dist.preemption import GO_ON, SAVE_AND_EXIT, SAVE_AND_REQUEUE
from dino_dist.run import Run
from dino_dist.run_session import said_by_rank_zero
from dino_dist.step import StepResult


def flags(run: Run, micro_batches: list[Batch]) -> torch.Tensor:
    """What this rank tells all others with its loss: it wants to stop [requeue, exit]; its new bad samples."""
    run.session.check_superseded()
    bad = [record for batch in micro_batches for record in replaced_samples(batch)]
    run.session.list_bad_samples(run.steps_done + 1, bad)
    if run.checkpointer.last_save_s is not None:
        run.signals.save_s = run.checkpointer.last_save_s
    run.signals.step_s = run.meter.mean_step_s or run.signals.step_s
    word = run.signals.word
    return word_tensor(run, [float(word == SAVE_AND_REQUEUE), float(word == SAVE_AND_EXIT), float(len(bad))])


def replaced_samples(batch: Batch) -> list[BadRecord]:
    """A record for each image of the batch that stands in for another, not for those that could not stand in either."""
    records = {record.sample_id: record for record in batch.bad}
    return [records[sample_id] for sample_id in batch.sample_ids.tolist() if sample_id in records] if records else []


def word_tensor(run: Run, values: list[float]) -> torch.Tensor:
    """Numbers of the CPU in the type and place of a step's word."""
    on_cuda = run.world.device.type == "cuda"
    dtype = run.step.centering.center_1K.dtype
    return torch.tensor(values, dtype=dtype, pin_memory=on_cuda).to(run.world.device, non_blocking=True)


def agree(run: Run, result: StepResult) -> int:
    """The word on stopping of the step before, read now by all alike; its bad steps and samples are counted.

    0 to go on, or one of `preemption`: the strongest that any rank said.
    """
    run.word.post(torch.cat([result.flags_F, result.accepted[None]]))
    said = run.word.read()
    return GO_ON if said is None else take_in(run, run.steps_done - 1, said)


def unread_word(run: Run) -> list[float] | None:
    """What all ranks said at the last step, for the checkpoint: nobody has read it yet. Waits for the device."""
    said = run.word.latest()
    return None if said is None else [0.0, 0.0, *said[2:]]  # the wish to stop is no wish of the resumed run


def take_in(run: Run, step: int, said: list[float]) -> int:
    """Count what all ranks said at a step; the word on stopping."""
    requeue, leave, bad_samples, accepted = said
    count_bad_samples(run, step, int(bad_samples))
    count_skipped(run, step, bool(accepted))
    if leave > 0:
        return SAVE_AND_EXIT
    return SAVE_AND_REQUEUE if requeue > 0 else GO_ON


def count_skipped(run: Run, step: int, accepted: bool) -> None:
    """Count a refused step; `RunFailed` after too many in a row, with the samples of the last in the ledger."""
    run.skipped_in_a_row = 0 if accepted else run.skipped_in_a_row + 1
    if accepted:
        return
    run.skipped_steps += 1
    batch_size = run.config.train.batch_size
    sample_ids = run.order.ids((step - 1) * batch_size, step * batch_size).sample_ids
    why = f"loss or gradient not finite at step {step}: weights, center and teacher left as they were"
    run.session.ledger_row("fault", step, why, sample_ids=sample_ids.tolist())
    run.monitor.say(why)
    if run.skipped_in_a_row >= run.config.train.non_finite_patience:
        raise NoRestartHelps(
            f"{run.skipped_in_a_row} steps in a row were not finite, the last step {step}: the run stops before it "
            f"wastes more; see {run.session.folder.ledger} for the samples, lower optim.lr or use train.precision=fp32"
        )


def count_bad_samples(run: Run, step: int, new: int) -> None:
    """Count undecodable samples of all ranks; `UserError` over the threshold."""
    if not new:
        return
    run.bad_samples += new
    seen = max(run.training_set.num_samples, step * run.config.train.batch_size)
    share = run.config.data.max_bad_fraction
    if run.bad_samples > share * seen:
        with said_by_rank_zero(run.world):
            raise UserError(
                f"{run.bad_samples} samples could not be decoded, more than data.max_bad_fraction={share:g} of {seen}: "
                f"see {run.session.bad_samples_file}; raise the limit, or mend the shards and begin a new run folder"
            )
