"""Algorithm 1 of the paper (arXiv:2104.14294) as plainly as it can be said: one process, plain loops.

    python tools/plain_dino.py CONFIG [key=value ...] [--every IMAGES] [--json]

The full system is held against it, so of what learns the two share one thing: the weights at the start. Networks are
torch's own layers; crops are torchvision's v2 transforms, image by image, drawn from torch's generator; loss, center,
EMA, schedules and clipping are written out here. The images, their order, and the judge (k-NN of the teacher) are the
system's, so that both have seen the same images when they are compared. What the statement leaves out (drop path,
blur, a trained prototype norm, a warm-up of the teacher's temperature, optimizers but AdamW) is refused.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from dino_dist.build import build_network, vit_shape
from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.dist import World
from dino_dist.durations import Duration
from dino_dist.errors import UserError
from dino_dist.inputs import sample_reader, training_set
from dino_dist.judging.evaluator import Evaluator
from dino_dist.models.vit import ViTShape

TORCH_NAMES = (
    ("backbone.cls_token", "cls"),
    ("backbone.pos_embed", "positions"),
    ("backbone.patch_embed.proj", "patches"),
    ("backbone.norm.", "blocks.norm."),
    ("backbone.blocks.", "blocks.layers."),
    (".attn.qkv.", ".self_attn.in_proj_"),
    (".attn.proj.", ".self_attn.out_proj."),
    (".mlp.fc", ".linear"),
    ("head.mlp.", "mlp."),
    ("head.last_layer.weight_v", "prototypes"),
)
"""Parts of the published parameter names, and what torch's layers call the same."""


class PlainNetwork(nn.Module):
    """A vision transformer and DINO's head, of torch's own layers; prototypes of norm 1."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape, head = vit_shape(config), config.head
        self.cls = nn.Parameter(torch.empty(1, 1, shape.embed_dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + shape.grid**2, shape.embed_dim))
        self.patches = nn.Conv2d(3, shape.embed_dim, shape.patch_size, stride=shape.patch_size)
        self.blocks = _blocks(shape)
        widths = [shape.embed_dim, *[head.hidden_dim] * (head.num_layers - 1)]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Linear(narrow, wide), *[nn.BatchNorm1d(wide)] * head.batch_norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], head.bottleneck_dim))
        self.prototypes = nn.Parameter(torch.empty(head.num_prototypes, head.bottleneck_dim))

    def features(self, images: Tensor) -> Tensor:
        """The normed class token of each image."""
        tokens = self.patches(images)
        rows, grid = tokens.shape[-1], math.isqrt(self.positions.shape[1] - 1)
        positions: Tensor = self.positions
        if rows != grid:
            square = positions[:, 1:].transpose(1, 2).reshape(1, -1, grid, grid)
            square = F.interpolate(square, scale_factor=(rows + 0.1) / grid, mode="bicubic")
            positions = torch.cat([positions[:, :1], square.flatten(2).transpose(1, 2)], 1)
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens.flatten(2).transpose(1, 2)], 1)
        cls: Tensor = self.blocks(tokens + positions)[:, 0]
        return cls

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """The prototype logits of all crops, those of one size in one pass, the head once for all of them."""
        sizes = list(dict.fromkeys(crop.shape[-1] for crop in crops))
        cls = [self.features(torch.cat([crop for crop in crops if crop.shape[-1] == size])) for size in sizes]
        directions = F.normalize(self.mlp(torch.cat(cls)), dim=-1)
        return F.linear(directions, F.normalize(self.prototypes, dim=-1))

    def start_from(self, published: dict[str, Tensor]) -> None:
        """Take the weights of one of the system's networks."""
        renamed = {}
        for key, value in published.items():
            name = key
            for theirs, ours in TORCH_NAMES:
                name = name.replace(theirs, ours)
            renamed[name] = value
        renamed.pop("head.last_layer.weight_g")  # ones
        own = self.state_dict()
        statistics = {name: value for name, value in own.items() if "running" in name or "num_batches" in name}
        self.load_state_dict(renamed | statistics, strict=True)


def _blocks(shape: ViTShape) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        shape.embed_dim,
        shape.num_heads,
        int(shape.embed_dim * shape.mlp_ratio),
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )
    norm = nn.LayerNorm(shape.embed_dim, eps=1e-6)
    return nn.TransformerEncoder(layer, shape.depth, norm=norm, enable_nested_tensor=False)


def check_plain(config: Config) -> None:
    """Raise `UserError` for a setting that this statement leaves out."""
    augment, loss = config.augment, config.loss
    demands = {
        "model.init_from=null": config.model.init_from is None,
        "model.drop_path=0": config.model.drop_path == 0,
        "head.num_layers=2 or more": config.head.num_layers > 1,
        "head.norm_last_layer=true": config.head.norm_last_layer,
        "optim.name=adamw": config.optim.name == "adamw",
        "optim.clip_scope=parameter": config.optim.clip_scope == "parameter",
        "loss.warmup_teacher_temp=loss.teacher_temp": loss.warmup_teacher_temp == loss.teacher_temp,
        "augment.blur_*_p=0": not (augment.blur_global_1_p or augment.blur_global_2_p or augment.blur_local_p),
        "augment.share_jitter=false": not augment.share_jitter,
        "augment.teacher_sees_colors=true": augment.teacher_sees_colors,
    }
    for demand, met in demands.items():
        if not met:
            raise UserError(f"plain DINO leaves this setting out: give {demand}")


def view_transforms(config: Config) -> list[Callable[[Tensor], Tensor]]:
    """One transform a view, uint8 [3, H, W] -> normalised [3, h, w]: two global ones, then the local ones."""
    augment, data = config.augment, config.data
    jitter = v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)

    def view(size_px: int, scale: tuple[float, float], solarize_p: float) -> Callable[[Tensor], Tensor]:
        transform: Callable[[Tensor], Tensor] = v2.Compose(
            [
                v2.RandomResizedCrop(size_px, scale, augment.aspect_ratio, interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(augment.flip_p),
                v2.RandomApply([jitter], p=augment.jitter_p),
                v2.RandomGrayscale(augment.gray_p),
                v2.RandomSolarize(128, p=solarize_p),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(data.mean), list(data.std)),
            ]
        )
        return transform

    first = view(augment.global_px, augment.global_scale, 0.0)
    second = view(augment.global_px, augment.global_scale, augment.solarize_global_2_p)
    return [first, second, *[view(augment.local_px, augment.local_scale, 0.0)] * augment.local_crops]


def cosine(base: float, final: float, steps: int, warmup: int = 0) -> list[float]:
    """The published schedule: a linear warm-up from 0, then half a cosine; one value a step."""
    rise: list[float] = np.linspace(0, base, warmup).tolist()
    rest = steps - warmup
    return rise + [final + (base - final) * (1 + math.cos(math.pi * i / rest)) / 2 for i in range(rest)]


class PlainDino:
    """Student, teacher, center and optimizer; `step` is one turn of algorithm 1's loop."""

    def __init__(self, config: Config, dataset_size: int) -> None:
        check_plain(config)
        self.config = config
        batch, optim, ema = config.train.batch_size, config.optim, config.ema

        def steps(length: str) -> int:
            return Duration.parse(length).steps(batch_size=batch, dataset_size=dataset_size)

        total = steps(config.train.length)
        lr = optim.lr * batch / optim.lr_reference_batch
        self.lr = cosine(lr, optim.lr_final, total, min(steps(optim.warmup), total - 1))
        self.weight_decay = cosine(optim.weight_decay, optim.weight_decay_final, total)
        self.momentum = cosine(ema.momentum, ema.momentum_final, total)
        self.frozen_steps = steps(optim.freeze_last_layer)

        self.student, self.teacher = PlainNetwork(config), PlainNetwork(config)
        start = build_network(config, "sdpa", is_teacher=False, world_size=1).state_dict()
        for network in (self.student, self.teacher):
            network.start_from(start)
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, config.head.num_prototypes)
        parameters = list(self.student.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)

    def step(self, crops: Sequence[Tensor], index: int) -> float:
        """Learn from the views of a batch, [n, 3, h, w] each, the two global ones first; returns the loss."""
        loss = self.loss(crops)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.optim.clip:
            for parameter in self.student.parameters():
                nn.utils.clip_grad_norm_([parameter], self.config.optim.clip)
        if index < self.frozen_steps:
            self.student.prototypes.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr[index]
        self.optimizer.param_groups[0]["weight_decay"] = self.weight_decay[index]
        self.optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.mul_(self.momentum[index]).add_((1 - self.momentum[index]) * theirs)
        return loss.item()

    def loss(self, crops: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of each global view's target with every other view's prediction; moves the center."""
        section, num_images = self.config.loss, len(crops[0])
        with torch.no_grad():
            teacher_logits = self.teacher(crops[:2])
        targets = ((teacher_logits - self.center) / section.teacher_temp).softmax(-1).split(num_images)
        predictions = (self.student(crops) / section.student_temp).log_softmax(-1).split(num_images)
        terms = [
            -(target * prediction).sum(-1).mean()
            for i, target in enumerate(targets)
            for j, prediction in enumerate(predictions)
            if i != j
        ]
        keep = section.center_momentum
        self.center = keep * self.center + (1 - keep) * teacher_logits.mean(0, keepdim=True)
        return torch.stack(terms).mean()


@dataclass(frozen=True, kw_only=True)
class PlainResult:
    """What a run gave."""

    knn_top1: dict[int, float]
    """Of the teacher, by images seen; k is the largest of `eval.knn_k`."""
    images_per_s: float
    """Of training alone, crops included."""


def train_plain(
    config: Config, index_dir: Path, *, every: int, say: Callable[[str], None] = lambda line: None
) -> PlainResult:
    """Train on the images of `data.train` in the system's order; judged each `every` images and at the end."""
    samples = training_set(config.data, index_dir)
    with closing(sample_reader(samples, config.data)) as reader:
        pixels = [reader.read(number).pixels for number in range(samples.dataset.num_samples)]
    images = [torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture in pixels]
    order = samples.order(seed=config.run.seed, shards_per_block=config.data.shards_per_block)
    evaluator, k = Evaluator(config, World(), index_dir), max(config.eval.knn_k)
    transforms, batch = view_transforms(config), config.train.batch_size
    plain, every_steps = PlainDino(config, samples.num_samples), -(-every // batch)
    judged: dict[int, float] = {}
    seconds = 0.0
    torch.manual_seed(config.run.seed)
    for index in range(len(plain.lr)):
        started_s = time.monotonic()
        ids = order.ids(index * batch, (index + 1) * batch).sample_ids
        crops = [torch.stack([transform(images[number]) for number in ids]) for transform in transforms]
        loss = plain.step(crops, index)
        seconds += time.monotonic() - started_s
        seen = (index + 1) * batch
        if (index + 1) % every_steps == 0 or index + 1 == len(plain.lr):
            judged[seen] = evaluator.knn(torch.no_grad()(plain.teacher.features))[0][k].top1
            say(f"plain: {seen} images, {seen / seconds:.0f} images/s, loss {loss:.3f}, k-NN {judged[seen]:.4f}")
    return PlainResult(knn_top1=judged, images_per_s=len(plain.lr) * batch / seconds)


def main(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    every: Annotated[int, typer.Option(help="Images between judgements.", min=1)] = 60_000,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Train plain DINO on labelled shards and print the teacher's k-NN accuracy over images seen."""
    torch.set_num_threads(1)
    say: Callable[[str], None] = (lambda line: None) if as_json else print
    try:
        config = load_config(recipe, overrides or [])
        if config.data.eval_train is None:
            raise UserError("plain DINO is judged by k-NN: give data.eval_train=PATH data.eval_test=PATH")
        result = train_plain(config, Path(config.run.dir) / "index", every=every, say=say)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps({"knn_top1": result.knn_top1, "images_per_s": result.images_per_s}))


if __name__ == "__main__":
    typer.run(main)
