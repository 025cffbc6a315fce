"""The gallery finds what cosine of the class tokens finds, leaves the picture itself and damaged images out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino_dist.data.reading.decode import DecodeRules, decode_image
from dino_dist.errors import UserError
from dino_dist.models.vit import VisionTransformer, ViTShape
from dino_dist.pictures.neighbors import EvalView, Gallery

RULES = DecodeRules(max_member_bytes=10**6, max_pixels=10**6)
VIEW = EvalView(resize_px=18, crop_px=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    shape = ViTShape(embed_dim=16, depth=2, num_heads=2, patch_size=4, image_px=16, init_std=0.3)
    return VisionTransformer(shape, "sdpa").eval()


def random_image() -> bytes:
    """A PNG, the same at each call."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(40):
        height, width = generator.integers(16, 40, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    return tmp_path


def test_neighbors_are_those_of_the_cosine(backbone: VisionTransformer, folder: Path) -> None:
    gallery = Gallery(str(folder), backbone, VIEW, RULES)
    files = sorted(folder.iterdir())
    images = [decode_image(file.read_bytes(), RULES) for file in files]
    with torch.no_grad():
        features = F.normalize(torch.cat([backbone([VIEW([image])]) for image in images]), dim=1)
    cosine = features @ features[5]
    cosine[5] = -2.0
    best = cosine.argsort(descending=True)[:4].tolist()
    found = gallery.nearest(images[5], files[5], 4)
    assert [one.source.name for one in found] == [files[index].name for index in best]
    assert [one.cosine for one in found] == pytest.approx(cosine[best].tolist(), abs=1e-6)
    assert gallery.nearest(images[5], Path("elsewhere.png"), 1)[0].source.name == files[5].name
    assert len(gallery.nearest(images[5], files[5], 1000)) == 39
    assert gallery.picture(found[0].source).shape == (3, 16, 16)


def test_damaged_images_are_left_out_and_named(backbone: VisionTransformer, folder: Path) -> None:
    (folder / "03.png").write_bytes(b"no picture")
    seen: list[None] = []
    gallery = Gallery(str(folder), backbone, VIEW, RULES, lambda: seen.append(None))
    assert gallery.bad == ["03.png"]
    assert len(gallery.sources) == 39
    assert len(seen) == 40


def test_a_gallery_without_images(backbone: VisionTransformer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images"):
        Gallery(str(tmp_path), backbone, VIEW, RULES)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its 1 images can be decoded"):
        Gallery(str(tmp_path), backbone, VIEW, RULES)


def test_tar_shards_are_a_gallery(
    backbone: VisionTransformer, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", [5, 7])
    gallery = Gallery(str(shards), backbone, VIEW, RULES)
    assert len(gallery.sources) == 12
    image = decode_image(random_image(), RULES)
    assert {one.label for one in gallery.nearest(image, Path("elsewhere.png"), 12)} == {"0", "1", "2", "3"}


def test_sub_folders_are_classes(backbone: VisionTransformer, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(random_image())
    gallery = Gallery(str(tmp_path), backbone, VIEW, RULES)
    found = gallery.nearest(decode_image(random_image(), RULES), tmp_path / "dog/1.png", 5)
    assert [(one.source.name, one.label) for one in found] == [("cat/1.png", "cat")]
    assert found[0].cosine == pytest.approx(1.0)
