"""Recipes: what each says of itself, and the paper's numbers that it comes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_dist.config_checks import check_for_world
from dino_dist.config_file import load_config, recipe_names, recipe_path
from dino_dist.errors import UserError
from dino_dist.schedules import build_schedules

TRAIN = "data.train=shards"
IMAGENET_IMAGES = 1_281_167

RECIPES = {
    # name: (ranks, learning rate after scaling, epochs)
    "dino_vits16_in1k_100ep": (8, 1e-3, 100),
    "dino_vits16_in1k_800ep": (16, 2e-3, 800),
    "dino_vits8_in1k_800ep": (64, 2e-3, 800),
    "dino_vitb16_in1k_400ep": (32, 3e-3, 400),
    "dino_vitb8_in1k_300ep": (176, 5e-4 * 1056 / 256, 300),
}


def test_every_recipe_is_known_to_the_tests() -> None:
    assert set(recipe_names()) == {"quickstart", "fashion_mnist", *RECIPES}
    with pytest.raises(UserError, match="dino_vitb8_in1k_300ep"):
        load_config("dino_vitb8_in1k")


@pytest.mark.parametrize("name", ["quickstart", "fashion_mnist", *RECIPES])
def test_a_recipe_says_what_it_is_and_loads(name: str) -> None:
    path = recipe_path(name)
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in (
        "2104.14294",
        "Run:",
        f"dino-dist {'quickstart' if name == 'quickstart' else f'train {name} '}",
        "Hardware:",
    ):
        assert any(word in line for line in header), f"{path.name}: no {word!r} in the header"
    config = load_config(name, [TRAIN])
    size = RECIPES[name][0] if name in RECIPES else 2
    check_for_world(config, [min(size, 8)] * size)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_the_paper_resolves_to_its_numbers(name: str) -> None:
    path = recipe_path(name)
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 45
    assert "not yet measured" in text
    ranks, peak_lr, epochs = RECIPES[name]
    config = load_config(name, [TRAIN])
    assert config.train.batch_size % ranks == 0
    schedules = build_schedules(config, IMAGENET_IMAGES)
    assert schedules.lr.base == pytest.approx(peak_lr, rel=1e-12)
    assert not schedules.notes
    assert schedules.total_steps == -(-epochs * IMAGENET_IMAGES // config.train.batch_size)
    assert schedules.at(schedules.total_steps - 1).teacher_temp == config.loss.teacher_temp
    frozen_epochs = 3 if "vitb" in name else 1
    assert schedules.freeze_last_layer_steps == -(-frozen_epochs * IMAGENET_IMAGES // config.train.batch_size)


def test_a_folder_with_the_name_of_a_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipe_path("quickstart").name == "quickstart.yaml"
