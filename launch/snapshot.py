"""The copy of the code that a submitted run trains with, `RUN/code`: later edits of the checkout do not reach it."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from dino_dist import __version__
from dino_dist.errors import UserError
from dino_dist.fencing import file_lock
from dino_dist.run_folder import RunFolder, fsync_folder

FILE: Final = "snapshot.json"
PACKAGES: Final = ("dino_dist", "launch")

_CHUNK_BYTES: Final = 1 << 20
_TEMPORARY: Final = ".code.tmp-"
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


def take(run_folder: RunFolder, *, project: Path | None = None) -> dict[str, Any]:
    """Copy the code of `project` (default: the one that runs) to RUN/code and say what it is.

    From a git checkout come the tracked files as they lie on the disk, from an installation the files of the packages.
    Returns what RUN/code/snapshot.json holds: `commit` (None outside of git), `dirty` (tracked files differ from it),
    `version`, `files` (their number) and `sha256` over paths and contents. RUN/code changes in one rename, so that a
    kill leaves the old snapshot or the new one. `UserError` for code that cannot be copied or would not run as a copy,
    and where the run folder cannot be written.
    """
    root = (project or Path(__file__).parents[1]).resolve()
    paths, commit, dirty = _what_runs(root)
    try:
        run_folder.path.mkdir(parents=True, exist_ok=True)
        with file_lock(run_folder.path / ".code.lock"):
            for leftover in run_folder.path.glob(f"{_TEMPORARY}*"):  # of a snapshot that was killed
                shutil.rmtree(leftover)
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=run_folder.path))
            try:
                files, digest = _copy(root, paths, temporary)
                facts = {"commit": commit, "dirty": dirty, "version": __version__, "files": files, "sha256": digest}
                (temporary / FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
                temporary.chmod(0o777 & ~_umask())  # mkdtemp lets in nobody else, and a colleague may resume the run
                _swap_in(temporary, run_folder.code)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{run_folder.code}: the code cannot be copied there ({error.filename}: {error.strerror}): free some space "
            "or choose another run.dir"
        ) from error
    return facts


def _what_runs(root: Path) -> tuple[list[str], str | None, bool]:
    """Relative paths of the files to copy, the commit, and whether tracked files differ from it."""
    in_checkout = (root / "pyproject.toml").is_file() and any((up / ".git").exists() for up in (root, *root.parents))
    tracked = _names(_git(root, "ls-files", "-z", "--recurse-submodules")) if in_checkout else []
    if "launch/cli.py" not in tracked:  # such as an installation inside a checkout of something else
        return _package_files(root), None, False
    _refuse_untracked_imports(root, tracked)
    commit = _git(root, "rev-list", "--max-count=1", "--all").strip() and _git(root, "rev-parse", "HEAD").strip()
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "-z", "--", ".")
    return tracked, commit or None, bool(changed)


def _git(root: Path, *arguments: str) -> str:
    # Inside a git hook these variables name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
    except OSError as error:
        raise UserError(f"git cannot be run ({error.strerror}), and {root} is a checkout: install git") from None
    if done.returncode:
        words = " ".join(os.fsdecode(done.stderr).split())
        raise UserError(f"git {arguments[0]} in {root}: {words}")
    return os.fsdecode(done.stdout)


def _names(output: str) -> list[str]:
    # An unmerged file is listed once a side.
    return sorted({name for name in output.split("\0") if name})


def _package_files(root: Path) -> list[str]:
    """Files of the packages, with the recipes, which a wheel has inside and a source tree beside them."""
    folders = [*PACKAGES] if (root / "dino_dist" / "recipes").is_dir() else [*PACKAGES, "configs"]
    found = (path for folder in folders for path in (root / folder).rglob("*"))
    kept = (path for path in found if "__pycache__" not in path.parts and (path.is_symlink() or not path.is_dir()))
    return sorted(path.relative_to(root).as_posix() for path in kept)


def _refuse_untracked_imports(root: Path, tracked: list[str]) -> None:
    """A new file that nobody added is not in the copy: better now than when the job starts."""
    listing = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *PACKAGES)
    untracked = {_module(name): name for name in _names(listing) if name.endswith(".py")}
    if not untracked:
        return
    for name in tracked:
        if name.endswith(".py") and name.startswith(PACKAGES) and (root / name).is_file():
            missing = untracked.keys() & set(_imports((root / name).read_bytes()))
            if missing:
                raise UserError(
                    f"{name} imports {untracked[min(missing)]}, which git does not track, so that the copy in RUN/code "
                    f"would lack it: `git add {untracked[min(missing)]}`"
                )


def _module(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(source: bytes) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # it will say so itself when it is imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _copy(root: Path, paths: Iterable[str], destination: Path) -> tuple[int, str]:
    """Copy files; their number and the digest. A tracked file that was deleted on the disk is left out."""
    digest = hashlib.sha256()
    count = 0
    for name in paths:
        source, target = root / name, destination / name
        try:
            kind = source.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISDIR(kind.st_mode):  # a submodule that was not checked out
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        digest.update(os.fsencode(name) + b"\0")
        if stat.S_ISLNK(kind.st_mode):
            link = _inner_link(root, name)
            os.symlink(link, target)
            digest.update(b"link\0" + os.fsencode(link) + b"\0")
        elif stat.S_ISREG(kind.st_mode):
            digest.update(_copy_file(source, target))
            target.chmod(stat.S_IMODE(kind.st_mode))
        else:
            raise UserError(f"{source} is neither a file nor a link: remove it, or make it a file")
        count += 1
    return count, digest.hexdigest()


def _copy_file(source: Path, target: Path) -> bytes:
    """Copy the content; its sha256."""
    digest = hashlib.sha256()
    with open(source, "rb") as reading, open(target, "xb") as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            writing.write(chunk)
            digest.update(chunk)
    return digest.digest()


def _inner_link(root: Path, name: str) -> str:
    """The target of a link, relative, so that it stays inside the copy; `UserError` if it leaves the project."""
    source = root / name
    target = os.readlink(source)
    inside = Path(os.path.normpath(source.parent / target)).is_relative_to(root)
    if not inside or not source.resolve().is_relative_to(root):
        raise UserError(
            f"{source} is a link to {target}, outside of {root}: what runs would not be what was copied; put a file in "
            "its place, or take it out of git"
        )
    return os.path.relpath(target, source.parent) if os.path.isabs(target) else target


def _swap_in(new: Path, place: Path) -> None:
    """Put the folder `new` at `place` at one moment; what was there ends at `new`, for removal."""
    try:
        os.rename(new, place)  # succeeds where there is nothing, or an empty folder
    except OSError:
        if not _exchange(new, place):
            # Some network file systems cannot exchange: for a moment there is no code. The next snapshot mends that,
            # and no job runs while one is taken.
            old = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=new.parent))
            os.rename(place, old)
            os.rename(new, place)
            shutil.rmtree(old)
    fsync_folder(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, as Linux can on most file systems; whether it did."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _umask() -> int:
    """Of this process; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
