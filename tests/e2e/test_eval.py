"""`dino-dist eval knn|linear|logreg` as a person types them: what is judged, what is printed, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.e2e

LINEAR = ("eval.linear_blocks=[1,2]", "eval.linear_epochs=3", "eval.linear_lr=[0.01,0.1]")


@pytest.fixture(scope="module")
def run(tiny: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; not to be written to."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    command = [sys.executable, "-m", "launch.cli", "train", *tiny(folder, "train.length=2st")]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return folder


def environment() -> dict[str, str]:
    """With this checkout first on the path."""
    root = str(Path(__file__).parents[2])
    return dict(os.environ, PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


def photographs(folder: Path, classes: str = "ab", count: int = 6, size: tuple[int, int] = (9, 7)) -> Path:
    """A folder of noise for each class: dark for `a`, brighter from letter to letter."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 30, (*size, 3), dtype=np.uint8) + np.uint8(110 * (ord(name) - ord("a")))
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_print_what_one_finds(cli: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    results = {}
    for command, more in (("knn", ("eval.knn_temperatures=[0.2]",)), ("linear", LINEAR), ("logreg", ())):
        arguments = ("eval", command, str(tmp_path / "run"), *more, "--json")
        alone = cli(*arguments)
        assert alone.code == 0, alone.err
        result = results[command] = alone.json()
        assert (result["step"], result["network"], result["classes"], result["train_images"]) == (2, "teacher", 4, 24)
        assert 0.0 < result[{"knn": "knn_top5_k20"}.get(command, f"{command}_top5")] <= 1.0
    shutil.rmtree(tmp_path / "run" / "eval")
    both = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.cli",
            "eval",
            "linear",
            str(tmp_path / "run"),
            *LINEAR,
            "--json",
            "--nproc",
            "2",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout) == results["linear"]
    assert both.stderr.count("features of train") == 1


def test_a_table_for_people(cli: Callable[..., Any], run: Path) -> None:
    ended = cli("eval", "knn", str(run), "eval.knn_k=[1,5]", "--network", "student")
    assert ended.code == 0
    assert "knn_top1_k5" in ended.out
    assert "student" in ended.out
    assert "features of test: 24" in ended.err


def test_own_folders_of_images_one_of_them_damaged_one_of_a_pixel(
    cli: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    train, test = photographs(tmp_path / "train"), photographs(tmp_path / "test", "b", 1, (1, 1))
    (train / "a" / "3.png").write_bytes(b"no image")
    data = (f"data.eval_train={train}", f"data.eval_test={test}")
    checkpoint = str(run / "checkpoints" / "step-00000002")
    result = cli("eval", "knn", checkpoint, *data, "eval.knn_k=[1]", "--json").json()
    assert (result["train_images"], result["test_images"], result["bad_images"]) == (11, 1, 1)
    assert result["first_bad_images"][0].startswith(f"{train / 'a' / '3.png'}: ")
    assert result["knn_top1_k1"] == 1.0, "b is the same class in both, though the second has no a"


def test_what_cannot_be_judged_is_told_in_one_line(cli: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    two, one = photographs(tmp_path / "two"), photographs(tmp_path / "one", "a")
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "bare" / "0.png")
    (tmp_path / "empty").mkdir()
    for train, test, words in (
        (one, two, "all 6 train images have label 0, at least two classes"),
        (two, tmp_path / "bare", "1 of 1 test images have no label"),
        (two, tmp_path / "empty", f"{tmp_path / 'empty'} holds"),
        (two, tmp_path / "nowhere", "nowhere"),
    ):
        for command in ("knn", "linear", "logreg"):
            refused = cli("eval", command, str(run), f"data.eval_train={train}", f"data.eval_test={test}").refusal()
            assert words in refused
    assert "eval.crop_px=15" in cli("eval", "knn", str(run), "eval.crop_px=15").refusal()
    assert "eval.linear_lr" in cli("eval", "linear", str(run), "eval.linear_lr=[]").refusal()
    assert "has only 2 blocks" in cli("eval", "linear", str(run), "eval.linear_blocks=[3]").refusal()
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "below")
    refused = cli("eval", "linear", str(run), "eval.linear_blocks=[1]", "--out", out).refusal()
    assert f"{out} cannot hold the sweep's state" in refused
    assert "--network pupil" in cli("eval", "knn", str(run), "--network", "pupil").refusal()
    without = cli("eval", "knn", str(run), "data.eval_train=null", "data.eval_test=null").refusal()
    assert "labelled images are needed" in without
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text("eval: {knn_kk: [3]}\n")
    refused = cli("eval", "knn", str(tmp_path / "run"), "eval.knn_k=[5]").refusal()
    assert f"{config}: unknown setting 'eval.knn_kk'" in refused


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_refuse_in_one_line(run: Path, tmp_path: Path) -> None:
    one = photographs(tmp_path / "one", "a")
    for override in (f"data.eval_train={one}", "eval.knn_kk=3"):
        ended = subprocess.run(
            [sys.executable, "-m", "launch.cli", "eval", "knn", str(run), override, "--nproc", "2"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2
        assert len([line for line in ended.stderr.splitlines() if line.startswith("error: ")]) == 1, ended.stderr
