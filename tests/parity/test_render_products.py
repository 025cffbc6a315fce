"""The renderer of products equals torchvision given the same parameters, one sample at a time, in any company."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops.buckets import Bucket, bucket_of
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe
from dino_dist.data.crops.render_cpu import CpuRenderer
from dino_dist.data.crops.render_products import ProductRenderer
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.data.crops.resample import center_crops, resize_views, view_weights
from dino_dist.errors import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AS_LEVELS = RenderRules(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), blur="taps9")
"""Without normalisation: views in [0, 1]."""
SMALL_SIZES = [(1, 1), (1, 256), (256, 1), (2, 3), (8, 8), (37, 53), (211, 130), (97, 1)]


def renderer(recipes: Sequence[ViewRecipe], rules: RenderRules = AS_LEVELS, **changes: Any) -> ProductRenderer:
    return ProductRenderer(recipes, rules=rules, device=CPU, **changes)


def by_torchvision(
    torchvision: Any, image: Tensor, rows: Tensor, recipes: Sequence[ViewRecipe], rules: RenderRules
) -> Tensor:
    """All views [views, 3, S, S] in [0, 1] of one picture with parameters [views, columns]."""
    levels = image.permute(2, 0, 1)

    def as_picture(levels: Tensor) -> Tensor:
        return levels.round().to(torch.uint8) if rules.quantize else levels / 255

    def as_levels(picture: Tensor) -> Tensor:
        return picture.float() if rules.quantize else picture * 255

    if rules.jitter_before_crop:
        levels = as_levels(torchvision.colored(as_picture(levels.float()), rows[0]))
    views = []
    for row, recipe in zip(rows, recipes, strict=True):
        view = as_picture(torchvision.cropped(levels.float(), row, recipe.size_px))
        view = view if rules.jitter_before_crop else torchvision.colored(view, row)
        sigma = float(row[Column.BLUR_SIGMA])
        view = tv.gaussian_blur(view, [9, 9], [sigma, sigma]) if sigma else view
        if row[Column.SOLARIZE]:
            view = tv.solarize(view, 128 if rules.quantize else 128 / 255)
        views.append(as_levels(view) / 255)
    return torch.stack(views)


def by_view(views: Sequence[Tensor]) -> Tensor:
    """Of two views of one side: [2, n, 3, S, S]."""
    (view,) = views
    return torch.unflatten(view, 0, (2, -1))


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
    pictures: Any,
    torchvision: Any,
    plain_recipe: ViewRecipe,
    operands: torch.dtype,
    sizes: list[tuple[int, int]],
    tolerance: float,
) -> None:
    recipes = [replace(plain_recipe, size_px=side, scale=(0.05, 1.0), flip_p=0.5) for side in (33, 33, 8)]
    batch = pictures.random(sizes)
    images, params = batch.images, batch.drawn(recipes)
    large, small = renderer(recipes, operand_dtype=operands)(batch.pixels, batch.sizes, params).views
    views = [*torch.unflatten(large, 0, (2, -1)), small]
    for view, image in itertools.product(range(3), range(len(images))):
        levels = images[image].permute(2, 0, 1).float()
        expected = torchvision.cropped(levels, params[view, image], recipes[view].size_px)
        difference = (views[view][image] * 255 - expected).abs().max()
        assert difference <= tolerance, f"{sizes[image]} -> {recipes[view].size_px}: {difference:.4f} grey levels"


def test_an_image_longer_than_any_bucket_and_a_small_box_far_from_its_origin(
    pictures: Any, torchvision: Any, plain_recipe: ViewRecipe
) -> None:
    batch = pictures.random([(3, 20_000)])
    params = batch.untouched()
    params[0, 0, : Column.FLIP + 1] = torch.tensor([0, 19_001, 3, 997, 1])
    assert not bucket_of(3, 20_000).is_listed
    (view,) = renderer([plain_recipe])(batch.pixels, batch.sizes, params).views
    expected = torchvision.cropped(batch.images[0].permute(2, 0, 1).float(), params[0, 0], 32)
    assert (view[0] * 255 - expected).abs().max() <= 0.02


@pytest.mark.parametrize("jitter_before_crop", [False, True])
def test_all_operations_equal_torchvisions_on_float(
    pictures: Any, torchvision: Any, full_recipe: ViewRecipe, jitter_before_crop: bool
) -> None:
    """Solarize compares with a threshold, which rounding may cross at a few pixels."""
    rules = replace(AS_LEVELS, jitter_before_crop=jitter_before_crop)
    batch = pictures.random(SMALL_SIZES * 2, seed=1)
    for solarize_p, most in ((0.0, 0.0), (0.5, 1e-3)):
        recipes = [replace(full_recipe, solarize_p=solarize_p)] * 2
        params = batch.drawn(recipes, share_jitter=jitter_before_crop)
        views = by_view(renderer(recipes, rules)(batch.pixels, batch.sizes, params).views)
        off = [
            (views[:, index] - by_torchvision(torchvision, image, params[:, index], recipes, rules)).abs() > 1e-4
            for index, image in enumerate(batch.images)
        ]
        assert float(torch.stack(off).double().mean()) <= most


@pytest.mark.parametrize("rules", [AS_LEVELS, replace(AS_LEVELS, blur="box3", jitter_before_crop=True, plain_views=1)])
def test_views_are_the_cpu_renderers(pictures: Any, full_recipe: ViewRecipe, rules: RenderRules) -> None:
    """Jitter before the crop takes its parameters from the first view, even where others differ."""
    recipes = [replace(full_recipe, solarize_p=0.0)] * 2 + [
        replace(full_recipe, size_px=17, scale=(0.05, 0.4), solarize_p=0.0)
    ]
    batch = pictures.random([*SMALL_SIZES, *([] if rules.jitter_before_crop else [(375, 500)])], seed=1)
    params = batch.drawn(recipes)
    ours = renderer(recipes, rules)(batch.pixels, batch.sizes, params)
    theirs = CpuRenderer(recipes, rules=rules)(batch.pixels, batch.sizes, params)
    for view, expected in zip(ours.views, theirs.views, strict=True):
        assert (view - expected).abs().max() <= 1e-4
    assert (ours.plain is None) == (theirs.plain is None) == (rules.plain_views == 0)
    if ours.plain is not None and theirs.plain is not None:
        assert (ours.plain - theirs.plain).abs().max() <= 1e-4


@pytest.mark.parametrize("jitter_before_crop", [False, True])
def test_quantized_operations_equal_torchvisions_on_uint8(
    pictures: Any, torchvision: Any, full_recipe: ViewRecipe, jitter_before_crop: bool
) -> None:
    """A level that rounds the other way after the resize moves the pixel, and with it a mean that others depend on."""
    rules = replace(AS_LEVELS, quantize="uint8", jitter_before_crop=jitter_before_crop)
    recipes = [replace(full_recipe, solarize_p=0.0)] * 2
    batch = pictures.random([(37, 53), (64, 64), (211, 130), (8, 8)] * 3, seed=1)
    params = batch.drawn(recipes, share_jitter=jitter_before_crop)
    views = by_view(renderer(recipes, rules)(batch.pixels, batch.sizes, params).views) * 255
    assert (views - views.round()).abs().max() <= 1e-4
    pairs = enumerate(batch.images)
    expected = 255 * torch.stack(
        [by_torchvision(torchvision, image, params[:, index], recipes, rules) for index, image in pairs], 1
    )
    difference = (views - expected).abs()
    assert difference.max() <= 3
    assert float((difference > 0.5).double().mean()) <= 0.01


def test_plain_views_have_the_same_crops_and_no_change_of_colour(
    pictures: Any, torchvision: Any, full_recipe: ViewRecipe
) -> None:
    recipes = [full_recipe, full_recipe, full_recipe, replace(full_recipe, size_px=8)]
    batch = pictures.random(SMALL_SIZES)
    num = len(batch.images)
    for jitter_before_crop in (False, True):
        params = batch.drawn(recipes, share_jitter=jitter_before_crop)
        rules = replace(AS_LEVELS, jitter_before_crop=jitter_before_crop, plain_views=2)
        rendered = renderer(recipes, rules)(batch.pixels, batch.sizes, params)
        without = renderer(recipes, replace(rules, plain_views=0))(batch.pixels, batch.sizes, params)
        assert rendered.plain is not None
        assert without.plain is None
        assert all(torch.equal(a, b) for a, b in zip(rendered.views, without.views, strict=True))
        for view, index in itertools.product(range(2), range(num)):
            levels = batch.images[index].permute(2, 0, 1).float()
            levels = torchvision.colored(levels / 255, params[0, index]) * 255 if jitter_before_crop else levels
            expected = torchvision.cropped(levels, params[view, index], 32)
            assert (torch.unflatten(rendered.plain, 0, (2, num))[view, index] * 255 - expected).abs().max() <= 0.02
    with pytest.raises(UserError, match="plain_views=4"):
        renderer(recipes, replace(AS_LEVELS, plain_views=4))


@pytest.mark.parametrize(("num_threads", "jitter_before_crop"), [(1, False), (2, False), (2, True)])
def test_a_sample_renders_to_the_same_bits_in_any_batch(
    pictures: Any,
    threads: Callable[[int], AbstractContextManager[None]],
    full_recipe: ViewRecipe,
    num_threads: int,
    jitter_before_crop: bool,
) -> None:
    """What lies in a sample's padding are its neighbours' bytes, so neither do those matter."""
    rules = replace(AS_LEVELS, mean=MEAN, std=STD, blur="box3", jitter_before_crop=jitter_before_crop)
    recipes = [
        full_recipe,
        full_recipe,
        replace(full_recipe, size_px=16, scale=(0.05, 0.4)),
        replace(full_recipe, size_px=16),
    ]
    larger = [] if jitter_before_crop else [(300, 260), (258, 1), (511, 512)]
    batch = pictures.random([*SMALL_SIZES, (64, 64), (8, 8), (33, 200), (200, 7), *larger], seed=2)
    num = len(batch.images)

    def rendered(ids: Sequence[int]) -> list[Tensor]:
        some = batch.chosen(ids)
        params = some.drawn(recipes, share_jitter=jitter_before_crop)
        return [torch.unflatten(view, 0, (2, len(ids))) for view in render(some.pixels, some.sizes, params).views]

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


def test_views_come_crop_major_one_tensor_per_side(pictures: Any, plain_recipe: ViewRecipe) -> None:
    recipes = [plain_recipe] * 2 + [replace(plain_recipe, size_px=8)] * 3
    gray_levels = list(range(0, 200, 5))
    batch = pictures([torch.full((9, 7 + 9 * (level % 50), 3), level, dtype=torch.uint8) for level in gray_levels])
    globals_, locals_ = renderer(recipes)(batch.pixels, batch.sizes, batch.drawn(recipes)).views
    assert globals_.shape == (80, 3, 32, 32)
    assert locals_.shape == (120, 3, 8, 8)
    assert globals_.is_contiguous()
    for views, count in ((globals_, 2), (locals_, 3)):
        expected = torch.tensor(gray_levels * count).view(-1, 1, 1, 1).expand_as(views)
        assert torch.allclose(views * 255, expected.float(), atol=1e-3)


def test_normalisation_and_dtype(pictures: Any, full_recipe: ViewRecipe) -> None:
    rules = RenderRules(mean=MEAN, std=STD, blur="taps9", plain_views=1)
    batch, recipes = pictures.random([(20, 30)] * 3), [full_recipe]
    params = batch.drawn(recipes)
    (plain,) = renderer(recipes)(batch.pixels, batch.sizes, params).views
    (normalised,) = renderer(recipes, rules)(batch.pixels, batch.sizes, params).views
    assert torch.allclose(normalised, tv.normalize(plain, list(MEAN), list(STD)), atol=1e-5)
    half = renderer(recipes, rules, dtype=torch.bfloat16)(batch.pixels, batch.sizes, params)
    assert torch.equal(half.views[0], normalised.bfloat16())
    assert half.plain is not None
    assert half.plain.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = renderer(recipes, rules)(batch.pixels, batch.sizes, params).views
    assert torch.equal(inside, normalised), "autocast must not reach the pixels"


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operator that runs, and the shapes it runs on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [value.shape for value in args if isinstance(value, Tensor)]
        self.calls.append((func.overloadpacket.__name__, shapes))
        return func(*args, **(kwargs or {}))


def recorded(render: ProductRenderer, recipes: Sequence[ViewRecipe], batch: Any) -> Recorder:
    params = batch.drawn(recipes)
    recorder = Recorder()
    with recorder:
        render(batch.pixels, batch.sizes, params)
    return recorder


ALL_RULES = [
    AS_LEVELS,
    replace(AS_LEVELS, blur="box3", quantize="uint8", plain_views=1),
    replace(AS_LEVELS, jitter_before_crop=True, plain_views=1),
]


@pytest.mark.parametrize("rules", ALL_RULES)
def test_the_host_never_reads_a_tensor_of_the_device(
    pictures: Any, full_recipe: ViewRecipe, rules: RenderRules
) -> None:
    recipes = [full_recipe, replace(full_recipe, size_px=8)]
    calls = recorded(renderer(recipes, rules), recipes, pictures.random(SMALL_SIZES)).calls
    names = {name for name, _ in calls}
    assert {"bmm", "index_copy_"} <= names
    reading = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
    of_the_datas_shape = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "repeat_interleave"}
    assert not names & (reading | of_the_datas_shape)


def test_shapes_are_the_buckets_and_launches_grow_with_neither_images_nor_views(
    pictures: Any, full_recipe: ViewRecipe
) -> None:
    recipes = [full_recipe, full_recipe, *[replace(full_recipe, size_px=8)] * 2]
    render, two = renderer(recipes), pictures.random([(30, 40)] * 2)
    few = recorded(render, recipes, two).calls
    full = recorded(render, recipes, pictures.random([(256, 3 + index) for index in range(32)])).calls
    assert [call for call in few if call[0] == "bmm"] == [call for call in full if call[0] == "bmm"]
    assert len(full) <= len(few)
    more = [*recipes, *[replace(full_recipe, size_px=8)] * 4]
    assert len(recorded(renderer(more), more, two).calls) == len(few)


@pytest.mark.parametrize("rules", ALL_RULES)
def test_one_graph_a_bucket_one_for_colours_and_none_more(
    pictures: Any, full_recipe: ViewRecipe, rules: RenderRules
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    recipes = [full_recipe, replace(full_recipe, size_px=8)]
    compiled = renderer(recipes, rules, compile=True, backend=backend)
    compiled.warm_up([Bucket(256, 256)])
    batches = [(SMALL_SIZES, 2), ([(9, 7)] * 40, 2), ([(257, 4), (5, 5)], 3), ([(3, 510)] * 2, 3)]
    for sizes, expected in batches if rules is AS_LEVELS else batches[:1]:
        batch = pictures.random(sizes)
        params = batch.drawn(recipes)
        views = compiled(batch.pixels, batch.sizes, params).views
        assert len(graphs) == expected, sizes
        if sizes is SMALL_SIZES:
            theirs = renderer(recipes, rules)(batch.pixels, batch.sizes, params).views
            assert all(torch.equal(view, other) for view, other in zip(views, theirs, strict=True))


@pytest.mark.slow
def test_what_inductor_makes_of_it_is_the_same(pictures: Any, full_recipe: ViewRecipe) -> None:
    batch, recipes = pictures.random(SMALL_SIZES), [full_recipe]
    params = batch.drawn(recipes)
    (ours,), _ = renderer(recipes, compile=True)(batch.pixels, batch.sizes, params)
    (expected,), _ = renderer(recipes)(batch.pixels, batch.sizes, params)
    assert float(((ours - expected).abs() > 1e-4).double().mean()) <= 1e-4


@pytest.mark.parametrize(("resize_px", "crop_px"), [(32, 28), (17, 17), (40, 9), (8, 8)])
def test_center_crops_equal_torchvisions(pictures: Any, resize_px: int, crop_px: int) -> None:
    sizes = [*SMALL_SIZES, (32, 32), (50, 75), (300, 258)]
    batch = pictures.random(sizes)
    crops = center_crops(batch.pixels, sizes, resize_px=resize_px, crop_px=crop_px)
    assert crops.shape == (len(sizes), crop_px, 3, crop_px)
    for crop, image in zip(crops, batch.images, strict=True):
        resized = tv.resize(image.permute(2, 0, 1).float(), [resize_px], InterpolationMode.BICUBIC, antialias=True)
        expected = tv.center_crop(resized.clamp(0, 255), [crop_px])
        difference = (crop.transpose(0, 1) - expected).abs().max()
        assert difference <= 0.02, f"{tuple(image.shape)}: {difference:.4f} grey levels"


def test_a_batch_of_none_and_wrong_arguments(pictures: Any, full_recipe: ViewRecipe) -> None:
    nothing = torch.empty(0, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64)
    (views,), plain = renderer([full_recipe], replace(AS_LEVELS, plain_views=1))(
        *nothing, torch.empty(1, 0, len(Column))
    )
    assert views.shape == (0, 3, 32, 32)
    assert plain is not None
    assert center_crops(nothing[0], [], resize_px=8, crop_px=8).shape == (0, 8, 3, 8)
    batch = pictures.random([(4, 5)])
    pixels, sizes, params = batch.pixels, batch.sizes, batch.drawn([full_recipe])
    with pytest.raises(ValueError, match="pixels must be 60"):
        renderer([full_recipe])(pixels[:-1], sizes, params)
    with pytest.raises(ValueError, match="params must have shape"):
        renderer([full_recipe, full_recipe])(pixels, sizes, params)
    with pytest.raises(ValueError, match="sizes must be"):
        renderer([full_recipe])(pixels, sizes[0], params)
    with pytest.raises(UserError, match="at least one view"):
        renderer([])
