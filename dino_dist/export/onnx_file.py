"""One ONNX file for any number of images of one size: `images` -> `cls`, `patches` and, with the head, `logits`.

Letters: N images, P patches, D width, K prototypes; images [N, C, px, px], normalised; cls [N, D] and patches
[N, P, D] normed; logits [N, K].
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from dino_dist.errors import UserError
from dino_dist.export.safetensors_file import metadata
from dino_dist.export.verification import Outputs, outputs_of, probe_images
from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VisionTransformer
from dino_dist.weights.network_weights import NetworkWeights, build_backbone
from dino_dist.weights.shapes import has_batch_norm, head_on_meta
from dino_dist.weights.weights_file import METADATA_KEY

MAX_BYTES: Final = 2**31 - 2**20
"""A protobuf message ends at 2 GiB; some of it is the graph."""


def write_onnx(weights: NetworkWeights, path: Path, *, with_head: bool) -> None:
    """By torch's exporter, attention as scaled_dot_product_attention; fp32 is expected."""
    head = build_head(weights) if with_head else None
    backbone = build_backbone(weights, torch.device("cpu"), "sdpa")
    network = _Network(backbone, head).eval()
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if num_bytes > MAX_BYTES:
        raise UserError(f"--to onnx holds at most 2 GiB in one file, this network has {num_bytes / 2**30:.1f} GiB")
    images = probe_images(weights.shape.in_channels, weights.shape.image_px)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own parts
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["cls", "patches", "logits"][: 2 if head is None else 3],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata(weights))
    program.save(path, external_data=False)


def build_head(weights: NetworkWeights) -> DinoHead:
    """The head with these weights in fp32; `UserError` for one whose outputs depend on the batch it sees."""
    if has_batch_norm(weights.head):
        raise UserError(
            f"the head of {weights.source} has batch norms without running statistics: logits of one image are not "
            "defined; leave out --with-head, or take --to safetensors or torch"
        )
    head = head_on_meta(weights.head, weights.shape.embed_dim)
    assert head is not None  # readers take a head whole or not at all
    head.load_state_dict({name: tensor.float() for name, tensor in weights.head.items()}, assign=True)
    return head.requires_grad_(False).eval()


def open_onnx(path: Path) -> Callable[[Tensor], Outputs]:
    """What onnxruntime makes of the file on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def forward(images: Tensor) -> Outputs:
        # One at a time and all together: the batch has to be free.
        alone = session.run(names, {"images": images[:1].numpy()})
        together = session.run(names, {"images": images.numpy()})
        return {
            name: torch.cat([torch.from_numpy(first), torch.from_numpy(rest[1:])])
            for name, first, rest in zip(names, alone, together, strict=True)
        }

    return forward


class _Network(nn.Module):
    def __init__(self, backbone: VisionTransformer, head: DinoHead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(self.backbone, self.head, images).values())
