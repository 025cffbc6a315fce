"""From the config to the objects of a run that hold weights: networks, sharded, and the step that trains them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from dino_dist.config import Config
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.models.attention import BackendChoice, ResolvedBackend, choose_backend
from dino_dist.models.dino import DinoNetwork
from dino_dist.models.head import DinoHead
from dino_dist.models.vit import VIT_SIZES, VisionTransformer, ViTShape
from dino_dist.step import DinoStep
from dino_dist.student_teacher import build_student_teacher

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: `train.precision`, where auto is bf16 on GPUs that have it, else fp32."""
    precision = config.train.precision
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    return _DTYPES[precision]


def vit_shape(config: Config) -> ViTShape:
    """Sizes of the backbone: the architecture's, with what the config overrides."""
    model, size = config.model, VIT_SIZES[config.model.arch]
    return ViTShape(
        embed_dim=model.embed_dim or size.embed_dim,
        depth=model.depth or size.depth,
        num_heads=model.num_heads or size.num_heads,
        patch_size=model.patch_size,
        image_px=config.augment.global_px,
        init_std=model.init_std,
        drop_path=model.drop_path,
    )


def attention_backend(config: Config, device: torch.device) -> BackendChoice:
    """The attention backend of a run, and why it was chosen; `UserError` for xformers in compiled blocks."""
    if config.train.compile and config.model.attention == "xformers":
        raise UserError("train.compile=true breaks at xformers' operators: use model.attention=auto or sdpa")
    if config.train.compile and config.model.attention == "auto":
        return BackendChoice(name="sdpa", reason="xformers does not compile")
    shape = vit_shape(config)
    return choose_backend(
        config.model.attention,
        device,
        dtype=compute_dtype(config, device),
        head_dim=shape.embed_dim // shape.num_heads,
        deterministic=config.train.deterministic,
    )


def build_network(config: Config, attention: ResolvedBackend, *, is_teacher: bool, world_size: int) -> DinoNetwork:
    """One network on the CPU, its weights a pure function of `run.seed`.

    The teacher's prototype norms have no gradients (as published); where the student trains its own they follow by EMA.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        shape = vit_shape(config)
        backbone = VisionTransformer(shape, attention)
        head = DinoHead(
            shape.embed_dim,
            config.head.num_prototypes,
            hidden_dim=config.head.hidden_dim,
            bottleneck_dim=config.head.bottleneck_dim,
            num_layers=config.head.num_layers,
            batch_norm=config.head.batch_norm,
            norm_last_layer=is_teacher or config.head.norm_last_layer,
            world_size=world_size,
            init_std=config.model.init_std,
        )
    return DinoNetwork(backbone, head)


def build_step(config: Config, world: World, attention: ResolvedBackend) -> DinoStep:
    """Student, teacher, center and optimizer of a run at step 0."""
    dtype = compute_dtype(config, world.device)

    def make_network(is_teacher: bool) -> DinoNetwork:
        return build_network(config, attention, is_teacher=is_teacher, world_size=world.size)

    networks = build_student_teacher(config, make_network, world, dtype)
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    if dtype == torch.bfloat16 and config.parallel.strategy in ("none", "oss"):
        # The sharded strategies cast parameters themselves; whole parameters leave it to autocast.
        autocast = partial(torch.autocast, world.device.type, dtype=dtype)
    return DinoStep(config, networks, world, autocast)


def check_strategy(config: Config, device: torch.device) -> None:
    """Raise `UserError` for sizes, a strategy and options that exclude each other."""
    vit_shape(config)
    kind = config.parallel.activation_checkpointing
    if not kind.startswith("fairscale"):
        return
    if config.train.compile:
        raise UserError(f"train.compile=true cannot trace parallel.activation_checkpointing={kind}: use torch")
    if compute_dtype(config, device) == torch.bfloat16 and config.parallel.strategy in ("none", "oss"):
        # fairscale recomputes under autocast's default dtype, not under the one of the forward.
        raise UserError(
            f"parallel.activation_checkpointing={kind} recomputes in another precision than bf16 under "
            f"parallel.strategy={config.parallel.strategy}: use activation_checkpointing=torch or a sharded strategy"
        )
