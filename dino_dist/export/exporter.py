"""One export, from what a user names to a file or folder that was read back and gives the same features.

The order keeps memory near one copy: the network's outputs and digests are taken, it is written and dropped, and only
then does a reader load what was written.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from dino_dist.errors import UserError
from dino_dist.export.dino_checkpoint import write_dino
from dino_dist.export.hf_folder import open_hf, write_hf
from dino_dist.export.onnx_file import build_head, open_onnx, write_onnx
from dino_dist.export.positions import at_image_size
from dino_dist.export.safetensors_file import write_safetensors
from dino_dist.export.staging import size_bytes, staged
from dino_dist.export.timm_folder import open_timm, write_timm
from dino_dist.export.verification import (
    Expected,
    Outputs,
    digests_of,
    outputs_of,
    probe_images,
    refuse_non_finite,
    refuse_other_bytes,
    refuse_other_features,
    relative_difference,
)
from dino_dist.weights.network_weights import NetworkWeights, build_backbone
from dino_dist.weights.opened import ONLY
from dino_dist.weights.read_network import open_weights, read_network
from dino_dist.weights.run_checkpoint import is_checkpoint_folder
from dino_dist.weights.weights_file import ReadOptions

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Format:
    """What `--to` may name."""

    suffixes: tuple[str, ...] = ()
    """Of the file; empty: a folder."""
    packages: tuple[str, ...] = ()
    """Needed to write and to check; the first one does the check. Empty: this project reads its own."""
    open: Callable[[Path], Callable[[Tensor], Outputs]] | None = None
    holds_head: bool = True
    always_with_head: bool = False
    both_networks: bool = False
    """Unless one is asked for."""


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "safetensors": Format(suffixes=(".safetensors",)),
        "timm": Format(packages=("timm",), open=open_timm, holds_head=False),
        "hf": Format(packages=("transformers",), open=open_hf, holds_head=False),
        "onnx": Format(suffixes=(".onnx",), packages=("onnxruntime", "onnx", "onnxscript"), open=open_onnx),
        "torch": Format(suffixes=(".pth", ".pt"), always_with_head=True, both_networks=True),
    }
)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What a user asks for; `UserError` for what cannot go together, before anything is read."""

    source: Path
    """As for `read_network`."""
    to: str
    out: Path
    network: str | None = None
    """teacher or student; None: the teacher, or both where the format holds both."""
    with_head: bool = False
    """The projection head and the center too; the format of `torch` always has them."""
    image_px: int | None = None
    """None: the size of the learned positions."""
    num_heads: int | None = None

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise UserError(f"--to {self.to}: choose one of {', '.join(FORMATS)}")
        if self.network not in (None, "teacher", "student"):
            raise UserError(f"--network {self.network}: choose teacher or student")
        form = self.form
        if form.suffixes and self.out.suffix not in form.suffixes:
            raise UserError(f"--out {self.out}: --to {self.to} writes a file, name it *{' or *'.join(form.suffixes)}")
        if is_checkpoint_folder(self.out.absolute().parent):
            raise UserError(f"--out {self.out}: a file more makes the checkpoint there unsound; choose another folder")
        if self.with_head and not form.holds_head:
            raise UserError(f"--with-head: --to {self.to} has no place for a head; choose safetensors, onnx or torch")
        missing = [package for package in form.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"--to {self.to} needs {', '.join(missing)}, to check what it writes: pip install 'dino-dist[export]'"
            )

    @property
    def form(self) -> Format:
        """The format that `to` names."""
        return FORMATS[self.to]

    @property
    def takes_head(self) -> bool:
        """Whether the head goes along."""
        return self.with_head or self.form.always_with_head


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how close its reader came."""

    source: str
    networks: tuple[str, ...]
    step: int | None
    notes: tuple[str, ...]
    """What the user should know about the source, a sentence each."""
    format: str
    out: str
    image_px: int
    has_head: bool
    bytes: int
    checked_with: str
    relative_difference: float
    """max|a - b| / max|b| of the features on fixed images, fp32; the tolerance is 1e-5."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"networks": list(self.networks), "notes": list(self.notes)}


def export_network(request: ExportRequest) -> Exported:
    """Write and check, then give it its name; `UserError` for bad input, `RunFailed` if the check fails."""
    form = request.form
    with staged(request.out, folder=not form.suffixes) as part:
        first, expected = _write(request, part)
        checked_with = _version(form.packages[0]) if form.packages else _version("dino-dist")
        difference = max(_check(form, part, one, first, checked_with) for one in expected)
        num_bytes = size_bytes(part)
    return Exported(
        source=first.source,
        networks=tuple(one.network for one in expected),
        step=first.step,
        notes=first.notes,
        format=request.to,
        out=str(request.out),
        image_px=first.image_px,
        has_head=first.has_head,
        bytes=num_bytes,
        checked_with=checked_with,
        relative_difference=difference,
    )


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What stays known of a network whose tensors are dropped."""

    source: str
    step: int | None
    notes: tuple[str, ...]
    image_px: int
    num_heads: int
    has_head: bool


def _write(request: ExportRequest, part: Path) -> tuple[_Written, list[Expected]]:
    """The networks live in this function only."""
    networks = _read(request)
    if request.form.open is not None:
        networks = [_in_fp32(weights) for weights in networks]
    first = networks[0]
    image_px = first.shape.image_px if request.image_px is None else request.image_px
    resized = [at_image_size(weights, image_px) for weights in networks]
    expected = [
        _expected(request, weights, at_size) for weights, at_size in zip(networks, resized, strict=True)
    ]  # of the networks as they are, so that resampled positions are checked with the rest
    if request.to == "safetensors":
        write_safetensors(resized[0], part, with_head=request.with_head)
    elif request.to == "timm":
        write_timm(resized[0], part)
    elif request.to == "hf":
        write_hf(resized[0], part)
    elif request.to == "onnx":
        write_onnx(resized[0], part, with_head=request.with_head)
    else:
        write_dino(resized, part)
    written = _Written(
        source=first.source,
        step=first.step,
        notes=first.notes,
        image_px=image_px,
        num_heads=first.shape.num_heads,
        has_head=request.takes_head and bool(first.head),
    )
    return written, expected


def _read(request: ExportRequest) -> list[NetworkWeights]:
    opened = open_weights(request.source, ReadOptions(num_heads=request.num_heads))
    roles: tuple[str, ...] = (request.network or "teacher",)
    if request.form.both_networks and request.network is None and opened.networks != (ONLY,):
        roles = opened.networks
    networks = [opened.network(role) for role in roles]
    if request.with_head and not networks[0].head:
        raise UserError(f"--with-head: {networks[0].source} holds no whole head; leave --with-head out")
    return networks


def _in_fp32(weights: NetworkWeights) -> NetworkWeights:
    """What other libraries' files hold, and what their features are compared in."""
    return replace(weights, backbone={name: tensor.to(torch.float32) for name, tensor in weights.backbone.items()})


def _expected(request: ExportRequest, weights: NetworkWeights, at_size: NetworkWeights) -> Expected:
    images = probe_images(weights.shape.in_channels, at_size.shape.image_px)
    head = build_head(weights) if request.to == "onnx" and request.with_head else None
    outputs = outputs_of(build_backbone(weights, _CPU, "sdpa"), head, images)
    refuse_non_finite(f"the {weights.network} of {weights.source}", outputs)
    return Expected(
        network="student" if weights.network == "student" else "teacher",
        images=images,
        outputs=outputs,
        digests=digests_of(at_size, with_head=request.takes_head) if request.form.open is None else {},
    )


def _check(form: Format, part: Path, expected: Expected, written: _Written, checked_with: str) -> float:
    if form.open is not None:
        found = form.open(part)(expected.images)
    else:
        weights = read_network(part, network=expected.network, num_heads=written.num_heads)
        refuse_other_bytes(digests_of(weights, with_head=True), expected.digests)
        found = outputs_of(build_backbone(weights, _CPU, "sdpa"), None, expected.images)
    difference = relative_difference(found, expected.outputs)
    refuse_other_features(difference, checked_with)
    return difference


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return package
