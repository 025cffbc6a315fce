"""The report as a browser shows it: no network, no console message, every picture there, in light and in dark."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from dino_dist.config_file import load_config, to_yaml
from dino_dist.dist import World
from dino_dist.ledger import JsonLines, Ledger
from dino_dist.metrics import MetricsWriter
from dino_dist.report.page import page
from dino_dist.report.run_record import Standing, read_run
from dino_dist.run_folder import RunFolder

pytestmark = pytest.mark.distributed

TINY = Path(__file__).parents[2] / "tiny.yaml"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
HOSTILE = "<img src=x onerror=\"document.body.dataset.owned='yes'\"><script>document.body.dataset.owned='yes'<"
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
MEASURE = """<script>
const wide = [...document.querySelectorAll("main > section > *, article")].filter(
    (box) => box.scrollWidth > box.clientWidth + 1);
const decoded = [...document.images].map((image) => image.decode().then(() => image.naturalWidth > 0, () => false));
Promise.all(decoded).then((pictures) => document.body.dataset.found = JSON.stringify({
  pictures,
  charts: [...document.querySelectorAll("svg.chart")].map((chart) => chart.getBoundingClientRect().width),
  page: document.documentElement.scrollWidth, window: window.innerWidth, wide: wide.map((box) => box.className),
}));
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a small run with pictures, a fault and hostile names."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / HOSTILE.replace("/", ""))
    folder.create()
    folder.config.write_text(to_yaml(load_config(str(TINY), [f"run.dir={folder.path}", "data.train=/nowhere"])))
    with folder.begin_attempt() as attempt:
        ledger = Ledger(attempt, rank=0, host=HOSTILE)
        ledger.append("start", step=0, why="2 ranks")
        writer = MetricsWriter(
            append=JsonLines(folder.metrics, attempt).append,
            tensorboard_dir=folder.tensorboard,
            purge_step=None,
            world=World(),
        )
        style = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
        images = torch.rand(4, 3, 16, 16)
        writer.image_grid(1, "crops/global", images, **style)
        for step in range(1, 41):
            row = {"loss": 7.0 - step / 20, "knn_top1": step / 50, "live_prototypes": 200, "prototype_perplexity": 90.0}
            writer.log(step, {**row, "step_s": 0.1, "images_per_s": 24.0, HOSTILE: 1.0})
        writer.attention(40, images, torch.rand(4, 2, 4, 4), **style)
        writer.attention(20, images, torch.rand(4, 2, 4, 4), **style)
        writer.histogram(40, "health/prototype_usage", torch.rand(256) * 2)
        writer.close()
        ledger.append("fault", step=40, why=HOSTILE, stacks={"0": HOSTILE})
    standing = Standing(state="FAILED", now_s=1_900_000_000.0, total_steps=40, notes=(HOSTILE,))
    return page(read_run(folder.path, standing))


def visit(browser: str, text: str, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open the page; what it says and what it logs."""
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    command = [browser, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *flags, file.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in ended.stderr, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    return ended


@pytest.mark.parametrize("width_px", [1400, 500])
def test_all_is_there_and_fits(browser: str, text: str, tmp_path: Path, width_px: int) -> None:
    """Measured by a script of the test's own, without the page's policy: escaping alone guards then."""
    bare = POLICY.sub("", text).replace("</body>", MEASURE)
    ended = visit(browser, bare, tmp_path, f"--window-size={width_px},1000", "--virtual-time-budget=5000", "--dump-dom")
    assert "data-owned" not in ended.stdout
    told = re.search(r'data-found="([^"]*)"', ended.stdout)
    assert told is not None
    found = json.loads(told.group(1).replace("&quot;", '"'))
    assert len(found["pictures"]) == 3
    assert all(found["pictures"])
    assert len(found["charts"]) >= 7
    assert min(found["charts"]) > 250
    assert found["page"] <= found["window"], "no sideways scrolling of the page"
    assert found["wide"] == []


def test_it_runs_no_script_and_logs_nothing(browser: str, text: str, tmp_path: Path) -> None:
    ended = visit(browser, text, tmp_path, "--dump-dom")
    assert "data-owned" not in ended.stdout
    assert "FAILED".lower() in ended.stdout


def test_a_script_in_it_would_not_run(browser: str, text: str, tmp_path: Path) -> None:
    """The second wall: the page's own policy; without it the same script does run."""
    ran = {}
    for name, page_text in (("with", text), ("without", POLICY.sub("", text))):
        file = tmp_path / f"{name}.html"
        script = "<script>document.body.dataset.ran = 1</script></body>"
        file.write_text(page_text.replace("</body>", script), encoding="utf-8")
        command = [browser, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        ran[name] = 'data-ran="1"' in ended.stdout
    assert ran == {"with": False, "without": True}


def test_light_and_dark(browser: str, text: str, tmp_path: Path) -> None:
    corner: dict[str, int] = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        flags = (
            f"--screenshot={picture}",
            "--window-size=1400,2400",
            f"--blink-settings=preferredColorScheme={number}",
        )
        visit(browser, text, tmp_path, *flags)
        with Image.open(io.BytesIO(picture.read_bytes())) as image:
            gray = image.convert("L")
            corner[scheme] = int(gray.getpixel((3, 3)))
            assert len(set(gray.resize((140, 240)).tobytes())) > 40, "there is something to see"
    assert corner["dark"] < 40
    assert corner["light"] > 220
