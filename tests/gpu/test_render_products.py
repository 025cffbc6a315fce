"""Products on a CUDA device: as near the CPU's as float16 allows, the same bits in any batch, and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_dist.data.crops.buckets import Bucket, bucket_of
from dino_dist.data.crops.crop_parameters import ViewRecipe, draw
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
GLOBAL = ViewRecipe(
    size_px=224,
    scale=(0.4, 1.0),
    ratio=(3 / 4, 4 / 3),
    flip_p=0.5,
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    gray_p=0.2,
    blur_p=0.5,
    blur_sigma_px=(0.1, 2.0),
    solarize_p=0.0,
)
RECIPES = [GLOBAL, GLOBAL, *[replace(GLOBAL, size_px=96, scale=(0.05, 0.4))] * 3]
WITHOUT_COLORS = [replace(recipe, jitter_p=0.0, gray_p=0.0, blur_p=0.0) for recipe in RECIPES]


def random_images(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """uint8 [H, W, 3]: noise beside ramps, so that both overshoot and flat regions occur."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for height, width in sizes:
        noise = torch.rand(height, width, 3, generator=generator)
        ramp = torch.linspace(0, 1, height)[:, None, None] * torch.linspace(1, 0, width)[None, :, None]
        left = torch.arange(width)[None, :, None] < width // 2
        images.append((torch.where(left, noise, ramp) * 255.99).to(torch.uint8))
    return images


IMAGES = random_images(SIZES_PX)


def batch(recipes: Sequence[ViewRecipe], ids: Sequence[int], seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, sizes and parameters of some of `IMAGES`, in host memory."""
    sizes = np.array([SIZES_PX[index] for index in ids], dtype=np.int64)
    sample_ids = np.array(ids, dtype=np.int64)
    rows = draw(
        recipes, seed=seed, epochs=np.zeros_like(sample_ids), sample_ids=sample_ids, sizes=sizes, share_jitter=True
    )
    return torch.cat([IMAGES[index].flatten() for index in ids]), torch.from_numpy(sizes), torch.from_numpy(rows)


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
def test_crops_are_the_cpus(operands: torch.dtype, tolerance: float) -> None:
    inputs = batch(WITHOUT_COLORS, range(len(IMAGES)))
    on_cuda = ProductRenderer(WITHOUT_COLORS, rules=RULES, device=CUDA, operand_dtype=operands)
    on_cpu = ProductRenderer(WITHOUT_COLORS, rules=RULES, device=CPU)
    difference = (levels(render(on_cuda, *inputs)) - levels(render(on_cpu, *inputs))).abs()
    assert float(difference.max()) <= tolerance
    assert float(difference.mean()) <= tolerance / 10


@pytest.mark.parametrize("rules", [RULES, SHARED_JITTER])
def test_colours_are_the_cpus(rules: RenderRules) -> None:
    inputs = batch(RECIPES, range(len(IMAGES)))
    for operands, most in ((torch.float32, 0.1), (torch.float16, 1.0)):
        on_cuda = ProductRenderer(RECIPES, rules=rules, device=CUDA, operand_dtype=operands)
        on_cpu = ProductRenderer(RECIPES, rules=rules, device=CPU)
        difference = (levels(render(on_cuda, *inputs)) - levels(render(on_cpu, *inputs))).abs()
        assert float(difference.max()) <= most, operands


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rules", [RULES, SHARED_JITTER])
def test_a_sample_renders_to_the_same_bits_in_any_batch(rules: RenderRules, compiled: bool) -> None:
    renderer = ProductRenderer(RECIPES, rules=rules, device=CUDA, compile=compiled)
    num = len(IMAGES)
    whole = render(renderer, *batch(RECIPES, range(num))).views
    for ids in ([0], [7], [8, 0], [5, 9, 2, 2, 6], list(range(num - 1, -1, -1)) * 4):
        some = render(renderer, *batch(RECIPES, ids)).views
        for views, expected in zip(some, whole, strict=True):
            assert torch.equal(views.unflatten(0, (-1, len(ids))), expected.unflatten(0, (-1, num))[:, ids]), ids


@pytest.mark.parametrize("rules", [RULES, SHARED_JITTER])
def test_compiled_is_eager_without_waiting_or_compiling_again(rules: RenderRules) -> None:
    renderer = ProductRenderer(RECIPES, rules=rules, device=CUDA, compile=True)
    eager = ProductRenderer(RECIPES, rules=rules, device=CUDA)
    renderer.warm_up({bucket_of(*size) for size in SIZES_PX})
    for seed in (5, 6):
        pixels, sizes, params = batch(RECIPES, range(len(IMAGES)), seed)
        on_device, pinned = pixels.to(CUDA), params.pin_memory()
        expected = levels(eager(on_device, sizes, params))
        with torch.compiler.set_stance("fail_on_recompile"), waiting_is_an_error():
            rendered = renderer(on_device, sizes, pinned)
        assert float((levels(rendered) - expected).abs().max()) <= 0.3


@pytest.mark.parametrize("rules", [RULES, SHARED_JITTER])
def test_a_pinned_batch_is_rendered_without_waiting(rules: RenderRules) -> None:
    pixels, sizes, params = batch(RECIPES, list(range(len(IMAGES))) * 5)
    renderer = ProductRenderer(RECIPES, rules=rules, device=CUDA, dtype=torch.bfloat16)
    on_device, pinned = pixels.to(CUDA), params.pin_memory()
    renderer(on_device, sizes, pinned)
    with waiting_is_an_error():
        rendered = renderer(on_device, sizes, pinned)
    assert bool(torch.isfinite(levels(rendered)).all())


def test_memory_of_a_full_chunk_is_bounded() -> None:
    """As the module's first lines say, for 32 images of the most common bucket."""
    recipes = [GLOBAL, GLOBAL, *[replace(GLOBAL, size_px=96)] * 8]
    renderer = ProductRenderer(recipes, rules=RULES, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    renderer.warm_up([Bucket(512, 512)])
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1.0e9


def test_center_crops_are_the_cpus() -> None:
    pixels = torch.cat([image.flatten() for image in IMAGES])
    expected = center_crops(pixels, SIZES_PX, resize_px=64, crop_px=56)
    ours = center_crops(pixels.to(CUDA), SIZES_PX, resize_px=64, crop_px=56)
    assert float((ours.cpu() - expected).abs().max()) <= 0.02
