"""`dino-dist attention`: everything that was asked for about pictures and videos, written to one new folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F

from dino_dist.data.reading.decode import BadSample, open_image
from dino_dist.errors import UserError, reading
from dino_dist.pictures.draw import Tile, enlarged, sheet, to_image
from dino_dist.pictures.masks import MaskScores, find_mask, summarise
from dino_dist.pictures.media import Medium, find_media, read_image, shown
from dino_dist.pictures.neighbors import Gallery
from dino_dist.pictures.observer import Observer, open_observer
from dino_dist.pictures.output import new_folder, writing
from dino_dist.pictures.patch_colors import PatchColors, PatchSample
from dino_dist.pictures.picture_results import Look, look_at_image, mask_scores, overview_row, write_look
from dino_dist.pictures.video import open_video
from dino_dist.pictures.video_results import write_video, write_video_colors

Progress = Callable[[str, int | None], Callable[[], None]]
"""Called with what begins and how many there are (None: not known); what it returns is called after each."""
_OVERVIEW = 12
"""Pictures that the sheets of all show."""


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What is to be looked at, by whom, and what is wanted of it."""

    checkpoint: Path
    media: Sequence[Path]
    out: Path
    network: str = "teacher"
    size_px: int | None = None
    """Short side; 0: as the pictures are; None: 480 for a network trained at 224 px, others in proportion."""
    mass: float = 0.6
    """Share of the attention that a mask keeps."""
    smooth: bool = False
    masks: Path | None = None
    """A folder of masks to compare with."""
    pca: bool = False
    pca_foreground: float | None = None
    """As `PatchSample.fit`."""
    neighbors: str | None = None
    """Images to find alike ones in: a folder, a list or shards."""
    num_neighbors: int = 8
    frames: bool = False
    """Each folder is the frames of one video."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def _no_progress(what: str, total: int | None) -> Callable[[], None]:
    return lambda: None


def attend(request: AttentionRequest, progress: Progress = _no_progress) -> dict[str, Any]:
    """Do it; the summary, which is also written as `summary.json`, last. `UserError` for anything wrong with it."""
    media = find_media(request.media, frames=request.frames)
    with reading(str(request.masks)):
        _check(request, media)
    observer = open_observer(
        request.checkpoint, network=request.network, size_px=request.size_px, device=request.device
    )
    _check_chosen(media, observer)
    gallery = None if request.neighbors is None else _open_gallery(request.neighbors, observer, progress)
    out = new_folder(request.out)
    with writing(out):
        session = _Session(request, observer, out, gallery, progress)
        session.images([medium for medium in media if medium.kind == "image"])
        session.videos([medium for medium in media if medium.kind != "image"])
        summary = session.summary()
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _check(request: AttentionRequest, media: Sequence[Medium]) -> None:
    if not 0.0 < request.mass <= 1.0:
        raise UserError(f"--mass {request.mass:g} must be above 0 and at most 1")
    if request.pca_foreground is not None and not 0.0 < request.pca_foreground < 1.0:
        raise UserError(f"--pca-foreground {request.pca_foreground:g} must be between 0 and 1")
    if request.masks is not None and not request.masks.is_dir():
        raise UserError(f"--masks {shown(request.masks)} is no folder: give one with a mask for each image")
    images = [medium for medium in media if medium.kind == "image"]
    for option, wanted in (("--masks", request.masks), ("--neighbors", request.neighbors)):
        if wanted is not None and not images:
            raise UserError(f"{option} is about images, and only videos were given: leave it out")
    if request.masks is not None and not any(find_mask(request.masks, medium) for medium in images):
        raise UserError(f"--masks {shown(request.masks)} has no mask for any of {len(images)} images: see --help")


def _open_gallery(spec: str, observer: Observer, progress: Progress) -> Gallery:
    try:
        return Gallery(spec, observer.backbone, observer.eval_view, observer.rules, progress("reading neighbors", None))
    except OSError as error:
        raise UserError(f"--neighbors {shown(spec)} cannot be read ({error.strerror}): look at its files") from None


def _check_chosen(media: Sequence[Medium], observer: Observer) -> None:
    """By their headers, so that a slip of the hand is told before anything is written."""
    for medium in media:
        if medium.chosen and medium.kind == "image":
            _check_chosen_image(medium, observer)
        elif medium.chosen:
            open_video(medium, observer.rules)


def _check_chosen_image(medium: Medium, observer: Observer) -> None:
    try:
        opened = open_image(medium.path.read_bytes(), replace(observer.rules, exif_transpose=False))
        observer.seen_size((opened.height, opened.width))
    except (BadSample, OSError):
        read_image(medium.path, observer.rules)  # which says what is wrong
    except UserError as error:
        raise UserError(f"{shown(medium.path)}: {error}") from None


class _Session:
    """One call of the command: what was found so far, and the folder."""

    def __init__(
        self, request: AttentionRequest, observer: Observer, out: Path, gallery: Gallery | None, progress: Progress
    ) -> None:
        self._request, self._observer, self._out, self._progress = request, observer, out, progress
        self._gallery = gallery
        wants_colors = request.pca or request.pca_foreground is not None
        self._sample = PatchSample() if wants_colors else None
        self._looked: list[dict[str, Any]] = []
        self._left_out: list[dict[str, str]] = []
        self._scores: list[MaskScores] = []
        self._overview: list[list[Tile]] = []
        self._color_rows: list[list[Tile]] = []
        self._neighbor_rows: list[list[Tile]] = []

    def images(self, media: Sequence[Medium]) -> None:
        """Attention of all, then what needs all of them or a second pass."""
        if not media:
            return
        request = self._request
        done = self._progress("looking at images", len(media))
        good = [medium for medium in media if self._image(medium, done)]
        if self._sample is not None and good:
            self._color_images(good, self._sample.fit(request.pca_foreground))
        for name, rows in (
            ("overview", self._overview),
            ("pca", self._color_rows),
            ("neighbors", self._neighbor_rows),
        ):
            if rows:
                sheet(rows).save(self._out / f"{name}.png")

    def videos(self, media: Sequence[Medium]) -> None:
        """Each by itself; the colours of a video are its own."""
        for medium in media:
            try:
                said = self._video(medium)
            except UserError as error:
                self._leave_out(medium, error)
                shutil.rmtree(self._out / medium.name, ignore_errors=True)  # of a video that breaks off
            else:
                self._looked.append({"file": str(medium.path), "kind": medium.kind, "folder": medium.name, **said})

    def summary(self) -> dict[str, Any]:
        """What was done; sizes in px. `UserError` if nothing could be looked at."""
        if not self._looked:
            first = self._left_out[0]
            raise UserError(f"none of {len(self._left_out)} pictures can be looked at; the first: {first['why']}")
        weights = self._observer.weights
        resized = sum(
            (row["width_px"], row["height_px"]) != (row["seen_width_px"], row["seen_height_px"]) for row in self._looked
        )
        result: dict[str, Any] = {
            "checkpoint": weights.source,
            "network": weights.network,
            "step": weights.step,
            "notes": list(weights.notes),
            "out": str(self._out),
            "patch_px": weights.shape.patch_size,
            "heads": weights.shape.num_heads,
            "mass": self._request.mass,
            "images": sum(row["kind"] == "image" for row in self._looked),
            "videos": sum(row["kind"] != "image" for row in self._looked),
            "resized": resized,
        }
        if self._scores:
            result |= summarise(self._scores)
        if self._gallery is not None:
            result |= {"gallery": len(self._gallery.sources), "gallery_left_out": len(self._gallery.bad)}
        return result | {"left_out": self._left_out, "looked_at": self._looked}

    def _image(self, medium: Medium, done: Callable[[], None]) -> bool:
        request = self._request
        try:
            look = look_at_image(self._observer, medium)
        except UserError as error:
            self._leave_out(medium, error)
            return False
        folder = self._out / medium.name
        write_look(folder, look, mass=request.mass, smooth=request.smooth)
        row = {"file": str(medium.path), "kind": "image", "folder": medium.name, **look.sizes()}
        if request.masks is not None:
            row |= self._score(look, request.masks)
        if self._sample is not None:
            self._sample.add(look.patches_hwD, look.mean_hw)
        if self._gallery is not None:
            row["neighbors"] = self._neighbors(look, self._gallery, folder)
        if len(self._overview) < _OVERVIEW:
            self._overview.append(overview_row(look, mass=request.mass, smooth=request.smooth))
        self._looked.append(row)
        done()
        return True

    def _video(self, medium: Medium) -> dict[str, Any]:
        request, observer, folder = self._request, self._observer, self._out / medium.name
        video = open_video(medium, observer.rules)
        sample = None if self._sample is None else PatchSample()
        said = write_video(
            folder,
            medium,
            video,
            observer,
            mass=request.mass,
            smooth=request.smooth,
            sample=sample,
            done=self._progress(f"looking at {medium.name}", None),
        )
        if sample is not None:
            colors = sample.fit(request.pca_foreground)
            done = self._progress(f"coloring {medium.name}", said["frames"])
            write_video_colors(folder, medium, video, observer, colors, done)
        return said

    def _leave_out(self, medium: Medium, error: UserError) -> None:
        """`error` itself if the user named this very file."""
        if medium.chosen:
            raise error
        self._left_out.append({"file": str(medium.path), "why": str(error)})

    def _score(self, look: Look, masks: Path) -> dict[str, Any]:
        scores = mask_scores(look, masks, self._observer, mass=self._request.mass)
        if scores is None:
            return {"jaccard_heads": None}
        self._scores.append(scores)
        return {"jaccard_heads": list(scores.heads), "best_head": scores.best_head}

    def _neighbors(self, look: Look, gallery: Gallery, folder: Path) -> list[dict[str, Any]]:
        found = gallery.nearest(look.pixels, look.medium.path, self._request.num_neighbors)
        query = self._observer.eval_view.picture(look.pixels)
        row = [Tile(enlarged(query), look.medium.path.name)]
        for one in found:
            name = Path(one.source.name).name if one.label is None else f"{one.label}: {Path(one.source.name).name}"
            row.append(Tile(enlarged(gallery.picture(one.source)), f"{one.cosine:.3f}  {name}"))
        sheet([row]).save(folder / "neighbors.png")
        if len(self._neighbor_rows) < _OVERVIEW:
            self._neighbor_rows.append(row)
        return [{"name": one.source.name, "cosine": one.cosine, "class": one.label} for one in found]

    def _color_images(self, media: Sequence[Medium], colors: PatchColors) -> None:
        done = self._progress("coloring patches", len(media))
        for medium in media:
            look = look_at_image(self._observer, medium)
            picture = look.shown()
            drawn = F.interpolate(colors(look.patches_hwD)[None], size=picture.shape[1:], mode="nearest")[0]
            to_image(drawn).save(self._out / medium.name / "pca.png")
            if len(self._color_rows) < _OVERVIEW:
                self._color_rows.append([Tile(picture, medium.path.name), Tile(drawn, "patch features")])
            done()
