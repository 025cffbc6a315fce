"""A snapshot holds the tracked files as they lie on the disk, never something from outside, and never half of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dino_dist.errors import UserError
from dino_dist.run_folder import RunFolder
from launch.snapshot import take

ROOT = Path(__file__).parents[2]
TRACKED = {
    "pyproject.toml": "[project]\n",
    "dino_dist/__init__.py": "",
    "dino_dist/train.py": "from dino_dist import errors\n",
    "dino_dist/errors.py": "",
    "launch/__init__.py": "",
    "launch/cli.py": "import dino_dist.train\n",
    "configs/a.yaml": "train: {}\n",
    "names/ä \n\tb.txt": "odd",
}


def git(project: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *arguments], cwd=project, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_files(project: Path) -> None:
    for name, content in TRACKED.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(content)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git checkout with one commit."""
    folder = tmp_path / "project"
    write_files(folder)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def copied(run_folder: RunFolder) -> dict[str, str]:
    """Paths and contents of the snapshot."""
    files = (path for path in run_folder.code.rglob("*") if path.is_symlink() or path.is_file())
    found = {path.relative_to(run_folder.code).as_posix(): path for path in files}
    assert not list(run_folder.path.glob(".code.tmp*")), "temporary folders are left"
    return {name: path.read_text() for name, path in found.items() if name != "snapshot.json"}


def test_tracked_files_and_no_others(project: Path, run_folder: RunFolder) -> None:
    (project / "untracked.txt").write_text("mine")
    (project / "dino_dist" / "scratch.py").write_text("nobody imports me")
    facts = take(run_folder, project=project)
    assert copied(run_folder) == TRACKED
    assert facts["commit"] == git(project, "rev-parse", "HEAD")
    assert (facts["dirty"], facts["files"]) == (False, len(TRACKED))
    assert json.loads((run_folder.code / "snapshot.json").read_text()) == facts


def test_uncommitted_edits_are_in_it_and_called_dirty(project: Path, run_folder: RunFolder) -> None:
    clean = take(run_folder, project=project)
    (project / "dino_dist" / "errors.py").write_text("edited = True\n")
    (project / "configs" / "a.yaml").unlink()
    facts = take(run_folder, project=project)
    assert facts["dirty"]
    assert facts["sha256"] != clean["sha256"]
    expected = TRACKED | {"dino_dist/errors.py": "edited = True\n"}
    del expected["configs/a.yaml"]
    assert copied(run_folder) == expected


def test_equal_code_has_an_equal_digest(project: Path, run_folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")  # whose folder does not exist yet
    os.utime(project / "launch" / "cli.py", (1, 1))
    assert take(run_folder, project=project) == take(other, project=project)
    (project / "launch" / "cli.py").rename(project / "launch" / "cli2.py")
    git(project, "add", "-A")
    shutil.copy(project / "launch" / "cli2.py", project / "launch" / "cli.py")
    git(project, "add", "-A")
    git(project, "rm", "-q", "-f", "launch/cli2.py")
    assert take(other, project=project)["sha256"] == take(run_folder, project=project)["sha256"]


def test_modes_and_inner_links_stay(project: Path, run_folder: RunFolder) -> None:
    (project / "launch" / "cli.py").chmod(0o755)
    (project / "configs" / "relative.yaml").symlink_to("a.yaml")
    (project / "configs" / "absolute.yaml").symlink_to(project / "configs" / "a.yaml")
    git(project, "add", "-A")
    take(run_folder, project=project)
    assert (run_folder.code / "launch" / "cli.py").stat().st_mode & 0o777 == 0o755
    for name in ("relative.yaml", "absolute.yaml"):
        link = run_folder.code / "configs" / name
        assert link.is_symlink()
        assert link.resolve() == (run_folder.code / "configs" / "a.yaml").resolve()


@pytest.mark.parametrize("target", ["/etc/hostname", "../../elsewhere", "../link2"])
def test_a_link_to_the_outside_is_refused(project: Path, run_folder: RunFolder, target: str) -> None:
    take(run_folder, project=project)
    (project / "link2").symlink_to("/etc")
    (project / "configs" / "link").symlink_to(target)
    git(project, "add", "configs/link")
    with pytest.raises(UserError, match="configs/link"):
        take(run_folder, project=project)
    assert copied(run_folder) == TRACKED, "the old snapshot is gone"


def test_what_is_neither_file_nor_link_is_refused(project: Path, run_folder: RunFolder) -> None:
    (project / "configs" / "a.yaml").unlink()
    os.mkfifo(project / "configs" / "a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml"):
        take(run_folder, project=project)


@pytest.mark.parametrize(
    "statement", ["import dino_dist.new", "from dino_dist import new", "def f():\n    from dino_dist.new import thing"]
)
def test_an_import_that_the_copy_would_lack_is_refused(project: Path, run_folder: RunFolder, statement: str) -> None:
    (project / "dino_dist" / "new.py").write_text("thing = 1\n")
    (project / "launch" / "cli.py").write_text(f"{statement}\n")
    with pytest.raises(UserError, match=r"launch/cli.py imports dino_dist/new.py.*git add"):
        take(run_folder, project=project)
    git(project, "add", "-N", "dino_dist/new.py")
    take(run_folder, project=project)
    assert "dino_dist/new.py" in copied(run_folder)


def test_a_project_in_a_folder_of_a_larger_repository(tmp_path: Path, run_folder: RunFolder) -> None:
    outer = tmp_path / "outer"
    write_files(outer / "inner")
    (outer / "large.bin").write_text("not ours")
    git(outer, "init", "-q")
    git(outer, "add", "-A")
    facts = take(run_folder, project=outer / "inner")
    assert facts["commit"] is None, "nothing is committed yet"
    assert facts["dirty"]
    assert copied(run_folder) == TRACKED
    git(outer, "commit", "-q", "-m", "first")
    (outer / "large.bin").write_text("changed")
    facts = take(run_folder, project=outer / "inner")
    assert (facts["commit"], facts["dirty"]) == (git(outer, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("around", ["nothing", "another checkout"])
def test_an_installation_gives_its_packages(tmp_path: Path, run_folder: RunFolder, around: str) -> None:
    site = tmp_path / "venv" / "site-packages"
    write_files(site)
    (site / "pyproject.toml").unlink()
    (site / "names" / "other.py").write_text("another project's")
    (site / "dino_dist" / "recipes").mkdir()
    (site / "configs" / "a.yaml").rename(site / "dino_dist" / "recipes" / "a.yaml")
    (site / "dino_dist" / "__pycache__").mkdir()
    (site / "dino_dist" / "__pycache__" / "train.pyc").write_text("")
    if around == "another checkout":
        (tmp_path / "other.txt").write_text("")
        git(tmp_path, "init", "-q")
        git(tmp_path, "add", "other.txt")
        git(tmp_path, "commit", "-q", "-m", "first")
    facts = take(run_folder, project=site)
    assert (facts["commit"], facts["dirty"]) == (None, False)
    expected = {name for name in TRACKED if name.startswith(("dino_dist", "launch"))}
    assert copied(run_folder).keys() == expected | {"dino_dist/recipes/a.yaml"}


def test_words_of_git_are_passed_on(project: Path, run_folder: RunFolder) -> None:
    (project / ".git" / "index").write_bytes(b"broken")
    with pytest.raises(UserError, match="git ls-files") as caught:
        take(run_folder, project=project)
    assert "\n" not in str(caught.value)


def test_variables_of_a_git_hook_do_not_mislead(
    project: Path, run_folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "-q")
    expected = take(run_folder, project=project)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere")
    assert take(run_folder, project=project) == expected


def test_a_run_folder_without_room_is_a_user_error(project: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        take(RunFolder(tmp_path / "file" / "run"), project=project)


KILLED = """
import os, signal, sys
from pathlib import Path
from dino_dist.run_folder import RunFolder
from launch.snapshot import take

left = int(sys.argv[3])

def hook(event, arguments):
    global left
    if event in ("open", "os.rename", "os.mkdir", "os.chmod", "shutil.rmtree", "os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
take(RunFolder(Path(sys.argv[1])), project=Path(sys.argv[2]))
"""


NUM_OPERATIONS = 60
"""Of a snapshot of TRACKED over an older one, at least."""


def test_a_kill_leaves_the_old_snapshot_or_the_new(project: Path, run_folder: RunFolder, rng: random.Random) -> None:
    """At any file operation; a small random choice of them."""
    old = take(run_folder, project=project)
    (project / "dino_dist" / "errors.py").write_text("edited = True\n")
    new = TRACKED | {"dino_dist/errors.py": "edited = True\n"}
    operations = sorted(rng.sample(range(NUM_OPERATIONS), 6))
    for operation in operations:
        command = [sys.executable, "-c", KILLED, str(run_folder.path), str(project), str(operation)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, f"operation {operation}: {done.stderr}"
        facts = json.loads((run_folder.code / "snapshot.json").read_text())
        files = {p.relative_to(run_folder.code).as_posix() for p in run_folder.code.rglob("*") if p.is_file()}
        assert files == {*TRACKED, "snapshot.json"}
        assert (run_folder.code / "dino_dist" / "errors.py").read_text() == (TRACKED if facts == old else new)[
            "dino_dist/errors.py"
        ]
    take(run_folder, project=project)
    assert copied(run_folder) == new


def test_the_copy_of_this_very_project_runs(tmp_path: Path) -> None:
    """From its own folder, and not from where it was copied."""
    project = tmp_path / "project"
    for folder in ("dino_dist", "launch", "configs"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run_folder = RunFolder(tmp_path / "run")
    take(run_folder, project=project)
    program = "import launch.cli, dino_dist.config_file as c; print(launch.cli.__file__, c.recipe_names())"
    environment = {**os.environ, "PYTHONPATH": str(run_folder.code)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(run_folder.code))
    assert "'dino" in done.stdout
