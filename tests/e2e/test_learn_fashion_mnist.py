"""The learning proof runs end to end, small: both contenders, result file, picture; and its verdict is right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from dino_dist.errors import UserError
from dino_dist.run_folder import RunFolder

pytest.importorskip("matplotlib")
TOOLS = Path(__file__).parents[2] / "tools"
SMALL = (
    *("train.batch_size=12", "model.embed_dim=12", "model.depth=1", "head.num_prototypes=16", "head.hidden_dim=8"),
    *("augment.local_crops=2", "optim.warmup=2st", "metrics.every=1st", "metrics.tensorboard=false"),
)


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(TOOLS))
    yield import_module("learn_fashion_mnist")
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def shards(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 + 12 images of four classes where the tool looks for Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder / "train", [16, 14])
    make_shards(folder / "test", [12], seed=1)
    return folder


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "learn_fashion_mnist.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_both_contenders_are_trained_and_told_of(shards: Path, tmp_path: Path) -> None:
    budget = ("--images", 36, "--evaluations", 3, "--nproc", 1, "--against-plain", "--json")
    done = run_tool("--dir", tmp_path, "--shards", shards, *budget, *SMALL)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "result.json").read_text())
    assert [(run["name"], run["seed"]) for run in document["runs"]] == [("system", 0), ("plain", 0)]
    for run in document["runs"]:
        assert list(run["knn_top1"]) == ["12", "24", "36"], "judged at the same images"
        assert all(0 <= accuracy <= 1 for accuracy in run["knn_top1"].values())
        assert run["images_per_s"] > 0
    assert 0 <= document["knn_random_init"] <= 1
    assert document["machine"]["cpus"] >= 1
    assert "--against-plain" in document["command"]
    assert document["comparison"] is None, "one seed is no comparison"
    assert RunFolder(tmp_path / "system-0").config.is_file()
    again = json.loads(run_tool("--dir", tmp_path, "--shards", shards, *budget, *SMALL).stdout)
    for before, after in zip(document["runs"], again["runs"], strict=True):
        assert (after["knn_top1"], after["images_per_s"]) == (before["knn_top1"], before["images_per_s"]), "not again"
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--minutes or --images"),
        (("--images", 36, "--minutes", 1), "--minutes or --images"),
        (("--images", 36, "--against-plain", "model.drop_path=0.1"), "model.drop_path"),
        (("--images", 36, "--against-plain", "model.init_from=a.pth"), "model.init_from=null"),
        (("--images", 36, "optim.lrr=1"), "optim.lr"),
        (("--images", 36, "run.seed=3"), "run.seed=3: this tool sets it by its options"),
        (("--images", 36, "--shards", TOOLS), "tools holds no train/"),
    ],
)
def test_bad_input_is_one_line(
    tool: ModuleType, shards: Path, tmp_path: Path, arguments: tuple[object, ...], named: str
) -> None:
    app = typer.Typer()
    app.command()(tool.main)
    done = CliRunner().invoke(app, [str(word) for word in ("--dir", tmp_path, "--shards", shards, *arguments)])
    assert done.exit_code == 2, done.output
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr


def curves_of(tool: ModuleType, system: list[float], plain: list[float]) -> list[object]:
    return [
        tool.Curve(name=name, seed=seed, knn_top1={60: 0.1, 120: accuracy}, images_per_s=1.0, seconds=1.0)
        for name, accuracies in (("system", system), ("plain", plain))
        for seed, accuracy in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("system", "plain", "mean", "error", "verdict"),
    [
        ([0.80, 0.82, 0.81], [0.80, 0.81, 0.79], 1.0, 3**-0.5, "no difference shown"),
        ([0.80, 0.80, 0.80], [0.81, 0.82, 0.79], -2 / 3, (7 / 9) ** 0.5, "no difference shown"),
        ([0.80, 0.80, 0.80], [0.85, 0.84, 0.86], -5.0, 3**-0.5, "worse"),
        ([0.85, 0.84, 0.86], [0.80, 0.80, 0.80], 5.0, 3**-0.5, "better"),
    ],
)
def test_the_verdict(
    tool: ModuleType, system: list[float], plain: list[float], mean: float, error: float, verdict: str
) -> None:
    """Differences by hand: (0, 1, 2), (-1, -2, 1), (-5, -4, -6) and (5, 4, 6) points; deviations over root 3."""
    comparison = tool.compare(curves_of(tool, system, plain))
    assert comparison["mean"] == pytest.approx(mean)
    assert comparison["standard_error"] == pytest.approx(error)
    # Student's quantile for two degrees of freedom, from a table.
    assert comparison["interval_95"] == pytest.approx([mean - 4.303 * error, mean + 4.303 * error], abs=1e-3)
    assert comparison["verdict"] == verdict


def test_a_folder_takes_trainings_of_one_commit(tool: ModuleType, tmp_path: Path) -> None:
    tool.refuse_other_commits(tmp_path / "commit", "a1")
    tool.refuse_other_commits(tmp_path / "commit", "a1")
    with pytest.raises(UserError, match="holds trainings of commit a1, this is b2"):
        tool.refuse_other_commits(tmp_path / "commit", "b2")


@pytest.mark.parametrize(("plain", "code"), [([0.80, 0.80, 0.80], 0), ([0.85, 0.84, 0.86], 1)])
def test_a_worse_system_ends_with_another_exit_code(
    tool: ModuleType, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: list[float], code: int
) -> None:
    curves = curves_of(tool, [0.80, 0.80, 0.80], plain)
    found = {"knn_random_init": 0.1, "knn_raw_pixels": 0.7, "k": 20, "comparison": tool.compare(curves)}
    monkeypatch.setattr(tool, "prove", lambda *_, **__: (found, curves))
    app = typer.Typer()
    app.command()(tool.main)
    done = CliRunner().invoke(app, ["--dir", str(tmp_path), "--shards", str(shards), "--images", "36"])
    assert done.exit_code == code, done.output
    assert (": worse" in done.stdout) == bool(code)
    assert json.loads((tmp_path / "result.json").read_text()) == found


def test_without_plain_runs_there_is_no_verdict(tool: ModuleType) -> None:
    assert tool.compare(curves_of(tool, [0.8, 0.7], [])) is None


def test_time_is_that_of_all_starts(tool: ModuleType) -> None:
    """The night between two starts is no training."""
    ledger = [
        {"attempt": attempt, "time": f"2030-01-0{day}T10:{minute:02d}:00.000000+00:00"}
        for attempt, day, minute in ((1, 1, 0), (1, 1, 7), (1, 1, 5), (2, 2, 30), (2, 2, 33))
    ]
    assert tool.seconds_of_all_starts(ledger) == 600
