"""Output appears whole or not at all; differences are measured so that nothing strange counts as close."""

from __future__ import annotations

import errno
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from dino_dist.errors import RunFailed, UserError
from dino_dist.export.exporter import ExportRequest
from dino_dist.export.staging import size_bytes, staged
from dino_dist.export.verification import refuse_other_features, relative_difference, tensor_digest


@pytest.mark.parametrize("folder", [False, True])
def test_it_has_its_name_only_after_the_end(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "new" / "out"
    with staged(out, folder=folder) as part:
        (part / "file" if folder else part).write_bytes(b"12345")
        assert size_bytes(part) == 5
        assert not out.exists()
    assert size_bytes(out) == 5
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("x"), KeyboardInterrupt()]
)
def test_nothing_is_left_of_what_failed(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises((UserError, KeyError, KeyboardInterrupt)) as raised:
        write_and_raise(tmp_path / "o", error)
    if isinstance(error, OSError):
        assert str(raised.value) == (
            f"--out {tmp_path / 'o'} cannot be written (No space left on device): choose another place"
        )
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_there_and_what_came_meanwhile_is_kept(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty", folder=True) as part:
        (part / "file").touch()
    assert (tmp_path / "empty" / "file").exists()
    with pytest.raises(UserError, match="exists already"):
        write_too_late(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "theirs"


def write_and_raise(out: Path, error: BaseException) -> None:
    with staged(out, folder=False) as part:
        part.write_text("half")
        raise error


def write_too_late(out: Path) -> None:
    with staged(out, folder=False) as part:
        part.write_text("ours")
        out.write_text("theirs")


def test_a_difference_is_relative_to_the_largest_and_strange_ones_are_infinite() -> None:
    expected = {"cls": torch.tensor([[-4.0, 1.0]]), "patches": torch.tensor([[[0.5]]])}
    found = {"cls": torch.tensor([[-4.0, 1.5]]), "patches": torch.tensor([[[0.5]]])}
    assert relative_difference(found, expected) == 0.125
    assert relative_difference(expected, expected) == 0.0
    for strange in (torch.tensor([[math.nan, 1.0]]), torch.tensor([[math.inf, 1.0]]), torch.tensor([[1.0]])):
        assert relative_difference(found | {"cls": strange}, expected) == math.inf
    assert relative_difference({"cls": expected["cls"]}, expected) == math.inf
    for difference in (1.1e-5, math.inf, math.nan):
        with pytest.raises(RunFailed, match="nothing was exported: timm"):
            refuse_other_features(difference, "timm 1.0")
    refuse_other_features(1e-5, "timm 1.0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_digest_is_of_type_shape_and_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=dtype)
    assert tensor_digest(tensor) == tensor_digest(tensor.t().contiguous().t())
    others = [tensor.view(4), tensor.to(torch.float16), tensor.t(), torch.where(tensor == 0, -tensor, tensor)]
    assert len({tensor_digest(each) for each in [tensor, *others]}) == 5


@pytest.mark.parametrize("to", ["timm", "hf", "onnx"])
def test_a_missing_library_is_told_with_what_installs_it(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"to check what it writes: pip install 'dino-dist\[export\]'"):
        ExportRequest(source=tmp_path, to=to, out=tmp_path / "x.onnx")
