"""Plain DINO, which the full system is held against: the same steps on equal views, and views of the same rules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_dist.build import build_step
from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.schedules import build_schedules
from dino_dist.step import Views

TOOLS = Path(__file__).parents[2] / "tools"
DATASET_SIZE = 30
SMALL = (
    *("data.train=nowhere", "train.precision=fp64", "train.batch_size=6", "train.length=7st", "optim.warmup=2st"),
    *("optim.freeze_last_layer=2st", "parallel.strategy=none", "loss.warmup_teacher_temp_length=0ep"),
    *("model.embed_dim=24", "model.depth=2", "model.num_heads=3", "head.hidden_dim=20", "head.num_prototypes=32"),
)


@pytest.fixture(scope="module")
def plain_dino() -> Iterator[ModuleType]:
    """As the tools import each other."""
    sys.path.insert(0, str(TOOLS))
    yield import_module("plain_dino")
    sys.path.remove(str(TOOLS))


def config_of(*overrides: str) -> Config:
    return load_config("fashion_mnist", [*SMALL, *overrides])


def random_crops(config: Config, generator: torch.Generator) -> list[Tensor]:
    augment, n = config.augment, config.train.batch_size
    sides = [augment.global_px] * 2 + [augment.local_px] * augment.local_crops
    return [torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64) for side in sides]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("head.batch_norm=false", "augment.local_crops=0", "optim.clip=0.01"),
        ("head.num_layers=2", "head.batch_norm=false", "optim.clip=0", "ema.momentum=0.5", "model.init_std=0.02"),
    ],
    ids=["recipe", "two views, clipped", "one hidden layer, fast teacher"],
)
def test_the_system_takes_the_same_steps_on_equal_views(plain_dino: ModuleType, overrides: tuple[str, ...]) -> None:
    """In float64, over frozen prototypes, warm-up and thaw: losses, centers and every weight of both networks."""
    config = config_of(*overrides)
    step, schedules = build_step(config, World(), "sdpa"), build_schedules(config, DATASET_SIZE)
    plain = plain_dino.PlainDino(config, DATASET_SIZE)
    plain.student.double()
    plain.teacher.double()
    # Both started from one draw in float32; what differs later is their own doing.
    for network in (plain.student, plain.teacher):
        network.start_from(step.networks.student.state_dict())
    generator = torch.Generator().manual_seed(5)
    assert schedules.total_steps == len(plain.lr) == 7
    for index in range(schedules.total_steps):
        crops = random_crops(config, generator)
        local = torch.cat(crops[2:]) if config.augment.local_crops else None
        views = Views(global_crops=torch.cat(crops[:2]), local_crops=local)
        no_flags = torch.zeros(0, dtype=torch.float64)
        result = step([lambda views=views: views], schedules.at(index), no_flags)  # type: ignore[misc]
        assert plain.step(crops, index) == pytest.approx(result.loss.item(), rel=1e-9)
    torch.testing.assert_close(plain.center, step.centering.center_1K, rtol=1e-8, atol=1e-10)
    for ours, network in ((plain.student, step.networks.student), (plain.teacher, step.networks.teacher)):
        expected = plain_dino.PlainNetwork(config).double()
        expected.start_from(network.state_dict())
        for name, parameter in expected.named_parameters():
            # A batch norm undoes what a bias before it adds: such a bias stays at 0 but for rounding.
            torch.testing.assert_close(
                ours.get_parameter(name), parameter, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )  # type: ignore[misc]
    moved = plain.student.prototypes - plain.teacher.prototypes
    assert moved.abs().max() > 0, "the prototypes never thawed: the test has seen too little"


def test_schedules_are_the_systems(plain_dino: ModuleType) -> None:
    config = config_of("train.length=40st", "optim.warmup=9st", "optim.weight_decay_final=0.4", "ema.momentum_final=1")
    plain, schedules = plain_dino.PlainDino(config, DATASET_SIZE), build_schedules(config, DATASET_SIZE)
    settings = [schedules.at(step) for step in range(40)]
    assert plain.lr == pytest.approx([each.lr for each in settings], rel=1e-12)
    assert plain.weight_decay == pytest.approx([each.weight_decay for each in settings], rel=1e-12)
    assert plain.momentum == pytest.approx([each.momentum for each in settings], rel=1e-12)
    assert [step < plain.frozen_steps for step in range(40)] == [not each.train_last_layer for each in settings]


def test_views_are_those_of_the_recipe(plain_dino: ModuleType) -> None:
    """Sizes, normalisation, and one look at what is random: with everything else off a view is a crop of the image."""
    off = [f"augment.{name}_p=0" for name in ("flip", "jitter", "gray", "solarize_global_2")]
    config = config_of(*off, "augment.global_scale=[1,1]", "augment.aspect_ratio=[1,1]", "augment.local_crops=3")
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8))
    views = [transform(image) for transform in plain_dino.view_transforms(config)]
    px = config.augment.local_px
    assert [tuple(view.shape) for view in views] == [(3, 28, 28)] * 2 + [(3, px, px)] * 3
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.data.mean, config.data.std))
    torch.testing.assert_close(views[0], (image / 255 - mean) / std)


@pytest.mark.parametrize(
    "override", ["model.drop_path=0.1", "augment.blur_local_p=0.5", "optim.name=sgd", "head.norm_last_layer=false"]
)
def test_what_the_statement_leaves_out_is_refused(plain_dino: ModuleType, override: str) -> None:
    with pytest.raises(UserError, match=override.split("=")[0].replace("blur_local_p", "blur_")):
        plain_dino.PlainDino(config_of(override), DATASET_SIZE)
