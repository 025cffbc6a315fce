"""Fashion-MNIST (arXiv:1708.07747; 60,000 + 10,000 grey images of 28 px) as tar shards with labels.

    python tools/fashion_mnist_shards.py DST [--source FOLDER]

FOLDER holds the four published idx files; by default that of Debian's package `dataset-fashion-mnist`. Without either,
torchvision's downloader fetches them. Writes DST/train and DST/test for data.train, data.eval_train and data.eval_test.
"""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from dino_dist.data.prepare.build import BuildOptions, build_shards
from dino_dist.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped idx file of unsigned bytes: magic 0x08 and the number of dimensions, big-endian sizes, values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): give a folder with the four published files") from None
    if content[:3] != b"\0\0\x08":
        raise UserError(f"{path} is not an idx file of bytes: give a folder with the four published files")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def find_source(source: Path | None, downloads: Path) -> Path:
    """The folder with the four files, downloaded if it has to be."""
    if source is not None:
        return source
    if DEBIAN.is_dir():
        return DEBIAN
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(downloads), download=True)
    except (OSError, RuntimeError) as error:  # torchvision's word for: no mirror answered
        raise UserError(
            f"Fashion-MNIST cannot be downloaded ({' '.join(str(error).split())}): give --source FOLDER with the four "
            "published idx files, or install Debian's package dataset-fashion-mnist"
        ) from None
    return downloads / "FashionMNIST" / "raw"


def write_shards(destination: Path, source: Path | None = None, workers: int = 2) -> None:
    """Write both splits; `UserError` where the published files cannot be had."""
    folder = find_source(source, destination / "downloads")
    for split, prefix in SPLITS.items():
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        with tempfile.TemporaryDirectory() as pictures:
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                path = Path(pictures) / str(label) / f"{index:05d}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(image).save(path)
                os.utime(path, (0, 0))  # else a build that was killed would not know its pictures again
            report = build_shards(
                pictures, destination / split, BuildOptions(samples_per_shard=2000), num_workers=workers
            )
        shards = len(report.dataset.shards)
        print(f"{split}: {report.dataset.num_samples} images in {shards} shards", file=sys.stderr)


def main(
    destination: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    source: Annotated[Path | None, typer.Option(help="Folder with the four idx files.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
) -> None:
    """Write Fashion-MNIST as tar shards."""
    try:
        write_shards(destination, source, workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
