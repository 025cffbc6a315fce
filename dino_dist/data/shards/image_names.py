"""Names of image files: which ones are images, and in which order they are the frames of a video."""

from __future__ import annotations

import os
import re

from dino_dist.data.shards.shard_index import IMAGE_SUFFIXES


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden ones are not."""
    return not name.startswith(".") and os.fsencode(os.path.splitext(name)[1][1:].lower()) in IMAGE_SUFFIXES


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key to sort by: 2.png before 10.png."""
    return [_natural(part) for part in re.split(r"(\d+)", name)]


def _natural(part: str) -> tuple[int, int, str]:
    return (0, int(part), part) if part.isascii() and part.isdigit() else (1, 0, part)
