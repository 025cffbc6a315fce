"""`dino-dist attention` as a user calls it: pictures, comparisons, videos in one new folder; mistakes in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dino_dist.models.vit import VisionTransformer, ViTShape

pytestmark = pytest.mark.e2e

HEADS = 2
FILES_OF_AN_IMAGE = {
    *("attention.npy", "seen.png", "sheet.png"),
    *(f"{name}{what}.png" for name in ("mean", "head-00", "head-01") for what in ("", "-overlay", "-mask")),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights under the published names: width 128, so two heads, patches of 8 px, trained at 32 px."""
    torch.manual_seed(0)
    shape = ViTShape(embed_dim=128, depth=2, num_heads=HEADS, patch_size=8, image_px=32, init_std=0.2)
    path = tmp_path_factory.mktemp("network") / "vit.safetensors"
    save_file({name: value.contiguous() for name, value in VisionTransformer(shape, "sdpa").state_dict().items()}, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Noise with a bright square, of several sizes; `b/one.png` is called like `one.png`."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for name, (height, width) in (("one.png", (60, 90)), ("two.jpg", (64, 64)), ("b/one.png", (33, 47))):
        pixels = generator.integers(0, 120, (height, width, 3), dtype=np.uint8)
        pixels[10:30, 20:40] += 130
        Image.fromarray(pixels).save(folder / name)
    return folder


def rows(summary: Any) -> dict[str, Any]:
    return {row["folder"]: row for row in summary["looked_at"]}


def test_everything_about_images(cli: Callable[..., Any], network: Path, photos: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, (height, width) in (("one", (60, 90)), ("two", (64, 64))):
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[10:30, 20:40] = 255
        Image.fromarray(mask).save(masks / f"{name}.png")
    (photos / "b/one.png").rename(photos / "b/three.png")
    (photos / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    out = tmp_path / "out"
    options = ("--masks", masks, "--pca", "--pca-foreground", 0.4, "--neighbors", photos / "b", "--mass", 0.5, "--json")

    result = cli("attention", str(network), str(photos), "--out", str(out), *map(str, options))

    assert result.code == 0, result.err
    assert result.err == ""
    summary = result.json()
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {entry.name for entry in out.iterdir()} == {
        *("one", "two", "b_three", "overview.png", "pca.png", "neighbors.png", "summary.json")
    }
    for folder in ("one", "two", "b_three"):
        assert {file.name for file in (out / folder).iterdir()} == {*FILES_OF_AN_IMAGE, "pca.png", "neighbors.png"}
    assert {Path(row["file"]).name: "no image" in row["why"] for row in summary["left_out"]} == {
        "bad.png": True,
        "dot.png": False,
    }
    one = rows(summary)["one"]
    assert (one["width_px"], one["height_px"], one["seen_width_px"], one["seen_height_px"]) == (90, 60, 96, 64)
    assert np.load(out / "one/attention.npy", allow_pickle=False).shape == (HEADS, 8, 12)
    assert Image.open(out / "one/head-01-mask.png").size == (90, 60)
    assert Image.open(out / "one/seen.png").size == (96, 64)
    assert summary["masks"] == 2
    assert summary["jaccard_best_head"] == pytest.approx(
        np.mean([max(rows(summary)[name]["jaccard_heads"]) for name in ("one", "two")])
    )
    kept = np.array(Image.open(out / f"one/head-{one['best_head']:02d}-mask.png")) > 0
    marked = np.array(Image.open(masks / "one.png")) > 0
    assert (kept & marked).sum() / (kept | marked).sum() == pytest.approx(max(one["jaccard_heads"]))
    assert [found["name"] for found in one["neighbors"]] == ["three.png"]
    assert rows(summary)["b_three"]["neighbors"] == [], "an image is no neighbour of itself"


def test_names_do_not_collide_and_people_get_a_table(
    cli: Callable[..., Any], network: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    files = [str(photos / name) for name in ("one.png", "b/one.png")]
    result = cli("attention", str(network), *files, "--out", str(out), "--size-px", "0", "--smooth")
    assert result.code == 0, result.err
    assert (out / "one/sheet.png").is_file()
    assert (out / "one-2/sheet.png").is_file()
    table = " ".join(result.out.split())
    assert "one.png: 90 x 60 px, looked at as 88 x 56 px" in table
    assert "one.png: 47 x 33 px, looked at as 40 x 32 px" in table


def test_names_are_shown_as_they_are_and_command_no_terminal(
    cli: Callable[..., Any], network: Path, photos: Path, tmp_path: Path
) -> None:
    """What Rich takes for markup, what no encoding takes, and what a terminal would obey."""
    picture = (photos / "one.png").read_bytes()
    for name in (b"cat [final].png", b"x[:smile:].png", b"caf\xe9.png", b"\x1b[31mred.png"):
        (photos / os.fsdecode(name)).write_bytes(picture)
    (photos / "bad[").mkdir()
    (photos / "bad[/y].png").write_bytes(b"no picture")
    result = cli("attention", str(network), str(photos), "--out", str(tmp_path / "out [v2]"))
    assert result.code == 0, result.err
    table = re.sub(r"[\s│]", "", result.out)
    for shown in (
        "cat[final].png:",
        "x[:smile:].png:",
        "caf\\udce9.png:",
        "\\x1b[31mred.png:",
        "bad[/y].png",
        "out[v2]",
    ):
        assert shown in table
    assert "\x1b" not in result.out


def test_a_bad_video_in_a_folder_is_left_out(
    cli: Callable[..., Any], network: Path, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av", reason="PyAV is not installed (extra: video)")
    frames = [Image.fromarray(np.full((32, 32, 3), 20 * number, dtype=np.uint8)) for number in range(12)]
    frames[0].save(photos / "good.gif", save_all=True, append_images=frames[1:])
    (photos / "bad.mp4").write_bytes(b"no video")
    Image.new("RGB", (4, 4)).save(photos / "small.gif")  # which only its first frame tells
    result = cli("attention", str(network), str(photos), "--out", str(tmp_path / "out"), "--json")
    assert result.code == 0, result.err
    summary = result.json()
    assert (summary["images"], summary["videos"]) == (3, 1)
    assert {Path(row["file"]).name for row in summary["left_out"]} == {"bad.mp4", "small.gif"}
    made = {entry.name for entry in (tmp_path / "out").iterdir() if entry.is_dir()}
    assert made == {row["folder"] for row in summary["looked_at"]}


def test_a_video_and_a_folder_of_frames(cli: Callable[..., Any], network: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed (extra: video)")
    video, frames = tmp_path / "clip.mp4", tmp_path / "clip"
    frames.mkdir()
    container = av.open(str(video), "w")
    stream = container.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for number in range(11):
        pixels = np.zeros((48, 64, 3), dtype=np.uint8)
        pixels[10:30, 3 * number : 3 * number + 20] = (250, 120, 60)
        Image.fromarray(pixels).save(frames / f"{number}.png")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())
    container.close()
    out = tmp_path / "out"

    arguments = (str(network), str(video), str(frames), "--out", str(out), "--frames", "--pca", "--json")
    result = cli("attention", *arguments)

    assert result.code == 0, result.err
    assert [(row["kind"], row["folder"], row["frames"]) for row in result.json()["looked_at"]] == [
        ("video", "clip", 11),
        ("frames", "clip-2", 11),
    ]
    for what in ("attention", "heads", "mask", "pca"):
        with av.open(str(out / "clip" / f"{what}.mp4")) as written:
            assert sum(1 for _ in written.decode(video=0)) == 11
        assert len(list((out / "clip-2" / what).iterdir())) == 11
    # Beside the frame itself: what the network saw, moving as it moves.
    first, last = (np.array(Image.open(out / "clip-2/attention" / name)) for name in ("01-0.png", "11-10.png"))
    assert first.shape == last.shape
    assert np.abs(first.astype(int) - last).mean() > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dot.png"], ["dot.png", "1 x 1 px is less than one patch of 8 x 8 px"]),
        (["one.png", "bad.png"], ["bad.png", "no image that can be read"]),
        (["cut.png"], ["cut.png", "no image that can be read"]),
        (["gone.png"], ["gone.png does not exist"]),
        (["empty"], ["empty holds nothing to look at"]),
        (["empty", "--frames"], ["empty holds no images to be frames"]),
        (["only_bad"], ["none of 1 pictures", "bad.png"]),
        (["bad.mp4"], ["bad.mp4 cannot be decoded as a video"]),
        (["one.png", "--mass", "0"], ["--mass 0", "above 0"]),
        (["one.png", "--pca-foreground", "1.5"], ["--pca-foreground 1.5"]),
        (["one.png", "--size-px", "3"], ["--size-px 3", "at least 8"]),
        (["one.png", "--network", "pupil"], ["pupil"]),
        (["one.png", "--masks", "gone"], ["--masks", "gone is no folder"]),
        (["one.png", "--masks", "gone" + 300 * "x"], ["File name too long"]),
        (["one.png", "--masks", "empty"], ["--masks", "no mask for any of 1 images"]),
        (["one.png", "--masks", "other"], ["one.png is 2 x 2 px, its picture 90 x 60"]),
        (["one.png", "--neighbors", "empty"], ["empty holds no images"]),
        (["one.png", "--neighbors", "gone"], ["gone"]),
        (["empty", "--frames", "--masks", "other"], ["--masks is about images"]),
    ],
)
def test_refusals(
    cli: Callable[..., Any], network: Path, photos: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    for name in ("empty", "only_bad", "other"):
        (photos / name).mkdir()
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    Image.new("L", (2, 2)).save(photos / "other/one.png")
    for name in ("bad.png", "only_bad/bad.png", "bad.mp4"):
        (photos / name).write_bytes(b"no picture")
    whole = (photos / "one.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    named = [str(photos / word) if "gone" in word or (photos / word).exists() else word for word in arguments]
    if "bad.mp4" in arguments:
        pytest.importorskip("av", reason="PyAV is not installed (extra: video)")
    line = cli("attention", str(network), *named, "--out", str(tmp_path / "out")).refusal()
    for word in words:
        assert word in line
    if arguments not in (["cut.png"], ["only_bad"], ["one.png", "--masks", "other"]):  # which only looking can tell
        assert not (tmp_path / "out").exists()


def test_what_is_there_stays(cli: Callable[..., Any], network: Path, photos: Path, tmp_path: Path) -> None:
    picture = str(photos / "one.png")
    assert "is not empty" in cli("attention", str(network), picture, "--out", str(photos)).refusal()
    assert "cannot be used" in cli("attention", str(network), picture, "--out", picture).refusal()
    assert "cannot be used" in cli("attention", str(network), picture, "--out", f"{picture}/below").refusal()
    assert "does not exist" in cli("attention", str(tmp_path / "no"), picture, "--out", str(tmp_path / "o")).refusal()
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(cli: Callable[..., Any], network: Path, photos: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    line = cli("attention", str(network), str(photos / "one.png"), "--out", str(locked / "out")).refusal()
    assert "cannot be used" in line
