"""Whose names a file's tensors have, and which of this project's tensors each of them is; names alone, no tensors.

Ours are the published DINO checkpoints' (arXiv:2104.14294), and timm's ViT has the same in its backbone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dino_dist.errors import UserError

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")

_BACKBONE = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)
_HEAD = re.compile(r"mlp\.(\d+\.)?(weight|bias)|last_layer\.weight_[gv]")
# How torch names the two since weight_norm became a parametrization.
_PARAMETRIZED = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}

_WITHOUT_EFFECT = re.compile(
    # Classifiers and poolers behind the backbone, and the statistics of a head's batch norm, which training never uses.
    r"(head|fc|classifier|linear|pooler|pre_logits|lm_head|decoder)(\.|$)"
    r"|mlp\.\d+\.(running_mean|running_var|num_batches_tracked)$"
)

_ARCHITECTURES = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"^layer[1-4]\.0\.|^conv1\.|^bn1\.", "a ResNet or another convolutional network"),
        (r"cls_attn_blocks|\.local_mp\.|pos_embeder", "an XCiT"),
        (r"^stages\.|downsample_layers", "a ConvNeXt or another network in stages"),
        (r"relative_position|^layers\.\d+\.blocks\.", "a Swin or another network with relative positions"),
        (r"register_tokens|reg_token|storage_tokens", "a ViT with register tokens (DINOv2, DINOv3)"),
        (r"\.ls[12]\.|layer_scale|\.gamma_[12]$", "a ViT with LayerScale (DINOv2, DINOv3, DeiT III)"),
        (r"mask_token", "a ViT with a mask token (DINOv2, BEiT)"),
        (r"rope|freqs_cis", "a ViT with rotary positions (DINOv3, EVA)"),
        (r"dist_token|distillation_token", "a DeiT with a distillation token"),
        (r"norm_pre|pre_layrnorm|ln_pre", "a CLIP image tower"),
        (r"[qk]_norm|attn_pool", "a ViT with other attention"),
    )
)

_HF_LAYER = re.compile(r"^(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)$")
_HF_PREFIX = re.compile(r"^vit\.")
_HF_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
# Two generations of names: of files, and of models in memory since transformers 5.
_HF_PARTS = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_HF_QKV = {
    "attention.attention.query": 0,
    "attention.attention.key": 1,
    "attention.attention.value": 2,
    "attention.q_proj": 0,
    "attention.k_proj": 1,
    "attention.v_proj": 2,
}


@dataclass(kw_only=True)
class NameMap:
    """For each tensor of ours, the names in the file whose tensors, one below the other, make it up."""

    backbone: dict[str, list[str]] = field(default_factory=dict)
    head: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """Known to have no effect on features, such as a classifier's."""
    unknown: list[str] = field(default_factory=list)


def map_names(names: Iterable[str], source: str) -> NameMap:
    """Sort a network's names; `UserError` where they are another architecture's."""
    stripped: dict[str, str] = {}
    for name in names:
        other = stripped.setdefault(_WRAPPERS.sub("", name), name)
        if other != name:
            raise UserError(f"{source} holds {other} and {name}, the same tensor of two networks: give one network")
    _refuse_other_architectures(stripped, source)
    plain = {_HF_PREFIX.sub("", name): original for name, original in stripped.items()}
    if "embeddings.cls_token" in plain:
        return _from_hugging_face(plain)
    found = NameMap()
    wrapped = any(name.startswith("backbone.") for name in stripped)
    for name, original in stripped.items():
        inner = name.removeprefix("backbone.")
        below_head = name.removeprefix("head.")
        below_head = _PARAMETRIZED.get(below_head, below_head)
        if _BACKBONE.fullmatch(inner) and wrapped == name.startswith("backbone."):
            found.backbone[inner] = [original]
        elif name.startswith("head.") and _HEAD.fullmatch(below_head):
            found.head[below_head] = [original]
        elif _WITHOUT_EFFECT.match(inner) or _WITHOUT_EFFECT.match(below_head):
            found.left_out.append(original)
        else:
            found.unknown.append(original)
    return found


def _from_hugging_face(names: dict[str, str]) -> NameMap:
    found = NameMap()
    thirds: dict[str, dict[int, str]] = {}
    for name, original in names.items():
        layer = _HF_LAYER.match(name)
        part = "" if layer is None else layer[2]
        if name in _HF_NAMES:
            found.backbone[_HF_NAMES[name]] = [original]
        elif layer is not None and part in _HF_PARTS:
            found.backbone[f"blocks.{layer[1]}.{_HF_PARTS[part]}.{layer[3]}"] = [original]
        elif layer is not None and part in _HF_QKV:
            thirds.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[_HF_QKV[part]] = original
        elif _WITHOUT_EFFECT.match(name):
            found.left_out.append(original)
        else:
            found.unknown.append(original)
    for name, parts in thirds.items():
        # With one of the three missing the height shows it.
        found.backbone[name] = [parts[index] for index in sorted(parts)]
    return found


def _refuse_other_architectures(names: Iterable[str], source: str) -> None:
    for name in names:
        # Prefixes hide `conv1.` and the like.
        inner = re.sub(r"^(backbone|model|encoder|vit|base_model)\.", "", name)
        for pattern, what in _ARCHITECTURES:
            if pattern.search(inner):
                raise UserError(
                    f"{source} holds {what} (it has {name}), another architecture than DINO v1's ViT: "
                    "give weights of a plain ViT with learned positions"
                )
