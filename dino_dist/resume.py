"""What a checkpoint holds of a run, and how a run goes on from it as if it had never stopped; how a new one begins."""

from __future__ import annotations

from typing import Any

import torch

from dino_dist import __version__
from dino_dist.agreement import unread_word, word_tensor
from dino_dist.config import leaves
from dino_dist.config_file import to_plain
from dino_dist.errors import UserError
from dino_dist.init_from import start_from
from dino_dist.manifest import VerifiedCheckpoint
from dino_dist.optim import group_settings
from dino_dist.run import Run
from dino_dist.run_session import said_by_rank_zero


def save(run: Run, *, wait: bool) -> bool:
    """Save everything that the next step depends on."""
    with run.meter.paused():
        saved = run.checkpointer.save(run.step.tensors(), state(run), step=run.steps_done, wait=wait)
    return saved


def state(run: Run) -> dict[str, Any]:
    """What a checkpoint holds besides tensors; nothing of it belongs to one rank."""
    return {
        "step": run.steps_done,
        "samples_consumed": run.steps_done * run.config.train.batch_size,
        "computed_with": run.computed_with,
        "skipped_steps": run.skipped_steps,
        "skipped_in_a_row": run.skipped_in_a_row,
        "bad_samples": run.bad_samples,
        "save_s": run.checkpointer.last_save_s,
        "unread_word": unread_word(run),
        "alarms": run.monitor.watch.state_dict(),
        "optimizer_groups": group_settings(run.step.update.outer),  # for readers: a resumed run takes its schedules'
        "config": to_plain(run.config),
        "dataset_hash": run.training_set.hash,
        "dataset_samples": run.training_set.num_samples,
        "world_size": run.world.size,
        "versions": {"dino_dist": __version__, "torch": torch.__version__},
    }


def restore(run: Run) -> None:
    """Take up the newest checkpoint that verifies, if there is one; rows that were written after it are cut.

    A run without one begins: at the weights of its seed, or of `model.init_from`.
    """
    with said_by_rank_zero(run.world):
        choice = run.checkpointer.newest()
    if choice is not None:
        load(run, choice)
    elif run.config.model.init_from is not None:
        begin_elsewhere(run)
    run.session.begin(run.config, run.steps_done)
    run.evaluated_at = run.session.last_logged("knn_top1")
    run.monitor.begin(run.steps_done, {key: value for key, value, _ in leaves(run.config)})
    for line in run.introduction:
        run.monitor.say(line)


def begin_elsewhere(run: Run) -> None:
    """Take the weights of `model.init_from`, whatever was drawn from the seed."""
    lines = start_from(run.config, run.step, run.world)
    run.introduction += lines
    run.session.ledger_row("restore", 0, "; ".join(lines))


def load(run: Run, choice: VerifiedCheckpoint) -> None:
    """Take up a checkpoint of this data set."""
    with said_by_rank_zero(run.world):
        saved = choice.state
        if saved["dataset_hash"] != run.training_set.hash:
            raise UserError(
                f"data.train={run.config.data.train} is not the data set of this run (it had "
                f"{saved['dataset_samples']} samples, now {run.training_set.num_samples}, or other ones): put the old "
                "shards back or choose another run.dir"
            )
        saved = run.checkpointer.load(choice, run.step.tensors())
    run.steps_done = choice.step
    run.skipped_steps = saved["skipped_steps"]
    run.skipped_in_a_row = saved["skipped_in_a_row"]
    run.bad_samples = saved["bad_samples"]
    if saved["save_s"] is not None:
        run.signals.save_s = saved["save_s"]
    if saved["computed_with"] != run.computed_with:
        run.introduction.append(f"resuming with {run.computed_with} what was computed with {saved['computed_with']}")
    if saved["unread_word"] is not None:
        run.word.post(word_tensor(run, saved["unread_word"]))
    # It is looked at on log steps: what fell due since the last one is still to be done.
    run.drift_checked = run.steps_done // run.every.log * run.every.log // run.every.drift
    run.monitor.watch.load_state_dict(saved["alarms"])
    if saved["world_size"] != run.world.size:
        run.monitor.say(f"resuming on {run.world.size} ranks what {saved['world_size']} ranks saved")
