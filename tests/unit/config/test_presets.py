"""Presets of the crops: the published pipelines, and what stands beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_dist.augment_presets import AUGMENT_PRESETS
from dino_dist.config import AugmentSection
from dino_dist.config_file import load_config, to_yaml
from dino_dist.errors import UserError

TRAIN = "data.train=shards"


@pytest.mark.parametrize(
    ("preset", "blurs", "scales", "blur_filter", "flip_p"),
    [
        ("dino_v1", (1.0, 0.1, 0.5), ((0.4, 1.0), (0.05, 0.4)), "box3", 0.5),
        ("dinov2_as_trained", (0.0, 0.9, 0.5), ((0.32, 1.0), (0.05, 0.32)), "taps9", 0.5),
        ("dinov2_as_intended", (1.0, 0.1, 0.5), ((0.32, 1.0), (0.05, 0.32)), "taps9", 0.5),
        ("dinov3", (0.0, 0.9, 0.5), ((0.32, 1.0), (0.05, 0.32)), "taps9", 0.0),
    ],
)
def test_presets_are_the_published_pipelines(
    preset: str,
    blurs: tuple[float, ...],
    scales: tuple[tuple[float, float], ...],
    blur_filter: str,
    flip_p: float,
) -> None:
    """DINOv2's released code inverts its blur probabilities; what was trained differs from what it reads as."""
    augment = load_config(None, [TRAIN, f"augment.preset={preset}"]).augment
    assert (augment.blur_global_1_p, augment.blur_global_2_p, augment.blur_local_p) == blurs
    assert (augment.global_scale, augment.local_scale) == scales
    assert (augment.blur_filter, augment.flip_p) == (blur_filter, flip_p)
    assert (augment.jitter_p, augment.gray_p, augment.solarize_global_2_p) == (0.8, 0.2, 0.2)
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.4, 0.4, 0.2, 0.1)


def test_the_defaults_are_a_preset() -> None:
    assert load_config(None, [TRAIN, "augment.preset=dino_v1"]).augment == AugmentSection()
    for name, values in AUGMENT_PRESETS.items():
        assert values.keys() == AUGMENT_PRESETS["dino_v1"].keys(), name


def test_a_preset_replaces_what_comes_before_and_yields_to_what_stands_beside(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("augment: {gray_p: 0.7, preset: dinov3, flip_p: 0.3, global_px: 32}\nmodel: {patch_size: 16}\n")
    augment = load_config(str(path), [TRAIN]).augment
    assert (augment.gray_p, augment.flip_p, augment.blur_global_2_p) == (0.7, 0.3, 0.9)
    augment = load_config(str(path), [TRAIN, "augment.gray_p=0.1", "augment.preset=dinov2_as_intended"]).augment
    assert (augment.gray_p, augment.flip_p, augment.blur_global_2_p, augment.global_px) == (0.1, 0.5, 0.1, 32)
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(load_config(str(path), [TRAIN])))
    assert load_config(str(saved)) == load_config(str(path), [TRAIN])
    with pytest.raises(UserError, match="dinov2_as_trained"):
        load_config(None, [TRAIN, "augment.preset=dinov2"])
