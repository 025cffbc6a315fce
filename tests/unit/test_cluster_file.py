"""The user's defaults: strict, read as they stand, below what the command line says."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_dist.errors import UserError
from launch.cluster_file import Settings, cluster_file_path, job_options, read_cluster_file

FULL = """
partition: on            # YAML would read true
account: 007
time: 3:00:00            # YAML would read 10800
gpus_per_node: 8
exclude: [n1, "n[3-5]"]
comment: null
qos:
setup:
  - module load cuda
  - ""
  - source env.sh
slurm:
  exclusive: true
  hint: nomultithread
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    assert read_cluster_file(written(tmp_path, FULL)) == Settings(
        partition="on",
        account="007",
        time="3:00:00",
        gpus_per_node=8,
        exclude="n1,n[3-5]",
        setup=("module load cuda", "source env.sh"),
        slurm={"exclusive": "true", "hint": "nomultithread"},
    )


def test_no_file_and_an_empty_one_say_nothing(tmp_path: Path) -> None:
    assert read_cluster_file(None) == read_cluster_file(written(tmp_path, "# nothing\n")) == Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: x", "did you mean partition?"),
        ("gpus-per-node: 8", "did you mean gpus_per_node?"),
        ("zzz: x", "keys are"),
        ("gpus_per_node: many", "gpus_per_node"),
        ("tasks_per_node: 0", "at least 1"),
        ("time: 5x", "--time '5x'"),
        ("partition: [a, b]", "partition must be one value"),
        ("setup: {a: b}", "setup must be a list"),
        ("slurm: [exclusive]", "slurm must hold"),
        ("slurm: {nodes: 3}", "use --nodes"),
        ("- a", "must hold lines"),
        ("a: [", "not valid YAML"),
        ('comment: "two\\nlines"', "line break"),
    ],
)
def test_anything_else_is_one_line_that_names_the_file(tmp_path: Path, text: str, words: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError) as refused:
        read_cluster_file(file)
    message = str(refused.value)
    assert str(file) in message
    assert words in message
    assert "\n" not in message


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(b"\xff\xfe\x00partition")
    with pytest.raises(UserError, match="cannot be read"):
        read_cluster_file(file)


def test_the_command_line_wins_and_adds() -> None:
    file = Settings(partition="a", account="b", time="30", setup=("first",), slurm={"nice": "1", "exclusive": "true"})
    given = Settings(partition="c", gpus_per_node=0, setup=("then",), slurm={"nice": "2"})
    assert given.over(file) == Settings(
        partition="c",
        account="b",
        time="30",
        gpus_per_node=0,
        setup=("first", "then"),
        slurm={"nice": "2", "exclusive": "true"},
    )


@pytest.mark.parametrize(
    ("settings", "tasks"),
    [
        (Settings(), 1),
        (Settings(gpus_per_node=8), 8),
        (Settings(gpus_per_node=8, tasks_per_node=2), 2),
        (Settings(tasks_per_node=3), 3),
    ],
)
def test_a_task_a_gpu_unless_said(settings: Settings, tasks: int) -> None:
    assert job_options("2", settings).tasks_per_node == tasks


def test_false_drops_a_flag_of_the_file() -> None:
    merged = Settings(slurm={"exclusive": "false"}).over(Settings(slurm={"exclusive": "true", "nice": "1"}))
    assert dict(job_options("1", merged).slurm) == {"nice": "1"}


def test_where_the_file_is(tmp_path: Path) -> None:
    home, named = tmp_path / "home", tmp_path / "mine.yaml"
    default = home / ".config" / "dino_dist" / "cluster.yaml"
    assert cluster_file_path({"HOME": str(home)}) is None
    default.parent.mkdir(parents=True)
    default.touch()
    assert cluster_file_path({"HOME": str(home)}) == default
    assert cluster_file_path({"HOME": str(home), "XDG_CONFIG_HOME": str(tmp_path)}) is None
    assert cluster_file_path({"XDG_CONFIG_HOME": str(home / ".config")}) == default
    with pytest.raises(UserError, match=r"DINO_DIST_CLUSTER=.*no such file"):
        cluster_file_path({"HOME": str(home), "DINO_DIST_CLUSTER": str(named)})
    named.touch()
    assert cluster_file_path({"HOME": str(home), "DINO_DIST_CLUSTER": str(named)}) == named
