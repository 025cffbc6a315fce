"""The bench of data pipelines: its figures follow from what happened, and its contenders make the same views."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_dist.config import Config
from dino_dist.data.crops.augment import MultiCropRenderer
from dino_dist.data.crops.crop_parameters import draw
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.errors import UserError
from dino_dist.views import view_recipes

TOOLS = Path(__file__).parents[2] / "tools"
CORE = min(os.sched_getaffinity(0))

WHOLE_IMAGE = {"global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0), "aspect_ratio": (4 / 3, 4 / 3)}
NO_CHANGE = {
    **dict.fromkeys(("flip_p", "jitter_p", "gray_p", "blur_global_1_p", "blur_global_2_p", "blur_local_p"), 0.0),
    "solarize_global_2_p": 0.0,
}
SMALL = {"global_px": 32, "local_px": 16, "local_crops": 2}


@pytest.fixture(scope="module")
def tool() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of tools/ as the tools import each other."""
    sys.path.insert(0, str(TOOLS))
    yield import_module
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def photographs(tool: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 photographs in three shards."""
    pytest.importorskip("skimage")
    module = tool("photograph_shards")
    folder = tmp_path_factory.mktemp("photographs")
    module.build_photograph_shards(folder, module.PhotographOptions(images=12, samples_per_shard=4))
    return folder


def measured(tool: Callable[[str], ModuleType], **changes: Any) -> Any:
    figures = {"images": 100, "batches": 10, "wall_s": 2.0, "cpu_s": 4.0, "peak_rss_bytes": 2**30, "pss_bytes": 2**29}
    return tool("bench_data_process").Round(**{**figures, **changes})


def test_photographs_are_jpegs_of_the_size_and_differ(photographs: Path) -> None:
    files = []
    for path in sorted(photographs.glob("*.tar")):
        with tarfile.open(path) as tar:
            files += [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
    assert len(files) == len(set(files)) == 12
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
    # Real detail at its own scale: an enlarged or empty picture would be a fraction of this.
    assert np.mean([len(data) for data in files]) > 40_000


def test_photographs_are_the_same_bytes_every_time(
    tool: Callable[[str], ModuleType], photographs: Path, tmp_path: Path
) -> None:
    module = tool("photograph_shards")
    for seed, same in ((0, True), (1, False)):
        module.build_photograph_shards(
            tmp_path / str(seed), module.PhotographOptions(images=12, samples_per_shard=4, seed=seed)
        )
        for path in photographs.glob("*.tar"):
            assert ((tmp_path / str(seed) / path.name).read_bytes() == path.read_bytes()) is same


def test_no_scikit_image_is_told_in_one_line(
    tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tool("photograph_shards")
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match="pip install scikit-image") as raised:
        module.build_photograph_shards(tmp_path, module.PhotographOptions(images=1))
    assert "\n" not in str(raised.value)


def test_a_round_counts_what_lies_between_its_marks(tool: Callable[[str], ModuleType]) -> None:
    module = tool("bench_data_process")
    given: list[int] = []
    workers: list[int] = []
    closed: list[bool] = []

    def stream(num_workers: int) -> Generator[int, None, None]:
        workers.append(num_workers)
        try:
            for size in range(1, 100):
                given.append(size)
                yield size
        finally:
            closed.append(True)

    options = module.RoundOptions(num_workers=3, warmup_batches=2, min_s=0.0)
    result = module.measure_round(stream, options)
    assert given == [1, 2, 3, 4], "two to warm up, then two at least"
    assert (result.images, result.batches) == (3 + 4, 2)
    assert (workers, closed) == ([3], [True])
    assert result.peak_rss_bytes >= result.pss_bytes > 0


def test_a_round_lasts_at_least_as_long_as_asked(tool: Callable[[str], ModuleType]) -> None:
    module = tool("bench_data_process")

    def stream(num_workers: int) -> Generator[int, None, None]:
        while True:
            yield 1

    result = module.measure_round(stream, module.RoundOptions(num_workers=0, warmup_batches=0, min_s=0.05))
    assert result.wall_s >= 0.05
    assert result.images == result.batches > 2


def test_cpu_time_of_descendants_counts(tool: Callable[[str], ModuleType]) -> None:
    """Of one that still lives and of one that was waited for."""
    module = tool("bench_data_process")

    def child(*, ends: bool) -> int:
        told, tells = os.pipe()
        pid = os.fork()
        if pid == 0:
            while time.process_time() < 0.3:
                pass
            os.write(tells, b"x")
            while not ends:
                time.sleep(60)
            os._exit(0)
        os.read(told, 1)
        os.close(told)
        os.close(tells)
        return pid

    before_s = module.tree_cpu_s()
    os.waitpid(child(ends=True), 0)
    after_first_s = module.tree_cpu_s()
    second = child(ends=False)
    after_second_s = module.tree_cpu_s()
    os.kill(second, 9)
    os.waitpid(second, 0)
    assert after_first_s - before_s > 0.25
    assert after_second_s - after_first_s > 0.25


def test_operators_are_those_of_one_batch_after_the_first(tool: Callable[[str], ModuleType]) -> None:
    def stream(num_workers: int) -> Generator[int, None, None]:
        assert num_workers == 0, "operators of other processes cannot be counted"
        constant = torch.ones(3).cumsum(0).cumsum(0)
        while True:
            constant.add(1).mul(2)
            yield 1

    assert tool("bench_data_process").count_operators(stream) == 2


@pytest.mark.distributed
def test_a_contender_that_cannot_run_says_why(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module, ours = tool("bench_data_process"), tool("bench_data_ours")
    asked = ours.Ours(config=Config(), index_dir=tmp_path)
    options = module.RoundOptions(num_workers=1, warmup_batches=0, min_s=0.0)
    with (
        module.Contender(ours.open_render, (asked, "cuda"), [CORE]) as no_device,
        module.Contender(os._exit, (3,), [CORE]) as dying,
    ):
        if not torch.cuda.is_available():
            for ask in (no_device.operators, lambda: no_device.round(options)):
                with pytest.raises(module.NotMeasured, match="no CUDA device") as raised:
                    ask()
                assert not isinstance(raised.value, module.Crashed)
        with pytest.raises(module.Crashed, match="ended with code 3"):
            dying.round(options)


def test_ratios_are_taken_within_a_round(tool: Callable[[str], ModuleType]) -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    report = tool("bench_data_report")
    slowness = (1.0, 2.0, 1.0)
    published = [measured(tool, wall_s=10.0 * slow, cpu_s=10.0 * slow) for slow in slowness]
    decode = [measured(tool, wall_s=0.5 * slow, cpu_s=0.4 * slow) for slow in slowness]
    render = [measured(tool, wall_s=4.0 * slow, cpu_s=5.0 * slow) for slow in slowness]
    rows = report.ratios(
        {
            "published": report.Result(rounds=tuple(published)),
            "decode_only": report.Result(rounds=tuple(decode)),
            "render_cpu": report.Result(rounds=tuple(render)),
            "torchvision_v2": report.Result(not_measured="no reason"),
        }
    )
    found = {(row["numerator"], row["denominator"], row["figure"]): row for row in rows}
    expected = {
        ("published", "decode_only", "core_s_per_image"): 25.0,
        ("render_cpu", "published", "images_per_s"): 2.5,
        ("published", "render_cpu", "core_s_per_image"): 2.0,
    }
    assert found.keys() == expected.keys(), "none with a contender that was not measured"
    for key, value in expected.items():
        assert found[key]["lowest"] == pytest.approx(value)
        assert found[key]["median"] == pytest.approx(value)
        assert found[key]["highest"] == pytest.approx(value)


def test_figures_are_medians_of_the_rounds(tool: Callable[[str], ModuleType]) -> None:
    report = tool("bench_data_report")
    rounds = tuple(measured(tool, wall_s=wall_s, cpu_s=2 * wall_s) for wall_s in (1.0, 2.0, 50.0))
    row = report.summary(report.Result(rounds=rounds, operators_per_batch=7), 12)
    assert row["images_per_s"] == pytest.approx(50.0)
    assert row["core_s_per_image"] == pytest.approx(0.04)
    assert row["crops_per_s"] == pytest.approx(600.0)
    assert (row["operators_per_batch"], row["peak_rss_mib"], row["pss_mib"]) == (7, 1024.0, 512.0)
    assert [each["wall_s"] for each in row["rounds"]] == [1.0, 2.0, 50.0]
    assert report.summary(report.Result(rounds=rounds), None)["crops_per_s"] is None
    assert report.summary(report.Result(not_measured="none here"), 12) == {
        "not_measured": "none here",
        "crashed": False,
    }


@pytest.mark.parametrize(
    ("changes", "worst_mean"),
    [
        ({}, 0.6),
        ({"gray_p": 1.0}, 1.0),
        ({"solarize_global_2_p": 1.0}, 2.0),
        ({"blur_global_1_p": 1.0, "blur_global_2_p": 1.0, "blur_local_p": 1.0, "blur_sigma_px": (1.5, 1.5)}, 1.0),
    ],
    ids=["plain", "gray", "solarize", "blur"],
)
def test_the_contenders_make_the_same_views(
    tool: Callable[[str], ModuleType], photographs: Path, changes: dict[str, Any], worst_mean: float
) -> None:
    """With nothing left to chance they differ by their roundings alone, in grey levels on average."""
    config, rules, image = one_photograph(tool, photographs, **WHOLE_IMAGE, **{**NO_CHANGE, **changes})
    expected = ours(config, rules, image)
    for name in ("pil", "torchvision"):
        for view, (one, other) in enumerate(zip(theirs(tool, name, config, rules, image), expected, strict=True)):
            assert (one.shape, one.dtype) == (other.shape, torch.float32)
            difference = 255 * (one - other).abs().mean().item()
            assert difference < worst_mean, f"{name}, view {view}: {difference:.2f} grey levels"


@pytest.mark.parametrize("build", ["_pil_crop", "_tensor_crop"])
def test_the_baselines_leave_no_stage_out(tool: Callable[[str], ModuleType], photographs: Path, build: str) -> None:
    """The stages of the published pipeline with its probabilities, where the test above leaves nothing to chance."""
    config, rules, _ = one_photograph(tool, photographs)
    recipe = replace(view_recipes(config.augment)[1], blur_p=0.1, flip_p=0.4)
    stages = getattr(tool("bench_data_baselines"), build)(recipe, rules)
    said = repr(stages)
    positions = [said.index(stage) for stage in ("RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter")]
    positions += [said.index("RandomGrayscale"), said.index("Blur"), max(said.find("Lambda"), said.find("Solarize"))]
    assert positions == sorted(positions)
    assert "brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1)" in said
    assert [stage.p for stage in stages.transforms if hasattr(stage, "p")] == [0.4, 0.8, 0.2, 0.1, 0.2]


def test_kornia_makes_such_views_but_for_antialiasing(tool: Callable[[str], ModuleType], photographs: Path) -> None:
    kornia = pytest.importorskip("kornia.augmentation")
    settings = {**WHOLE_IMAGE, **NO_CHANGE, "gray_p": 1.0, "solarize_global_2_p": 1.0}
    config, rules, image = one_photograph(tool, photographs, **settings, global_px=300, local_px=300)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    for recipe, expected in zip(view_recipes(config.augment), ours(config, rules, image), strict=True):
        (made,) = tool("bench_data_baselines")._kornia_view(kornia, recipe, rules)(batch)
        assert 255 * (made - expected).abs().mean().item() < 4.0  # at 300 px there is little to antialias


def one_photograph(
    tool: Callable[[str], ModuleType], photographs: Path, **augment: Any
) -> tuple[Config, RenderRules, NDArray[np.uint8]]:
    """The bench's config with these settings, rules without normalisation, and the first photograph."""
    bench = tool("bench_data")
    sizes = {"global_px": 64, "local_px": 48, "local_crops": 1}
    config = bench.bench_config(str(photographs), "dinov2_as_trained", 1, photographs, **{**sizes, **augment})
    with tarfile.open(photographs / "shard-000000.tar") as tar:
        data = tar.extractfile(tar.getmembers()[0]).read()  # type: ignore[union-attr]
    rules = RenderRules(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), blur="taps9")
    with Image.open(io.BytesIO(data)) as image:
        return config, rules, np.array(image)


def ours(config: Config, rules: RenderRules, image: NDArray[np.uint8]) -> list[Tensor]:
    recipes = view_recipes(config.augment)
    zero, sizes = np.zeros(1, dtype=np.int64), np.array([image.shape[:2]], dtype=np.int64)
    params = torch.from_numpy(draw(recipes, seed=0, epochs=zero, sample_ids=zero, sizes=sizes))
    renderer = MultiCropRenderer(recipes, rules=rules, device=torch.device("cpu"))
    views = renderer(torch.from_numpy(image).flatten(), torch.from_numpy(sizes), params).views
    return [view for side in views for view in side]


def theirs(
    tool: Callable[[str], ModuleType], name: str, config: Config, rules: RenderRules, image: NDArray[np.uint8]
) -> list[Tensor]:
    baselines = tool("bench_data_baselines")
    recipes = view_recipes(config.augment)
    if name == "pil":
        return [baselines._pil_crop(recipe, rules)(Image.fromarray(image)) for recipe in recipes]
    return [baselines._tensor_crop(recipe, rules)(torch.from_numpy(image).permute(2, 0, 1)) for recipe in recipes]


@pytest.mark.parametrize("name", ["open_published_pil", "open_torchvision_v2", "open_kornia"])
def test_baselines_give_batch_after_batch(tool: Callable[[str], ModuleType], photographs: Path, name: str) -> None:
    if name == "open_kornia":
        pytest.importorskip("kornia")
    bench = tool("bench_data")
    config = bench.bench_config(str(photographs), "dino_v1", 5, photographs, **SMALL)
    dataset = bench.open_dataset(str(photographs), fallback_dir=photographs)
    places = bench.file_places(dataset)
    assert len(places) == 12
    (baseline,) = bench.contenders_of(config, dataset)["published"][1]
    stream = getattr(tool("bench_data_baselines"), name)(baseline)(0)
    assert [next(stream) for _ in range(4)] == [5, 5, 5, 5], "past the end of the 12 images"
    stream.close()


def test_kornia_refuses_images_of_several_sizes(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("kornia")
    bench, baselines = tool("bench_data"), tool("bench_data_baselines")
    places = []
    for side in (40, 50):
        path = tmp_path / f"{side}.jpg"
        Image.new("RGB", (side, 30)).save(path)
        places.append(baselines.FilePlace(path=str(path), offset=0, size=path.stat().st_size))
    config = bench.bench_config("", "dino_v1", 32, tmp_path, **SMALL)
    baseline = baselines.Baseline(
        places=tuple(places),
        recipes=tuple(view_recipes(config.augment)),
        rules=RenderRules(mean=config.data.mean, std=config.data.std),
        batch_size=32,
    )
    with pytest.raises(UserError, match="40 x 30, 50 x 30"):
        next(baselines.open_kornia(baseline)(0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda bench, path: bench.bench_config("x", "dino_v9", 2, path), "--preset dino_v9 must be one of dino_v1"),
        (lambda bench, path: bench.bench_config("x", "dino_v1", 0, path), "--batch 0 must be at least 1"),
        (lambda bench, path: bench.first_cores(10_000), "--cores 10000 must be 1 to"),
        (
            lambda bench, path: bench.bench(bench.bench_config("x", "dino_v1", 1, path), only=["tv"]),
            "--only tv must be",
        ),
    ],
)
def test_wrong_options_are_refused(
    tool: Callable[[str], ModuleType], tmp_path: Path, call: Callable[[ModuleType, Path], Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        call(tool("bench_data"), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_whole_run(tool: Callable[[str], ModuleType], photographs: Path, tmp_path: Path) -> None:
    bench = tool("bench_data")
    config = bench.bench_config(str(photographs), "dino_v1", 4, tmp_path, **SMALL)
    only = ["published", "decode_only"]
    document = json.loads(json.dumps(bench.bench(config, only=only, num_rounds=2, min_s=1.0)))
    assert list(document) == ["settings", "machine", "contenders", "ratios"]
    assert document["settings"]["images"] == 12
    assert list(document["contenders"]) == only
    for name, row in document["contenders"].items():
        assert len(row["rounds"]) == 2, name
        assert row["rounds"][0]["images"] == 4 * row["rounds"][0]["batches"]
        assert row["operators_per_batch"] > 0
        assert row["peak_rss_mib"] > row["pss_mib"] > 50
        assert (row["crops_per_s"] is None) is (name == "decode_only")
    assert [(row["numerator"], row["denominator"]) for row in document["ratios"]] == [("published", "decode_only")]
    bench.show(document)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_cores_are_two_ranks(tool: Callable[[str], ModuleType], photographs: Path, tmp_path: Path) -> None:
    """Both render, what they give is added up, and closing leaves none of them."""
    ours = tool("bench_data_ours")
    config = tool("bench_data").bench_config(str(photographs), "dino_v1", 3, tmp_path, **SMALL)
    stream = ours.open_render(ours.Ours(config=config, index_dir=tmp_path), "cpu")
    before = psutil.Process().children()
    batches = stream(2)
    assert [next(batches) for _ in range(4)] == [6, 3, 3, 3]
    assert len(psutil.Process().children()) >= len(before) + 2
    batches.close()
    ranks = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert not ranks
