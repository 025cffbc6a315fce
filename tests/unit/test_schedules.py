"""Schedules equal the published formulas, written here with NumPy over whole epochs; durations resolve to steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_dist.config import Config, DataSection, EmaSection, LossSection, OptimSection, TrainSection
from dino_dist.schedules import build_schedules

GOLDEN = Path(__file__).parents[1] / "golden" / "dino_v1_trajectory_a.npz"
BATCH, STEPS_PER_EPOCH, EPOCHS = 16, 5, 6
IMAGES = BATCH * STEPS_PER_EPOCH


def config_of(**optim: Any) -> Config:
    return Config(
        data=DataSection(train="shards"),
        train=TrainSection(length=f"{EPOCHS}ep", batch_size=BATCH),
        optim=OptimSection(**{"warmup": "2ep", **optim}),
        loss=LossSection(warmup_teacher_temp=0.03, teacher_temp=0.07, warmup_teacher_temp_length="3ep"),
        ema=EmaSection(momentum=0.99),
    )


def published(
    base: float, final: float, *, warmup_steps: int = 0, total: int = EPOCHS * STEPS_PER_EPOCH
) -> NDArray[Any]:
    """A straight line from 0 to `base`, ends included; then a half cosine over the rest, its end left out."""
    line = np.linspace(0.0, base, warmup_steps)
    angle = np.linspace(0.0, np.pi, total - warmup_steps, endpoint=False)
    return np.concatenate([line, (base + final) / 2 + (base - final) / 2 * np.cos(angle)])


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 29])
def test_the_learning_rate_is_the_published_one(warmup: int) -> None:
    schedules = build_schedules(config_of(lr=0.3, lr_final=1e-3, warmup=f"{warmup}st"), IMAGES)
    ours = [schedules.at(step).lr for step in range(schedules.total_steps)]
    expected = published(0.3 * BATCH / 256, 1e-3, warmup_steps=warmup)  # the final value is not scaled
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-18)
    assert not schedules.notes


def test_weight_decay_and_momentum_are_the_published_ones() -> None:
    schedules = build_schedules(config_of(weight_decay=0.04, weight_decay_final=0.4), IMAGES)
    steps = [schedules.at(step) for step in range(schedules.total_steps)]
    np.testing.assert_allclose([s.weight_decay for s in steps], published(0.04, 0.4), rtol=1e-12)
    np.testing.assert_allclose([s.momentum for s in steps], published(0.99, 1.0), rtol=1e-12)


@pytest.mark.parametrize(("warmup_epochs", "stages"), [(0, []), (1, [0.03]), (2, [0.03, 0.07]), (5, None)])
def test_the_temperature_moves_once_an_epoch(warmup_epochs: int, stages: list[float] | None) -> None:
    config = config_of()
    config = replace(config, loss=replace(config.loss, warmup_teacher_temp_length=f"{warmup_epochs}ep"))
    schedules = build_schedules(config, IMAGES)
    ours = [schedules.at(step).teacher_temp for step in range(schedules.total_steps)]
    rises = list(np.linspace(0.03, 0.07, warmup_epochs)) if stages is None else stages
    expected = np.repeat([*rises, *[0.07] * (EPOCHS - warmup_epochs)], STEPS_PER_EPOCH)
    np.testing.assert_allclose(ours, expected, rtol=1e-14)


@pytest.mark.parametrize(("length", "steps"), [("0ep", 0), ("2ep", 7), ("4st", 4)])
def test_the_warmup_of_the_temperature_in_steps(length: str, steps: int) -> None:
    """17 images, 5 a step: two epochs are over within step 6."""
    config = replace(config_of(), train=TrainSection(length="9ep", batch_size=5))
    config = replace(config, loss=replace(config.loss, warmup_teacher_temp_length=length))
    assert build_schedules(config, 17).teacher_temp.warmup_steps == steps
    flat = replace(config, loss=replace(config.loss, warmup_teacher_temp=0.07))
    assert build_schedules(flat, 17).teacher_temp.warmup_steps == 0


def test_a_temperature_warmup_in_steps_moves_every_step() -> None:
    config = config_of()
    config = replace(config, loss=replace(config.loss, warmup_teacher_temp_length="4st"))
    ours = [build_schedules(config, IMAGES).at(step).teacher_temp for step in range(7)]
    np.testing.assert_allclose(ours, [*np.linspace(0.03, 0.07, 4), 0.07, 0.07, 0.07], rtol=1e-14)


def test_an_epoch_that_is_no_whole_number_of_steps_changes_temperature_with_its_first_image() -> None:
    """17 images, 5 a step: epoch 1 starts inside step 3, so step 4 is the first that starts in it."""
    config = replace(config_of(), train=TrainSection(length="3ep", batch_size=5))
    config = replace(config, loss=replace(config.loss, warmup_teacher_temp_length="2ep"))
    ours = [build_schedules(config, 17).at(step).teacher_temp for step in range(11)]
    np.testing.assert_allclose(ours, [0.03] * 4 + [0.07] * 7, rtol=1e-14)


@pytest.mark.parametrize(("length", "steps"), [("0ep", 0), ("1ep", 5), ("2ep", 10), ("3st", 3)])
def test_the_last_layer_thaws_on_time(length: str, steps: int) -> None:
    schedules = build_schedules(config_of(freeze_last_layer=length), IMAGES)
    assert [schedules.at(step).train_last_layer for step in range(12)] == [step >= steps for step in range(12)]


@pytest.mark.parametrize("warmup", ["30st", "6ep", "100ep"])
def test_a_warmup_that_would_fill_the_run_is_cut_and_noted(warmup: str) -> None:
    schedules = build_schedules(config_of(lr=0.3, warmup=warmup), IMAGES)
    assert schedules.lr.warmup_steps == 29
    (note,) = schedules.notes
    assert f"optim.warmup={warmup}" in note
    assert "29 of 30" in note
    assert schedules.at(28).lr == pytest.approx(0.3 * BATCH / 256, rel=1e-12)


def test_a_run_of_one_step_has_settings() -> None:
    config = replace(config_of(lr=0.3), train=TrainSection(length="1st", batch_size=BATCH))
    schedules = build_schedules(config, IMAGES)
    assert schedules.total_steps == 1
    assert schedules.at(0).lr == pytest.approx(0.3 * BATCH / 256)


def test_past_the_end_the_last_value_stays() -> None:
    schedules = build_schedules(config_of(), IMAGES)
    assert schedules.at(10_000) == schedules.at(schedules.total_steps - 1)


def test_lengths_in_steps_epochs_and_images_are_the_same_length() -> None:
    totals = []
    for length in ("30st", "6ep", "480im", "0.48kim"):
        config = replace(config_of(), train=TrainSection(length=length, batch_size=BATCH))
        totals.append(build_schedules(config, IMAGES))
    assert all(schedules == totals[0] for schedules in totals)


def test_the_recorded_schedules_are_reproduced() -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        meta = json.loads(str(golden["meta.json"]))["config"]
        config = Config(
            train=TrainSection(length=f"{meta['epochs']}ep", batch_size=meta["batch"]),
            optim=OptimSection(
                lr=meta["lr_base"],
                lr_reference_batch=meta["batch"],
                lr_final=meta["lr_final"],
                warmup=f"{meta['warmup_epochs']}ep",
                weight_decay=meta["weight_decay"],
                weight_decay_final=meta["weight_decay_end"],
            ),
            loss=LossSection(
                warmup_teacher_temp=meta["warmup_teacher_temp"],
                teacher_temp=meta["teacher_temp"],
                warmup_teacher_temp_length=f"{meta['warmup_teacher_temp_epochs']}ep",
            ),
            ema=EmaSection(momentum=meta["teacher_momentum"]),
        )
        schedules = build_schedules(config, meta["batch"] * meta["steps_per_epoch"])
        steps = [schedules.at(step) for step in range(schedules.total_steps)]
        for key in ("lr", "weight_decay", "momentum"):
            np.testing.assert_allclose(
                [getattr(s, key) for s in steps], golden[f"schedule/{key}"], rtol=1e-12, atol=1e-18
            )
        temperatures = [s.teacher_temp for s in steps[:: meta["steps_per_epoch"]]]
        np.testing.assert_allclose(temperatures, golden["schedule/teacher_temp"], rtol=1e-12)
