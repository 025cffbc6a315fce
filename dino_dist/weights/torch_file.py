"""Files of torch.save, read without running anything that they hold: tensors, plain containers, a short allow-list."""

from __future__ import annotations

import argparse
import pathlib
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dino_dist.errors import UserError

_NAMED_AT_MOST = 3
_REFUSED = re.compile(r"Unsupported (?:global: GLOBAL|class) (\S+)")


def read_torch_file(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU, by torch's restricted reader (`weights_only`).

    Besides what torch allows: `argparse.Namespace`, numpy scalars and paths, which published training checkpoints keep
    under `args`. Tensors of the zip format stay in the file until they are used. `UserError` for anything else, with
    its name, and for what is no such file.
    """
    is_zip = zipfile.is_zipfile(path)
    with safe_globals(_allowed()):
        try:
            if is_zip and (refused := get_unsafe_globals_in_checkpoint(str(path))):
                raise _refusal(path, refused)
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file") from None
        except MemoryError:
            raise
        except Exception as error:
            # Damaged bytes make the reader fail in any way: KeyError, EOFError, RuntimeError, UnpicklingError, ...
            if named := _REFUSED.findall(str(error)):
                raise _refusal(path, named) from None
            if "torchscript" in str(error).lower():
                raise UserError(
                    f"{path} is a TorchScript program, not a file of weights: save its state_dict"
                ) from None
            raise UserError(f"{path} is damaged, or no file of torch.save ({type(error).__name__})") from None


def _refusal(path: Path, names: list[str]) -> UserError:
    more = len(names) - _NAMED_AT_MOST
    listed = ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
    return UserError(
        f"{path} is refused: reading it would run {listed}; only tensors and plain values are read: save a state_dict"
    )


def _allowed() -> list[Any]:
    """What may be made while reading: types that only hold values."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = "?bhilqBHILQefd"
    return [
        argparse.Namespace,
        # A path is a word: making one touches no disk.
        (pathlib.PosixPath, "pathlib.PosixPath"),
        (pathlib.PosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 calls it
        np.dtype,
        *{type(np.dtype(code)) for code in numbers},
        # numpy 2 moved the function; files keep the name of their day.
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]
