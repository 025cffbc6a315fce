"""The record of a submission comes back as it was written, and one that is none is refused in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dino_dist.errors import UserError
from dino_dist.ledger import read_rows
from launch.submission import FILE, Submission, registry_file


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state home"
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder


def a_submission(run_dir: Path) -> Submission:
    return Submission(
        job_id="123_4",
        submitted="2030-01-01T00:00:00.000000+00:00",
        run_dir=str(run_dir),
        argv=["dino-dist", "launch", "a.yaml", "run.dir=/ä b"],
        config_file=str(run_dir / "submitted.yaml"),
        nodes_min=1,
        nodes_max=2,
        tasks_per_node=1,
        gpus_per_node=0,
        time_min=None,
        partition=None,
        slurm_folder=str(run_dir / "slurm"),
        code={"commit": "abc", "dirty": False},
    )


def test_it_comes_back_and_a_newer_one_replaces_it(tmp_path: Path) -> None:
    assert Submission.read(tmp_path) is None
    first = a_submission(tmp_path)
    first.write(tmp_path)
    assert Submission.read(tmp_path) == first
    second = replace(first, job_id="124", time_min=90, partition="low")
    second.write(tmp_path)
    assert Submission.read(tmp_path) == second
    assert [row["job_id"] for row in read_rows(registry_file())] == ["123_4", "124"]
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "state home"}, "temporary files are left"


def test_the_list_is_no_condition_of_a_submission(
    tmp_path: Path, state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_home.write_text("a file where the folder should be")
    a_submission(tmp_path).write(tmp_path)
    assert Submission.read(tmp_path) == a_submission(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(state_home) in said


def test_a_run_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        a_submission(tmp_path).write(tmp_path / "missing")
    assert not registry_file().exists()


@pytest.mark.parametrize("home", ["", "relative/state"])
def test_the_list_has_its_default_place(home: str) -> None:
    environment = {"XDG_STATE_HOME": home, "HOME": "/home/someone"}
    assert registry_file(environment) == Path("/home/someone/.local/state/dino_dist/submissions.jsonl")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.pop("job_id"), "job_id"),
        (lambda content: content.update(job_id=123), "job_id"),
        (lambda content: content.update(nodes_min="1"), "nodes_min"),
        (lambda content: content.update(nodes_max=True), "nodes_max"),
        (lambda content: content.update(argv="dino-dist"), "argv"),
        (lambda content: content.update(time_min=1.5), "time_min"),
        (lambda content: content.update(code=[]), "code"),
    ],
)
def test_a_malformed_record_is_named(tmp_path: Path, change: Any, named: str) -> None:
    a_submission(tmp_path).write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    change(content)
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=named) as caught:
        Submission.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("torn", [b"", b'{"job_id": "12', b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_torn_record_is_a_user_error(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / FILE).write_bytes(torn)
    with pytest.raises(UserError, match=r"submission\.json"):
        Submission.read(tmp_path)


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    a_submission(tmp_path).write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text()) | {"later": 1}
    (tmp_path / FILE).write_text(json.dumps(content))
    assert Submission.read(tmp_path) == a_submission(tmp_path)
