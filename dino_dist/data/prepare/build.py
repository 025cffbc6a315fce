"""Build shards: globally shuffled, equally full, every image decoded once before it is let in.

A build is planned (`build.json`), checked (`rejected.jsonl`) and written, each shard under another name until it is
whole. The same command goes on where it was stopped; bytes of shards depend on the input and the options alone.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from dino_dist.data.loading.worker_process import map_in_processes
from dino_dist.data.order.order import rank_slice
from dino_dist.data.prepare.sources import Source, SourceSet, find_sources
from dino_dist.data.reading.decode import BadSample, DecodeRules, decode_image, image_format
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.data.shards.shard_index import write_atomically
from dino_dist.errors import UserError
from dino_dist.randomness import Purpose, permutation, substream

PLAN_NAME = "build.json"
REJECTED_NAME = "rejected.jsonl"
_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "PPM": "ppm", "BMP": "bmp", "TIFF": "tif"}
_CHECK_CHUNK = 256
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the shards of a build are like."""

    samples_per_shard: int = 1000
    """At most; all shards hold the same number, give or take one."""
    seed: int = 0
    """Of the global shuffle."""
    resize_short_px: int | None = None
    """Make the short side this long where it is longer; null keeps the bytes of every file as they are."""
    jpeg_quality: int = 95
    """Of JPEG files that are resized; others become PNG."""
    keep_source: bool = False
    """Add a json member with the original name."""
    max_member_bytes: int = 64 * 2**20
    """Larger files are rejected."""
    max_pixels: int = 100_000_000
    """Larger images are rejected."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UserError(f"samples_per_shard={self.samples_per_shard} must be at least 1")
        if self.resize_short_px is not None and self.resize_short_px < 1:
            raise UserError(f"resize_short_px={self.resize_short_px} must be at least 1")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality={self.jpeg_quality} must be 1..100")

    @property
    def rules(self) -> DecodeRules:
        """The bounds for decoding."""
        return DecodeRules(max_member_bytes=self.max_member_bytes, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build made."""

    dataset: DatasetIndex
    num_rejected: int
    num_written: int
    """Shards written by this call; the others were there already."""


def build_shards(
    src: str, dst: Path, options: BuildOptions, *, num_workers: int = 1, max_bad_fraction: float = 0.01
) -> BuildReport:
    """Build shards in the folder `dst` from the images that `src` names (see `sources.find_sources`), and index them.

    `UserError` if there are no images, if more than `max_bad_fraction` of them cannot be decoded (`rejected.jsonl`
    lists them), or if `dst` holds shards of another build.
    """
    found = find_sources(src)
    _claim(dst, found, options)
    rejected = _rejected(dst, found, options, num_workers)
    if len(rejected) > max_bad_fraction * len(found.sources):
        raise UserError(
            f"{len(rejected)} of {len(found.sources)} images of {src} cannot be used, more than "
            f"max_bad_fraction={max_bad_fraction:g}; {dst / REJECTED_NAME} lists them with reasons"
        )
    accepted = [source for number, source in enumerate(found.sources) if number not in rejected]
    if not accepted:
        raise UserError(f"none of the {len(found.sources)} images of {src} can be used; see {dst / REJECTED_NAME}")
    _remove_leftovers(dst)
    tasks = _shard_tasks(dst, accepted, options)
    missing = [task for task in tasks if not task.path.exists()]
    for _ in map_in_processes(_write_shard, missing, num_workers=num_workers):
        pass
    dataset = open_dataset(str(dst), fallback_dir=dst)
    return BuildReport(dataset=dataset, num_rejected=len(rejected), num_written=len(missing))


def _claim(dst: Path, found: SourceSet, options: BuildOptions) -> None:
    """Write the plan, or find that `dst` holds the same one; `UserError` if there are shards of another."""
    plan: dict[str, Any] = {
        "version": 1,
        "input": found.fingerprint,
        "images": len(found.sources),
        "classes": list(found.classes),
        "options": asdict(options),
    }
    try:
        dst.mkdir(parents=True, exist_ok=True)
        path = dst / PLAN_NAME
        old: Any = json.loads(path.read_bytes()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{dst} cannot take a build ({error}); remove its {PLAN_NAME} or choose another folder"
        ) from error
    if old == plan:
        return
    if any(dst.glob("*.tar")):
        old = old if isinstance(old, dict) else {}
        other = ", ".join(key for key in plan if old.get(key) != plan[key])
        raise UserError(f"{dst} holds shards of another build (different: {other}); empty it or choose another folder")
    try:
        (dst / REJECTED_NAME).unlink(missing_ok=True)
        write_atomically(path, (json.dumps(plan, indent=1) + "\n").encode())
    except OSError as error:
        raise _unwritable(dst, error) from error


def _rejected(dst: Path, found: SourceSet, options: BuildOptions, num_workers: int) -> set[int]:
    """Numbers of the sources that cannot be decoded; decodes all, unless an earlier call has."""
    path = dst / REJECTED_NAME
    if not path.exists():
        sources = found.sources
        chunks = [
            _CheckTask(start, sources[start : start + _CHECK_CHUNK], options.rules)
            for start in range(0, len(sources), _CHECK_CHUNK)
        ]
        rows = [row for part in map_in_processes(_check_chunk, chunks, num_workers=num_workers) for row in part]
        try:
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        except OSError as error:
            raise _unwritable(dst, error) from error
    return {json.loads(line)["number"] for line in path.read_text().splitlines()}


@dataclass(frozen=True)
class _CheckTask:
    first_number: int
    sources: tuple[Source, ...]
    rules: DecodeRules


def _check_chunk(task: _CheckTask) -> list[dict[str, int | str]]:
    rows: list[dict[str, int | str]] = []
    for number, source in enumerate(task.sources, start=task.first_number):
        try:
            decode_image(_read(source, task.rules), task.rules)
        except BadSample as error:
            rows.append({"number": number, "source": source.name, "reason": str(error)})
    return rows


@dataclass(frozen=True)
class _ShardTask:
    path: Path
    keys: tuple[str, ...]
    sources: tuple[Source, ...]
    options: BuildOptions


def _shard_tasks(dst: Path, accepted: list[Source], options: BuildOptions) -> list[_ShardTask]:
    num_samples = len(accepted)
    num_shards = -(-num_samples // options.samples_per_shard)
    shuffled = permutation(num_samples, key=(options.seed, 0), stream=substream(Purpose.SPLIT)).tolist()
    key_digits, shard_digits = max(8, len(str(num_samples))), max(6, len(str(num_shards)))
    tasks = []
    for shard in range(num_shards):
        start, stop = rank_slice(0, num_samples, shard, num_shards)
        tasks.append(
            _ShardTask(
                dst / f"shard-{shard:0{shard_digits}d}.tar",
                tuple(f"{position:0{key_digits}d}" for position in range(start, stop)),
                tuple(accepted[number] for number in shuffled[start:stop]),
                options,
            )
        )
    return tasks


def _remove_leftovers(dst: Path) -> None:
    """Files half written when a build was killed; one that still runs beside this writes them again."""
    try:
        for leftover in dst.glob("shard-*.tar.tmp*"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(dst, error) from error


def _write_shard(task: _ShardTask) -> None:
    temporary = task.path.with_name(f"{task.path.name}.tmp-{uuid.uuid4().hex}")
    try:
        # A time, an owner or a name would make the bytes depend on when and by whom they were written.
        with open(temporary, "wb") as file:
            with webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
                for key, source in zip(task.keys, task.sources, strict=True):
                    writer.write({"__key__": key, **_members(source, task.options)})
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, task.path)
        except FileNotFoundError:  # the same build was started once more, and took it for a leftover
            _write_shard(task)
    except OSError as error:  # of writing: `_read` has taken care of its own
        with suppress(OSError):
            temporary.unlink()  # its bytes may be what the disk lacks
        raise _unwritable(task.path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder} cannot be written to ({error.strerror or error}); see to its disk, then give the same command again"
    )


def _members(source: Source, options: BuildOptions) -> dict[str, bytes]:
    try:
        data = _read(source, options.rules)
        if options.resize_short_px is not None:
            data = _resized(data, options.resize_short_px, options)
        members = {_SUFFIX[image_format(data)]: data}
    except BadSample as error:
        raise UserError(f"{source.name} changed while the shards were built ({error}); build again") from error
    if source.label >= 0:
        members["cls"] = str(source.label).encode()
    if options.keep_source:
        members["json"] = json.dumps({"source": source.name}).encode()
    return members


def _read(source: Source, rules: DecodeRules) -> bytes:
    if source.size_bytes > rules.max_member_bytes:
        raise BadSample(f"{source.size_bytes} bytes; at most {rules.max_member_bytes}")
    try:
        with open(source.path, "rb") as file:
            file.seek(source.offset_bytes)
            return file.read(source.size_bytes)
    except (FileNotFoundError, PermissionError) as error:
        raise BadSample(f"{error.strerror}") from error
    except OSError as error:
        raise UserError(f"{source.path}: {error.strerror or error}; see to its disk, then build again") from error


def _resized(data: bytes, short_px: int, options: BuildOptions) -> bytes:
    """The file itself if its short side is short enough; else the image made smaller, JPEG if it was, else PNG."""
    pixels = decode_image(data, options.rules)
    height, width = pixels.shape[:2]
    if min(height, width) <= short_px:
        return data
    scale = short_px / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smaller = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)
    with Image.open(io.BytesIO(data)) as original:
        is_jpeg = original.format in ("JPEG", "MPO")
        orientation = original.getexif().get(_EXIF_ORIENTATION, 1)
    exif = Image.Exif()
    if orientation != 1:  # pixels keep their orientation, so the tag must stay true
        exif[_EXIF_ORIENTATION] = orientation
    buffer = io.BytesIO()
    if is_jpeg:
        smaller.save(buffer, "JPEG", quality=options.jpeg_quality, exif=exif)
    else:
        smaller.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()
