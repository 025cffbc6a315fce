"""Labels travel as the published protocol says, whatever the chunks; a moving object is followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_dist.config import Config
from dino_dist.data.reading.index_mask import read_index_mask, write_index_mask
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.video_segmentation import (
    PropagationRules,
    copy_labels,
    frame_size_px,
    label_map,
    one_hot_labels,
    segment,
)
from dino_dist.judging.video import VideoOptions, compare, segment_videos
from dino_dist.judging.video_files import Video, chosen_videos, davis_videos, own_video
from dino_dist.models.vit import VisionTransformer, ViTShape

ROWS, COLUMNS = 6, 9


def random_sources(count: int, seed: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A frame's features and some earlier frames' with soft labels."""
    generator = torch.Generator().manual_seed(seed)

    def features() -> Tensor:
        return torch.nn.functional.normalize(torch.randn(ROWS, COLUMNS, 5, generator=generator), dim=-1)

    sources = [(features(), torch.rand(ROWS * COLUMNS, 3, generator=generator).softmax(1)) for _ in range(count)]
    return features(), sources


def stated_plainly(target: Tensor, sources: Sequence[tuple[Tensor, Tensor]], rules: PropagationRules) -> Tensor:
    """Patch by patch: all neighbours within reach in all frames, the best few, their weighted labels."""
    result = torch.zeros(ROWS * COLUMNS, sources[0][1].shape[1])
    for row in range(ROWS):
        for column in range(COLUMNS):
            found: list[tuple[float, Tensor]] = []
            for features, labels in sources:
                for v in range(ROWS):
                    for u in range(COLUMNS):
                        if rules.radius and max(abs(v - row), abs(u - column)) > rules.radius:
                            continue
                        cosine = float(target[row, column] @ features[v, u])
                        found.append((float(np.exp(cosine / rules.temperature)), labels[v * COLUMNS + u]))
            best = sorted(found, key=lambda pair: -pair[0])[: rules.top_k]
            total = sum(weight for weight, _ in best)
            result[row * COLUMNS + column] = sum(weight / total * label for weight, label in best)  # type: ignore
    return result


@pytest.mark.parametrize("radius", [0, 1, 3, 20])
@pytest.mark.parametrize("top_k", [1, 5, 1000])
def test_labels_are_copied_as_plainly_stated_whatever_the_chunks(radius: int, top_k: int) -> None:
    rules = PropagationRules(radius=radius, top_k=top_k)
    target, sources = random_sources(3, seed=radius)
    expected = stated_plainly(target, sources, rules)
    for max_elements in (1, 2000, 10**9):
        found = copy_labels(target, sources, rules, max_elements=max_elements)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.sum(1), torch.ones(ROWS * COLUMNS))


def test_frames_copy_from_the_first_and_the_last_few() -> None:
    frames = [random_sources(0, seed)[0] for seed in range(6)]
    first = one_hot_labels(torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 3, 3)
    rules = PropagationRules(last_frames=2, radius=2)
    found = [first, *segment(frames, first, rules)]
    assert len(found) == 6
    for number, chosen in ((1, [0]), (2, [0, 1]), (4, [0, 2, 3]), (5, [0, 3, 4])):
        sources = [(frames[n], found[n]) for n in chosen]
        torch.testing.assert_close(found[number], copy_labels(frames[number], sources, rules, max_elements=10**6))
    # With no frame beside the first, each is labelled by itself.
    alone = list(segment(frames, first, PropagationRules(last_frames=0)))
    torch.testing.assert_close(
        alone[4], copy_labels(frames[5], [(frames[0], first)], PropagationRules(), max_elements=10**6)
    )


def test_a_frame_like_the_first_gets_its_labels() -> None:
    frame = random_sources(0, 1)[0]
    first = one_hot_labels(torch.randint(0, 4, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0)), 4)
    (found,) = segment([frame, frame], first, PropagationRules(top_k=1))
    assert torch.equal(found, first)


def test_a_label_map_is_stretched_before_the_strongest_is_taken() -> None:
    weak = torch.full((4, 6, 2), 0.0)
    weak[..., 0], weak[..., 1] = 0.9, 0.1
    weak[1:3, 2:4] = torch.tensor([0.7, 0.3])  # never the strongest as it is
    found = label_map(weak.reshape(-1, 2), (4, 6), 8)
    assert found.shape == (32, 48)
    assert bool((found[12:20, 20:28] == 1).all())
    assert bool((found[0] == 0).all())
    nothing = torch.zeros(24, 3)
    nothing[:, 0] = 1
    assert not label_map(nothing, (4, 6), 8).any(), "objects that are gone do not come back"
    rounding = 1e-7 * torch.rand(24, generator=torch.Generator().manual_seed(0))
    full = torch.stack([torch.zeros(24), 1.0 - rounding], dim=1)
    assert label_map(full, (4, 6), 8).all(), "an object that fills the frame stays whole"


@pytest.mark.parametrize(
    ("height", "width", "short", "patch", "expected"),
    [
        (480, 854, 480, 16, (480, 832)),
        (480, 854, 480, 8, (480, 832)),
        (1080, 1920, 480, 16, (480, 832)),
        (854, 480, 480, 16, (832, 480)),
        (480, 480, 480, 16, (480, 448)),
        (480, 854, 480, 14, (476, 854 // 14 * 14)),
        (32, 48, 32, 4, (32, 48)),
        (32, 50, 33, 4, (32, 48)),
    ],
)
def test_frame_sizes(height: int, width: int, short: int, patch: int, expected: tuple[int, int]) -> None:
    assert frame_size_px(height, width, short_px=short, patch_size=patch) == expected


def test_impossible_sizes_and_rules_are_refused() -> None:
    with pytest.raises(UserError, match="less than one patch"):
        frame_size_px(480, 854, short_px=10, patch_size=16)
    with pytest.raises(UserError, match=r"1000000 x 480 px, 1875000 patches; at most 131072: give a smaller --size-px"):
        frame_size_px(48, 100_000, short_px=480, patch_size=16)
    with pytest.raises(UserError, match="at least"):
        PropagationRules(top_k=0)


def moving_squares(folder: Path, count: int = 10, side: int = 64) -> Path:
    """Two textured squares of different colors that cross a noisy background; frames and true masks."""
    rng = np.random.default_rng(0)
    background = rng.integers(0, 90, (side, side, 3), dtype=np.uint8)
    texture = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
    (folder / "frames").mkdir(parents=True)
    (folder / "masks").mkdir()
    for number in range(count):
        picture, mask = background.copy(), np.zeros((side, side), dtype=np.uint8)
        for label, color, top, left in (
            (3, (180, 20, 20), 8, 4 + 4 * number),
            (7, (20, 180, 180), 36, 44 - 4 * number),
        ):
            picture[top : top + 16, left : left + 16] = np.array(color, dtype=np.uint8) + texture
            mask[top : top + 16, left : left + 16] = label
        Image.fromarray(picture).save(folder / "frames" / f"{number:05d}.png")
        write_index_mask(folder / "masks" / f"{number:05d}.png", mask)
    return folder


def network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        ViTShape(embed_dim=48, depth=2, num_heads=2, patch_size=4, image_px=32, init_std=0.1), "sdpa"
    ).eval()


def test_moving_objects_are_followed(tmp_path: Path) -> None:
    """Even untrained features do far better than the first mask, left where it is."""
    folder = moving_squares(tmp_path)
    video = own_video(folder / "frames", folder / "masks")
    out = tmp_path / "found"
    options = VideoOptions(short_px=64, rules=PropagationRules(radius=4), out=out)
    found = segment_videos(network(), [video], Config(), World(), options)
    assert found["judged_frames"] == 8
    assert [score["number"] for score in found["objects"]] == [3, 7]
    first = read_index_mask(video.masks[0], max_pixels=10**6)
    left_alone = [
        pair
        for number in sorted(video.judged)
        for pair in compare(
            first,
            read_index_mask(video.masks[number], max_pixels=10**6),
            np.array([3, 7], dtype=np.uint8),
            torch.device("cpu"),
        ).values()
    ]
    assert np.mean(left_alone) < 0.4
    assert found["jf_mean"] > np.mean(left_alone) + 0.3, found
    assert found["jf_mean"] == pytest.approx((found["j_mean"] + found["f_mean"]) / 2)
    # What was written is what was judged, under the frames' names and with the objects' own numbers.
    masks = {file.name: read_index_mask(file, max_pixels=10**6) for file in sorted((out / "frames").iterdir())}
    assert [*masks] == [f"{frame.stem}.png" for frame in video.frames]
    assert set(np.unique(masks["00005.png"])) == {0, 3, 7}
    truth: NDArray[np.uint8] = read_index_mask(video.masks[5], max_pixels=10**6)
    both, either = ((masks["00005.png"] == 3) & (truth == 3)).sum(), ((masks["00005.png"] == 3) | (truth == 3)).sum()
    assert both / either > 0.5


def _segmented(world: World, root: str, count: int) -> dict[str, Any] | str:
    folders = [Path(root) / str(number) for number in range(count)]
    videos = [replace(own_video(folder / "frames", folder / "masks"), name=folder.name) for folder in folders]
    options = VideoOptions(short_px=64, rules=PropagationRules(radius=4))
    try:
        return segment_videos(network(), videos, Config(), world, options)
    except UserError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.distributed
@pytest.mark.parametrize("count", [1, 3])
def test_ranks_share_videos_out(tmp_path: Path, ranks: Callable[..., list[Any]], count: int) -> None:
    for number in range(count):
        moving_squares(tmp_path / str(number), count=4 + number)
    alone = _segmented(World(), str(tmp_path), count)
    assert isinstance(alone, dict)
    assert (alone["videos"], len(alone["objects"])) == (count, 2 * count)
    assert ranks(2, _segmented, str(tmp_path), count) == [alone, alone]
    damaged = tmp_path / str(count - 1) / "frames" / "00001.png"
    damaged.write_bytes(b"no image")
    first, second = ranks(2, _segmented, str(tmp_path), count)
    assert first.startswith(f"UserError: {damaged} cannot be used (")
    assert second == first.replace("UserError", "SaidByRankZero", 1)


def test_only_the_first_mask_gives_masks_but_no_figures(tmp_path: Path) -> None:
    folder = moving_squares(tmp_path, count=3)
    (video,) = chosen_videos(folder / "frames", folder / "masks" / "00000.png", split="val", names=[])
    found = segment_videos(network(), [video], Config(), World(), VideoOptions(short_px=64, out=tmp_path / "out"))
    assert found == {"videos": 1, "frames": 3, "judged_frames": 0, "objects": []}
    assert len(list((tmp_path / "out" / "frames").iterdir())) == 3


def test_frames_follow_each_other_by_their_numbers(tmp_path: Path) -> None:
    frames, mask = tmp_path / "frames", tmp_path / "mask.png"
    frames.mkdir()
    for file in (mask, *(frames / f"f{number}.png" for number in range(12))):
        file.touch()
    video = own_video(frames, mask)
    assert [frame.stem for frame in video.frames] == [f"f{number}" for number in range(12)]


def test_a_davis_folder(tmp_path: Path) -> None:
    for name in ("bear", "swan"):
        folder = moving_squares(tmp_path / name, count=4)
        for kind, source in (("JPEGImages", "frames"), ("Annotations", "masks")):
            (tmp_path / kind / "480p").mkdir(parents=True, exist_ok=True)
            (folder / source).rename(tmp_path / kind / "480p" / name)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("bear\nswan\n")
    assert [video.name for video in davis_videos(tmp_path)] == ["bear", "swan"]
    (video,) = chosen_videos(tmp_path, None, split="val", names=["swan"])
    assert sorted(video.judged) == [1, 2]
    with pytest.raises(UserError, match=r"train\.txt cannot be read"):
        davis_videos(tmp_path, split="train")
    with pytest.raises(UserError, match="is no name of a video"):
        davis_videos(tmp_path, names=["../bear"])
    with pytest.raises(UserError, match="leave --masks out"):
        chosen_videos(tmp_path, tmp_path, split="val", names=[])


def test_what_is_wrong_with_a_video_is_named(tmp_path: Path) -> None:
    folder = moving_squares(tmp_path, count=3)
    frames, masks = folder / "frames", folder / "masks"

    def refused(video: Video, **options: Path) -> str:
        with pytest.raises(UserError) as caught:
            segment_videos(network(), [video], Config(), World(), VideoOptions(short_px=64, **options))  # type: ignore
        return str(caught.value)

    good = own_video(frames, masks)
    assert "is not empty" in refused(good, out=masks)
    (tmp_path / "a_file").write_text("")
    assert "cannot be made" in refused(good, out=tmp_path / "a_file" / "below")
    (frames / "00001.png").write_bytes(b"no image")
    assert "00001.png cannot be used" in refused(good)
    Image.new("RGB", (10, 10)).save(frames / "00001.png")
    assert "has 10 x 10 px, the first mask 64 x 64" in refused(good)
    Image.new("RGB", (64, 64)).save(masks / "00000.png")
    assert "is a mask of colours" in refused(good)
    Image.new("L", (64, 64)).save(masks / "00000.png")
    assert "shows 0 objects" in refused(good)
    (masks / "00000.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "is no mask that can be read" in refused(good)
    (masks / "00000.png").unlink()
    with pytest.raises(UserError, match=r"has no 00000\.png"):
        own_video(frames, masks)
    with pytest.raises(UserError, match="does not exist"):
        own_video(frames, tmp_path / "absent")
    Image.new("RGB", (64, 64)).save(frames / "00001.jpg")
    with pytest.raises(UserError, match="two frames named 00001"):
        own_video(frames, masks)
    with pytest.raises(UserError, match="is no DAVIS folder"):
        chosen_videos(frames, None, split="val", names=[])
    with pytest.raises(UserError, match="File name too long"):
        chosen_videos(tmp_path / ("x" * 300), None, split="val", names=[])
