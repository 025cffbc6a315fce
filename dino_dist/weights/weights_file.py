"""Networks in single files and in folders of other libraries: who wrote them, which networks, read under our names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.manifest import MANIFEST
from dino_dist.models.vit import ViTShape
from dino_dist.weights.layouts import map_names
from dino_dist.weights.model_folder import (
    CONFIG,
    SAFETENSORS,
    TORCH,
    Stated,
    folder_tensors,
    read_stated,
    stated_pixels,
)
from dino_dist.weights.network_weights import NetworkWeights
from dino_dist.weights.opened import ONLY, ROLES, OpenedWeights
from dino_dist.weights.safetensors_file import SafetensorsFile
from dino_dist.weights.shapes import backbone_differences, head_on_meta, heads_of, in_few_words, shape_of
from dino_dist.weights.torch_file import read_torch_file

METADATA_KEY = "dino_dist"
"""Under which this project's safetensors files hold `{"format", "network", "step", "shape"}` as JSON."""
FORMAT = 1

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_CENTER = "center"
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GIVE = "give plain weights of fp16, bf16, fp32 or fp64"
_SEEN_IN_TENSORS = ("embed_dim", "depth", "patch_size", "image_px", "mlp_ratio", "in_channels")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a caller wants files of others read."""

    num_heads: int | None = None
    """Attention heads, where the file does not tell."""
    assumed_heads: int | None = None
    """Where neither the file nor `num_heads` tells, and no published size has that width."""
    strict: bool = True
    """Refuse a backbone that is not complete, and names that nobody here knows."""


def open_model_folder(folder: Path, options: ReadOptions) -> OpenedWeights:
    """A folder of timm or Hugging Face."""
    stated = read_stated(folder / CONFIG)
    tensors = folder_tensors(folder)
    return _one_network(tensors, str(folder), stated, options)


def open_weights_file(path: Path, options: ReadOptions) -> OpenedWeights:
    """A file of safetensors or of torch.save."""
    beside = read_stated(path.parent / CONFIG) if path.name in (SAFETENSORS, TORCH) else Stated()
    if path.suffix == ".safetensors":
        if (path.parent / MANIFEST).is_file():
            raise UserError(f"{path} is a part of the checkpoint {path.parent}: give that folder")
        file = SafetensorsFile(path)
        if METADATA_KEY in file.metadata:
            return _own_file(file, options)
        return _one_network(file, str(path), beside, options)
    if path.suffix not in TORCH_SUFFIXES:
        allowed = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise UserError(f"{path} is no file of weights that can be read here: its name must end in one of {allowed}")
    content = read_torch_file(path)
    networks = _networks_of(content, str(path))
    stated = beside if beside.num_heads is not None else replace(beside, num_heads=_heads_in_args(content))

    def read(network: str) -> NetworkWeights:
        weights = _assemble(networks[network], str(path), network, stated, options)
        if network == ONLY:
            return weights
        return replace(weights, center_1K=_center(content, str(path)), epoch=_epoch(content))

    return OpenedWeights(source=str(path), networks=tuple(networks), read=read)


def _networks_of(content: Any, source: str) -> dict[str, dict[str, Tensor]]:
    """The networks of a file of torch.save by role."""
    if not isinstance(content, Mapping):
        raise UserError(f"{source} holds a {type(content).__name__}, not a state_dict: give a file of weights")
    roles = {role: content[role] for role in ROLES if isinstance(content.get(role), Mapping)}
    if not roles:
        inner = (content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping))
        roles = {ONLY: next(inner, content)}
    networks = {
        role: {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        for role, tensors in roles.items()
    }
    for role, tensors in networks.items():
        if not tensors:
            raise UserError(f"{source} holds no tensors{'' if role == ONLY else f' under {role}'}: no file of weights")
    return networks


def _center(content: Mapping[str, Any], source: str) -> Tensor | None:
    """[1, K] of a DINO checkpoint, if it is there."""
    loss = content.get("dino_loss")
    center_1K = loss.get(_CENTER) if isinstance(loss, Mapping) else None
    if not isinstance(center_1K, Tensor) or center_1K.ndim != 2 or center_1K.shape[0] != 1:
        return None
    return _checked(center_1K, _CENTER, source).clone()


def _heads_in_args(content: Mapping[str, Any]) -> int | None:
    """This project's exports in the original's format say it; the original's own `args` do not."""
    args = content.get("args")
    heads = args.get("num_heads") if isinstance(args, Mapping) else None
    return heads if type(heads) is int and heads > 0 else None


def _epoch(content: Mapping[str, Any]) -> int | None:
    """Epochs done, as a DINO checkpoint counts them."""
    epoch = content.get("epoch")
    return epoch if isinstance(epoch, int) else None


def _own_file(file: SafetensorsFile, options: ReadOptions) -> OpenedWeights:
    """A file that this project exported."""
    source = str(file.path)
    header = _own_header(file)
    pixels = stated_pixels(header.get("pixel_mean"), header.get("pixel_std"), file.path)
    stated = Stated(num_heads=header["shape"]["num_heads"], pixels=pixels)

    def read(network: str) -> NetworkWeights:
        weights = _assemble({name: file[name] for name in file if name != _CENTER}, source, network, stated, options)
        told, seen = header["shape"], asdict(weights.shape)
        differing = [key for key in _SEEN_IN_TENSORS if told.get(key) != seen[key]]
        if differing:
            raise UserError(
                f"{source}: its header says {', '.join(f'{key}={told.get(key)}' for key in differing)}, its tensors "
                f"{', '.join(f'{key}={seen[key]}' for key in differing)}: export it again"
            )
        center_1K = _checked(file[_CENTER], _CENTER, source).clone() if _CENTER in file else None
        return replace(weights, step=header["step"], epoch=header.get("epoch"), center_1K=center_1K)

    return OpenedWeights(source=source, networks=(header["network"],), read=read)


def _own_header(file: SafetensorsFile) -> dict[str, Any]:
    """The metadata of an export; `UserError` if it is broken or of another format."""
    try:
        header: dict[str, Any] = json.loads(file.metadata[METADATA_KEY])
        version, network, heads = header["format"], header["network"], header["shape"]["num_heads"]
        counts = [header["step"], header.get("epoch")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file.path}: its {METADATA_KEY} header is broken ({type(error).__name__}: {error}): export it again"
        ) from None
    if version != FORMAT or network not in (*ROLES, ONLY):
        raise UserError(
            f"{file.path}: its {METADATA_KEY} header is of format {version!r}, network {network!r}; format {FORMAT} is "
            "known here: use the dino_dist that wrote it, or export it again"
        )
    if type(heads) is not int or heads < 1 or not all(isinstance(count, int | None) for count in counts):
        raise UserError(
            f"{file.path}: its {METADATA_KEY} header says num_heads={heads!r}, step and epoch {counts!r}: export it "
            "again"
        )
    return header


def _one_network(tensors: Mapping[str, Tensor], source: str, stated: Stated, options: ReadOptions) -> OpenedWeights:
    def read(network: str) -> NetworkWeights:
        return _assemble(tensors, source, network, stated, options)

    return OpenedWeights(source=source, networks=(ONLY,), read=read)


def _assemble(
    tensors: Mapping[str, Tensor], source: str, network: str, stated: Stated, options: ReadOptions
) -> NetworkWeights:
    """The tensors of one network under our names, copied out of the file; `UserError` if they are not one of ours."""
    names = map_names(tensors, source)
    if names.unknown and options.strict:
        raise UserError(
            f"{source} holds names of no DINO ViT: {in_few_words(names.unknown)}; give weights of this architecture"
        )
    backbone = {name: _joined(tensors, parts, source) for name, parts in names.backbone.items()}
    heads = heads_of(
        backbone, stated=stated.num_heads, asked=options.num_heads, assumed=options.assumed_heads, source=source
    )
    shape = shape_of(backbone, num_heads=heads, source=source)
    differences = backbone_differences(backbone, shape)
    if differences and options.strict:
        raise UserError(f"{source} is not a whole ViT: {in_few_words(differences)}; give the whole backbone")
    head = {name: _joined(tensors, parts, source) for name, parts in names.head.items()}
    whole_head = head_on_meta(head, shape.embed_dim) is not None
    part_of_head = [] if whole_head else [part for parts in names.head.values() for part in parts]
    weights = NetworkWeights(
        source=source,
        network=network,
        shape=shape,
        backbone=backbone,
        head=head if whole_head else {},
        left_out=tuple(names.left_out + names.unknown + part_of_head),
        notes=stated.notes,
    )
    return replace(weights, **_checked_pixels(stated, shape, source))


def _checked_pixels(stated: Stated, shape: ViTShape, source: str) -> Mapping[str, Any]:
    """The normalisation of images, if it is stated; `UserError` if it does not fit a network that sees colors."""
    channels = len(stated.pixels.get("pixel_mean", range(3)))
    if shape.in_channels == 3 and channels != 3:
        raise UserError(
            f"{source}: the mean and std stated for its images hold {channels} numbers each: they must be 3 (RGB)"
        )
    return stated.pixels


def _joined(tensors: Mapping[str, Tensor], parts: list[str], source: str) -> Tensor:
    """The parts one below the other, in memory of their own: the file may be replaced afterwards."""
    read = [_checked(tensors[part], part, source) for part in parts]
    if len({(part.shape, part.dtype) for part in read}) > 1 or (len(read) > 1 and not read[0].ndim):
        raise UserError(f"{source}: {', '.join(parts)} do not belong together: give weights of one network")
    return read[0].clone(memory_format=torch.contiguous_format) if len(read) == 1 else torch.cat(read)


def _checked(tensor: Tensor, name: str, source: str) -> Tensor:
    """As it lies in the file; `UserError` for one that no network could be computed with."""
    if tensor.dtype not in _TYPES or tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        odd = tensor.dtype if tensor.dtype not in _TYPES else "nested" if tensor.is_nested else tensor.layout
        kind = "without numbers" if tensor.is_meta else f"of type {str(odd).removeprefix('torch.')}"
        raise UserError(f"{source}: {name} is {kind}: {_GIVE}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{source}: {name}{list(tensor.shape)} holds fewer numbers than its shape says: {_GIVE}")
    if not torch.isfinite(tensor).all():
        raise UserError(f"{source}: {name} holds numbers that are not finite: the file is of no use")
    return tensor.detach()
