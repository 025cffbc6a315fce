"""The plan of a job: its numbers, and that whatever the ranks would refuse is refused before there is a job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.errors import UserError
from dino_dist.manifest import committed
from dino_dist.run_folder import RunFolder
from launch.job_options import JobOptions
from launch.plan import Plan, index_dir_of, make_plan

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


@pytest.fixture
def config(small_shards: tuple[Path, Path], tmp_path: Path) -> Callable[..., Config]:
    """The tiny config on 61 images, with overrides."""
    train, test = small_shards
    base = [f"data.train={train}", f"data.eval_train={train}", f"data.eval_test={test}", f"run.dir={tmp_path / 'run'}"]
    return lambda *overrides: load_config(TINY, [*base, *overrides])


def planned(config: Config, tmp_path: Path, *, nodes: tuple[int, int] = (1, 1), tasks: int = 1) -> Plan:
    options = JobOptions(nodes_min=nodes[0], nodes_max=nodes[1], tasks_per_node=tasks)
    return make_plan(config, options, index_dir=tmp_path / "index")


def test_the_numbers_of_a_run(config: Callable[..., Config], tmp_path: Path) -> None:
    plan = planned(
        config("train.length=2ep", "checkpoint.every=30im", "optim.warmup=9ep"), tmp_path, nodes=(1, 2), tasks=5
    )
    assert (plan.dataset_size, plan.batch_size, plan.steps, plan.images) == (61, 12, 11, 132)
    assert plan.epochs == pytest.approx(132 / 61)
    assert plan.checkpoint_steps == 3
    assert (plan.world_min, plan.world_max) == (5, 10)
    assert plan.micro_batch_max == 3
    assert any("optim.warmup" in note for note in plan.notes)
    assert json.loads(json.dumps(plan.as_json()))["steps"] == 11


def test_accumulation_makes_the_parts_smaller(config: Callable[..., Config], tmp_path: Path) -> None:
    plan = planned(config("head.batch_norm=false", "train.accumulate=2"), tmp_path, nodes=(2, 2))
    assert plan.micro_batch_max == 3


@pytest.mark.parametrize(
    ("overrides", "nodes", "tasks", "words"),
    [
        ((), (1, 13), 1, r"13 ranks for train.batch_size=12"),
        ((), (10**5, 10**5), 8, r"800000 ranks"),
        (("parallel.strategy=hsdp",), (1, 2), 1, r"on 1 node.*hsdp needs at least two ranks"),
        (("parallel.strategy=hsdp", "parallel.replicate=2"), (2, 4), 1, r"on 3 nodes.*replicate=2 does not divide 3"),
        (("parallel.strategy=none",), (2, 2), 1, r"parallel.strategy=none"),
        (("head.batch_norm=false", "train.accumulate=4"), (4, 4), 1, r"train.accumulate=4"),
        (("model.num_heads=3",), (1, 1), 1, r"num_heads=3"),
        (("train.compile=true", "parallel.activation_checkpointing=fairscale"), (1, 1), 1, r"cannot trace"),
        (("data.train=/nowhere",), (1, 1), 1, r"/nowhere does not exist"),
        (("data.eval_test=/nowhere",), (1, 1), 1, r"/nowhere does not exist"),
        (("model.init_from=/nowhere",), (1, 1), 1, r"model.init_from=/nowhere does not exist"),
    ],
)
def test_what_the_ranks_would_refuse(
    config: Callable[..., Config],
    tmp_path: Path,
    overrides: tuple[str, ...],
    nodes: tuple[int, int],
    tasks: int,
    words: str,
) -> None:
    with pytest.raises(UserError, match=words):
        planned(config(*overrides), tmp_path, nodes=nodes, tasks=tasks)


def test_a_folder_that_trains_something_else_is_refused(config: Callable[..., Config], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    checkpoint = folder.checkpoints / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}", encoding="utf-8")
    assert committed(folder.checkpoints)
    from dino_dist.run_session import write_config

    write_config(folder, config())
    planned(config("checkpoint.every=5st"), tmp_path)
    with pytest.raises(UserError, match=r"optim.lr"):
        planned(config("optim.lr=1"), tmp_path)
    options = JobOptions(nodes_min=1, nodes_max=1)
    make_plan(config("optim.lr=1"), options, index_dir=tmp_path / "index", accept_changes=True)


def test_a_plan_leaves_nothing_in_the_run_folder(config: Callable[..., Config], tmp_path: Path) -> None:
    planned(config(), tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_index_of_a_dry_run_is_gone_afterwards(tmp_path: Path) -> None:
    with index_dir_of(tmp_path / "run", dry_run=True) as folder:
        assert folder.is_dir()
        shutil.copy(TINY, folder)
    assert not folder.exists()
    with index_dir_of(tmp_path / "run", dry_run=False) as folder:
        assert folder == tmp_path / "run" / "index"
    assert not (tmp_path / "run").exists()
