"""A run that is made to collapse says so by name, soon after its warm-up; on digits, as the quickstart is."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.quickstart import build_digit_shards

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(180)]

WARMUP = 20
WITHIN = 200


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train, _ = build_digit_shards(tmp_path_factory.mktemp("digits"))
    return train


def alarms(run: Any) -> dict[str, int]:
    """Name and step of the alarms in the ledger."""
    return {row["alarm"]: row["step"] for row in run.events("fault") if "alarm" in row}


@pytest.mark.parametrize(
    ("setting", "alarm"),
    [
        # Targets that are not sharpened: the easiest thing to agree on is the uniform distribution.
        (["loss.teacher_temp=1.0", "loss.warmup_teacher_temp=1.0"], "uniform_collapse"),
        # A center that never moves from 0: the easiest thing to agree on is one prototype for all.
        (["loss.center_momentum=1.0"], "one_hot_collapse"),
    ],
    ids=["uniform", "one-hot"],
)
def test_a_forced_collapse_is_named(
    setting: list[str],
    alarm: str,
    digits: Path,
    tiny: Callable[..., list[str]],
    start: Callable[..., Any],
    tmp_path: Path,
) -> None:
    settings = tiny(
        tmp_path / "run",
        *(f"data.train={digits}", "data.eval_train=null", "data.eval_test=null", "parallel.strategy=none"),
        *("model.embed_dim=32", "model.drop_path=0", "augment.flip_p=0", "augment.blur_global_1_p=0"),
        *("augment.solarize_global_2_p=0", "augment.blur_local_p=0", "augment.hue=0", "augment.gray_p=0"),
        *("augment.local_scale=[0.15,0.4]", "head.num_prototypes=256", "head.hidden_dim=128", "head.bottleneck_dim=32"),
        *("train.batch_size=32", "train.length=1000st", "optim.lr_reference_batch=32", f"optim.warmup={WARMUP}st"),
        *("optim.freeze_last_layer=0st", "loss.warmup_teacher_temp_length=0st", "checkpoint.every=1000st"),
        *("metrics.every=5st", "metrics.tensorboard=false", *setting),
    )
    run = start(settings, 1)
    run.wait_until(lambda: alarm in alarms(run) or run.last_logged_step() > WARMUP + WITHIN, "alarm")
    run.send(signal.SIGTERM, [0])
    run.end(3)
    assert alarm in alarms(run), f"{alarms(run)}\n{run.output()}"
    assert WARMUP < alarms(run)[alarm] <= WARMUP + WITHIN
    assert f"ALARM {alarm}" in run.output()
