"""The doctor's report on one's own data: counts and sizes are right, and so is the arithmetic of what a GPU needs."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from dino_dist.build import build_network
from dino_dist.config import AugmentSection, Config, DataSection, HeadSection, ModelSection
from dino_dist.errors import UserError
from launch.data_doctor import DataQuestions, cores_for, examine_data, table
from launch.gpu_demand import GpuAssumption, estimated_demands, given_demand, training_flop_per_image

SMALL = AugmentSection(global_px=16, local_px=8, local_crops=2)
QUICK = DataQuestions(sample=100, batch_size=4, num_threads=0, loader_s=0.0, augment=SMALL)


def image_bytes(number: int, file_format: str, height: int = 40, width: int = 60) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, file_format)
    return buffer.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number, (suffix, data) in enumerate(members):
            writer.write({"__key__": f"{path.stem}-{number:04d}", suffix: data})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """18 good images of 60 x 40 px, two thirds JPEG and one third PNG, and two bad ones, in two shards."""
    folder = tmp_path / "shards"
    folder.mkdir()
    good = [
        ("png", image_bytes(number, "PNG")) if number % 3 == 0 else ("jpg", image_bytes(number, "JPEG"))
        for number in range(18)
    ]
    broken = ("jpg", image_bytes(99, "JPEG")[:200])
    write_shard(folder / "a.tar", [*good[:9], broken])
    write_shard(folder / "b.tar", [("jpg", b"no image at all"), *good[9:]])
    return folder


def test_what_is_there_is_counted(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = examine_data(str(shards), QUICK, fallback_dir=tmp_path)
    assert (report.num_shards, report.num_samples) == (2, 20)
    assert report.num_bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert (report.looked_at, report.num_bad) == (20, 2), "all of them: fewer than asked for"
    assert report.formats == {"JPEG": 12, "PNG": 6}
    assert {(record.shard, record.key) for record in report.bad} == {("a.tar", "a-0009"), ("b.tar", "b-0000")}
    assert (report.height_px.median, report.width_px.p95) == (40, 60)
    assert report.batch_bytes == 4 * 40 * 60 * 3
    sizes = [len(image_bytes(n, "PNG" if n % 3 == 0 else "JPEG")) for n in range(18)]
    assert report.image_bytes.mean == pytest.approx(np.mean(sizes))
    assert min(report.decode_ms.mean, report.render_ms, report.read_ms.mean, report.loader_images_per_s) > 0
    assert any("shards check" in line for line in report.advice)
    document = json.loads(json.dumps(asdict(report)))
    assert document["cores_per_gpu"][0]["demand"]["model"] == "ViT-S/16"
    table(report)
    shown = capsys.readouterr().out
    for words in ("JPEG 12, PNG 6; 2 bad", "a-0009", "Estimates", "ViT-L/16"):
        assert words in shown, shown


def test_a_sample_is_the_same_every_time_and_no_larger(shards: Path, tmp_path: Path) -> None:
    questions = DataQuestions(sample=5, batch_size=4, num_threads=0, loader_s=0.0, augment=SMALL)
    first, second = (examine_data(str(shards), questions, fallback_dir=tmp_path) for _ in range(2))
    assert first.looked_at == second.looked_at == 5
    assert (first.image_bytes, first.formats, first.bad) == (second.image_bytes, second.formats, second.bad)


def test_cores_follow_from_the_costs_found(shards: Path, tmp_path: Path) -> None:
    questions = DataQuestions(
        sample=20, batch_size=4, num_threads=0, loader_s=0.0, augment=SMALL, images_per_s=100_000.0
    )
    report = examine_data(str(shards), questions, fallback_dir=tmp_path)
    (row,) = report.cores_per_gpu
    assert (row.demand.basis, row.demand.images_per_s) == ("given", 100_000.0)
    assert row.decode_cores == int(np.ceil(100_000.0 / report.images_per_s_per_core))
    core_s = 1 / report.images_per_s_per_core + report.render_ms / 1000
    assert row.render_cores == pytest.approx(100_000.0 * core_s, abs=1.01)


@pytest.mark.parametrize(
    ("rate", "decode_s", "render_s", "expected"),
    [(1000.0, 0.0015, 0.0204, (2, 22)), (3000.0, 0.001, 0.0, (3, 3)), (0.5, 0.001, 0.02, (1, 1))],
)
def test_whole_cores(rate: float, decode_s: float, render_s: float, expected: tuple[int, int]) -> None:
    cores = cores_for(given_demand(rate), decode_core_s=decode_s, render_core_s=render_s, loader_images_per_s=3 * rate)
    assert cores.gpus_fed == pytest.approx(3.0)
    assert (cores.decode_cores, cores.render_cores) == expected


@pytest.mark.distributed
def test_the_loader_s_threads_are_measured(shards: Path, tmp_path: Path) -> None:
    questions = DataQuestions(sample=2, batch_size=4, num_threads=2, loader_s=0.1, augment=SMALL)
    report = examine_data(str(shards), questions, fallback_dir=tmp_path)
    assert (report.num_threads, report.loader_images_per_s > 0) == (2, True)


def test_large_images_and_small_buffers_are_remarked_on(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (2500, 2000), (9, 99, 200)).save(buffer, "JPEG")
    write_shard(folder / "large.tar", [("jpg", buffer.getvalue())] * 2)
    questions = DataQuestions(sample=1, batch_size=64, num_threads=0, loader_s=0.0, augment=SMALL)
    report = examine_data(str(folder), questions, fallback_dir=tmp_path)
    advice = "\n".join(report.advice)
    assert "median short side 2000 px" in advice
    assert "holds 0.6 batches of 64 images" in advice  # 512 MiB over 64 * 2500 * 2000 * 3 bytes


def test_no_usable_image_is_one_clear_line(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    write_shard(folder / "broken.tar", [("jpg", b"nothing")] * 3)
    with pytest.raises(UserError, match="none of the 3 images looked at can be used") as raised:
        examine_data(str(folder), QUICK, fallback_dir=tmp_path)
    assert "\n" not in str(raised.value)


def test_no_shards_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere") as raised:
        examine_data(str(tmp_path / "nowhere"), QUICK, fallback_dir=tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DataQuestions(sample=0), "sample=0 must be at least 1"),
        (lambda: DataQuestions(batch_size=0), "batch_size=0 must be at least 1"),
        (lambda: DataQuestions(num_threads=-1), "num_threads=-1 must be at least 0"),
        (lambda: DataQuestions(images_per_s=0.0), "images_per_s=0 must be above 0"),
        (lambda: DataQuestions(images_per_s=float("nan")), "images_per_s=nan must be above 0"),
        (lambda: GpuAssumption(peak_tflops=0.0), "peak_tflops=0 must be above 0"),
        (lambda: GpuAssumption(utilization=1.5), "utilization=1.5 must be above 0 and at most 1"),
    ],
)
def test_questions_out_of_range_are_refused(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(UserError, match=words):
        call()


def test_published_figures_of_the_demand() -> None:
    """GFLOP an image with 2 x 224 + 10 x 96 px, and images/s at 40 % of 989 TFLOP/s: 122, 472 and 2,014."""
    demands = estimated_demands(AugmentSection(local_crops=10), HeadSection(), GpuAssumption())
    found = {demand.model: demand for demand in demands}
    for model, gflop, images_per_s in (
        ("ViT-S/16", 122, 3240),
        ("ViT-B/16", 472, 838),
        ("ViT-B/8", 2014, 196),
    ):
        assert found[model].gflop_per_image == pytest.approx(gflop, rel=0.02)
        assert found[model].images_per_s == pytest.approx(images_per_s, rel=0.02)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_operations_are_those_that_torch_counts(num_layers: int) -> None:
    """Without local crops an image costs 4 forward passes of two global ones: 3 of the student and 1 of the teacher."""
    augment, head = AugmentSection(local_crops=0), HeadSection(num_layers=num_layers)
    config = Config(
        data=DataSection(train="none"),
        augment=augment,
        head=head,
        model=ModelSection(arch="vit_small", patch_size=16, drop_path=0.0),
    )
    with torch.device("meta"):
        network = build_network(config, "explicit", is_teacher=True, world_size=1)
        crops = torch.empty(2, 3, 224, 224)
    with FlopCounterMode(display=False) as count, torch.no_grad():
        network([crops])
    assert training_flop_per_image("vit_small", 16, augment, head) == pytest.approx(
        4 * count.get_total_flops(), rel=0.002
    )
