"""Replay a recorded trajectory of the published DINO step through this project's own step, and compare every row.

    python tools/replay_golden.py FILE.npz [--out RESULT.npz] [--json]

FILE holds initial weights, crops and settings (key `meta.json`) and what the published step made of them. Prints the
largest relative error, max|a - b| / max|b|, of every kind of row; exits with 1 if one is above 1e-9.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dino_dist.build import build_step
from dino_dist.config import (
    AugmentSection,
    Config,
    DataSection,
    EmaSection,
    EvalSection,
    HeadSection,
    LossSection,
    ModelSection,
    OptimSection,
    ParallelSection,
    TrainSection,
)
from dino_dist.config_checks import check
from dino_dist.dist import World
from dino_dist.schedules import Schedules, build_schedules
from dino_dist.step import DinoStep, Views

Arrays = dict[str, NDArray[np.float64]]
TOLERANCE = 1e-9


def config_of(meta: dict[str, Any]) -> Config:
    """This project's config for the settings of a trajectory file."""
    config = Config(
        data=DataSection(train="the crops in the file"),
        model=ModelSection(
            embed_dim=meta["embed_dim"],
            depth=meta["depth"],
            num_heads=meta["num_heads"],
            patch_size=meta["patch_px"],
            drop_path=0.0,
            attention="sdpa",
        ),
        head=HeadSection(
            num_prototypes=meta["num_prototypes"],
            hidden_dim=meta["head_hidden_dim"],
            bottleneck_dim=meta["head_bottleneck_dim"],
            norm_last_layer=meta["norm_last_layer"],
            batch_norm=meta.get("head_batch_norm", False),
        ),
        augment=AugmentSection(
            global_px=meta["global_px"],
            local_px=meta.get("local_px") or meta["patch_px"],  # a file without local crops may leave it out
            local_crops=meta["num_local_crops"],
        ),
        loss=LossSection(
            student_temp=meta["student_temp"],
            teacher_temp=meta["teacher_temp"],
            warmup_teacher_temp=meta["warmup_teacher_temp"],
            warmup_teacher_temp_length=f"{meta['warmup_teacher_temp_epochs']}ep",
            center_momentum=meta["center_momentum"],
        ),
        train=TrainSection(length=f"{meta['epochs']}ep", batch_size=meta["batch"], precision="fp64", device="cpu"),
        optim=OptimSection(
            lr=meta["lr_base"],
            lr_reference_batch=meta["batch"],  # the file's learning rate is already scaled
            lr_final=meta["lr_final"],
            warmup=f"{meta['warmup_epochs']}ep",
            weight_decay=meta["weight_decay"],
            weight_decay_final=meta["weight_decay_end"],
            clip=meta["clip_per_parameter"] or 0.0,
            freeze_last_layer=f"{meta['freeze_last_layer_epochs']}ep",
        ),
        ema=EmaSection(momentum=meta["teacher_momentum"]),
        eval=EvalSection(resize_px=meta["global_px"], crop_px=meta["global_px"]),
        parallel=ParallelSection(strategy="none"),
    )
    check(config)
    return config


def schedule_rows(schedules: Schedules, meta: dict[str, Any]) -> Arrays:
    """The schedules over the whole run the file describes: the temperature once an epoch, the others once a step."""
    settings = [schedules.at(step) for step in range(schedules.total_steps)]
    return {
        "schedule/lr": np.array([s.lr for s in settings]),
        "schedule/weight_decay": np.array([s.weight_decay for s in settings]),
        "schedule/momentum": np.array([s.momentum for s in settings]),
        "schedule/teacher_temp": np.array([s.teacher_temp for s in settings[:: meta["steps_per_epoch"]]]),
    }


def load_initial_weights(step: DinoStep, golden: Arrays) -> None:
    """Both networks start from `init/`."""
    weights = {key.removeprefix("init/"): torch.from_numpy(golden[key]) for key in golden if key.startswith("init/")}
    for network in (step.networks.student, step.networks.teacher):
        network.load_state_dict(weights, strict=True)


def backbone_rows(step: DinoStep, global_crops: Tensor, local_crops: Tensor | None) -> Arrays:
    """What the backbone says of the first crops before any update."""
    backbone = step.networks.student.backbone
    with torch.no_grad():
        rows = {
            "step0/student_backbone_cls_global": backbone([global_crops]).numpy(),
            "step0/last_selfattention_global": backbone.last_attention(global_crops).numpy(),
        }
        if local_crops is not None:
            rows["step0/student_backbone_cls_local"] = backbone([local_crops]).numpy()
    return rows


def replay(golden: Arrays, meta: dict[str, Any]) -> Arrays:
    """Run every step of the file; the arrays under the file's keys."""
    settings = meta["config"]
    config = config_of(settings)
    schedules = build_schedules(config, dataset_size=settings["batch"] * settings["steps_per_epoch"])
    step = build_step(config, World(), "sdpa")
    load_initial_weights(step, golden)
    rows = schedule_rows(schedules, settings)

    logits: dict[str, Tensor] = {}
    step.networks.student.register_forward_hook(lambda _m, _i, out: logits.update(student=out.detach()))
    step.networks.teacher.register_forward_hook(lambda _m, _i, out: logits.update(teacher=out.detach()))
    order = [step.parameters.names.index(name) for name in meta["grad_parameters"]]
    for index in range(settings["steps"]):
        global_crops = torch.from_numpy(golden[f"step{index}/global_crops"]).flatten(0, 1)
        local = golden.get(f"step{index}/local_crops")
        local_crops = None if local is None or not local.size else torch.from_numpy(local).flatten(0, 1)
        if index == 0:
            rows |= backbone_rows(step, global_crops, local_crops)
        rows[f"step{index}/center_before"] = step.centering.center_1K.numpy().copy()
        views = Views(global_crops=global_crops, local_crops=local_crops)
        result = step([lambda views=views: views], schedules.at(index), torch.zeros(0, dtype=torch.float64))  # type: ignore[misc]
        rows[f"step{index}/teacher_logits"] = logits["teacher"].numpy()
        rows[f"step{index}/student_logits"] = logits["student"].numpy()
        rows[f"step{index}/loss"] = result.loss.numpy()
        rows[f"step{index}/center_after"] = step.centering.center_1K.numpy().copy()
        rows[f"step{index}/grad_norm_per_parameter"] = result.grad_norms_P[order].numpy()
    for role, network in (("student", step.networks.student), ("teacher", step.networks.teacher)):
        for name, tensor in network.state_dict().items():
            rows[f"final_{role}/{name}"] = tensor.numpy().copy()
    return rows


def errors_by_kind(rows: Arrays, golden: Arrays) -> dict[str, float]:
    """Largest relative error of every kind of row; a row that is missing here or there is an infinite one."""
    inputs = ("init/", "meta")
    crops = ("global_crops", "local_crops")
    expected = {k for k in golden if golden[k].size and not k.startswith(inputs) and not k.endswith(crops)}
    errors: dict[str, float] = defaultdict(float)
    for key in expected | rows.keys():
        head, _, tail = key.partition("/")
        kind = tail if head.startswith("step") else head if head.startswith("final") else key
        error = float("inf")
        if key in rows and key in golden and rows[key].shape == golden[key].shape:
            largest = float(np.abs(golden[key]).max(initial=0.0))
            difference = float(np.abs(rows[key] - golden[key]).max(initial=0.0))
            error = difference / largest if largest else difference
        errors[kind] = max(errors[kind], error if error == error else float("inf"))
    return dict(sorted(errors.items()))


def main(
    file: Annotated[Path, typer.Argument(help="Trajectory in the format of tests/golden.")],
    out: Annotated[Path | None, typer.Option(help="Write this project's arrays here, under the same keys.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Replay FILE and print the largest relative error of every kind of row; exit 1 above 1e-9."""
    with np.load(file, allow_pickle=False) as archive:
        golden = {key: archive[key] for key in archive.files if key != "meta.json"}
        meta = json.loads(str(archive["meta.json"]))
    torch.set_num_threads(1)
    rows = replay(golden, meta)
    if out is not None:
        inputs = {key: value for key, value in golden.items() if key not in rows}
        np.savez(out, **{"meta.json": np.array(json.dumps(meta))}, **inputs, **rows)  # type: ignore[arg-type]
    errors = errors_by_kind(rows, golden)
    worst = max(errors.values())
    if as_json:
        print(json.dumps({"errors": errors, "largest": worst, "tolerance": TOLERANCE, "ok": worst <= TOLERANCE}))
    else:
        table = Table("row", "largest relative error", title=str(file))
        for kind, error in errors.items():
            table.add_row(kind, f"{error:.1e}")
        Console().print(table)
    raise typer.Exit(0 if worst <= TOLERANCE else 1)


if __name__ == "__main__":
    typer.run(main)
