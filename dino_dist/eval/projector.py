"""The embedding projector's files: one set of points, replaced as a whole each time it is written."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

THUMBNAIL_PX = 32


def write_projector(
    logdir: Path, *, features: Tensor, labels: Tensor, images: Tensor | None = None, name: str = "features"
) -> Path:
    """Write the points that TensorBoard's projector shows for `logdir`; returns their folder.

    `features` [N, D], `labels` [N] int, `images` [N, 3, h, w] in [0, 1] or None (shown as 32 px thumbnails). Text
    files, since that is all the projector reads; keep N near 1,000. The folder of the last call goes only after the
    config names the new one.
    """
    # `SummaryWriter.add_embedding` keeps every set it was ever given, and prints to stdout.
    from tensorboard.plugins.projector import ProjectorConfig, visualize_embeddings

    if len(labels) != len(features) or (images is not None and len(images) != len(features)):
        raise ValueError(f"projector: {len(features)} features need as many labels and images")
    root = logdir / "projector"
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "tensors.tsv", _tab_separated(features))
    _write_text(folder / "metadata.tsv", "".join(f"{label}\n" for label in labels.tolist()))
    config = ProjectorConfig()
    entry = config.embeddings.add()
    entry.tensor_name = name
    entry.tensor_path = str(folder.relative_to(logdir) / "tensors.tsv")
    entry.metadata_path = str(folder.relative_to(logdir) / "metadata.tsv")
    if images is not None:
        thumbnails_sheet(images).save(folder / "sprite.png")
        entry.sprite.image_path = str(folder.relative_to(logdir) / "sprite.png")
        entry.sprite.single_image_dim.extend([THUMBNAIL_PX, THUMBNAIL_PX])
    visualize_embeddings(str(logdir), config)
    for old in root.iterdir():
        if old != folder:
            shutil.rmtree(old)
    return folder


def thumbnails_sheet(images: Tensor) -> Image.Image:
    """Images [N, 3, h, w] in [0, 1] as the square sheet of square thumbnails that the projector cuts up, row by row."""
    side = math.ceil(math.sqrt(len(images)))
    small = F.interpolate(
        images.detach().float().cpu(), size=(THUMBNAIL_PX, THUMBNAIL_PX), mode="bilinear", antialias=True
    )
    padded = torch.cat([small, small.new_zeros(side * side - len(small), 3, THUMBNAIL_PX, THUMBNAIL_PX)])
    sheet = make_grid(padded, nrow=side, padding=0)
    return Image.fromarray(sheet.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _tab_separated(rows: Tensor) -> str:
    lines = ("\t".join(f"{value:.7g}" for value in row) for row in rows.detach().float().cpu().tolist())
    return "".join(f"{line}\n" for line in lines)


def _write_text(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
