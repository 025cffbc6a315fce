"""The command line called in children forked from this process, where torch is imported already."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dino_dist.train  # noqa: F401  imported once, here, not in each child
from launch.cli import _exit_code, app

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int | None
    out: str
    err: str

    def json(self) -> Any:
        """What a command with --json printed: JSON alone."""
        return json.loads(self.out)

    def refusal(self) -> str:
        """The one line of bad input."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert self.out == ""
        return lines[0]


def _command(arguments: tuple[str, ...], out: Path, err: Path) -> None:
    logging.getLogger().handlers.clear()  # pytest's
    code = 1
    with open(out, "w") as sys.stdout, open(err, "w") as sys.stderr:
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        try:
            code = _exit_code(lambda: app(list(arguments)))
        except BaseException:
            traceback.print_exc()
    os._exit(code)  # skip the interpreter's shutdown, which a forked torch process does not survive cleanly


@pytest.fixture
def cli(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """`cli("train", "recipe.yaml", ...)`."""

    def call(*arguments: str) -> Ended:
        folder = tmp_path_factory.mktemp("cli")
        out, err = folder / "out", folder / "err"
        process = FORK.Process(target=_command, args=(arguments, out, err))
        process.start()
        process.join(PATIENCE_S)
        code = process.exitcode
        process.kill()
        return Ended(code=code, out=out.read_text(), err=err.read_text())

    return call
