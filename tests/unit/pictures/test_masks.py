"""Masks hold the asked share of the attention with as few patches as can be; Jaccard is scikit-learn's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from dino_dist.data.reading.decode import DecodeRules
from dino_dist.errors import UserError
from dino_dist.pictures.masks import MaskScores, Truth, find_mask, head_scores, jaccard, keep_mass, read_mask, summarise
from dino_dist.pictures.media import Medium

RULES = DecodeRules(max_member_bytes=10**6, max_pixels=10**6)


def truth(marked: list[list[int]], counts: list[list[int]] | None = None) -> Truth:
    objects = np.array(marked, dtype=bool)
    return Truth(object_HW=objects, counts_HW=np.ones_like(objects) if counts is None else np.array(counts, dtype=bool))


def test_a_worked_example() -> None:
    maps = torch.tensor([[1.0, 4.0], [2.0, 3.0]])
    assert keep_mass(maps, 0.4).tolist() == [[False, True], [False, False]]
    assert keep_mass(maps, 0.6).tolist() == [[False, True], [False, True]]
    assert keep_mass(maps, 0.9).tolist() == [[False, True], [True, True]]
    assert keep_mass(maps, 1.0).all()


@pytest.mark.parametrize("share", [0.05, 0.6, 0.95])
def test_the_share_is_held_and_no_patch_is_too_many(share: float) -> None:
    maps = torch.rand(2, 5, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = keep_mass(maps, share)
    held = (maps * kept).sum((-2, -1)) / maps.sum((-2, -1))
    least = torch.where(kept, maps, torch.inf).amin((-2, -1)) / maps.sum((-2, -1))
    assert (held >= share - 1e-12).all()
    assert (held - least < share).all()


def test_as_the_published_code_thresholds() -> None:
    """Sorted upwards, patches are dropped as long as what is dropped is at most 1 - share."""
    maps = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(1))
    value, order = maps.flatten(1).sort(dim=1)
    above = (value / value.sum(1, keepdim=True)).cumsum(1) > 1 - 0.6
    expected = torch.stack([row[places.argsort()] for row, places in zip(above, order, strict=True)]).view_as(maps)
    assert torch.equal(keep_mass(maps, 0.6), expected)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_no_share(share: float) -> None:
    with pytest.raises(UserError, match="--mass"):
        keep_mass(torch.ones(2, 2), share)


def test_jaccard_by_hand() -> None:
    marked = truth([[1, 1, 0], [0, 0, 0]])
    found = np.array([[True, False, True], [False, False, False]])
    assert jaccard(found, marked) == 1 / 3
    assert jaccard(found, truth([[1, 1, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 1]])) == 1 / 2
    assert jaccard(np.zeros((2, 3), dtype=bool), truth([[0, 0, 0], [0, 0, 0]])) == 1.0


def test_jaccard_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(3)
    for _ in range(20):
        found, marked = (generator.random((13, 11)) < generator.random() for _ in range(2))
        marked[0, 0] = True
        assert jaccard(found, truth(marked.tolist())) == jaccard_score(marked.ravel(), found.ravel())


def test_patches_are_enlarged_to_the_marked_picture() -> None:
    kept = torch.tensor([[[True, False], [False, False]], [[False, False], [False, True]]])
    marked = np.zeros((7, 10), dtype=bool)
    marked[:3, :5] = True  # the middle of row 3 is where the second patch begins
    assert head_scores(kept, truth(marked.tolist())) == [1.0, 0.0]


def test_means_over_pictures_are_of_each_one_s_best_head() -> None:
    scores = [
        MaskScores(heads=(0.2, 0.6), mean_of_heads=0.5, everything=0.1),
        MaskScores(heads=(0.4, 0.3), mean_of_heads=0.1, everything=0.3),
    ]
    summary = summarise(scores)
    assert summary["jaccard_best_head"] == pytest.approx(0.5)
    assert summary["jaccard_each_head"] == pytest.approx([0.3, 0.45])
    assert (summary["jaccard_mean_of_heads"], summary["jaccard_everything"]) == pytest.approx((0.3, 0.2))
    assert [score.best_head for score in scores] == [1, 0]


def test_mask_files(tmp_path: Path) -> None:
    numbers = np.array([[0, 1], [20, 255]], dtype=np.uint8)
    voc = Image.fromarray(numbers, mode="P")
    voc.putpalette([value for color in range(256) for value in (color, 255 - color, 7)])
    voc.save(tmp_path / "voc.png")
    read = read_mask(tmp_path / "voc.png", (2, 2), RULES)
    assert read.object_HW.tolist() == [[False, True], [True, False]]
    assert read.counts_HW.tolist() == [[True, True], [True, False]]
    Image.fromarray(numbers).save(tmp_path / "grey.png")
    read = read_mask(tmp_path / "grey.png", (2, 2), RULES)
    assert read.object_HW.tolist() == [[False, True], [True, True]]
    assert read.counts_HW.all()
    for dtype, suffix in ((np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")):
        of_16_bits = tmp_path / f"{np.dtype(dtype)}.{suffix}"
        Image.fromarray(np.array([[0, 1], [128, 40000]], dtype=dtype)).save(of_16_bits)
        read = read_mask(of_16_bits, (2, 2), RULES)
        assert read.object_HW.tolist() == [[False, True], [True, True]]
        assert read.counts_HW.all()
    with pytest.raises(UserError, match="2 x 2 px, its picture 3 x 2"):
        read_mask(tmp_path / "grey.png", (2, 3), RULES)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.png is no image"):
        read_mask(tmp_path / "bad.png", (2, 2), RULES)


def test_the_mask_of_a_picture(tmp_path: Path) -> None:
    medium = Medium(kind="image", path=Path("photos/a/cat.v2.jpg"), below=Path("a/cat.v2.jpg"), chosen=False)
    assert find_mask(tmp_path, medium) is None
    long = Path(f"{'x' * 251}.jpg")
    assert find_mask(tmp_path, Medium(kind="image", path=long, below=long, chosen=True)) is None
    (tmp_path / "cat.v2.png").touch()
    assert find_mask(tmp_path, medium) == tmp_path / "cat.v2.png"
    (tmp_path / "a").mkdir()
    (tmp_path / "a/cat.v2.bmp").touch()
    assert find_mask(tmp_path, medium) == tmp_path / "a/cat.v2.bmp"
    (tmp_path / "a/cat.v2.png").touch()
    with pytest.raises(UserError, match="could both be the mask"):
        find_mask(tmp_path, medium)
