"""Recorded trajectories are replayed to 1e-9, of any size and setting; one that was tampered with is found out.

Besides the recorded file, trajectories made here by a second statement of the method: plain functions of a dictionary
of weights, one crop resolution at a time, explicit softmax, loops over pairs, AdamW by hand.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "dino_v1_trajectory_a.npz"
Weights = dict[str, Tensor]


def load_tool(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("replay_golden")


def run_tool(tool: ModuleType, *arguments: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of `replay_golden.py ... --json`."""
    app = typer.Typer()
    app.command()(tool.main)
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


# The second statement. Letters: N crops, P patches, L = 1 + P tokens, D width, H heads, K prototypes.


def backbone(w: Weights, images: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Normed CLS tokens [N, D] and the last block's attention [N, H, L, L]."""
    n, patch = len(images), c["patch_px"]
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    tiles = images.view(n, 3, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)
    x = tiles @ w["backbone.patch_embed.proj.weight"].flatten(1).T + w["backbone.patch_embed.proj.bias"]
    x = torch.cat([w["backbone.cls_token"].expand(n, -1, -1), x], 1) + positions(w, rows, columns)
    attention = x
    for block in range(c["depth"]):
        name = f"backbone.blocks.{block}"
        y, attention = self_attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", x), c["num_heads"])
        x = x + y
        y = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x))
        x = x + linear(w, f"{name}.mlp.fc2", gelu(y))
    return layer_norm(w, "backbone.norm", x)[:, 0], attention


def positions(w: Weights, rows: int, columns: int) -> Tensor:
    learned = w["backbone.pos_embed"]
    grid = math.isqrt(learned.shape[1] - 1)
    if rows == columns == grid:
        return learned
    image = learned[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    resized = F.interpolate(image, scale_factor=scale, mode="bicubic")
    return torch.cat([learned[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def self_attention(w: Weights, name: str, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    n, length, width = x.shape
    q, k, v = linear(w, f"{name}.qkv", x).reshape(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(-1)
    return linear(w, f"{name}.proj", (attention @ v).transpose(1, 2).reshape(n, length, width)), attention


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def head(w: Weights, x: Tensor) -> Tensor:
    x = gelu(linear(w, "head.mlp.0", x))
    x = linear(w, "head.mlp.4", gelu(linear(w, "head.mlp.2", x)))
    x = x / x.square().sum(-1, keepdim=True).sqrt()
    v = w["head.last_layer.weight_v"]
    return x @ (w["head.last_layer.weight_g"] * v / v.square().sum(1, keepdim=True).sqrt()).T


def network(w: Weights, crops: list[Tensor], c: dict[str, Any]) -> Tensor:
    return head(w, torch.cat([backbone(w, images, c)[0] for images in crops]))


def cosine(base: float, final: float, total: int, warmup: int = 0) -> list[float]:
    rise = [base * step / max(warmup - 1, 1) for step in range(warmup)]
    rest = total - warmup
    return rise + [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


@dataclass
class AdamW:
    """Decoupled weight decay; a weight without gradient is left alone, its step count too."""

    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def update(self, name: str, weight: Tensor, gradient: Tensor, lr: float, decay: float) -> Tensor:
        count = self.counts[name] = self.counts.get(name, 0) + 1
        self.first[name] = 0.9 * self.first.get(name, torch.zeros_like(weight)) + 0.1 * gradient
        self.second[name] = 0.999 * self.second.get(name, torch.zeros_like(weight)) + 0.001 * gradient**2
        mean, variance = self.first[name] / (1 - 0.9**count), self.second[name] / (1 - 0.999**count)
        return weight * (1 - lr * decay) - lr * mean / (variance.sqrt() + 1e-8)


def initial_weights(c: dict[str, Any], generator: torch.Generator) -> Weights:
    """Far from their usual small scale, so that every part of the network matters."""
    d, hidden, bottleneck, k = c["embed_dim"], c["head_hidden_dim"], c["head_bottleneck_dim"], c["num_prototypes"]
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.cls_token": (1, 1, d),
        "backbone.pos_embed": (1, 1 + (c["global_px"] // c["patch_px"]) ** 2, d),
        "backbone.patch_embed.proj.weight": (d, 3, c["patch_px"], c["patch_px"]),
        "backbone.patch_embed.proj.bias": (d,),
    }
    for block in range(c["depth"]):
        name = f"backbone.blocks.{block}"
        shapes |= {f"{name}.norm1.weight": (d,), f"{name}.norm1.bias": (d,)}
        shapes |= {f"{name}.attn.qkv.weight": (3 * d, d), f"{name}.attn.qkv.bias": (3 * d,)}
        shapes |= {f"{name}.attn.proj.weight": (d, d), f"{name}.attn.proj.bias": (d,)}
        shapes |= {f"{name}.norm2.weight": (d,), f"{name}.norm2.bias": (d,)}
        shapes |= {f"{name}.mlp.fc1.weight": (4 * d, d), f"{name}.mlp.fc1.bias": (4 * d,)}
        shapes |= {f"{name}.mlp.fc2.weight": (d, 4 * d), f"{name}.mlp.fc2.bias": (d,)}
    shapes |= {"backbone.norm.weight": (d,), "backbone.norm.bias": (d,)}
    for index, (wide, narrow) in {0: (d, hidden), 2: (hidden, hidden), 4: (hidden, bottleneck)}.items():
        shapes |= {f"head.mlp.{index}.weight": (narrow, wide), f"head.mlp.{index}.bias": (narrow,)}
    shapes |= {"head.last_layer.weight_g": (k, 1), "head.last_layer.weight_v": (k, bottleneck)}
    weights = {name: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    weights["head.last_layer.weight_g"] = torch.ones(k, 1, dtype=torch.float64)
    return weights


def loss_of(student: Tensor, targets: Tensor, images: int, student_temp: float) -> Tensor:
    """Mean over pairs of different views and over images of the cross-entropy."""
    terms = []
    for g, target in enumerate(targets.split(images)):  # type: ignore[no-untyped-call]
        for s, logits in enumerate(student.split(images)):  # type: ignore[no-untyped-call]
            if s != g:
                terms.append(-(target * (logits / student_temp).log_softmax(-1)).sum(-1).mean())
    return torch.stack(terms).mean()


def make_trajectory(c: dict[str, Any]) -> dict[str, Any]:
    """A file in the recorded format for the settings `c`, computed by the functions above."""
    generator = torch.Generator().manual_seed(c["seed"])
    student = initial_weights(c, generator)
    teacher = dict(student)
    total, per_epoch = c["epochs"] * c["steps_per_epoch"], c["steps_per_epoch"]
    lr = cosine(c["lr_base"], c["lr_final"], total, c["warmup_epochs"] * per_epoch)
    decay = cosine(c["weight_decay"], c["weight_decay_end"], total)
    momentum = cosine(c["teacher_momentum"], 1.0, total)
    warm = np.linspace(c["warmup_teacher_temp"], c["teacher_temp"], c["warmup_teacher_temp_epochs"])
    temperature = [*warm, *[c["teacher_temp"]] * c["epochs"]][: c["epochs"]]
    trained = [name for name in student if not (c["norm_last_layer"] and name.endswith("weight_g"))]
    rows: dict[str, Any] = {f"init/{name}": tensor.numpy() for name, tensor in student.items()}
    rows |= {"schedule/lr": lr, "schedule/weight_decay": decay, "schedule/momentum": momentum}
    rows["schedule/teacher_temp"] = temperature
    center = torch.zeros(1, c["num_prototypes"], dtype=torch.float64)
    adamw = AdamW()
    for step in range(c["steps"]):
        epoch, key = step // per_epoch, f"step{step}"
        sizes = [(2, c["global_px"]), (c["num_local_crops"], c["local_px"])]
        crops = [
            torch.randn(views, c["batch"], 3, px, px, generator=generator, dtype=torch.float64)
            for views, px in sizes
            if views
        ]
        rows |= {f"{key}/{kind}_crops": x.numpy() for kind, x in zip(("global", "local"), crops, strict=False)}
        flat = [x.flatten(0, 1) for x in crops]
        if step == 0:
            for kind, images in zip(("global", "local"), flat, strict=False):
                rows[f"step0/student_backbone_cls_{kind}"] = backbone(student, images, c)[0].numpy()
            rows["step0/last_selfattention_global"] = backbone(student, flat[0], c)[1].numpy()
        leaves = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in student.items()}
        teacher_logits = network(teacher, flat[:1], c)
        student_logits = network(leaves, flat, c)
        targets = ((teacher_logits - center) / temperature[epoch]).softmax(-1)
        loss = loss_of(student_logits, targets, c["batch"], c["student_temp"])
        gradients = dict(zip(trained, torch.autograd.grad(loss, [leaves[name] for name in trained]), strict=True))
        norms = {name: gradient.square().sum().sqrt() for name, gradient in gradients.items()}
        rows |= {
            f"{key}/teacher_logits": teacher_logits.numpy(),
            f"{key}/student_logits": student_logits.detach().numpy(),
        }
        rows |= {f"{key}/loss": loss.detach().numpy(), f"{key}/center_before": center.numpy()}
        rows[f"{key}/grad_norm_per_parameter"] = np.array([norms[name].item() for name in trained])
        for name, gradient in gradients.items():
            if "last_layer" in name and epoch < c["freeze_last_layer_epochs"]:
                continue
            clip = c["clip_per_parameter"]
            scale = min(1.0, clip / (norms[name].item() + 1e-6)) if clip else 1.0
            undecayed = name.endswith(".bias") or gradient.ndim == 1
            student[name] = adamw.update(
                name, student[name], scale * gradient, lr[step], 0.0 if undecayed else decay[step]
            )
        teacher = {name: momentum[step] * old + (1 - momentum[step]) * student[name] for name, old in teacher.items()}
        center = c["center_momentum"] * center + (1 - c["center_momentum"]) * teacher_logits.mean(0, keepdim=True)
        rows[f"{key}/center_after"] = center.numpy()
    rows |= {f"final_student/{name}": tensor.numpy() for name, tensor in student.items()}
    rows |= {f"final_teacher/{name}": tensor.numpy() for name, tensor in teacher.items()}
    rows["meta.json"] = np.array(json.dumps({"config": c, "grad_parameters": trained}))
    return rows


BASE: dict[str, Any] = {
    **{"seed": 11, "embed_dim": 20, "depth": 2, "num_heads": 2, "patch_px": 4, "global_px": 24, "local_px": 12},
    **{"num_local_crops": 2, "num_prototypes": 31, "head_hidden_dim": 18, "head_bottleneck_dim": 7, "batch": 2},
    **{"steps": 6, "epochs": 6, "steps_per_epoch": 2, "norm_last_layer": False, "clip_per_parameter": 0.0},
    **{"freeze_last_layer_epochs": 2, "lr_base": 3e-3, "lr_final": 1e-6, "warmup_epochs": 2, "teacher_momentum": 0.8},
    **{"warmup_teacher_temp": 0.05, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 2, "weight_decay": 0.04},
    **{"weight_decay_end": 0.4, "student_temp": 0.1, "center_momentum": 0.7, "dtype": "float64"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "trained prototype norms, no clipping, two frozen epochs": {},
    "no local crops, clipping, nothing frozen or warmed up": {
        **{"num_local_crops": 0, "clip_per_parameter": 0.01, "freeze_last_layer_epochs": 0, "warmup_epochs": 0},
        **{"warmup_teacher_temp_epochs": 0, "norm_last_layer": True, "seed": 12},
    },
    "one step an epoch, one head, one block, local crops as large as global ones": {
        **{"steps": 3, "steps_per_epoch": 1, "num_heads": 1, "depth": 1, "local_px": 24, "patch_px": 8, "batch": 1},
        **{"num_local_crops": 1, "clip_per_parameter": None, "seed": 13},
    },
}


@pytest.fixture(scope="module", params=OTHERS, ids=lambda name: name)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "other.npz"
    np.savez(path, **make_trajectory(BASE | OTHERS[request.param]))
    return path


def test_the_recorded_trajectory_through_the_command(tmp_path: Path) -> None:
    out = tmp_path / "ours.npz"
    command = [sys.executable, str(ROOT / "tools" / "replay_golden.py"), str(GOLDEN), "--out", str(out), "--json"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["largest"] <= 1e-9
    kinds = {"loss", "center_after", "center_before", "teacher_logits", "student_logits", "grad_norm_per_parameter"}
    kinds |= {"final_student", "final_teacher", "schedule/lr", "schedule/momentum", "schedule/weight_decay"}
    kinds |= {"schedule/teacher_temp", "last_selfattention_global", "student_backbone_cls_global"}
    assert kinds | {"student_backbone_cls_local"} == report["errors"].keys()
    with np.load(GOLDEN, allow_pickle=False) as golden, np.load(out, allow_pickle=False) as ours:
        assert set(golden.files) == set(ours.files)
        for key in golden.files:
            if key != "meta.json":
                scale = max(float(np.abs(golden[key]).max()), 1e-300)
                assert float(np.abs(golden[key] - ours[key]).max()) <= 1e-9 * scale, key


def test_other_settings_are_replayed_too(tool: ModuleType, other: Path) -> None:
    code, report = run_tool(tool, other)
    assert report["largest"] <= 1e-9, report["errors"]
    assert (code, report["ok"]) == (0, True)


def test_the_second_statement_reproduces_the_recorded_trajectory() -> None:
    """The two agree on the recorded file as well, from its weights and crops: they are statements of one method."""
    with np.load(GOLDEN, allow_pickle=False) as golden:
        c = json.loads(str(golden["meta.json"]))["config"]
        weights = {
            key.removeprefix("init/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("init/")
        }
        crops = [torch.from_numpy(golden[f"step0/{kind}_crops"]).flatten(0, 1) for kind in ("global", "local")]
        ours = network(weights, crops, c).numpy()
        np.testing.assert_allclose(ours, golden["step0/student_logits"], rtol=0, atol=1e-9 * np.abs(ours).max())


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("step1/loss", "loss"),
        ("step4/center_after", "center_after"),
        ("step3/student_logits", "student_logits"),
        ("step2/grad_norm_per_parameter", "grad_norm_per_parameter"),
        ("final_teacher/head.last_layer.weight_v", "final_teacher"),
        ("schedule/momentum", "schedule/momentum"),
    ],
)
def test_a_row_that_was_tampered_with_is_named(tool: ModuleType, key: str, kind: str) -> None:
    """Against one replay: a change of one number by 1e-7 of the largest is seen, and only in its kind of row."""
    with np.load(GOLDEN, allow_pickle=False) as archive:
        golden = {name: archive[name] for name in archive.files if name != "meta.json"}
    rows = {name: row.copy() for name, row in golden.items() if not name.startswith("init/") and "_crops" not in name}
    rows[key].flat[0] += 1e-7 * np.abs(rows[key]).max()
    errors = tool.errors_by_kind(rows, golden)
    assert [name for name, error in errors.items() if error > 1e-9] == [kind]


def test_tampering_ends_in_exit_code_one(tool: ModuleType, tmp_path: Path) -> None:
    with np.load(GOLDEN, allow_pickle=False) as archive:
        rows = {key: archive[key] for key in archive.files}
    rows["step2/loss"] = rows["step2/loss"] * (1 + 1e-8)
    np.savez(tmp_path / "tampered.npz", **rows)
    code, report = run_tool(tool, tmp_path / "tampered.npz")
    assert (code, report["ok"]) == (1, False)
    assert [kind for kind, error in report["errors"].items() if error > 1e-9] == ["loss"]


@pytest.mark.parametrize("change", ["missing here", "missing there", "other shape", "not a number"])
def test_a_row_that_cannot_be_compared_is_an_error(tool: ModuleType, change: str) -> None:
    ours = {"step0/loss": np.array(1.0), "step0/center_after": np.ones((1, 3))}
    theirs = {key: value.copy() for key, value in ours.items()}
    if change == "missing here":
        del ours["step0/loss"]
    elif change == "missing there":
        del theirs["step0/loss"]
    elif change == "other shape":
        ours["step0/loss"] = np.ones(2)
    else:
        ours["step0/loss"] = np.array(float("nan"))
    errors = tool.errors_by_kind(ours, theirs)
    assert errors["loss"] == float("inf")
    assert errors["center_after"] == 0.0
