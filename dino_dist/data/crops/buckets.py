"""How a batch of images of any size becomes work of few fixed shapes: buckets by an image's own size, fixed chunks.

The last bits of a matrix product or of a mean depend on the shape of the work. Here every shape follows from one
image's own height and width, never from its neighbours: the size decides the bucket, the bucket how many images a
chunk has, and a chunk that is not full is filled up with copies. Few shapes also mean few graphs to compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

SIDES_PX = (512, 1024, 2048, 4096)
"""Padded heights and widths, each axis on its own. Longer axes are rounded up to a multiple of the last."""

SMALL_PX = 256
"""Images within this square on both axes have a bucket of their own."""

FULL_CHUNK = 32
"""Images in a chunk of up to 512 x 512 px."""

_CHUNK_PX = 2**22
"""Padded pixels in a chunk of larger images."""


class Bucket(NamedTuple):
    """Padded size of an image, px; both are multiples of 16, as tensor cores like their operands."""

    height_px: int
    width_px: int

    @property
    def chunk_images(self) -> int:
        """Images that are worked on at once.

        32 of up to 512 x 512 px: enough to fill a large GPU with every product and to spread the cost of a launch.
        Most data sets have one or two such buckets, so that little is filled up in vain. Larger images are fewer and
        scatter over several buckets, each with a chunk to fill up, so theirs are small: 8 of 512 x 1024, 1 from 2048 x
        2048 on.
        """
        pixels = self.height_px * self.width_px
        return FULL_CHUNK if pixels <= SIDES_PX[0] ** 2 else max(1, _CHUNK_PX // pixels)

    @property
    def is_listed(self) -> bool:
        """False where an axis is longer than the longest of `SIDES_PX`: there is no end of such buckets."""
        return max(self) <= SIDES_PX[-1]


class Chunk(NamedTuple):
    """Images of one bucket that are worked on together."""

    bucket: Bucket
    images: list[int]
    """Numbers in the batch, at most `bucket.chunk_images`; what lacks is filled up with copies of the first."""


def bucket_of(height_px: int, width_px: int) -> Bucket:
    """The bucket of an image, by its size alone."""
    if max(height_px, width_px) <= SMALL_PX:
        return Bucket(SMALL_PX, SMALL_PX)
    return Bucket(_padded(height_px), _padded(width_px))


def plan_chunks(sizes: Sequence[tuple[int, int]]) -> Iterator[Chunk]:
    """All images of a batch in chunks; images of one bucket stay in order."""
    members: dict[Bucket, list[int]] = {}
    for image, (height, width) in enumerate(sizes):
        members.setdefault(bucket_of(height, width), []).append(image)
    for bucket, images in members.items():
        for start in range(0, len(images), bucket.chunk_images):
            yield Chunk(bucket, images[start : start + bucket.chunk_images])


def _padded(length_px: int) -> int:
    longest = SIDES_PX[-1]
    return next((side for side in SIDES_PX if length_px <= side), -(-length_px // longest) * longest)
