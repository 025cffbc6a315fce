"""Pictures and histograms out of the TensorBoard files of a run, read once, a few of each tag over the run."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

_KEPT_EVENTS: Final = 64
"""Of each tag while reading: a long run has thousands of sheets."""
_MOST_TAGS: Final = 12
_SHOWN: Final = 6
_LARGE_BYTES: Final = 300_000
_LARGE_PX: Final = 1800
"""Sheets of big networks are shrunk to this side: the page is to be sent by mail."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of the run, ready for a page."""

    step: int
    content: bytes
    media_type: str
    width_px: int
    height_px: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many values lie up to each limit, and above the limit before it."""

    step: int
    limits: tuple[float, ...]
    counts: tuple[float, ...]
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Sights:
    """All that the event files show, by tag, each by rising step."""

    pictures: dict[str, list[Picture]]
    histograms: dict[str, list[Histogram]]
    notes: tuple[str, ...]
    """What could not be read, one line each."""


def read_sights(folder: Path) -> Sights:
    """Read the event files in `folder`. Those that are damaged give what comes before the damage."""
    if not folder.is_dir() or not any(folder.glob("events.out.tfevents.*")):
        return Sights(pictures={}, histograms={}, notes=())
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wanted = {"scalars": 1, "images": _KEPT_EVENTS, "histograms": _KEPT_EVENTS, "compressedHistograms": 1, "tensors": 1}
    events: Any = EventAccumulator(str(folder), size_guidance=wanted)
    notes: list[str] = []
    chatter = logging.getLogger("tensorboard")
    before = chatter.level
    chatter.setLevel(logging.CRITICAL)  # a purged restart is no news here
    try:
        events.Reload()
    except (OSError, ValueError, DecodeError, RuntimeError) as error:
        notes.append(f"the TensorBoard files were read only in part ({type(error).__name__})")
    finally:
        chatter.setLevel(before)
    tags: dict[str, list[str]] = events.Tags()
    pictures = {tag: _pictures(events.Images(tag), tag, notes) for tag in sorted(tags.get("images", []))[:_MOST_TAGS]}
    histograms = {tag: [_histogram(e) for e in spread(events.Histograms(tag))] for tag in tags.get("histograms", [])}
    return Sights(
        pictures={tag: found for tag, found in pictures.items() if found}, histograms=histograms, notes=tuple(notes)
    )


def spread(events: Sequence[Any], most: int = _SHOWN) -> list[Any]:
    """At most `most` of them, evenly over the run, the first and the last included; one a step."""
    by_step = sorted({int(event.step): event for event in events}.items())
    if len(by_step) <= most:
        return [event for _, event in by_step]
    return [by_step[round(number * (len(by_step) - 1) / (most - 1))][1] for number in range(most)]


def _pictures(events: Sequence[Any], tag: str, notes: list[str]) -> list[Picture]:
    found = []
    for event in spread(events):
        try:
            found.append(_ready(int(event.step), event.encoded_image_string))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            notes.append(f"a picture of {tag} at step {event.step} cannot be decoded")
    return found


def _ready(step: int, png: bytes) -> Picture:
    """The PNG as it is, or shrunk if it is large; decoded in any case, so that a browser is shown nothing broken."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.load()
        content, media_type = png, "image/png"
        if len(png) > _LARGE_BYTES:
            shrunk = image.convert("RGB")
            shrunk.thumbnail((_LARGE_PX, _LARGE_PX), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            shrunk.save(buffer, "WEBP", quality=85)
            content, media_type, image = buffer.getvalue(), "image/webp", shrunk  # type: ignore[assignment]
        return Picture(step=step, content=content, media_type=media_type, width_px=image.width, height_px=image.height)


def _histogram(event: Any) -> Histogram:
    value = event.histogram_value
    return Histogram(
        step=int(event.step),
        limits=tuple(value.bucket_limit),
        counts=tuple(value.bucket),
        low=float(value.min),
        high=float(value.max),
    )
