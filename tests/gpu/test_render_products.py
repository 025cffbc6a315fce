"""Products on a CUDA device: as near the CPU's as float16 allows, the same bits in any batch, and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_dist.data.crops.buckets import Bucket, bucket_of
from dino_dist.data.crops.crop_parameters import ViewRecipe
from dino_dist.data.crops.render_products import ProductRenderer
from dino_dist.data.crops.render_rules import Rendered, RenderRules
from dino_dist.data.crops.resample import center_crops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES_PX = [(375, 500), (37, 53), (1, 300), (300, 1), (1, 1), (640, 427), (224, 224), (97, 1200), (500, 375), (8, 8)]
RULES = RenderRules(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
SHARED_JITTER = replace(RULES, blur="taps9", jitter_before_crop=True, plain_views=2)


@pytest.fixture(scope="module")
def images(pictures: Any) -> Any:
    return pictures.random(SIZES_PX)


@pytest.fixture(scope="module")
def view(full_recipe: ViewRecipe) -> ViewRecipe:
    """Solarize compares with a threshold, which rounding may cross."""
    return replace(full_recipe, size_px=224, solarize_p=0.0)


@pytest.fixture(scope="module")
def recipes(view: ViewRecipe) -> list[ViewRecipe]:
    return [view, view, *[replace(view, size_px=96, scale=(0.05, 0.4))] * 3]


def inputs_of(batch: Any, recipes: Sequence[ViewRecipe], seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, sizes and parameters, in host memory."""
    return batch.pixels, batch.sizes, batch.drawn(recipes, seed=seed, share_jitter=True)


def render(renderer: ProductRenderer, pixels: Tensor, sizes: Tensor, params: Tensor) -> Rendered:
    return renderer(pixels.to(renderer.device), sizes, params)


def levels(rendered: Rendered) -> Tensor:
    """All of it in grey levels, on the CPU."""
    views = [*rendered.views, *([] if rendered.plain is None else [rendered.plain])]
    return 255.0 * torch.cat([view.cpu().flatten() for view in views])


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("operands", "tolerance"), [(torch.float16, 0.3), (torch.float32, 0.02)])
def test_crops_are_the_cpus(images: Any, recipes: list[ViewRecipe], operands: torch.dtype, tolerance: float) -> None:
    without_colors = [replace(recipe, jitter_p=0.0, gray_p=0.0, blur_p=0.0) for recipe in recipes]
    inputs = inputs_of(images, without_colors)
    on_cuda = ProductRenderer(without_colors, rules=RULES, device=CUDA, operand_dtype=operands)
    on_cpu = ProductRenderer(without_colors, rules=RULES, device=CPU)
    difference = (levels(render(on_cuda, *inputs)) - levels(render(on_cpu, *inputs))).abs()
    assert float(difference.max()) <= tolerance
    assert float(difference.mean()) <= tolerance / 10


@pytest.mark.parametrize("rules", [RULES, SHARED_JITTER])
def test_colours_are_the_cpus(images: Any, recipes: list[ViewRecipe], rules: RenderRules) -> None:
    inputs = inputs_of(images, recipes)
    for operands, most in ((torch.float32, 0.1), (torch.float16, 1.0)):
        on_cuda = ProductRenderer(recipes, rules=rules, device=CUDA, operand_dtype=operands)
        on_cpu = ProductRenderer(recipes, rules=rules, device=CPU)
        difference = (levels(render(on_cuda, *inputs)) - levels(render(on_cpu, *inputs))).abs()
        assert float(difference.max()) <= most, operands


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rules", [RULES, SHARED_JITTER])
def test_a_sample_renders_to_the_same_bits_in_any_batch(
    images: Any, recipes: list[ViewRecipe], rules: RenderRules, compiled: bool
) -> None:
    renderer = ProductRenderer(recipes, rules=rules, device=CUDA, compile=compiled)
    num = len(SIZES_PX)
    whole = render(renderer, *inputs_of(images, recipes)).views
    for ids in ([0], [7], [8, 0], [5, 9, 2, 2, 6], list(range(num - 1, -1, -1)) * 4):
        some = render(renderer, *inputs_of(images.chosen(ids), recipes)).views
        for views, expected in zip(some, whole, strict=True):
            chosen = torch.unflatten(expected, 0, (-1, num))[:, ids]
            assert torch.equal(torch.unflatten(views, 0, (-1, len(ids))), chosen), ids


@pytest.mark.parametrize("rules", [RULES, SHARED_JITTER])
def test_compiled_is_eager_without_waiting_or_compiling_again(
    images: Any, recipes: list[ViewRecipe], rules: RenderRules
) -> None:
    renderer = ProductRenderer(recipes, rules=rules, device=CUDA, compile=True)
    eager = ProductRenderer(recipes, rules=rules, device=CUDA)
    renderer.warm_up({bucket_of(*size) for size in SIZES_PX})
    for seed in (5, 6):
        pixels, sizes, params = inputs_of(images, recipes, seed)
        on_device, pinned = pixels.to(CUDA), params.pin_memory()
        expected = levels(eager(on_device, sizes, params))
        with torch.compiler.set_stance("fail_on_recompile"), waiting_is_an_error():
            rendered = renderer(on_device, sizes, pinned)
        assert float((levels(rendered) - expected).abs().max()) <= 0.3


@pytest.mark.parametrize("rules", [RULES, SHARED_JITTER])
def test_a_pinned_batch_is_rendered_without_waiting(images: Any, recipes: list[ViewRecipe], rules: RenderRules) -> None:
    pixels, sizes, params = inputs_of(images.chosen(list(range(len(SIZES_PX))) * 5), recipes)
    renderer = ProductRenderer(recipes, rules=rules, device=CUDA, dtype=torch.bfloat16)
    on_device, pinned = pixels.to(CUDA), params.pin_memory()
    renderer(on_device, sizes, pinned)
    with waiting_is_an_error():
        rendered = renderer(on_device, sizes, pinned)
    assert bool(torch.isfinite(levels(rendered)).all())


def test_memory_of_a_full_chunk_is_bounded(view: ViewRecipe) -> None:
    """As the module's first lines say, for 32 images of the most common bucket."""
    recipes = [view, view, *[replace(view, size_px=96)] * 8]
    renderer = ProductRenderer(recipes, rules=RULES, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    renderer.warm_up([Bucket(512, 512)])
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1.0e9


def test_center_crops_are_the_cpus(images: Any) -> None:
    expected = center_crops(images.pixels, SIZES_PX, resize_px=64, crop_px=56)
    ours = center_crops(images.pixels.to(CUDA), SIZES_PX, resize_px=64, crop_px=56)
    assert float((ours.cpu() - expected).abs().max()) <= 0.02
