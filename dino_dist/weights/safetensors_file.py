"""Files of safetensors: names and metadata at once, each tensor when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino_dist.errors import UserError


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one file by name; only those that are looked up are read."""

    def __init__(self, path: Path) -> None:
        """`UserError` if the file cannot be read or is damaged."""
        self.path = path
        try:
            file: Any = safe_open(str(path), framework="pt", device="cpu")  # its methods have no types
            self._file = file
            self._names = tuple(file.keys())
            self.metadata: dict[str, str] = file.metadata() or {}
        except SafetensorError as error:
            raise UserError(f"{path} is damaged, or no file of safetensors ({_one_line(error)})") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or _one_line(error)}): check the file") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({_one_line(error)})") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
