"""The views of a step: which crops in which order, and drop-path factors that belong to a sample, not to a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.config import AugmentSection, Config, DataSection
from dino_dist.data.crops.render_cpu import CpuRenderer
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.data.loading.batch import Batch
from dino_dist.data.order.order import StreamIds
from dino_dist.randomness import drop_path_uniforms
from dino_dist.views import ViewDescription, ViewRenderer, view_recipes

SMALL = AugmentSection(global_px=16, local_px=8, local_crops=3)
RATES = (0.0, 0.2, 0.5)


def ids_of(*ids: int) -> NDArray[np.int64]:
    return np.array(ids, dtype=np.int64)


def sizes_of(num: int) -> NDArray[np.int64]:
    return np.tile(np.array([[20, 30]], dtype=np.int64), (num, 1))


def description(rates: tuple[float, ...] = RATES, augment: AugmentSection = SMALL, seed: int = 7) -> ViewDescription:
    return ViewDescription(
        recipes=tuple(view_recipes(augment)), seed=seed, share_jitter=augment.share_jitter, drop_path_rates=rates
    )


def stream(ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> StreamIds:
    return StreamIds(epochs=epochs, sample_ids=ids, repeats=np.zeros_like(ids))


def factors(ids: NDArray[np.int64], *, epoch: int = 0, seed: int = 7) -> Tensor:
    """[depth, 2, views, n]"""
    described = description(seed=seed)(stream(ids, np.full_like(ids, epoch)), sizes_of(len(ids)))
    return described["drop_path"].reshape(len(RATES), 2, 2 + SMALL.local_crops, len(ids))


def test_two_global_views_come_first_and_differ_as_published() -> None:
    first, second, *local = view_recipes(AugmentSection())
    assert len(local) == 8
    assert (first.size_px, second.size_px, {r.size_px for r in local}) == (224, 224, {96})
    assert (first.scale, second.scale, {r.scale for r in local}) == ((0.4, 1.0), (0.4, 1.0), {(0.05, 0.4)})
    assert (first.blur_p, second.blur_p, {r.blur_p for r in local}) == (1.0, 0.1, {0.5})
    assert (first.solarize_p, second.solarize_p, {r.solarize_p for r in local}) == (0.0, 0.2, {0.0})
    for recipe in (first, second, *local):
        assert (recipe.flip_p, recipe.jitter_p, recipe.gray_p) == (0.5, 0.8, 0.2)
        assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.4, 0.4, 0.2, 0.1)
        assert recipe.blur_sigma_px == (0.1, 2.0)
        assert recipe.ratio == pytest.approx((3 / 4, 4 / 3))


def test_every_setting_reaches_its_recipe() -> None:
    augment = AugmentSection(
        global_px=32,
        local_px=12,
        local_crops=1,
        global_scale=(0.3, 0.9),
        local_scale=(0.1, 0.3),
        flip_p=0.11,
        jitter_p=0.12,
        brightness=0.13,
        contrast=0.14,
        saturation=0.15,
        hue=0.16,
        gray_p=0.17,
        blur_global_1_p=0.18,
        blur_global_2_p=0.19,
        blur_local_p=0.21,
        blur_sigma_px=(0.5, 0.6),
        solarize_global_2_p=0.22,
        aspect_ratio=(0.7, 1.1),
    )
    first, second, local = view_recipes(augment)
    common = {"flip_p": 0.11, "jitter_p": 0.12, "brightness": 0.13, "contrast": 0.14, "saturation": 0.15, "hue": 0.16}
    for recipe, changed in (
        (first, {"size_px": 32, "scale": (0.3, 0.9), "blur_p": 0.18, "solarize_p": 0.0}),
        (second, {"size_px": 32, "scale": (0.3, 0.9), "blur_p": 0.19, "solarize_p": 0.22}),
        (local, {"size_px": 12, "scale": (0.1, 0.3), "blur_p": 0.21, "solarize_p": 0.0}),
    ):
        assert recipe == replace(recipe, **common, **changed, gray_p=0.17, ratio=(0.7, 1.1), blur_sigma_px=(0.5, 0.6))  # type: ignore[arg-type]


def test_without_rates_nothing_is_drawn() -> None:
    described = description(rates=(0.0, 0.0))(stream(ids_of(1, 2), ids_of(0, 0)), sizes_of(2))
    assert described.keys() == {"crops"}
    assert described["crops"].shape[:2] == (5, 2)


def test_a_factor_is_zero_or_makes_up_for_the_zeros() -> None:
    drawn = factors(np.arange(50, dtype=np.int64))
    assert drawn.shape == (3, 2, 5, 50)
    for block, rate in enumerate(RATES):
        kept = torch.tensor(1 / (1 - rate), dtype=torch.float32)
        assert bool(((drawn[block] == 0) | (drawn[block] == kept)).all())
    assert bool((drawn[0] == 1).all())


def test_branches_are_dropped_at_their_rates() -> None:
    drawn = factors(np.arange(4000, dtype=np.int64))
    for block, rate in enumerate(RATES):
        for branch in range(2):
            share = (drawn[block, branch] == 0).double().mean().item()
            # 20,000 draws: five standard deviations
            assert abs(share - rate) <= 5 * (rate * (1 - rate) / 20_000) ** 0.5, (block, branch, share)


def test_blocks_branches_and_views_are_drawn_apart() -> None:
    """With a rate of one half, two independent rows agree in half of the samples."""
    described = description(rates=(0.5, 0.5))(stream(np.arange(2000), np.zeros(2000, dtype=np.int64)), sizes_of(2000))
    rows = (described["drop_path"].reshape(2, 2, 5, 2000) == 0).flatten(0, 2).double()
    agreement = (rows @ rows.T + (1 - rows) @ (1 - rows).T) / 2000
    others = agreement[~torch.eye(len(rows), dtype=torch.bool)]
    assert float((others - 0.5).abs().max()) < 0.06, others


def test_factors_belong_to_the_sample_not_to_its_place_in_a_batch() -> None:
    whole = factors(ids_of(5, 900, 17, 2))
    torch.testing.assert_close(factors(ids_of(17, 5)), whole[..., [2, 0]], rtol=0, atol=0)
    torch.testing.assert_close(factors(ids_of(2)), whole[..., [3]], rtol=0, atol=0)


def test_factors_change_with_epoch_and_seed() -> None:
    ids = np.arange(200, dtype=np.int64)
    assert not torch.equal(factors(ids), factors(ids, epoch=1))
    assert not torch.equal(factors(ids), factors(ids, seed=8))
    assert torch.equal(factors(ids), factors(ids))


def test_factors_are_crop_major_and_come_from_the_named_draws() -> None:
    ids = ids_of(3, 4)
    described = description()(stream(ids, ids_of(0, 1)), sizes_of(2))["drop_path"]
    for view in range(5):
        for index, (sample, epoch) in enumerate(zip((3, 4), (0, 1), strict=True)):
            uniforms = drop_path_uniforms(7, ids_of(epoch), ids_of(sample), view, 3)[0]
            expected = (uniforms >= np.array(RATES)[:, None]) / (1 - np.array(RATES)[:, None])
            np.testing.assert_allclose(described[:, :, 2 * view + index].numpy(), expected, rtol=1e-6)


def batch_of(augment: AugmentSection, ids: tuple[int, ...]) -> Batch:
    """Images of noise that depends on their id alone, with their descriptions."""
    shapes = [(20 + sample % 3, 30) for sample in ids]
    images = [
        torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(sample), dtype=torch.uint8)
        for shape, sample in zip(shapes, ids, strict=True)
    ]
    sizes = np.array(shapes, dtype=np.int64)
    epochs = np.zeros(len(ids), dtype=np.int64)
    return Batch(
        pixels=torch.cat([image.flatten() for image in images]),
        sizes=torch.from_numpy(sizes),
        sample_ids=torch.from_numpy(ids_of(*ids)),
        epochs=torch.from_numpy(epochs),
        labels=torch.full((len(ids),), -1),
        repeats=torch.zeros(len(ids), dtype=torch.int64),
        step=0,
        extra=description(augment=augment)(stream(ids_of(*ids), epochs), sizes),
    )


def renderer(augment: AugmentSection) -> ViewRenderer:
    config = Config(data=DataSection(train="none"), augment=augment)
    return ViewRenderer(config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("local_px", [8, 16], ids=["two sides", "one side"])
@pytest.mark.parametrize("local_crops", [0, 1, 3])
def test_views_are_split_into_global_and_local(local_px: int, local_crops: int) -> None:
    augment = replace(SMALL, local_px=local_px, local_crops=local_crops)
    views = renderer(augment)(batch_of(augment, (1, 2, 3)))
    assert views.num_images == 3
    assert views.global_crops.shape == (6, 3, 16, 16)
    if local_crops:
        assert views.local_crops is not None
        assert views.local_crops.shape == (3 * local_crops, 3, local_px, local_px)
    else:
        assert views.local_crops is None
    assert len(views.student_crops) == (2 if local_crops else 1)
    assert views.drop_path is not None
    assert views.drop_path.shape == (3, 2, (2 + local_crops) * 3)


def test_an_images_views_do_not_depend_on_its_neighbours() -> None:
    """Crop-major order: all of view 0, then all of view 1."""
    whole = renderer(SMALL)(batch_of(SMALL, (1, 2, 3)))
    alone = renderer(SMALL)(batch_of(SMALL, (2,)))
    assert whole.local_crops is not None
    assert alone.local_crops is not None
    torch.testing.assert_close(whole.global_crops[1::3], alone.global_crops, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.local_crops[1::3], alone.local_crops, rtol=1e-5, atol=1e-5)


def test_a_repeat_of_a_sample_drops_other_branches() -> None:
    ids, zeros = np.full(60, 5, dtype=np.int64), np.zeros(60, dtype=np.int64)
    repeats = description()(StreamIds(epochs=zeros, sample_ids=ids, repeats=np.arange(60)), sizes_of(60))["drop_path"]
    assert len(repeats.flatten(0, 1).T.reshape(5, 60, -1)[0].unique(dim=0)) > 5
    assert torch.equal(repeats.unflatten(2, (5, 60))[..., 0], factors(ids_of(5))[..., 0])


def test_a_teacher_may_be_spared_all_colors() -> None:
    """Both networks see the same crops, the teacher's unchanged in colour."""
    colorful = replace(SMALL, jitter_p=1.0, gray_p=1.0)
    views = renderer(replace(colorful, teacher_sees_colors=False))(batch_of(colorful, (1, 2, 3)))
    plain = replace(SMALL, jitter_p=0.0, gray_p=0.0, solarize_global_2_p=0.0)
    plain = replace(plain, blur_global_1_p=0.0, blur_global_2_p=0.0, blur_local_p=0.0)
    expected = renderer(plain)(batch_of(plain, (1, 2, 3)))
    torch.testing.assert_close(views.teacher_crops, expected.global_crops, rtol=1e-5, atol=1e-5)
    usual = renderer(colorful)(batch_of(colorful, (1, 2, 3)))
    assert torch.equal(views.global_crops, usual.global_crops)
    assert usual.teacher_crops is usual.global_crops


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"blur_filter": "taps9"}, {"blur": "taps9"}),
        ({"quantize": "uint8"}, {"quantize": "uint8"}),
        ({"share_jitter": True}, {"jitter_before_crop": True}),
        ({"teacher_sees_colors": False}, {"plain_views": 2}),
    ],
)
def test_every_option_of_rendering_reaches_the_renderer(changes: dict[str, Any], rules: dict[str, Any]) -> None:
    colorful = replace(SMALL, jitter_p=1.0, blur_local_p=1.0)
    augment = replace(colorful, **changes)
    batch = batch_of(augment, (1, 2, 3))
    data = DataSection()
    renders = CpuRenderer(view_recipes(augment), rules=RenderRules(mean=data.mean, std=data.std, **rules))
    expected = renders(batch.pixels, batch.sizes, batch.extra["crops"])
    views, usual = renderer(augment)(batch), renderer(colorful)(batch)
    assert views.local_crops is not None
    assert usual.local_crops is not None
    assert torch.equal(views.local_crops, expected.views[1])
    if expected.plain is None:
        assert not torch.equal(views.local_crops, usual.local_crops)
    else:
        assert torch.equal(views.teacher_crops, expected.plain)
