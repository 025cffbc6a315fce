"""The renderer of products equals torchvision given the same parameters, one sample at a time, in any company."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops.buckets import Bucket, bucket_of
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe, draw
from dino_dist.data.crops.render_cpu import CpuRenderer
from dino_dist.data.crops.render_products import ProductRenderer
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.data.crops.resample import center_crops, resize_views, view_weights
from dino_dist.errors import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AS_LEVELS = RenderRules(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), blur="taps9")
"""Without normalisation: views in [0, 1]."""
FULL = ViewRecipe(
    size_px=32,
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
    solarize_p=0.2,
)
PLAIN = replace(FULL, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)
SMALL_SIZES = [(1, 1), (1, 256), (256, 1), (2, 3), (8, 8), (37, 53), (211, 130), (97, 1)]
OPERATIONS: list[Callable[[Tensor, float], Tensor]] = [
    tv.adjust_brightness,
    tv.adjust_contrast,
    tv.adjust_saturation,
    tv.adjust_hue,
]


def random_images(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    """uint8 [H, W, 3], half noise and half smooth, so that both overshoot and flat regions occur."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for height, width in sizes:
        noise = torch.rand(height, width, 3, generator=generator)
        ramp = torch.linspace(0, 1, height)[:, None, None] * torch.linspace(1, 0, width)[None, :, None]
        mask = torch.arange(width)[None, :, None] < width // 2
        images.append((torch.where(mask, noise, ramp) * 255.99).to(torch.uint8))
    return images


def packed(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([image.flatten() for image in images]), torch.tensor([image.shape[:2] for image in images])


def drawn(
    recipes: Sequence[ViewRecipe], images: Sequence[Tensor], ids: Sequence[int], *, share: bool = False
) -> Tensor:
    """Parameters of the samples `ids`, whose pictures are `images`; float64 [views, n, columns]."""
    sample_ids = np.array(ids, dtype=np.int64)
    sizes = np.array([image.shape[:2] for image in images])
    epochs = np.zeros_like(sample_ids)
    rows = draw(recipes, seed=3, epochs=epochs, sample_ids=sample_ids, sizes=sizes, share_jitter=share)
    return torch.from_numpy(rows)


def renderer(recipes: Sequence[ViewRecipe], rules: RenderRules = AS_LEVELS, **changes: Any) -> ProductRenderer:
    return ProductRenderer(recipes, rules=rules, device=CPU, **changes)


def cropped(levels: Tensor, row: Tensor, side_px: int) -> Tensor:
    """torchvision's crop, antialiased resize and flip of float levels [3, H, W], overshoot cut."""
    top, left, height, width, flip = (int(value) for value in row[: Column.FLIP + 1])
    view = tv.resized_crop(
        levels, top, left, height, width, [side_px, side_px], InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 255)
    return tv.horizontal_flip(view) if flip else view


def jittered(picture: Tensor, row: Tensor) -> Tensor:
    """torchvision's jitter and grayscale of float in [0, 1] or of uint8."""
    neutral = (1.0, 1.0, 1.0, 0.0)
    orders = list(itertools.permutations(range(4)))
    for op in orders[int(row[Column.JITTER_ORDER])]:
        factor = float(row[Column.BRIGHTNESS + op].float())
        picture = picture if factor == neutral[op] else OPERATIONS[op](picture, factor)
    return tv.rgb_to_grayscale(picture, num_output_channels=3) if row[Column.GRAY] else picture


def by_torchvision(image: Tensor, rows: Tensor, recipes: Sequence[ViewRecipe], rules: RenderRules) -> list[Tensor]:
    """All views [3, S, S] in [0, 1] of one picture with parameters [views, columns]."""
    levels = image.permute(2, 0, 1)

    def as_picture(levels: Tensor) -> Tensor:
        return levels.round().to(torch.uint8) if rules.quantize else levels / 255

    def as_levels(picture: Tensor) -> Tensor:
        return picture.float() if rules.quantize else picture * 255

    if rules.jitter_before_crop:
        levels = as_levels(jittered(as_picture(levels.float()), rows[0]))
    views = []
    for row, recipe in zip(rows, recipes, strict=True):
        view = as_picture(cropped(levels.float(), row, recipe.size_px))
        view = view if rules.jitter_before_crop else jittered(view, row)
        sigma = float(row[Column.BLUR_SIGMA])
        view = tv.gaussian_blur(view, [9, 9], [sigma, sigma]) if sigma else view
        if row[Column.SOLARIZE]:
            view = tv.solarize(view, 128 if rules.quantize else 128 / 255)
        views.append(as_levels(view) / 255)
    return views


def by_view(views: Sequence[Tensor], num: int) -> Tensor:
    """Of views of one side: [views, n, 3, S, S]."""
    (view,) = views
    return view.unflatten(0, (-1, num))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("operands", "sizes", "tolerance"),
    [
        (torch.float32, [*SMALL_SIZES, *SMALL_SIZES], 0.02),
        (torch.float32, [(4000, 300), (375, 500), (300, 1), (1, 2000)], 0.02),
        (torch.float16, SMALL_SIZES, 0.3),
        (torch.float16, [(1200, 300), (375, 500)], 0.3),
    ],
)
def test_crop_resize_flip_equals_torchvision(
    operands: torch.dtype, sizes: list[tuple[int, int]], tolerance: float
) -> None:
    recipes = [replace(PLAIN, size_px=side, scale=(0.05, 1.0)) for side in (33, 33, 8)]
    images = random_images(sizes)
    params = drawn(recipes, images, range(len(images)))
    large, small = renderer(recipes, operand_dtype=operands)(*packed(images), params).views
    views = [*large.split(len(images)), small]
    for view, image in itertools.product(range(3), range(len(images))):
        expected = cropped(images[image].permute(2, 0, 1).float(), params[view, image], recipes[view].size_px)
        difference = (views[view][image] * 255 - expected).abs().max()
        assert difference <= tolerance, f"{sizes[image]} -> {recipes[view].size_px}: {difference:.4f} grey levels"


def test_an_image_longer_than_any_bucket_and_a_small_box_far_from_its_origin() -> None:
    (image,) = random_images([(3, 20_000)])
    params = drawn([PLAIN], [image], [0])
    params[0, 0, : Column.FLIP + 1] = torch.tensor([0, 19_001, 3, 997, 1])
    assert not bucket_of(3, 20_000).is_listed
    (view,) = renderer([PLAIN])(*packed([image]), params).views
    assert (view[0] * 255 - cropped(image.permute(2, 0, 1).float(), params[0, 0], 32)).abs().max() <= 0.02


@pytest.mark.parametrize("jitter_before_crop", [False, True])
def test_all_operations_equal_torchvisions_on_float(jitter_before_crop: bool) -> None:
    """Solarize compares with a threshold, which rounding may cross at a few pixels."""
    rules = replace(AS_LEVELS, jitter_before_crop=jitter_before_crop)
    images = random_images(SMALL_SIZES * 2, seed=1)
    for solarize_p, most in ((0.0, 0.0), (0.5, 1e-3)):
        recipes = [replace(FULL, solarize_p=solarize_p)] * 2
        params = drawn(recipes, images, range(len(images)), share=jitter_before_crop)
        views = by_view(renderer(recipes, rules)(*packed(images), params).views, len(images))
        off = [
            (views[:, index] - torch.stack(by_torchvision(image, params[:, index], recipes, rules))).abs() > 1e-4
            for index, image in enumerate(images)
        ]
        assert float(torch.stack(off).double().mean()) <= most


@pytest.mark.parametrize("rules", [AS_LEVELS, replace(AS_LEVELS, blur="box3", jitter_before_crop=True, plain_views=1)])
def test_views_are_the_cpu_renderers(rules: RenderRules) -> None:
    """Jitter before the crop takes its parameters from the first view, even where others differ."""
    recipes = [replace(FULL, solarize_p=0.0)] * 2 + [replace(FULL, size_px=17, scale=(0.05, 0.4), solarize_p=0.0)]
    images = random_images([*SMALL_SIZES, *([] if rules.jitter_before_crop else [(375, 500)])], seed=1)
    params = drawn(recipes, images, range(len(images)))
    ours = renderer(recipes, rules)(*packed(images), params)
    theirs = CpuRenderer(recipes, rules=rules)(*packed(images), params)
    for view, expected in zip(ours.views, theirs.views, strict=True):
        assert (view - expected).abs().max() <= 1e-4
    assert (ours.plain is None) == (theirs.plain is None) == (rules.plain_views == 0)
    if ours.plain is not None and theirs.plain is not None:
        assert (ours.plain - theirs.plain).abs().max() <= 1e-4


@pytest.mark.parametrize("jitter_before_crop", [False, True])
def test_quantized_operations_equal_torchvisions_on_uint8(jitter_before_crop: bool) -> None:
    """A level that rounds the other way after the resize moves the pixel, and with it a mean that others depend on."""
    rules = replace(AS_LEVELS, quantize="uint8", jitter_before_crop=jitter_before_crop)
    recipes = [replace(FULL, solarize_p=0.0)] * 2
    images = random_images([(37, 53), (64, 64), (211, 130), (8, 8)] * 3, seed=1)
    params = drawn(recipes, images, range(len(images)), share=jitter_before_crop)
    views = by_view(renderer(recipes, rules)(*packed(images), params).views, len(images)) * 255
    assert (views - views.round()).abs().max() <= 1e-4
    expected = torch.stack(
        [torch.stack(by_torchvision(image, params[:, i], recipes, rules)) * 255 for i, image in enumerate(images)], 1
    )
    difference = (views - expected).abs()
    assert difference.max() <= 3
    assert float((difference > 0.5).double().mean()) <= 0.01


def test_plain_views_have_the_same_crops_and_no_change_of_colour() -> None:
    recipes = [FULL, FULL, FULL, replace(FULL, size_px=8)]
    images = random_images(SMALL_SIZES)
    num = len(images)
    for jitter_before_crop in (False, True):
        params = drawn(recipes, images, range(num), share=jitter_before_crop)
        rules = replace(AS_LEVELS, jitter_before_crop=jitter_before_crop, plain_views=2)
        rendered = renderer(recipes, rules)(*packed(images), params)
        without = renderer(recipes, replace(rules, plain_views=0))(*packed(images), params)
        assert rendered.plain is not None
        assert without.plain is None
        assert all(torch.equal(a, b) for a, b in zip(rendered.views, without.views, strict=True))
        for view, index in itertools.product(range(2), range(num)):
            image = images[index].permute(2, 0, 1).float()
            image = jittered(image / 255, params[0, index]) * 255 if jitter_before_crop else image
            expected = cropped(image, params[view, index], 32)
            assert (rendered.plain.unflatten(0, (2, num))[view, index] * 255 - expected).abs().max() <= 0.02
    with pytest.raises(UserError, match="plain_views=4"):
        renderer(recipes, replace(AS_LEVELS, plain_views=4))


@pytest.mark.parametrize(("num_threads", "jitter_before_crop"), [(1, False), (2, False), (2, True)])
def test_a_sample_renders_to_the_same_bits_in_any_batch(num_threads: int, jitter_before_crop: bool) -> None:
    """What lies in a sample's padding are its neighbours' bytes, so neither do those matter."""
    rules = replace(AS_LEVELS, mean=MEAN, std=STD, blur="box3", jitter_before_crop=jitter_before_crop)
    recipes = [FULL, FULL, replace(FULL, size_px=16, scale=(0.05, 0.4)), replace(FULL, size_px=16)]
    larger = [] if jitter_before_crop else [(300, 260), (258, 1), (511, 512)]
    images = random_images([*SMALL_SIZES, (64, 64), (8, 8), (33, 200), (200, 7), *larger], seed=2)
    num = len(images)

    def rendered(ids: Sequence[int]) -> list[Tensor]:
        chosen = [images[index] for index in ids]
        params = drawn(recipes, chosen, ids, share=jitter_before_crop)
        return [view.unflatten(0, (2, len(ids))) for view in render(*packed(chosen), params).views]

    render = renderer(recipes, rules)
    batches = [[num - 1], [7, 3], list(range(num - 1, -1, -1)) * 3]
    with threads(num_threads):
        whole = rendered(range(num))
        for ids in batches if jitter_before_crop else [*batches, [0], [8], [11, 0, 5, 9, 2]]:
            for view, expected in zip(rendered(ids), whole, strict=True):
                assert torch.equal(view, expected[:, ids]), f"batch {ids}"


def test_padding_changes_nothing() -> None:
    bucket, (height, width) = Bucket(256, 256), (123, 45)
    boxes = torch.tensor([[[3.0, 4.0, 120.0, 41.0, 1.0], [100.0, 30.0, 23.0, 15.0, 0.0]]])
    vertical, horizontal = view_weights(boxes, 24, bucket, torch.float32)
    levels = torch.randint(0, 256, (1, *bucket, 3)).float().transpose(2, 3).contiguous()
    other = torch.randint(0, 256, levels.shape).float()
    other[:, :height, :, :width] = levels[:, :height, :, :width]
    assert torch.equal(resize_views(levels, vertical, horizontal), resize_views(other, vertical, horizontal))


def test_views_come_crop_major_one_tensor_per_side() -> None:
    recipes = [PLAIN, PLAIN, replace(PLAIN, size_px=8), replace(PLAIN, size_px=8), replace(PLAIN, size_px=8)]
    gray_levels = list(range(0, 200, 5))
    images = [torch.full((9, 7 + 9 * (level % 50), 3), level, dtype=torch.uint8) for level in gray_levels]
    params = drawn(recipes, images, range(len(images)))
    globals_, locals_ = renderer(recipes)(*packed(images), params).views
    assert globals_.shape == (80, 3, 32, 32)
    assert locals_.shape == (120, 3, 8, 8)
    assert globals_.is_contiguous()
    for views, count in ((globals_, 2), (locals_, 3)):
        expected = torch.tensor(gray_levels * count).view(-1, 1, 1, 1).expand_as(views)
        assert torch.allclose(views * 255, expected.float(), atol=1e-3)


def test_normalisation_and_dtype() -> None:
    rules = RenderRules(mean=MEAN, std=STD, blur="taps9", plain_views=1)
    images = random_images([(20, 30)] * 3)
    params = drawn([FULL], images, range(3))
    (plain,) = renderer([FULL])(*packed(images), params).views
    (normalised,) = renderer([FULL], rules)(*packed(images), params).views
    assert torch.allclose(normalised, tv.normalize(plain, list(MEAN), list(STD)), atol=1e-5)
    half = renderer([FULL], rules, dtype=torch.bfloat16)(*packed(images), params)
    assert torch.equal(half.views[0], normalised.bfloat16())
    assert half.plain is not None
    assert half.plain.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = renderer([FULL], rules)(*packed(images), params).views
    assert torch.equal(inside, normalised), "autocast must not reach the pixels"


class Recorder(TorchDispatchMode):
    """Every operator that runs, and the shapes it runs on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [value.shape for value in args if isinstance(value, Tensor)]
        self.calls.append((func.overloadpacket.__name__, shapes))
        return func(*args, **(kwargs or {}))


def recorded(render: ProductRenderer, recipes: Sequence[ViewRecipe], images: Sequence[Tensor]) -> Recorder:
    params = drawn(recipes, images, range(len(images)))
    pixels, sizes = packed(images)
    with Recorder() as recorder:
        render(pixels, sizes, params)
    return recorder


ALL_RULES = [
    AS_LEVELS,
    replace(AS_LEVELS, blur="box3", quantize="uint8", plain_views=1),
    replace(AS_LEVELS, jitter_before_crop=True, plain_views=1),
]


@pytest.mark.parametrize("rules", ALL_RULES)
def test_the_host_never_reads_a_tensor_of_the_device(rules: RenderRules) -> None:
    recipes = [FULL, replace(FULL, size_px=8)]
    names = {name for name, _ in recorded(renderer(recipes, rules), recipes, random_images(SMALL_SIZES)).calls}
    assert {"bmm", "index_copy_"} <= names
    reading = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
    of_the_datas_shape = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "repeat_interleave"}
    assert not names & (reading | of_the_datas_shape)


def test_shapes_are_the_buckets_and_launches_grow_with_neither_images_nor_views() -> None:
    recipes = [FULL, FULL, *[replace(FULL, size_px=8)] * 2]
    render = renderer(recipes)
    few = recorded(render, recipes, random_images([(30, 40)] * 2)).calls
    full = recorded(render, recipes, random_images([(256, 3 + index) for index in range(32)])).calls
    assert [call for call in few if call[0] == "bmm"] == [call for call in full if call[0] == "bmm"]
    assert len(full) <= len(few)
    more = [*recipes, *[replace(FULL, size_px=8)] * 4]
    assert len(recorded(renderer(more), more, random_images([(30, 40)] * 2)).calls) == len(few)


@pytest.mark.parametrize("rules", ALL_RULES)
def test_one_graph_a_bucket_one_for_colours_and_none_more(rules: RenderRules) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    recipes = [FULL, replace(FULL, size_px=8)]
    compiled = renderer(recipes, rules, compile=True, backend=backend)
    compiled.warm_up([Bucket(256, 256)])
    batches = [(SMALL_SIZES, 2), ([(9, 7)] * 40, 2), ([(257, 4), (5, 5)], 3), ([(3, 510)] * 2, 3)]
    for sizes, expected in batches if rules is AS_LEVELS else batches[:1]:
        images = random_images(sizes)
        params = drawn(recipes, images, range(len(images)))
        views = compiled(*packed(images), params).views
        assert len(graphs) == expected, sizes
        if sizes is SMALL_SIZES:
            theirs = renderer(recipes, rules)(*packed(images), params).views
            assert all(torch.equal(view, other) for view, other in zip(views, theirs, strict=True))


@pytest.mark.slow
def test_what_inductor_makes_of_it_is_the_same() -> None:
    recipes = [FULL]
    images = random_images(SMALL_SIZES)
    params = drawn(recipes, images, range(len(images)))
    (ours,), _ = renderer(recipes, compile=True)(*packed(images), params)
    (expected,), _ = renderer(recipes)(*packed(images), params)
    assert float(((ours - expected).abs() > 1e-4).double().mean()) <= 1e-4


@pytest.mark.parametrize(("resize_px", "crop_px"), [(32, 28), (17, 17), (40, 9), (8, 8)])
def test_center_crops_equal_torchvisions(resize_px: int, crop_px: int) -> None:
    images = random_images([*SMALL_SIZES, (32, 32), (50, 75), (300, 258)])
    pixels, sizes = packed(images)
    image_sizes = [(height, width) for height, width in sizes.tolist()]
    crops = center_crops(pixels, image_sizes, resize_px=resize_px, crop_px=crop_px)
    assert crops.shape == (len(images), crop_px, 3, crop_px)
    for crop, image in zip(crops, images, strict=True):
        resized = tv.resize(image.permute(2, 0, 1).float(), [resize_px], InterpolationMode.BICUBIC, antialias=True)
        expected = tv.center_crop(resized.clamp(0, 255), [crop_px])
        difference = (crop.transpose(0, 1) - expected).abs().max()
        assert difference <= 0.02, f"{tuple(image.shape)}: {difference:.4f} grey levels"


def test_a_batch_of_none_and_wrong_arguments() -> None:
    nothing = torch.empty(0, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64)
    (views,), plain = renderer([FULL], replace(AS_LEVELS, plain_views=1))(*nothing, torch.empty(1, 0, len(Column)))
    assert views.shape == (0, 3, 32, 32)
    assert plain is not None
    assert center_crops(nothing[0], [], resize_px=8, crop_px=8).shape == (0, 8, 3, 8)
    images = random_images([(4, 5)])
    pixels, sizes = packed(images)
    params = drawn([FULL], images, [0])
    with pytest.raises(ValueError, match="pixels must be 60"):
        renderer([FULL])(pixels[:-1], sizes, params)
    with pytest.raises(ValueError, match="params must have shape"):
        renderer([FULL, FULL])(pixels, sizes, params)
    with pytest.raises(ValueError, match="sizes must be"):
        renderer([FULL])(pixels, sizes[0], params)
    with pytest.raises(UserError, match="at least one view"):
        renderer([])
