"""Bad input ends a command with exit code 2 and one line that names the thing; what was there before is unharmed."""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_dist.ledger import read_rows

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batchsize=8", ["train.batchsize", "train.batch_size"]),
        ("tran.batch_size=8", ["tran.batch_size", "train.batch_size"]),
        ("train.batch_size=many", ["train.batch_size", "many"]),
        ("train.batch_size=2.5", ["train.batch_size", "2.5"]),
        ("train.batch_size=0", ["train.batch_size", "at least 1"]),
        ("train.length=10days", ["train.length", "10days"]),
        ("optim.lr=nan", ["optim.lr", "nan"]),
        ("optim.beta1=1.5", ["optim.beta1", "1.5", "below 1"]),
        ("model.arch=vit_huge", ["model.arch", "vit_huge"]),
        ("model.patch_size=5", ["model.patch_size=5", "augment.global_px=16"]),
        ("train.accumulate=2", ["head.batch_norm", "train.accumulate=2"]),
        ("parallel.strategy=hsdp", ["hsdp", "two ranks"]),
        ("parallel.replicate=2", ["parallel.replicate=2", "hsdp"]),
        ("run.dir=${oc.env:HOME}", ["${oc.env:HOME}"]),
        ("model.attention=xformers", ["xformers", "cpu"]),
        ("data.eval_test=null", ["data.eval_train", "data.eval_test"]),
        ("data.train=", ["data.train"]),
        ("data.train=/nowhere/at/all", ["/nowhere/at/all", "does not exist"]),
        ("data.train=/nowhere/{000..003}.tar", ["/nowhere/000.tar", "does not exist"]),
        ("data.train=pipe:cat x.tar", ["pipe:cat x.tar"]),
        ("train.batch_size", ["train.batch_size", "key=value"]),
    ],
)
def test_a_setting_that_cannot_work(
    override: str, words: list[str], cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    line = cli("train", *tiny(tmp_path / "run"), override).refusal()
    for word in words:
        assert word in line


def test_a_recipe_or_file_that_is_not_there(cli: Callable[..., Any], tmp_path: Path) -> None:
    assert "did you mean quickstart" in cli("train", "quickstar").refusal()
    assert "gone.yaml" in cli("train", str(tmp_path / "gone.yaml")).refusal()
    (tmp_path / "broken.yaml").write_text("train: [")
    assert "broken.yaml" in cli("train", str(tmp_path / "broken.yaml")).refusal()
    (tmp_path / "reads.yaml").write_text("run: {dir: '${oc.env:HOME}'}")
    assert "${oc.env:HOME}" in cli("train", str(tmp_path / "reads.yaml")).refusal()


def test_shards_that_cannot_be_read(
    cli: Callable[..., Any], tiny: Callable[..., list[str]], small_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = cli("train", *tiny(tmp_path / "run", f"data.train={empty}")).refusal()
    assert f"{empty} holds no .tar shards" in line

    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "0.tar").write_bytes((small_shards[0] / "0.tar").read_bytes()[:20_300])
    line = cli("train", *tiny(tmp_path / "run", f"data.train={cut}")).refusal()
    assert "0.tar" in line
    assert "20" in line, "it says where"

    # Nothing was trained, so the mistake may be mended in place.
    assert cli("train", *tiny(tmp_path / "run", "train.length=2st")).code == 0


def test_a_run_folder_that_cannot_be_written(
    cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = cli("train", *tiny(tmp_path / "file" / "run")).refusal()
    assert f"run.dir={tmp_path / 'file' / 'run'}" in line


def test_ranks_within_ranks(
    cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--nproc 2" in cli("train", *tiny(tmp_path / "run"), "--nproc", "2").refusal()
    assert "MASTER_ADDR" in cli("train", *tiny(tmp_path / "run")).refusal()
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "--nproc 2" in cli("train", *tiny(tmp_path / "run"), "--nproc", "2").refusal()


def test_other_commands(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in cli("shards", "check", nowhere).refusal()
    assert nowhere in cli("shards", "index", nowhere).refusal()
    assert nowhere in cli("shards", "build", nowhere, str(tmp_path / "out")).refusal()
    assert nowhere in cli("eval", "knn", nowhere).refusal()
    assert "neither a run folder" in cli("eval", "knn", str(tmp_path / "empty")).refusal()
    assert str(tmp_path / "file") in cli("quickstart", "--dir", str(tmp_path / "file" / "below")).refusal()


def test_names_in_files_cannot_write_to_the_terminal(cli: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"cls_token\n\x1b[2J ö": torch.ones(1)}, tmp_path / "a.pth")
    line = cli("export", str(tmp_path / "a.pth"), "--to", "torch", "--out", str(tmp_path / "b.pth")).refusal()
    assert r"cls_token\n\x1b[2J ö" in line
    assert line.isprintable()


@pytest.fixture
def trained(cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path) -> Path:
    """A run that was stopped short: a length of 4 steps, with a checkpoint."""
    assert cli("train", *tiny(tmp_path / "run", "train.length=4st")).code == 0
    return tmp_path / "run"


def test_another_config_on_resume(cli: Callable[..., Any], tiny: Callable[..., list[str]], trained: Path) -> None:
    changed = tiny(trained, "train.length=6st", "optim.beta2=0.99")
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    line = cli("train", *changed).refusal()
    assert "train.length: 4st -> 6st" in line
    assert "optim.beta2: 0.999 -> 0.99" in line
    assert "--accept-changes" in line
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before

    assert cli("train", *changed, "--accept-changes").code == 0
    assert [row["step"] for row in read_rows(trained / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    starts = [row["why"] for row in read_rows(trained / "ledger.jsonl") if row["event"] == "start"]
    assert "optim.beta2: 0.999 -> 0.99" in starts[-1]
    # The position in the data is counted in batches: that no word can allow.
    line = cli("train", *tiny(trained, "train.batch_size=9"), "--accept-changes").refusal()
    assert "train.batch_size=9" in line
    # What changes no result needs no word.
    assert cli("train", *changed, "metrics.every=2st", "checkpoint.keep=5").code == 0


def test_a_finished_run_started_again_adds_nothing(
    cli: Callable[..., Any], tiny: Callable[..., list[str]], trained: Path
) -> None:
    rows, tensors = (trained / "metrics.jsonl").read_bytes(), sorted((trained / "checkpoints").rglob("*"))
    assert cli("train", *tiny(trained, "train.length=4st")).code == 0
    assert (trained / "metrics.jsonl").read_bytes() == rows
    assert sorted((trained / "checkpoints").rglob("*")) == tensors


def test_another_data_set_on_resume(
    cli: Callable[..., Any], tiny: Callable[..., list[str]], make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", [20, 20])
    settings = tiny(tmp_path / "run", f"data.train={shards}", "train.length=4st")
    assert cli("train", *settings).code == 0
    (shards / "2.tar").write_bytes((make_shards(tmp_path / "more", [5]) / "0.tar").read_bytes())
    line = cli("train", *settings).refusal()
    assert f"data.train={shards}" in line
    assert "40 samples" in line
    assert "now 45" in line
    (shards / "2.tar").unlink()
    assert cli("train", *settings).code == 0


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header promises 3.6 gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def test_images_that_are_none(
    cli: Callable[..., Any], tiny: Callable[..., list[str]], make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", [12, 12], bad=[b"a text", bomb()])
    settings = tiny(tmp_path / "run", f"data.train={shards}", "train.length=6st")
    assert cli("train", *settings).code == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    # Counted one step late: two epochs of two steps each are behind the fifth row.
    assert rows[4]["bad_samples"] == 4
    listed = read_rows(tmp_path / "run" / "logs" / "bad_samples.jsonl")
    assert sorted(row["key"] for row in listed) == ["00022", "00022", "00022", "00023", "00023", "00023"]
    assert {row["shard"] for row in listed} == {"1.tar"}
    assert any("3600000000 pixels" in row["reason"] for row in listed)

    strict = tiny(tmp_path / "strict", f"data.train={shards}", "data.max_bad_fraction=0.05", "train.length=6st")
    ended = cli("train", *strict)
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert "data.max_bad_fraction=0.05" in line
    assert "bad_samples.jsonl" in line
    assert "Traceback" not in ended.err


def test_a_store_that_does_not_answer_is_no_mistake(
    cli: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """One line too, but the exit code of what another start may get over: a launched job is requeued."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/0.tar"
        settings = (f"data.train={url}", "data.store_attempts=2", "data.store_timeout_s=1")
        ended = cli("train", *tiny(tmp_path / "run", *settings))
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {url}: ")
    assert "tried 2 times" in line
    assert not [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if row["event"] == "stop"]
