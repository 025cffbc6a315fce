"""Numbers leave a run once and exactly: JSON rows round-trip, TensorBoard shows one point a tag and step."""

from __future__ import annotations

import io
import json
import logging
import math
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dino_dist.dist import World
from dino_dist.errors import Superseded
from dino_dist.metrics import MetricsWriter, json_row, order_event_files, tensorboard_tag
from dino_dist.progress import Progress, describe

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def writer(folder: Path, rows: list[dict[str, object]], purge_step: int | None = None, rank: int = 0) -> MetricsWriter:
    return MetricsWriter(
        append=rows.append,
        tensorboard_dir=folder / "tensorboard",
        purge_step=purge_step,
        world=World(rank=rank, size=rank + 1),
    )


def board(folder: Path) -> EventAccumulator:
    unlimited = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance=unlimited)
    accumulator.Reload()
    return accumulator


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(folder).Scalars(tag)]


@pytest.mark.parametrize("restarts", [1, 4, 12])
def test_one_curve_over_restarts_within_one_second(restarts: int, tmp_path: Path) -> None:
    """Each attempt goes on from a saved step; some overwrite a lot, the first one has nothing saved at all."""
    noise = random.Random(restarts)
    step, total = 0, 20 * (restarts + 1)
    images = torch.zeros(1, 3, 4, 4)
    for attempt in range(restarts + 1):
        metrics = writer(tmp_path, [], purge_step=step + 1 if step else 0)
        last = total if attempt == restarts else min(step + noise.randint(5, 25), total)
        if step == 0:
            metrics.image_grid(0, "crops/global", images, mean=MEAN, std=STD)
        for logged in range(step + 1, last + 1):
            metrics.log(logged, {"loss": float(attempt), "knn_top1": 0.5 if logged % 10 == 0 else None})
            if logged % 5 == 0:
                metrics.histogram(logged, "health/center", torch.arange(3.0))
        metrics.close()
        step = noise.randint(0, last) if attempt else 0
        print(f"attempt {attempt} ended at {last}, next restores {step}")
    events = board(tmp_path)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, total + 1))
    assert [event.step for event in events.Scalars("eval/knn_top1")] == list(range(10, total + 1, 10))
    assert [event.step for event in events.Histograms("health/center")] == list(range(5, total + 1, 5))
    assert [event.step for event in events.Images("crops/global")] == [0]
    # Each point is the last attempt's that wrote it: attempts never go back along the curve.
    values = [event.value for event in events.Scalars("train/loss")]
    assert values == sorted(values)


def test_a_clock_that_went_back_does_not_bring_replaced_points_back(tmp_path: Path) -> None:
    for _ in range(2):
        metrics = writer(tmp_path, [], purge_step=2)
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 1.0})
        metrics.close()
        for path in (tmp_path / "tensorboard").glob("events.out.tfevents.*"):
            # As if the node that wrote it were an hour ahead.
            stamp, _, rest = path.name.removeprefix("events.out.tfevents.").partition(".")
            path.rename(path.with_name(f"events.out.tfevents.{int(stamp.partition('-')[0]) + 3600}.{rest}"))
    metrics = writer(tmp_path, [], purge_step=1)
    metrics.log(1, {"loss": 2.0})
    metrics.close()
    assert points(tmp_path, "train/loss") == [(1, 2.0)]


def test_renamed_event_files_keep_their_order(tmp_path: Path) -> None:
    names = ["0000000100.a.1", "0000000200.b.1", "0000000200.b.2", "0000000300.a.1"]
    for index, name in enumerate(names):
        (tmp_path / f"events.out.tfevents.{name}").write_text(str(index))
    order_event_files(tmp_path, now_s=200)
    files = sorted(tmp_path.iterdir())
    assert [path.read_text() for path in files] == ["0", "1", "2", "3"]
    assert files[-1].name < "events.out.tfevents.0000000200"


def test_json_rows_round_trip_to_the_last_bit(tmp_path: Path) -> None:
    noise = random.Random(0)
    path = tmp_path / "metrics.jsonl"
    losses = [noise.uniform(-1, 1) * 10.0 ** noise.randint(-300, 300) for _ in range(200)]

    def append(row: dict[str, object]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    metrics = MetricsWriter(append=append, tensorboard_dir=tmp_path / "tb", purge_step=None, world=World())
    for step, loss in enumerate(losses):
        metrics.log(step, {"loss": loss, "images_seen": 2**60 + step})
    metrics.close()
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["loss"] for row in read] == losses
    assert [row["images_seen"] for row in read] == [2**60 + step for step in range(200)]


def test_a_number_that_is_not_finite_is_null_and_named() -> None:
    row = json_row(3, {"loss": math.nan, "lr": 0.1, "grad_norm": -math.inf, "kl": None})
    assert row == {
        "step": 3,
        "loss": None,
        "lr": 0.1,
        "grad_norm": None,
        "kl": None,
        "non_finite": ["loss", "grad_norm"],
    }


def test_a_tensor_in_a_row_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Tensor \(loss\)"):
        json_row(1, {"loss": torch.tensor(1.0)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("key", "tag"),
    [
        ("loss", "train/loss"),
        ("lr", "optim/lr"),
        ("teacher_entropy", "health/teacher_entropy"),
        ("images_per_s", "speed/images_per_s"),
        ("knn_top1", "eval/knn_top1"),
        ("mine/own", "mine/own"),
        ("something_new", "train/something_new"),
    ],
)
def test_tags_are_grouped(key: str, tag: str) -> None:
    assert tensorboard_tag(key) == tag


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    metrics = writer(tmp_path, rows, rank=1)
    metrics.log(1, {"loss": 1.0})
    metrics.embedding(1, torch.zeros(2, 2), torch.zeros(2))
    metrics.hparams({"a": 1}, ["loss"])
    metrics.close()
    assert rows == []
    assert list(tmp_path.iterdir()) == []


def test_every_row_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    metrics = writer(tmp_path, [])
    metrics.log(1, {"loss": 0.5})
    assert points(tmp_path, "train/loss") == [(1, 0.5)]
    metrics.close()


def test_a_superseded_process_leaves_tensorboard_alone(tmp_path: Path) -> None:
    def append(row: dict[str, object]) -> None:
        raise Superseded("attempt 2 owns the folder")

    metrics = MetricsWriter(append=append, tensorboard_dir=tmp_path / "tensorboard", purge_step=None, world=World())
    with pytest.raises(Superseded):
        metrics.log(1, {"loss": 0.5})
    assert board(tmp_path).Tags()["scalars"] == []


def test_rows_wait_for_a_full_disk_and_are_written_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, object]] = []
    full = True

    def append(row: dict[str, object]) -> None:
        if full:
            raise OSError(28, "No space left on device")
        rows.append(row)

    metrics = MetricsWriter(append=append, tensorboard_dir=tmp_path / "tensorboard", purge_step=None, world=World())
    with caplog.at_level(logging.ERROR):
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 1.0})
    assert [record.message for record in caplog.records if "rows wait in memory" in record.message] != []
    assert len(caplog.records) == 1
    full = False
    metrics.log(4, {"loss": 1.0})
    metrics.close()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_tensorboard_folder_that_cannot_be_written_does_not_stop_the_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    rows: list[dict[str, object]] = []
    metrics = writer(tmp_path, rows)
    metrics.log(1, {"loss": 1.0})
    metrics.close()
    assert len(rows) == 1
    assert "no TensorBoard until the next start" in caplog.text


def test_pictures_and_histograms_carry_step_and_content(tmp_path: Path) -> None:
    metrics = writer(tmp_path, [])
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    metrics.image_grid(0, "crops/global", images, mean=MEAN, std=STD)
    metrics.attention(100, images, torch.rand(5, 2, 4, 4), mean=MEAN, std=STD)
    metrics.histogram(100, "health/center", torch.tensor([1.0, 2.0, math.nan, 3.0]))
    metrics.histogram(100, "health/empty", torch.tensor([math.nan]))
    metrics.close()
    events = board(tmp_path)
    (grid,), (attention,) = events.Images("crops/global"), events.Images("attention/cls")
    assert (grid.step, grid.width, grid.height) == (0, 3 * 98 + 2, 2 * 98 + 2)
    assert (attention.step, attention.width, attention.height) == (100, 4 * 98 + 2, 5 * 98 + 2)
    (histogram,) = events.Histograms("health/center")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (100, 3.0, 6.0)
    assert events.Tags()["histograms"] == ["health/center"]


def test_hparams_are_in_the_same_run_and_add_no_point(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    metrics = writer(tmp_path, [])
    metrics.hparams({"optim.lr": 5e-4, "model.arch": "vit_tiny", "train.compile": True, "x": None}, ["knn_top1"])
    metrics.log(10, {"loss": 1.0, "knn_top1": 0.75})
    metrics.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert points(tmp_path, "eval/knn_top1") == [(10, 0.75)]
    content = board(tmp_path).PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert start["optim.lr"].number_value == 5e-4
    assert (start["model.arch"].string_value, start["train.compile"].string_value) == ("vit_tiny", "True")
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["eval/knn_top1"]


@pytest.mark.parametrize("with_images", [True, False])
def test_the_projector_holds_the_last_evaluation_alone(
    with_images: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from google.protobuf import text_format  # type: ignore[import-untyped]
    from tensorboard.plugins.projector import ProjectorConfig

    metrics = writer(tmp_path, [])
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if with_images else None
    features = torch.arange(60.0).view(30, 2)
    for step in (100, 200, 200):
        metrics.embedding(step, features + step, torch.arange(30), images, max_points=20)
    metrics.close()
    root = tmp_path / "tensorboard"
    config = text_format.Parse((root / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (entry,) = config.embeddings
    rows = [line.split("\t") for line in (root / entry.tensor_path).read_text().splitlines()]
    labels = (root / entry.metadata_path).read_text().splitlines()
    assert entry.tensor_name == "step-00000200"
    assert len(rows) == len(labels) == 20
    assert all(float(row[0]) == 200 + 2 * int(label) for row, label in zip(rows, labels, strict=True))
    assert (root / entry.sprite.image_path).is_file() if with_images else not entry.sprite.image_path
    assert [path.name for path in (root / "projector").iterdir()] == ["step-00000200"]
    assert capsys.readouterr().out == ""


def test_progress_draws_one_line_on_a_terminal_and_leaves_plain_lines_elsewhere() -> None:
    row = {"loss": 6.32167, "images_per_s": 412.31, "data_wait": 0.031, "step_s": 60.0, "lr": 0.1}
    shown, logged = io.StringIO(), io.StringIO()
    terminal = Progress(total_steps=100, console=Console(file=shown, force_terminal=True, width=120))
    plain = Progress(total_steps=100, plain_every=5, console=Console(file=logged, width=40))
    for step in range(10, 101, 10):
        terminal.update(step, row)
        plain.update(step, row)
    plain.say("ALARM [one_hot] at step 3")
    terminal.close()
    plain.close()
    assert describe(row) == "loss 6.3217  412.3 images/s  data wait 3%"
    assert "100/100" in shown.getvalue()
    assert logged.getvalue().splitlines() == [
        "step 10/100  loss 6.3217  412.3 images/s  data wait 3%  left 1:30 h",
        "step 60/100  loss 6.3217  412.3 images/s  data wait 3%  left 0:40 h",
        "step 100/100  loss 6.3217  412.3 images/s  data wait 3%  left 0:00 h",
        "ALARM [one_hot] at step 3",
    ]
