"""Tar shards of 500 x 375 JPEG photographs, cut at random from the pictures that scikit-image and scikit-learn ship.

    python tools/photograph_shards.py DST [--images 512] [--quality 90] [--samples-per-shard 128] [--seed 0]

For benchmarks that need real pictures and no network. A crop is taken at the picture's own scale or made smaller, never
larger: enlarged pictures are smooth and decode too fast. Files are about 55 KB at quality 90 and 90 KB at 96, where
ImageNet's of this size are about 110 KB: decoding time follows bytes as much as pixels.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from dino_dist.data.prepare.build import BuildOptions, build_shards
from dino_dist.data.shards.index import DatasetIndex
from dino_dist.errors import UserError

WIDTH_PX, HEIGHT_PX = 500, 375
MAX_REDUCTION = 2.0
"""Side of the largest piece that is made smaller, in sides of the photograph that comes out."""
SUBJECTS = ("astronaut", "coffee", "hubble_deep_field", "immunohistochemistry", "rocket", "stereo_motorcycle")
"""Of scikit-image, in colour, large enough and inside its wheel. Its retina is mostly black, its cat too small."""

Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class PhotographOptions:
    """What the photographs are like, and how many go into a shard."""

    images: int = 512
    """Number of photographs."""
    quality: int = 90
    """Of the JPEG files, as Pillow counts, with its chroma subsampling (4:2:0)."""
    samples_per_shard: int = 128
    """At most."""
    seed: int = 0
    """Of places and scales of the pieces."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"images={self.images} must be at least 1")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality={self.quality} must be 1..100")


@dataclass(frozen=True, kw_only=True)
class PhotographShards:
    """What was built."""

    dataset: DatasetIndex
    bytes_per_image: float
    """Mean size of the JPEG files."""


def load_pictures() -> list[Picture]:
    """The source photographs, uint8 [H, W, 3] each, the same on every machine; `UserError` without scikit-image."""
    try:
        from skimage import data
    except ImportError as error:
        raise UserError("photographs need scikit-image: pip install scikit-image (or 'dino-dist[dev]')") from error
    from sklearn.datasets import load_sample_images

    pictures: list[Picture] = []
    for subject in SUBJECTS:
        loaded = getattr(data, subject)()
        pictures += loaded[:2] if isinstance(loaded, tuple) else [loaded]  # of a stereo pair, not its disparities
    return [*pictures, *load_sample_images().images]


def photograph(pictures: list[Picture], number: int, seed: int) -> Image.Image:
    """Photograph `number`: a piece of 4:3 of one of the pictures, in turn, reduced by a random factor that fits."""
    picture = pictures[number % len(pictures)]
    rng = np.random.default_rng([seed, number])
    height, width = picture.shape[:2]
    largest = min(MAX_REDUCTION, height / HEIGHT_PX, width / WIDTH_PX)
    if largest < 1.0:
        raise ValueError(f"a picture of {width} x {height} px is too small")
    reduction = rng.uniform(1.0, largest)
    piece_height, piece_width = int(HEIGHT_PX * reduction), int(WIDTH_PX * reduction)
    top = int(rng.integers(0, height - piece_height + 1))
    left = int(rng.integers(0, width - piece_width + 1))
    piece = Image.fromarray(picture[top : top + piece_height, left : left + piece_width])
    return piece.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.LANCZOS)


def build_photograph_shards(destination: Path, options: PhotographOptions) -> PhotographShards:
    """Write and index the shards; the same options give the same bytes. `UserError` as for any build."""
    pictures = load_pictures()
    with tempfile.TemporaryDirectory() as folder:
        sizes_bytes = []
        for number in range(options.images):
            path = Path(folder) / f"{number:06d}.jpg"
            photograph(pictures, number, options.seed).save(path, "JPEG", quality=options.quality)
            sizes_bytes.append(path.stat().st_size)
        build = BuildOptions(samples_per_shard=options.samples_per_shard, seed=options.seed)
        report = build_shards(folder, destination, build)
    return PhotographShards(dataset=report.dataset, bytes_per_image=float(np.mean(sizes_bytes)))


def main(
    destination: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    images: Annotated[int, typer.Option(help="Photographs.")] = 512,
    quality: Annotated[int, typer.Option(help="Of the JPEG files.")] = 90,
    samples_per_shard: Annotated[int, typer.Option(help="At most.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the pieces and of the shuffle.")] = 0,
) -> None:
    """Write photographs as tar shards."""
    options = PhotographOptions(images=images, quality=quality, samples_per_shard=samples_per_shard, seed=seed)
    try:
        built = build_photograph_shards(destination, options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    size = f"{WIDTH_PX} x {HEIGHT_PX} px, {built.bytes_per_image / 1000:.0f} KB a file"
    print(f"{built.dataset.num_samples} photographs of {size}, in {len(built.dataset.shards)} shards")


if __name__ == "__main__":
    typer.run(main)
