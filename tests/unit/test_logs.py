"""The last lines of a log are exactly those, whatever its size; what is added afterwards follows without a gap."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dino_dist.errors import UserError
from dino_dist.run_folder import RunFolder
from launch.logs import show_logs
from launch.submission import Submission

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def log_file(folder: RunFolder, rank: int = 0) -> Path:
    return folder.logs / f"rank-{rank:05d}.log"


def shown(
    folder: RunFolder, *, lines: int = 200, rank: int = 0, supervisor: bool = False, follow: bool = False
) -> bytes:
    out = io.BytesIO()
    show_logs(folder.path, lines=lines, rank=rank, supervisor=supervisor, follow=follow, out=out)
    return out.getvalue()


def submit(folder: RunFolder, job_id: str) -> Path:
    """A record of a submission; the supervisor's folder."""
    slurm_folder = folder.path / "slurm"
    slurm_folder.mkdir()
    record = Submission(
        job_id=job_id,
        submitted="2030-01-01T00:00:00+00:00",
        run_dir=str(folder.path),
        argv=[],
        config_file="",
        nodes_min=1,
        nodes_max=1,
        tasks_per_node=1,
        gpus_per_node=0,
        time_min=None,
        partition=None,
        slurm_folder=str(slurm_folder),
        code={},
    )
    record.write(folder.path)
    return slurm_folder


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "no programs here"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.parametrize("ended", [True, False])
def test_the_last_lines_are_exactly_those(folder: RunFolder, ended: bool) -> None:
    """Against splitting the whole content, with lines around and above the size of a block."""
    rng = random.Random(11)
    for sizes in ([0], [5], [0] * 300, [1 << 16, (1 << 16) - 1, 3], [70_000, 10, 200_000], range(1, 2000, 7)):
        content = b"\n".join(rng.randbytes(size).replace(b"\n", b"x") for size in sizes) + b"\n" * ended
        log_file(folder).write_bytes(content)
        whole = io.BytesIO(content).readlines()
        for lines in (1, 2, 3, 200, 10_000):
            assert shown(folder, lines=lines) == b"".join(whole[-lines:]), (len(sizes), lines)
        assert shown(folder, lines=0) == b""


def test_bytes_are_passed_on_as_they_are(folder: RunFolder) -> None:
    log_file(folder, rank=12).write_bytes(b"\x1b[31m\xff\xfe 100%\r\n")
    assert shown(folder, rank=12) == b"\x1b[31m\xff\xfe 100%\r\n"


def test_a_rank_that_is_not_there(folder: RunFolder) -> None:
    for rank in (0, 1, 2, 7, 100_000):
        log_file(folder, rank).write_text("x")
    with pytest.raises(UserError, match=r"--rank 3: .* 0-2, 7, 100000"):
        shown(folder, rank=3)
    submit(folder, "123")
    with pytest.raises(UserError, match=r"--rank 3: .* 0-2, 7, 100000"):
        shown(folder, rank=3, follow=True)


def test_what_is_not_there_is_said(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "missing")):
        show_logs(tmp_path / "missing", out=io.BytesIO())
    with pytest.raises(UserError, match="never submitted"):
        shown(folder)
    with pytest.raises(UserError, match="never submitted"):
        shown(folder, supervisor=True)
    submit(folder, "123")
    with pytest.raises(UserError, match="scontrol is not on the PATH"):
        shown(folder)


def test_the_supervisors_two_files(folder: RunFolder) -> None:
    slurm_folder = submit(folder, "123_4")
    (slurm_folder / "123_4_0_log.out").write_text("said\n")
    assert shown(folder, supervisor=True) == b"said\n"
    (slurm_folder / "123_4_0_log.err").write_text("told\n")
    expected = f"==> {slurm_folder}/123_4_0_log.out <==\nsaid\n==> {slurm_folder}/123_4_0_log.err <==\ntold\n"
    assert shown(folder, supervisor=True) == expected.encode()


def test_following_a_run_that_is_over_ends(folder: RunFolder) -> None:
    log_file(folder).write_text("first\n")
    with folder.begin_attempt():
        pass
    assert shown(folder, follow=True) == b"first\n"


@pytest.mark.distributed
def test_following_loses_nothing_up_to_the_end_of_the_run(folder: RunFolder) -> None:
    program = (
        "import sys; from pathlib import Path; from launch.logs import show_logs; "
        "show_logs(Path(sys.argv[1]), follow=True)"
    )
    log_file(folder).write_text("first\n")
    with folder.begin_attempt():
        following = subprocess.Popen(
            [sys.executable, "-c", program, str(folder.path)], cwd=ROOT, stdout=subprocess.PIPE, env=dict(os.environ)
        )
        assert following.stdout is not None
        seen = [following.stdout.readline()]
        for number in range(20):
            with open(log_file(folder), "a") as file:
                file.write(f"line {number}\n")
            if number % 7 == 0:  # the reader keeps up with some of them, and gets others together
                seen += [following.stdout.readline() for _ in range(number + 2 - len(seen))]
        with open(log_file(folder), "a") as file:
            file.write("last")
    seen += following.stdout.readlines()
    assert b"".join(seen).decode() == "first\n" + "".join(f"line {number}\n" for number in range(20)) + "last"
    assert following.wait() == 0
