"""The views of a run on a CUDA device are those of the CPU, repeat to the bit, and nobody waits for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dino_dist.config import AugmentSection, Config, DataSection
from dino_dist.data.crops.augment import resize_for_eval
from dino_dist.data.loading.batch import Batch
from dino_dist.data.order.order import StreamIds
from dino_dist.step import Views
from dino_dist.views import ViewDescription, ViewRenderer, view_recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PUBLISHED = AugmentSection(local_crops=2)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES_PX = [(375, 500), (37, 53), (1, 300), (300, 1), (1, 1), (640, 427), (224, 224), (97, 1200)]
GRAY_LEVEL = 1 / 255 / 0.225
"""One of 256 levels, in normalised units."""


@pytest.fixture(scope="module")
def images(pictures: Any) -> Any:
    return pictures.random(SIZES_PX)


def batch_of(images: Any, augment: AugmentSection) -> Batch:
    """With parameters of the views."""
    zeros = np.zeros_like(images.ids)
    ids = StreamIds(epochs=zeros, sample_ids=images.ids, repeats=zeros)
    describe = ViewDescription(
        recipes=tuple(view_recipes(augment)),
        seed=5,
        share_jitter=augment.share_jitter,
        drop_path_rates=(0.0, 0.1),
    )
    return Batch(
        pixels=images.pixels,
        sizes=images.sizes,
        sample_ids=torch.from_numpy(ids.sample_ids),
        epochs=torch.from_numpy(ids.epochs),
        repeats=torch.from_numpy(ids.repeats),
        labels=torch.full((len(ids.sample_ids),), -1),
        step=0,
        extra=describe(ids, images.sizes.numpy()),
    )


def renderer(augment: AugmentSection, device: torch.device) -> ViewRenderer:
    return ViewRenderer(Config(data=DataSection(train="none"), augment=augment), device, torch.float32)


def differences(images: Any, augment: AugmentSection) -> torch.Tensor:
    """Of all pixels of all views, in grey levels."""
    batch = batch_of(images, augment)
    ours, expected = renderer(augment, CUDA)(batch.to(CUDA)), renderer(augment, CPU)(batch)
    pairs = zip(
        [*ours.student_crops, ours.teacher_crops], [*expected.student_crops, expected.teacher_crops], strict=True
    )
    return torch.cat([((a.cpu() - b).abs() / GRAY_LEVEL).flatten() for a, b in pairs])


def test_device_crops_are_cpu_crops(images: Any) -> None:
    """Solarize compares with a threshold, which rounding may cross at a few pixels; without it none differs."""
    assert float(differences(images, replace(PUBLISHED, solarize_global_2_p=0.0)).max()) <= 1.0
    all_of_it = differences(images, PUBLISHED)
    assert float((all_of_it > 1.0).double().mean()) <= 1e-3


def test_crops_of_an_image_jittered_as_a_whole_are_the_cpus(images: Any) -> None:
    shared = replace(
        PUBLISHED, share_jitter=True, teacher_sees_colors=False, blur_filter="taps9", solarize_global_2_p=0.0
    )
    assert float(differences(images, shared).max()) <= 1.0


def test_each_operation_alone_is_the_cpus(images: Any) -> None:
    off = {name: 0.0 for name in ("flip_p", "jitter_p", "gray_p", "blur_global_1_p", "blur_global_2_p", "blur_local_p")}
    plain = replace(PUBLISHED, solarize_global_2_p=0.0, **off)  # type: ignore[arg-type]
    for changes in ({}, {"flip_p": 1.0}, {"jitter_p": 1.0}, {"gray_p": 1.0}, {"blur_local_p": 1.0}):
        largest = float(differences(images, replace(plain, **changes)).max())  # type: ignore[arg-type]
        assert largest <= 1.0, (changes, largest)


def test_rendering_repeats_to_the_bit(images: Any) -> None:
    batch, render = batch_of(images, PUBLISHED).to(CUDA), renderer(PUBLISHED, CUDA)
    first, second = render(batch), render(batch)
    assert all(torch.equal(a, b) for a, b in zip(first.student_crops, second.student_crops, strict=True))


def test_a_batch_on_the_device_is_rendered_without_waiting(images: Any) -> None:
    batch, render = batch_of(images, PUBLISHED).to(CUDA), renderer(PUBLISHED, CUDA)
    render(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        views: Views = render(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert views.drop_path is not None
    assert views.global_crops.device.type == views.drop_path.device.type == "cuda"
    assert bool(torch.isfinite(views.global_crops).all())


def test_evaluations_view_is_the_cpus(images: Any) -> None:
    batch = batch_of(images, PUBLISHED)
    settings = {"resize_px": 64, "crop_px": 56, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
    expected = resize_for_eval(batch.pixels, batch.sizes, **settings)  # type: ignore[arg-type]
    ours = resize_for_eval(batch.pixels.to(CUDA), batch.sizes, **settings)  # type: ignore[arg-type]
    assert float((ours.cpu() - expected).abs().max()) <= 0.02
