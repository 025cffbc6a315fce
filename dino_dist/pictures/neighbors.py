"""The images of a gallery that a network finds most alike: cosine neighbours of its class token, as evaluation sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_dist.data.crops.augment import resize_for_eval
from dino_dist.data.prepare.sources import Source, find_sources
from dino_dist.data.reading.decode import BadSample, DecodeRules, Pixels, decode_image
from dino_dist.errors import UserError
from dino_dist.eval.attention_maps import to_unit_range
from dino_dist.eval.knn import nearest_neighbors
from dino_dist.models.vit import VisionTransformer
from dino_dist.pictures.media import shown

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class EvalView:
    """What evaluation makes of an image before the network sees it."""

    resize_px: int
    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Sequence[Pixels]) -> Tensor:
        """RGB uint8 [H, W, 3] of any sizes -> normalised [n, 3, C, C], CPU, fp32."""
        return resize_for_eval(
            torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])),
            torch.tensor([image.shape[:2] for image in images]),
            resize_px=self.resize_px,
            crop_px=self.crop_px,
            mean=self.mean,
            std=self.std,
        )

    def picture(self, image: Pixels) -> Tensor:
        """The same view to look at: [3, C, C] in [0, 1]."""
        return to_unit_range(self([image]), mean=self.mean, std=self.std)[0]


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """One gallery image that is like a picture."""

    source: Source
    cosine: float
    label: str | None
    """Its class, by name where the gallery has names; None: it has no label."""


class Gallery:
    """Unit class tokens of all images of a folder, a list or tar shards, in memory on the network's device."""

    def __init__(
        self,
        spec: str,
        backbone: VisionTransformer,
        view: EvalView,
        rules: DecodeRules,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """`done` is called after each image. `UserError` if there is no image, or none that can be decoded."""
        found = find_sources(spec)
        self._classes = found.classes
        self._backbone, self._view, self._rules = backbone, view, rules
        self.bad: list[str] = []
        """Names of images that could not be decoded, which are left out."""
        self.sources: list[Source] = []
        features: list[Tensor] = []
        images = self._decoded(found.sources, done)
        while batch := list(islice(images, _BATCH)):
            self.sources += [source for source, _ in batch]
            features.append(self._features([pixels for _, pixels in batch]))
        if not features:
            raise UserError(f"--neighbors {spec}: none of its {len(self.bad)} images can be decoded")
        self._features_ND = torch.cat(features)

    def nearest(self, pixels: Pixels, path: Path, count: int) -> list[Neighbor]:
        """The `count` most alike, best first, ties by the gallery's order; not the picture's own file, `path`."""
        own = str(path.resolve())
        # One more than asked for: the picture's own file may be among them.
        available = min(count + 1, len(self.sources))
        cosine, index = nearest_neighbors(self._features_ND, self._features([pixels]), k=available)
        pairs = zip(cosine[0].tolist(), index[0].tolist(), strict=True)
        others = [(self.sources[number], value) for value, number in pairs]
        alike = [(source, value) for source, value in others if _file(source) != own][:count]
        return [Neighbor(source=source, cosine=value, label=self._label(source)) for source, value in alike]

    def picture(self, source: Source) -> Tensor:
        """[3, C, C] in [0, 1], as the network saw it."""
        return self._view.picture(decode_image(_bytes(source), self._rules))

    def _label(self, source: Source) -> str | None:
        if source.label < 0:
            return None
        return self._classes[source.label] if self._classes else str(source.label)

    @torch.no_grad()
    def _features(self, images: Sequence[Pixels]) -> Tensor:
        token = self._backbone.cls_token
        views = self._view(images).to(token.device, token.dtype)
        return F.normalize(self._backbone([views]), dim=1)

    def _decoded(self, sources: Sequence[Source], done: Callable[[], None]) -> Iterator[tuple[Source, Pixels]]:
        for source in sources:
            try:
                if source.size_bytes > self._rules.max_member_bytes:
                    raise BadSample(f"{source.size_bytes} bytes")
                yield source, decode_image(_bytes(source), self._rules)
            except BadSample:
                self.bad.append(source.name)
            done()


def _bytes(source: Source) -> bytes:
    try:
        with open(source.path, "rb") as file:
            file.seek(source.offset_bytes)
            return file.read(source.size_bytes)
    except OSError as error:
        raise UserError(f"{shown(source.path)} cannot be read ({error.strerror}): look at its permissions") from None


def _file(source: Source) -> str:
    """Where a source's whole file is; members of a tar are no file of their own."""
    return str(Path(source.path).resolve())
