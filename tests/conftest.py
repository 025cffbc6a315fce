"""What several rooms of the tests share: ranks as forked processes, and small real objects."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import tarfile
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from dino_dist.config import AugmentSection
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe, draw
from dino_dist.dist import World
from dino_dist.views import view_recipes

TIMEOUT_S = 90.0


def _run_rank(function: Callable[..., Any], rank: int, size: int, store: str, pipe: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        world = World(rank=rank, size=size, local_rank=rank, local_size=size, host="here")
        pipe.send((True, function(world, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # skip the interpreter's shutdown, which a forked torch process does not survive cleanly


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(world, *args)` on `size` forked gloo ranks; their results (numpy, plain values) in rank order."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(size):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_run_rank, args=(function, rank, size, store, sending, args), daemon=True)
            process.start()
            sending.close()
            pipes.append(receiving)
            processes.append(process)
        results = [_receive(pipe, rank) for rank, pipe in enumerate(pipes)]
        for process in processes:
            process.join(TIMEOUT_S)
    failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
    if failed:
        raise AssertionError("\n".join(failed))
    return [value for _, value in results]


def _receive(pipe: Any, rank: int) -> tuple[bool, Any]:
    if not pipe.poll(TIMEOUT_S):
        return False, f"no answer within {TIMEOUT_S} s"
    try:
        answer: tuple[bool, Any] = pipe.recv()
        return answer
    except EOFError:
        return False, "died without an answer"


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """`ranks(size, function, *args)`: see `run_ranks`."""
    return run_ranks


def pytest_configure() -> None:
    """One thread here: a forked child waits for ever for the others of a pool that its parent has used."""
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-seed", type=int, help="Repeat the random faults of an earlier test run.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First those that fork: where torch was built with CUDA, no child can after a backward pass in this process."""
    items.sort(key=lambda item: not {"distributed", "e2e"} & {mark.name for mark in item.iter_markers()})


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """A thread that outlives its test keeps this process from ending, after all tests have passed.

    Idle threads of a pool, such as the compiler keeps, are told to end by Python itself.
    """
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon and not thread.name.startswith("ThreadPoolExecutor"):
            thread.join(5.0)
            assert not thread.is_alive(), f"{thread.name} goes on after the test that started it"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Another one each time; a failed test shows the seed."""
    seed = request.config.getoption("--fault-seed")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"repeat with --fault-seed {seed}")
    return random.Random(seed)


def write_shard(path: Path, images: list[tuple[bytes, int]], first: int = 0) -> None:
    """A tar shard of (PNG or other bytes, label)."""
    with tarfile.open(path, "w") as tar:
        for number, (data, label) in enumerate(images, first):
            for suffix, content in (("png", data), ("cls", b"%d" % label)):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def random_pngs(count: int, seed: int) -> list[tuple[bytes, int]]:
    """8 x 8 px noise with labels 0..3."""
    generator = np.random.default_rng(seed)
    images = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append((buffer.getvalue(), number % 4))
    return images


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Path]:
    """`make_shards(folder, counts, seed=0, bad=[])`: a folder of tar shards of 8-px images, the last of them `bad`."""

    def make(folder: Path, counts: list[int], seed: int = 0, bad: Sequence[bytes] = ()) -> Path:
        folder.mkdir(parents=True)
        for shard, count in enumerate(counts):
            images = random_pngs(count, seed * 100 + shard)
            if bad and shard == len(counts) - 1:
                images[-len(bad) :] = [(data, 0) for data in bad]
            write_shard(folder / f"{shard}.tar", images, first=sum(counts[:shard]))
        return folder

    return make


@pytest.fixture(scope="session")
def small_shards(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """61 images to train on, one of which is none, and 24 to evaluate with."""
    folder = tmp_path_factory.mktemp("small_shards")
    return make_shards(folder / "train", [23, 20, 18], bad=[b"no image"]), make_shards(folder / "eval", [24], seed=1)


@pytest.fixture(scope="session")
def tiny(small_shards: tuple[Path, Path]) -> Callable[..., list[str]]:
    """`tiny(run_dir, *more)`: a recipe of the tests' own and the overrides for a run in `run_dir` on `small_shards`."""
    train, test = small_shards
    data = [f"data.train={train}", f"data.eval_train={test}", f"data.eval_test={test}"]

    def settings(run_dir: Path, *more: str) -> list[str]:
        return [str(Path(__file__).with_name("tiny.yaml")), f"run.dir={run_dir}", *data, *more]

    return settings


class Pictures:
    """Pictures one after another, as a batch has them, and rows of parameters for them."""

    def __init__(self, images: Sequence[Tensor], ids: Sequence[int] | None = None) -> None:
        self.images = list(images)
        """uint8 [H, W, 3]."""
        self.ids = np.array(range(len(images)) if ids is None else ids, dtype=np.int64)
        self.pixels = torch.cat([image.flatten() for image in images])
        self.sizes = torch.tensor([image.shape[:2] for image in images])

    @classmethod
    def random(cls, sizes: Sequence[tuple[int, int]], seed: int = 0) -> Pictures:
        """Half noise and half smooth, so that both overshoot and flat regions occur."""
        generator = torch.Generator().manual_seed(seed)
        images = []
        for height, width in sizes:
            noise = torch.rand(height, width, 3, generator=generator)
            ramp = torch.linspace(0, 1, height)[:, None, None] * torch.linspace(1, 0, width)[None, :, None]
            mask = torch.arange(width)[None, :, None] < width // 2
            images.append((torch.where(mask, noise, ramp) * 255.99).to(torch.uint8))
        return cls(images)

    def chosen(self, indices: Sequence[int]) -> Pictures:
        """Some of them, in another order or repeated, under the ids that they have here."""
        return Pictures([self.images[index] for index in indices], [int(self.ids[index]) for index in indices])

    def drawn(self, recipes: Sequence[ViewRecipe], *, seed: int = 3, share_jitter: bool = False) -> Tensor:
        """Random parameters; float64 [views, n, columns]."""
        epochs, sizes = np.zeros_like(self.ids), self.sizes.numpy()
        rows = draw(recipes, seed=seed, epochs=epochs, sample_ids=self.ids, sizes=sizes, share_jitter=share_jitter)
        return torch.from_numpy(rows)

    def untouched(self) -> Tensor:
        """One view of each, cut nowhere and changed in nothing; float64 [1, n, columns]."""
        params = torch.zeros(1, len(self.images), len(Column), dtype=torch.float64)
        params[0, :, Column.HEIGHT : Column.WIDTH + 1] = self.sizes.double()
        params[..., Column.BRIGHTNESS : Column.SATURATION + 1] = 1.0
        return params


@pytest.fixture(scope="session")
def pictures() -> type[Pictures]:
    """`pictures(images)` or `pictures.random(sizes, seed=0)`: see `Pictures`."""
    return Pictures


@pytest.fixture(scope="session")
def full_recipe() -> ViewRecipe:
    """Every operation may happen."""
    return replace(view_recipes(AugmentSection())[1], size_px=32, blur_p=0.5)
