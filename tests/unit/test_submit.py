"""What is handed to sbatch, and what is refused where there is no Slurm; the real one is driven in tests/slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from dino_dist.errors import UserError
from launch.batch_job import BatchJob, check_path, script_text, signals_held_back, starters_hidden
from launch.cli import _exit_code, app
from launch.job_options import JobOptions
from launch.submit import Request, load_runs, submit
from launch.wait import reached_its_length

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


def job(*run_dirs: Path, parallelism: int | None = None, **options: object) -> BatchJob:
    given = JobOptions(**{"nodes_min": 1, "nodes_max": 1} | options)  # type: ignore[arg-type]
    folder = run_dirs[0].parent / "slurm"
    return BatchJob(name="dino-x", folder=folder, run_dirs=run_dirs, options=given, array_parallelism=parallelism)


def sbatch_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_every_option_is_one_line_of_the_script(tmp_path: Path) -> None:
    script = script_text(
        job(
            tmp_path / "run",
            nodes_min=2,
            nodes_max=2,
            gpus_per_node=8,
            tasks_per_node=8,
            cpus_per_task=6,
            mem="64G",
            partition="low",
            account="team",
            qos="long",
            constraint="a100|h100",
            exclude="n1,n[3-5]",
            comment="it's #1",
            time_min=90,
            slurm={"reservation": "r", "exclusive": "true", "signal": "USR2@30"},
        )
    )
    assert sbatch_lines(script) == [
        "account=team",
        "comment='it'\"'\"'s #1'",
        "constraint='a100|h100'",
        "cpus-per-task=6",
        "exclude='n1,n[3-5]'",
        "exclusive",
        "gpus-per-node=8",
        "job-name=dino-x",
        "mem=64G",
        "nodes=2",
        "ntasks-per-node=8",
        "open-mode=append",
        f"output={tmp_path}/slurm/%j_0_log.out",
        "partition=low",
        "qos=long",
        "requeue",
        "reservation=r",
        "signal=USR2@30",
        "time=90",
    ]


def test_what_was_not_given_is_left_to_the_site(tmp_path: Path) -> None:
    names = {line.split("=")[0] for line in sbatch_lines(script_text(job(tmp_path / "run")))}
    assert names == {"job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue", "signal"}


def test_a_range_of_nodes_is_not_held_to_the_tasks_of_the_fewest(tmp_path: Path) -> None:
    lines = sbatch_lines(script_text(job(tmp_path / "run", nodes_max=4, tasks_per_node=2, cpus_per_task=3)))
    assert "nodes=1-4" in lines
    assert "mincpus=6" in lines
    assert not [line for line in lines if line.startswith(("ntasks", "cpus-per-task"))]


def test_the_shell_reads_the_script(tmp_path: Path) -> None:
    odd = tmp_path / "a folder & more"
    script = script_text(job(odd / "run", setup=('echo "$HOME"',), comment="$(touch x)"))
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "\nsrun" not in script
    assert f"submitit.core._submit '{odd}/slurm'" in script


def imported_from(script: str, cwd: Path, **environment: str) -> str:
    """Where `import launch` would come from in the job, by its own setup lines."""
    setup = script.partition("# setup")[2].partition("# command")[0]
    command = f"{setup}\npython3 -c 'import launch; print(launch.__file__)'"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_job_imports_the_copy_of_the_code(tmp_path: Path) -> None:
    """Not what lies in the folder it was submitted from, nor on the user's PYTHONPATH."""
    places = [tmp_path / name for name in ("here", "user", "setup", "run 0/code", "run 1/code")]
    for place in places:
        (place / "launch").mkdir(parents=True)
        (place / "launch" / "__init__.py").touch()
    here, user, by_setup, first, second = places
    one = script_text(job(first.parent, setup=(f"export PYTHONPATH={by_setup}",)))
    assert imported_from(one, here, PYTHONPATH=str(user)) == str(first / "launch" / "__init__.py")
    two = script_text(job(first.parent, second.parent))
    for number, code in enumerate((first, second)):
        found = imported_from(two, here, PYTHONPATH=str(user), SLURM_ARRAY_TASK_ID=str(number))
        assert found == str(code / "launch" / "__init__.py")


@pytest.mark.parametrize(("parallelism", "array"), [(None, "0-2%3"), (1, "0-2%1")])
def test_a_sweep_is_an_array_with_the_same_options(tmp_path: Path, parallelism: int | None, array: str) -> None:
    runs = [tmp_path / f"{number:03d}" for number in range(3)]
    script = script_text(job(*runs, parallelism=parallelism, nodes_max=2, mem="1G", slurm={"nice": "5"}))
    lines = sbatch_lines(script)
    assert f"array={array}" in lines
    assert f"output={tmp_path}/slurm/%A_%a_0_log.out" in lines
    assert {"nodes=1-2", "mem=1G", "nice=5", "requeue"} <= set(lines)


@pytest.mark.parametrize("name", ["50%j", "a:b", "a'b", 'a"b', "a\\b", "a\nb"])
def test_folders_that_slurm_would_misread_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"run.dir=") as refused:
        check_path("run.dir", Path("/runs") / name)
    assert "\n" not in str(refused.value)


def test_a_sweep_gives_each_run_its_folder(small_shards: tuple[Path, Path], tmp_path: Path) -> None:
    base = [f"data.train={small_shards[0]}", f"run.dir={tmp_path / 'sweep'}"]
    entries = ["run.seed=1", "run.seed=2 'train.length=2 ep'", f"run.dir={tmp_path / 'own'}"]
    with pytest.raises(UserError, match=r"--sweep .*train.length: '2 ep'"):
        load_runs(TINY, base, entries)
    base_dir, configs = load_runs(TINY, base, [entries[0], "run.seed=2 optim.lr=1e-3", entries[2]])
    assert base_dir == tmp_path / "sweep"
    assert [config.run.dir for config in configs] == [
        str(tmp_path / "sweep" / "000"),
        str(tmp_path / "sweep" / "001"),
        str(tmp_path / "own"),
    ]
    assert [config.run.seed for config in configs] == [1, 2, 0]
    assert configs[1].optim.lr == 1e-3
    for wrong, words in (
        ("'a", "closing quotation"),
        (" ", "at least one"),
        (f"run.dir={tmp_path}/sweep/000", "two runs"),
    ):
        with pytest.raises(UserError, match=words):
            load_runs(TINY, base, [entries[0], wrong])


def test_run_dir_becomes_absolute(
    small_shards: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base_dir, (config,) = load_runs(TINY, [f"data.train={small_shards[0]}", "run.dir=runs/a"], [])
    assert config.run.dir == str(base_dir) == str(tmp_path / "runs" / "a")


def test_without_slurm_nothing_is_written(
    small_shards: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    base_dir, configs = load_runs(TINY, [f"data.train={small_shards[0]}", f"run.dir={tmp_path / 'run'}"], [])
    options = JobOptions(nodes_min=1, nodes_max=1)
    with pytest.raises(UserError, match="sbatch is not on the PATH"):
        submit(Request(configs=configs, base_dir=base_dir, options=options, argv=()))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, without Slurm."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("XDG_CONFIG_HOME", "DINO_DIST_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def launched(*arguments: str) -> int:
    return _exit_code(lambda: app(["launch", TINY, *arguments]))


def test_a_dry_run_shows_a_script_and_the_plan_and_writes_nothing(
    small_shards: tuple[Path, Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / ".config" / "dino_dist").mkdir(parents=True)
    (home / ".config" / "dino_dist" / "cluster.yaml").write_text(
        "partition: mine\nsetup: [echo file]\n", encoding="utf-8"
    )
    given = [f"data.train={small_shards[0]}", f"run.dir={home / 'run'}", "--nodes", "1-2", "--setup", "echo typed"]
    assert launched(*given, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/bin/bash\n")
    assert "#SBATCH --partition=mine\n" in shown
    assert "echo file\necho typed\nexport" in shown
    assert "#   world: 1-2 ranks on 1-2 nodes\n" in shown
    assert "#   length: 16 steps, 192 images, 3.148 epochs\n" in shown
    assert launched(*given, "--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert shown.startswith(document["script"])
    assert document["plans"][0]["steps"] == 16
    assert not (home / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--time", "soon"), "--time 'soon'"),
        (("--nodes", "two"), "--nodes 'two'"),
        (("--slurm", "output=x"), "--slurm output"),
        (("--partition", ""), "--partition: the value is empty"),
        (("--nodes", "13"), "13 ranks"),
        (("train.lenght=1ep",), "train.length"),
        ((), "sbatch is not on the PATH"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    small_shards: tuple[Path, Path],
    home: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    dry = ("--dry-run",) * bool(arguments)
    assert launched(f"data.train={small_shards[0]}", f"run.dir={home / 'run'}", *arguments, *dry) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not (home / "run").exists()


def test_variables_of_a_job_around_us_do_not_reach_the_new_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inherited = ("SLURM_JOB_ID", "SLURM_PROCID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_LISTEN_FD")
    for name in (*inherited, "SBATCH_PARTITION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    before = dict(os.environ)
    with starters_hidden():
        assert before.keys() - os.environ.keys() >= {*inherited, "SBATCH_PARTITION", "TORCHELASTIC_RUN_ID"}
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
        assert os.environ["PATH"] == before["PATH"]
    assert dict(os.environ) == before
    assert "SBATCH_PARTITION" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [0, 1])
def test_ctrl_c_waits_for_the_end_of_a_submission(threads: int) -> None:
    """Even if a thread that was there before, and blocks nothing, is given the signal."""
    order, over = [], threading.Event()
    others = [threading.Thread(target=over.wait) for _ in range(threads)]
    for other in others:
        other.start()

    def submission() -> None:
        with signals_held_back():
            os.kill(os.getpid(), signal.SIGINT)
            order.append("submitted")
        order.append("not reached")

    try:
        with pytest.raises(KeyboardInterrupt):
            submission()
    finally:
        over.set()
        for other in others:
            other.join()
    assert order == ["submitted"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("rows", "reached"),
    [
        ([], False),
        ([{"event": "start"}], False),
        ([{"event": "start"}, {"event": "stop", "why": "reached train.length"}], True),
        ([{"event": "start"}, {"event": "stop", "why": "stopped early, everything saved"}], False),
        ([{"event": "stop", "why": "reached train.length"}, {"event": "start"}], False),
        ([{"event": "stop", "why": "reached train.length"}, {"event": "fault", "why": "late"}], True),
    ],
)
def test_the_ledger_says_whether_a_run_is_complete(tmp_path: Path, rows: list[dict[str, str]], reached: bool) -> None:
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert reached_its_length(tmp_path) is reached
