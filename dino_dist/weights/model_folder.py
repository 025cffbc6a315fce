"""Folders as timm and Hugging Face libraries save them: what their config.json states, and where the tensors are."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.models.layers import LAYER_NORM_EPS
from dino_dist.weights.safetensors_file import SafetensorsFile
from dino_dist.weights.torch_file import read_torch_file

CONFIG = "config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH = "pytorch_model.bin"
_TIMM_OF_16_HEADS = ("vit_huge_", "vit_giant_", "vit_gigantic_")
"""timm's plain ViTs whose heads are not 64 wide, where the config does not say so."""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What a file says about a network besides its tensors."""

    num_heads: int | None = None
    pixels: Mapping[str, Any] = field(default_factory=dict)
    """`pixel_mean` and `pixel_std` of `NetworkWeights`, if they are stated."""
    notes: tuple[str, ...] = ()
    """For the user, a sentence each."""


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds weights under a name that these libraries use."""
    return any((path / name).is_file() for name in (SAFETENSORS, SAFETENSORS_INDEX, TORCH))


def folder_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of such a folder, each read when it is looked up; `UserError` for a broken one."""
    if (folder / SAFETENSORS).is_file():
        return SafetensorsFile(folder / SAFETENSORS)
    if (folder / SAFETENSORS_INDEX).is_file():
        return _SeveralFiles(folder)
    content = read_torch_file(folder / TORCH)
    if not isinstance(content, Mapping):
        raise UserError(f"{folder / TORCH} holds a {type(content).__name__}, not a state_dict")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def read_stated(config: Path) -> Stated:
    """What a config.json states, nothing if there is none; `UserError` for another architecture than DINO's ViT."""
    if not config.is_file():
        return Stated()
    content = read_json(config)
    if "model_type" in content:
        return _hugging_face(content, config)
    if "architecture" in content:
        return _timm(content, config)
    return Stated()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _hugging_face(content: dict[str, Any], config: Path) -> Stated:
    expected = {"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True}
    for key, value in expected.items():
        if content.get(key, value) != value:
            raise UserError(
                f"{config} says {key}={content[key]!r}, another architecture than DINO v1's ViT ({value!r}): give "
                "weights that transformers' ViTModel loads"
            )
    preprocessor = config.with_name("preprocessor_config.json")
    processing = read_json(preprocessor) if preprocessor.is_file() else {}
    pixels = stated_pixels(processing.get("image_mean"), processing.get("image_std"), preprocessor)
    notes: tuple[str, ...] = ()
    eps = content.get("layer_norm_eps", 1e-12)
    if isinstance(eps, float) and eps != LAYER_NORM_EPS:
        notes = (f"{config} says layer_norm_eps={eps:g}; computed with {LAYER_NORM_EPS:g}, as published",)
    heads = _whole_number(content, "num_attention_heads", config)
    return Stated(num_heads=heads, pixels=pixels, notes=notes)


def _timm(content: dict[str, Any], config: Path) -> Stated:
    architecture = str(content["architecture"])
    if not architecture.startswith(("vit_", "deit_")) or "quickgelu" in architecture:
        raise UserError(
            f"{config} says architecture={architecture!r}, another one than DINO v1's ViT: give a timm vit_* model"
        )
    arguments = content.get("model_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    cfg = content.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else {}
    pixels = stated_pixels(cfg.get("mean"), cfg.get("std"), config)
    heads = _whole_number(arguments, "num_heads", config)
    if heads is None and architecture.startswith(_TIMM_OF_16_HEADS):
        heads = 16
    return Stated(num_heads=heads, pixels=pixels)


def _whole_number(content: dict[str, Any], key: str, config: Path) -> int | None:
    value = content.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{config} says {key}={value!r}: it must be a whole number above 0")
    return value


def stated_pixels(mean: object, std: object, file: Path) -> dict[str, tuple[float, ...]]:
    """The normalisation of a network's images; `UserError` for what is none, nothing where none is stated."""
    if mean is None or std is None:
        return {}
    if not (_is_numbers(mean) and _is_numbers(std) and len(mean) == len(std) and min(std) > 0):
        raise UserError(
            f"{file} says mean={mean!r} and std={std!r}: they must be lists of numbers, as many, those of std above 0"
        )
    return {"pixel_mean": tuple(map(float, mean)), "pixel_std": tuple(map(float, std))}


def _is_numbers(value: object) -> TypeGuard[list[float]]:
    """Such as images can be normalised with: a float holds them."""
    return isinstance(value, list) and bool(value) and all(_is_number(each) for each in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max and math.isfinite(value)


def _is_file_name(place: str) -> bool:
    return Path(place).name == place and place not in ("", "..") and place.isprintable()


class _SeveralFiles(Mapping[str, Tensor]):
    """The tensors that an index spreads over several files of one folder."""

    def __init__(self, folder: Path) -> None:
        index = folder / SAFETENSORS_INDEX
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise UserError(f"{index} has no weight_map of names to files")
        strange = sorted({place for place in places.values() if not _is_file_name(place)})
        if strange:
            raise UserError(f"{index} names {strange[0]!r}: only files of its own folder are read")
        files = {place: SafetensorsFile(folder / place) for place in sorted(set(places.values()))}
        for name, place in places.items():
            if name not in files[place]:
                raise UserError(f"{index} looks for {name} in {place}, which has none: the folder is incomplete")
        self._of = {name: files[place] for name, place in places.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)
