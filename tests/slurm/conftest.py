"""A two-node Slurm for the tests, the real command line on it, and runs to be watched, broken and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dino_dist.ledger import read_rows
from dino_dist.manifest import committed
from dino_dist.run_folder import RunFolder

LENGTH = 120
SAVE_EVERY = 25
RUN_PATIENCE_S = 150.0
"""For what may take a start of the job: two ranks import torch on as few as two cores."""
MEASURED = frozenset({"host_memory_gib", "save_s", "images_per_s", "step_s", "data_wait"})
"""Keys of a row that tell of this machine at that moment."""


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = spec_from_file_location(f"slurm_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


slurm_cluster = _load("cluster")


@pytest.fixture(scope="session")
def _started_cluster() -> Iterator[Any]:
    reason = slurm_cluster.why_not()
    if reason is not None:
        pytest.skip(reason)
    cluster = slurm_cluster.Cluster()
    try:
        cluster.start()
        yield cluster
    except AssertionError:
        print(cluster.log_tails())
        raise
    finally:
        cluster.stop()


@pytest.fixture
def cluster(_started_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The two-node Slurm, idle, as the only one that this process and its children know; see `cluster.py`."""
    for name in os.environ:
        if name.startswith(("SLURM", "SBATCH", "DINO_DIST")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(_started_cluster.configuration))
    # The user's own defaults and list of submissions have no part in this.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield _started_cluster
    _started_cluster.clear()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def ok(self) -> Ended:
        """Itself, if it ended well."""
        assert self.code == 0, self
        return self

    def refusal(self) -> str:
        """The one line of bad input."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]


def call(*arguments: str, patience_s: float = 120) -> Ended:
    """Run `dino-dist` to its end."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, check=False)
    return Ended(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture
def dino(cluster: Any) -> Callable[..., Ended]:
    """`dino("status", run_dir)`: the real command in a process of its own, where Slurm is the test's."""
    return call


class SlurmRun:
    """A run folder that a Slurm job trains in."""

    def __init__(self, cluster: Any, path: Path, job_id: str) -> None:
        self.cluster = cluster
        self.folder = RunFolder(path)
        self.job_id = job_id

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The ledger's rows of these kinds, of all starts."""
        return [row for row in read_rows(self.folder.ledger) if row["event"] in kinds]

    def last_logged_step(self) -> int:
        """Of the last row of metrics.jsonl; 0 before the first."""
        found = read_rows(self.folder.metrics)
        return int(found[-1]["step"]) if found else 0

    def newest_checkpoint(self) -> int:
        """The step of the newest commit, 0 without one."""
        return max((step for step, _ in committed(self.folder.checkpoints)), default=0)

    def state(self) -> str:
        """Slurm's word for the job's state."""
        job = self.cluster.job(self.job_id)
        return "FORGOTTEN" if job is None else job.state

    def wait_until(self, predicate: Callable[[], Any], what: str, patience_s: float = RUN_PATIENCE_S) -> None:
        """Poll; a job that waits for its next run need not wait long, one that is over ends the wait."""

        def reached() -> bool:
            if predicate():
                return True
            self.cluster.release(self.job_id)
            job = self.cluster.job(self.job_id)
            assert job is None or not job.is_over or predicate(), f"job {job.state} before {what}"
            return False

        self.cluster.wait_for(reached, what, patience_s)

    def wait_for_step(self, step: int, starts: int = 1) -> None:
        """Until the start of that number has logged `step` (or a later one)."""
        self.wait_until(
            lambda: len(self.events("start")) >= starts and self.last_logged_step() >= step,
            f"step {step} in start {starts}",
        )

    def wait_for_end(self, state: str = "COMPLETED", patience_s: float = RUN_PATIENCE_S) -> None:
        """Until the job will not run again; it must be in that state."""
        self.cluster.wait_for(self._is_over, f"end of job {self.job_id}", patience_s)
        assert self.state() == state

    def _is_over(self) -> bool:
        self.cluster.release(self.job_id)
        job = self.cluster.job(self.job_id)
        return job is None or (job.is_over and job.state != "COMPLETING")

    def assert_restarted_at_the_saved_steps(self) -> None:
        """Each start but the first restored the newest commit of the one before, and says so."""
        newest = 0
        for row in self.events("save", "restore", "start"):
            if row["event"] == "save":
                newest = row["step"]
            else:
                assert row["step"] == newest, f"{row['event']} of attempt {row['attempt']}"


@pytest.fixture
def watch(cluster: Any) -> Callable[[Path, str], SlurmRun]:
    """`watch(run_dir, job_id)`."""
    return lambda path, job_id: SlurmRun(cluster, path, job_id)


@pytest.fixture
def launch(cluster: Any, small: Callable[..., list[str]]) -> Callable[..., SlurmRun]:
    """`launch(run_dir, *options, overrides=[])`: submit the small run on both nodes, a rank each."""

    def submit(path: Path, *options: str, overrides: Sequence[str] = ()) -> SlurmRun:
        ended = call("launch", *small(path, *overrides), "--nodes", "2", "--no-probe", "--json", *options).ok()
        (job,) = json.loads(ended.out)["jobs"]
        return SlurmRun(cluster, path, job["job_id"])

    return submit


@pytest.fixture(scope="session")
def small(tiny: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """`small(run_dir, *more)`: recipe and overrides of a run long enough to be met in its midst; see `tiny`."""
    length = [f"train.length={LENGTH}st", f"checkpoint.every={SAVE_EVERY}st", "checkpoint.keep=3"]
    less = ["data.eval_train=null", "data.eval_test=null", "metrics.pictures_every=1000st"]
    return lambda run_dir, *more: tiny(run_dir, *length, *less, *more)


def rows(path: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says that does not depend on the machine's speed; null is as good as absent."""
    found = read_rows(RunFolder(path).metrics)
    return [{key: value for key, value in row.items() if key not in MEASURED and value is not None} for row in found]


@pytest.fixture(scope="session")
def undisturbed_rows(small: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the same run logs on two local ranks that nobody disturbs."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    call("train", *small(path), "--nproc", "2").ok()
    return rows(path)


@pytest.fixture
def assert_undisturbed(undisturbed_rows: list[dict[str, Any]]) -> Callable[[Path], None]:
    """`assert_undisturbed(run_dir)`: every number of every row, to the last bit, as if nothing had happened."""

    def compare(path: Path) -> None:
        found = rows(path)
        assert [row["step"] for row in found] == list(range(1, LENGTH + 1)), "a row is missing or double"
        for one, other in zip(found, undisturbed_rows, strict=True):
            assert one == other

    return compare


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Beside a failure, what Slurm and the run said."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    if report.failed and "cluster" in arguments:
        report.sections.append(("Slurm", arguments["cluster"].log_tails()))
        if "tmp_path" in arguments:
            report.sections.append(("the run", _told(arguments["tmp_path"])))
    return report


def _told(folder: Path) -> str:
    """Ledgers, output of ranks and jobs below a folder."""
    paths = [path for pattern in ("*.jsonl", "*.out", "*.err", "rank-*.log") for path in sorted(folder.rglob(pattern))]
    texts = [
        f"--- {path.relative_to(folder)}\n{slurm_cluster.tail(path)}" for path in paths if path.name != "metrics.jsonl"
    ]
    return "\n".join(texts)
