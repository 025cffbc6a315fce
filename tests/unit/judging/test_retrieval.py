"""Retrieval and copy detection from files: views, lists, ranks, and what is wrong with a file said once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dino_dist.config import Config, DataSection, EvalSection
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.copy_detection import copy_forward
from dino_dist.judging.judge import labelled_judge
from dino_dist.judging.judged_network import JudgedNetwork
from dino_dist.judging.listed_images import listed_features
from dino_dist.judging.retrieval import (
    CopyOptions,
    RetrievalOptions,
    copy_detection,
    retrieval_by_label,
    retrieval_by_list,
)
from dino_dist.models.vit import VisionTransformer, ViTShape
from dino_dist.weights.network_weights import NetworkWeights

CONFIG = Config(data=DataSection(num_workers=2), eval=EvalSection(batch_size=3, resize_px=8, crop_px=8))


def network() -> VisionTransformer:
    torch.manual_seed(0)
    shape = ViTShape(embed_dim=32, depth=2, num_heads=2, patch_size=4, image_px=16, init_std=0.1)
    return VisionTransformer(shape, "sdpa").eval()


def painted(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Large patches of color, which a change of size or quality leaves recognisable."""
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def copydays(folder: Path, count: int = 6) -> Path:
    """Originals, strongly changed copies named after them, and JPEGs of low quality in the same order."""
    rng = np.random.default_rng(0)
    for block in ("original", "strong", "jpegqual/15", "whitening", "distractors"):
        (folder / block).mkdir(parents=True)
    for number in range(count):
        picture = painted(rng, 40, 56)
        name = f"{2000 + number}00.jpg"
        picture.save(folder / "original" / name, quality=95)
        picture.save(folder / "jpegqual" / "15" / name, quality=15)
        for copy in range(1 + number % 2):
            small = picture.crop((4, 2, 50, 38)).resize((30, 20)).convert("L")
            small.save(folder / "strong" / name.replace("00.", f"{copy + 1:02d}."), quality=40)
        painted(rng, 30, 30).save(folder / "whitening" / f"{number}.png")
        painted(rng, 30, 40).save(folder / "distractors" / f"{number}.png")
    for aside in ("whitening", "distractors"):
        (folder / aside).rename(folder.parent / aside)
    return folder


def _copies(world: World, folder: str, whitened: bool) -> dict[str, Any]:
    root = Path(folder)
    options = CopyOptions(
        folder=root,
        whitening=root.parent / "whitening" if whitened else None,
        distractors=root.parent / "distractors" if whitened else None,
        size_px=32,
    )
    return copy_detection(network(), CONFIG, world, options)


@pytest.mark.distributed
@pytest.mark.parametrize("whitened", [False, True])
def test_copies_are_found_alike_on_any_number_of_ranks(
    tmp_path: Path, ranks: Callable[..., list[Any]], whitened: bool
) -> None:
    folder = str(copydays(tmp_path / "copydays"))
    alone = _copies(World(), folder, whitened)
    assert alone["originals"] == alone["copies_jpegqual/15"] == 6
    assert alone["copies_strong"] == 9
    assert alone["map_jpegqual/15"] > 0.9
    assert 0.2 < alone["map_strong"] <= 1
    assert [*alone][-4:] == ["copies_strong", "map_strong", "copies_jpegqual/15", "map_jpegqual/15"]
    for found in ranks(2, _copies, folder, whitened):
        assert found == pytest.approx(alone, abs=1e-6)


def test_a_block_may_be_a_link_and_distractors_may_lie_beside_the_blocks(tmp_path: Path) -> None:
    folder = copydays(tmp_path / "copydays")
    expected = _copies(World(), str(folder), whitened=True)
    for block in ("original", "strong"):
        (folder / block).rename(tmp_path / block)
        (folder / block).symlink_to(tmp_path / block)
    for aside in ("whitening", "distractors"):
        (tmp_path / aside).rename(folder / aside)
    options = CopyOptions(folder=folder, whitening=folder / "whitening", distractors=folder / "distractors", size_px=32)
    assert copy_detection(network(), CONFIG, World(), options) == expected


def test_the_view_of_copies_is_torchvisions(tmp_path: Path) -> None:
    painted(np.random.default_rng(1), 50, 37).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    from dino_dist.judging.retrieval import _square

    seen: list[torch.Tensor] = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return copy_forward(network())(images)

    with torch.no_grad():
        features = listed_features(forward, [tmp_path / "a.png", tmp_path / "b.png"], _square(32), CONFIG, World())
    with Image.open(tmp_path / "a.png") as picture:
        expected = v2.Compose(
            [
                v2.Resize((32, 32), v2.InterpolationMode.BICUBIC),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(CONFIG.data.mean, CONFIG.data.std),
            ]
        )(picture.convert("RGB"))
    torch.testing.assert_close(seen[0], torch.stack([expected, expected]), atol=1e-6, rtol=0)
    torch.testing.assert_close(features[0], features[1])


def landmarks(folder: Path) -> Path:
    """Three landmarks in one light, so that they are easily confused, seen in several ways; lists of both layouts."""
    rng = np.random.default_rng(5)
    light = painted(rng, 60, 80)
    (folder / "jpg").mkdir(parents=True)
    lines, imlist, groups = [], [], []
    for group in range(3):
        picture = Image.blend(light, painted(rng, 60, 80), 0.35)
        picture.save(folder / "jpg" / f"query_{group}.jpg")
        lines.append(f"query\tjpg/query_{group}.jpg\tlandmark_{group}")
        for view in range(3):
            name = f"view_{group}_{view}"
            shifted = picture.crop((15 * view, 10 * view, 70, 55)).resize((80 - 9 * view, 60 - 7 * view))
            shifted.save(folder / "jpg" / f"{name}.jpg")
            imlist.append(name)
            groups.append(group)
            grade = ("easy", "hard", "junk")[view]
            lines.append(f"gallery\tjpg/{name}.jpg\tlandmark_{group}\t{grade}")
    for number in range(4):
        Image.blend(light, painted(rng, 60, 80), 0.2).save(folder / "jpg" / f"other_{number}.jpg")
        imlist.append(f"other_{number}")
        lines.append(f"gallery\tjpg/other_{number}.jpg")
    gnd = [
        {"easy": [3 * group], "hard": [3 * group + 1], "junk": [3 * group + 2], "bbx": [0, 0, 80.4, 60]}
        for group in range(3)
    ]
    content = {"imlist": imlist, "qimlist": [f"query_{group}" for group in range(3)], "gnd": gnd}
    (folder / "gnd.json").write_text(json.dumps(content))
    (folder / "list.tsv").write_text("\n".join(lines))
    return folder


def _by_list(world: World, file: str, images: str | None, **options: Any) -> dict[str, Any]:
    chosen = RetrievalOptions(**{"size_px": 64} | options)
    return retrieval_by_list(network(), Path(file), images and Path(images), CONFIG, world, chosen)  # type: ignore


@pytest.mark.distributed
def test_both_layouts_and_any_ranks_give_the_same_figures(tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    folder = landmarks(tmp_path / "landmarks")
    found = _by_list(World(), str(folder / "list.tsv"), None)
    assert found["queries"] == found["judged_queries_hard"] == 3
    assert found["gallery"] == 13
    assert {"map_easy", "map_medium", "map_hard", "precision_at_10_medium"} <= found.keys()
    assert 0.1 < found["map_hard"] < found["map_easy"] < 1, "neither hopeless nor a matter of course"
    assert _by_list(World(), str(folder / "gnd.json"), str(folder / "jpg")) == pytest.approx(found)
    for other in ranks(2, _by_list, str(folder / "list.tsv"), None):
        assert other == pytest.approx(found, abs=1e-6)
    # The box is the whole picture, and a bit more.
    cropped = _by_list(World(), str(folder / "gnd.json"), str(folder / "jpg"), crop_queries=True)
    assert cropped == pytest.approx(found)
    assert _by_list(World(), str(folder / "list.tsv"), None, multiscale=False) != pytest.approx(found)


def test_a_list_without_grades_has_one_figure(tmp_path: Path) -> None:
    folder = landmarks(tmp_path / "landmarks")
    lines = [line for line in (folder / "list.tsv").read_text().splitlines() if "hard" not in line]
    (folder / "plain.tsv").write_text("\n".join(lines))
    found = _by_list(World(), str(folder / "plain.tsv"), None)
    assert [key for key in found if key.startswith("map")] == ["map"]


def test_a_list_in_which_nothing_is_easy_has_the_other_figures(tmp_path: Path) -> None:
    folder = landmarks(tmp_path / "landmarks")
    text = (folder / "list.tsv").read_text().replace("\teasy", "\tjunk")
    (folder / "hard.tsv").write_text(text)
    found = _by_list(World(), str(folder / "hard.tsv"), None)
    assert [key for key in found if key.startswith("map")] == ["map_medium", "map_hard"]
    assert found["map_medium"] == found["map_hard"]


def _refused(world: World, file: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        _by_list(world, file, None, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.distributed
@pytest.mark.parametrize("damaged", ["jpg/view_0_0.jpg", "jpg/query_2.jpg"])
def test_a_file_that_one_rank_cannot_use_ends_all(
    tmp_path: Path, ranks: Callable[..., list[Any]], damaged: str
) -> None:
    folder = landmarks(tmp_path / "landmarks")
    (folder / damaged).write_bytes(b"no image")
    said = ranks(2, _refused, str(folder / "list.tsv"))
    assert said[0].startswith(f"UserError: {folder / damaged} cannot be used (")
    assert said[1].startswith("SaidByRankZero: ")


def test_what_is_wrong_with_files_is_named(tmp_path: Path) -> None:
    folder = landmarks(tmp_path / "landmarks")
    Image.new("RGB", (1, 1)).save(folder / "jpg" / "view_1_0.jpg")
    assert "1 x 1 px to look at; the least is 8 px" in _refused(World(), str(folder / "list.tsv"))
    (folder / "jpg" / "view_1_0.jpg").unlink()
    assert "view_1_0.jpg does not exist" in _refused(World(), str(folder / "list.tsv"))
    (folder / "long.tsv").write_text(f"query\t{'x' * 5000}\tgroup\ngallery\tjpg/view_0_0.jpg\tgroup\n")
    assert "does not exist" in _refused(World(), str(folder / "long.tsv"))
    huge = Image.new("RGB", (2000, 1100))
    huge.save(folder / "jpg" / "view_1_0.jpg")
    assert "2000 x 1100 px to look at, more than 131072 patches" in _refused(
        World(), str(folder / "list.tsv"), size_px=2000
    )
    copies = copydays(tmp_path / "copydays")

    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            copy_detection(network(), CONFIG, World(), CopyOptions(**{"folder": copies, "size_px": 32} | options))
        return str(caught.value)

    assert "must be a multiple of the patch size" in refused(size_px=30)
    assert "--size-px 1452 is more than 131072 patches: give at most 1448" in refused(size_px=1452)
    assert "File name too long" in refused(folder=copies / ("x" * 300))
    assert "File name too long" in refused(whitening=copies / ("x" * 300))
    assert "no folder original" in refused(folder=copies / "strong")
    assert "is no folder" in refused(whitening=tmp_path / "absent")
    diverged = network()
    torch.nn.init.constant_(diverged.norm.weight, 3e38)
    with pytest.raises(UserError, match=r"features of \d of 6 whitening images are not finite"):
        copy_detection(
            diverged, CONFIG, World(), CopyOptions(folder=copies, size_px=32, whitening=tmp_path / "whitening")
        )
    (copies / "jpegqual" / "15" / "200000.jpg").unlink()
    assert "5 copies cannot be matched one to one with 6" in refused()
    for file in (copies / "strong").iterdir():
        file.unlink()
    (copies / "jpegqual" / "15").rename(tmp_path / "aside")
    assert "at least one other folder" in refused()


def test_labelled_shards_find_their_class(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shards = str(make_shards(tmp_path / "shards", [20, 12]))
    other = str(make_shards(tmp_path / "other", [9], seed=1))

    def found(train: str, test: str) -> dict[str, Any]:
        data = replace(CONFIG.data, num_workers=0, eval_train=train, eval_test=test)
        backbone = network()
        weights = NetworkWeights(source="here", network="only", shape=backbone.shape, backbone=backbone.state_dict())
        judged = JudgedNetwork(
            backbone=backbone,
            weights=weights,
            config=replace(CONFIG, data=data),
            world=World(),
            index_dir=tmp_path / "index",
        )
        return retrieval_by_label(labelled_judge(judged))

    across = found(shards, other)
    assert across["judged_queries"] == 9
    within = found(shards, shards)
    # Noise with labels: chance, once an image no longer finds itself.
    assert within["judged_queries"] == 32
    assert within["precision_at_1"] < 0.6
