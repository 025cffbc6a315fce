"""The report of a run: what it computes from the files, by hand-worked examples, and that bad files are survived."""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_dist.config_file import load_config, to_yaml
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.ledger import JsonLines, Ledger
from dino_dist.metrics import MetricsWriter, json_row
from dino_dist.report.event_files import read_sights
from dino_dist.report.headline import checks
from dino_dist.report.markup import Markup, element, escape
from dino_dist.report.page import FIRST_LINE, page
from dino_dist.report.run_record import RunRecord, Standing, read_run
from dino_dist.report.settings import read_settings
from dino_dist.report.write import write_report
from dino_dist.run_folder import RunFolder
from launch.cli_report import report

TINY = Path(__file__).parents[2] / "tiny.yaml"
BEGIN_S = 1_900_000_000.0
HOSTILE = (
    "'\"><script>document.documentElement.id='owned'</script><img src=x onerror=document.documentElement.id='owned'>"
)
NO_SLASH = HOSTILE.replace("/", "")
TAGS = set(
    "html head meta title style body header main footer section article div nav p h1 h2 h3 h4 a span b small ul li "
    "dl dt dd table thead tbody tr th td code details summary pre figure figcaption img input label "
    "svg g path line rect circle text".split()
)


def moment(seconds: float) -> str:
    """`seconds` after the begin, as the ledger writes it."""
    from dino_dist.report.wording import moment as text

    return text(BEGIN_S + seconds).removesuffix(" UTC").replace(" ", "T") + "+00:00"


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def event(attempt: int, at_s: float, kind: str, step: int | None, why: str = "", **more: Any) -> dict[str, Any]:
    row = {"time": moment(at_s), "event": kind, "step": step, "attempt": attempt, "rank": 0, "host": "n0", "why": why}
    return row | more


def owner(folder: RunFolder, number: int, at_s: float, heartbeat_s: float) -> None:
    """The file of an attempt that began at `at_s` and gave its last sign of life at `heartbeat_s`."""
    facts = {"number": number, "host": "n0", "pid_namespace": "", "pid": 1, "process_started": 0.0}
    facts |= {"job_id": None, "restarts": None, "heartbeat_s": 5.0, "time": moment(at_s)}
    folder.attempt_file(number).write_text(json.dumps(facts))
    os.utime(folder.attempt_file(number), (BEGIN_S + heartbeat_s, BEGIN_S + heartbeat_s))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder that has begun and logged nothing."""
    made = RunFolder(tmp_path / "run")
    made.create()
    made.config.write_text(to_yaml(load_config(str(TINY), [f"run.dir={made.path}", "data.train=/nowhere"])))
    return made


@pytest.fixture
def killed_once(folder: RunFolder) -> RunFolder:
    """Killed at second 50 after its only save, of step 10, at second 30; went on from it and ended at step 30."""
    owner(folder, 1, 0, 50)
    owner(folder, 2, 60, 500)
    ledger = [
        event(1, 10, "start", 0, "2 ranks"),
        event(1, 30, "save", 10),
        event(1, 40, "signal", 14, "SIGUSR2"),
        event(2, 69, "restore", 10),
        event(2, 70, "start", 10, "2 ranks"),
        event(2, 118, "save", 30),
        event(2, 120, "stop", 30, "reached train.length", exit_code=0),
    ]
    write_lines(folder.ledger, ledger)
    write_lines(folder.metrics, [{"step": step, "step_s": 2.0, "loss": 3.0 - step / 30} for step in range(5, 31, 5)])
    os.utime(folder.config, (BEGIN_S + 69, BEGIN_S + 69))
    return folder


def read(folder: RunFolder, state: str = "COMPLETED", **more: Any) -> RunRecord:
    return read_run(folder.path, Standing(state=state, now_s=BEGIN_S + 200, **more))


class Reader(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


def assert_harmless(text: str) -> None:
    """Only our tags, nothing that runs, nothing from outside."""
    seen = Reader(text)
    assert seen.tags <= TAGS, seen.tags - TAGS
    for tag, name, value in seen.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href"):
            assert value.startswith(("#", "data:image/png;base64,", "data:image/webp;base64,")), (tag, value[:80])
        if name == "style":
            assert value.startswith(("width:", "flex-grow:")), value
    assert "url(" not in text
    assert "@import" not in text


def test_the_wall_time_of_a_killed_run_adds_up(killed_once: RunFolder) -> None:
    record = read(killed_once)
    wall = record.wall
    assert wall is not None
    assert (wall.starting_s, wall.between_s, wall.total_s) == (20.0, 10.0, 120.0)
    assert wall.counted_s == 60.0, "30 steps of 2 seconds, each counted once"
    assert wall.lost_s == 20.0, "from the save at 30 s to the last heartbeat at 50 s"
    assert wall.other_s == 10.0, "50 seconds of the second attempt, of which 40 are steps"
    assert wall.goodput == 0.5
    first, second = record.attempts
    assert (first.ending, first.kept_step, first.last_step, first.lost_steps) == ("killed", 10, 14, 4)
    assert (second.ending, second.kept_step, second.lost_steps) == ("done", 30, 0)
    assert (record.restarts, record.step) == (1, 30)


def test_times_of_a_copied_folder_are_not_believed(killed_once: RunFolder) -> None:
    os.utime(killed_once.config)
    os.utime(killed_once.attempt_file(1))
    first = read(killed_once).attempts[0]
    assert first.ended_s == BEGIN_S + 40, "its last word, since the heartbeat is that of the copy"


def test_a_checkpoint_that_was_damaged_costs_the_steps_of_two_attempts(folder: RunFolder) -> None:
    ledger = [
        event(1, 0, "start", 0),
        event(1, 10, "save", 10),
        event(1, 20, "save", 20),
        event(1, 21, "requeue", 20, "runs again"),
        event(2, 30, "start", 20),
        event(2, 40, "fault", 25, "rank 1 on n1: Killed", suspect_host="n1"),
        event(2, 41, "requeue", 25, "runs again", after_crash=True),
        event(3, 50, "fault", None, "step-00000020 does not verify"),
        event(3, 51, "start", 10),
    ]
    write_lines(folder.ledger, ledger)
    write_lines(folder.metrics, [{"step": 12, "step_s": 1.0}])
    one, two, three = read(folder, state="RUNNING").attempts
    assert [(story.kept_step, story.lost_steps) for story in (one, two, three)] == [(10, 10), (10, 5), (12, 0)]
    assert (one.ending, two.ending, two.why, three.ending) == ("requeued", "failed", "rank 1 on n1: Killed", "running")
    assert three.ended_s == BEGIN_S + 200, "a running attempt lasts until now"


def test_an_attempt_without_a_word_is_told_too(folder: RunFolder) -> None:
    owner(folder, 1, 5, 9)
    record = read(folder, state="KILLED")
    assert [(story.ending, story.ready_s) for story in record.attempts] == [("killed", None)]
    assert record.wall is not None
    assert record.wall.counted_s is None
    assert_harmless(page(record))


def test_text_cannot_become_markup() -> None:
    assert element("b", HOSTILE, title=HOSTILE) == Markup(f'<b title="{escape(HOSTILE)}">{escape(HOSTILE)}</b>')
    assert "<" not in escape(HOSTILE)
    assert '"' not in escape(HOSTILE)
    joined = Markup("<b>") + "<i>"
    assert escape(joined) == "&lt;b&gt;&lt;i&gt;", "joined to a text it is a text"
    assert escape("a\ud800\u202eb\x00\nc") == "a\ufffd\ufffdb\ufffd\nc"


def test_a_run_that_just_began(folder: RunFolder) -> None:
    write_lines(folder.ledger, [event(1, 0, "start", 0, "2 ranks")])
    text = page(read(folder, state="RUNNING", total_steps=16))
    assert_harmless(text)
    assert "step 0 of 16 (0.0%)" in text
    assert "it has logged no row yet" in text
    assert "No pictures" in text


def test_an_empty_folder_makes_a_page(tmp_path: Path) -> None:
    record = read_run(tmp_path, Standing(state="NEW", now_s=BEGIN_S))
    assert (record.attempts, record.wall, record.step) == ((), None, 0)
    assert "This run has not begun." in page(record)


def test_broken_lines_are_left_out_and_said(folder: RunFolder) -> None:
    rows = [
        '{"step": 1, "loss": 1.0}',
        '{"step": 2, "lo',
        "[1, 2]",
        "\x00\xff",
        "[" * 100_000,
        '{"step": 3, "loss": 2.0}',
    ]
    folder.metrics.write_text("\n".join(rows) + '\n{"step": 4, "loss')
    folder.ledger.write_text('{"event": "start"}\nnothing\n{"event": 7, "time": [], "attempt": "x", "why": null}\n')
    record = read(folder)
    assert record.metrics.series["loss"].num_rows == 2
    assert record.metrics.broken == 4, "the line that is being written now is none"
    assert "4 lines of metrics.jsonl are torn" in page(record)
    assert "1 lines of ledger.jsonl are torn" in page(record)


@pytest.mark.parametrize("step", [True, -1, 10**40, "7", None, 1.5, float("inf")])
def test_a_row_without_a_sensible_step_is_no_point(folder: RunFolder, step: Any) -> None:
    write_lines(
        folder.metrics, [{"step": step, "loss": 1.0}, {"step": 3, "loss": float("nan"), "kl": 10**400, "lr": True}]
    )
    record = read(folder)
    assert record.metrics.series == {}
    assert_harmless(page(record))


def test_numbers_that_were_not_finite_are_told_of(folder: RunFolder) -> None:
    """Else a loss that has become NaN would pass for its last finite value."""
    write_lines(folder.metrics, [json_row(1, {"loss": 3.0, "kl": 1.0})])
    assert verdicts(folder, "Logged numbers") == [("good", "every one was finite")]
    write_lines(folder.metrics, [json_row(1, {"loss": 3.0}), json_row(2, {"loss": math.nan, "kl": math.inf})])
    assert verdicts(folder, "Logged numbers") == [("warn", "2 were not finite; curves and figures leave them out")]
    assert "2 were not finite" in page(read(folder))


def verdicts(folder: RunFolder, name: str) -> list[tuple[str, str]]:
    return [(check.verdict, check.words) for check in checks(read(folder)) if check.name == name]


def test_numbers_beyond_any_axis_are_left_out(folder: RunFolder) -> None:
    huge = [{"step": 1, "loss": 1e308, "grad_norm": 5e-324}, {"step": 2, "loss": -1e308, "grad_norm": 1.7e308}]
    write_lines(folder.metrics, [*huge, {"step": 3, "loss": 2.0, "grad_norm": 1e99}])
    record = read(folder)
    assert record.metrics.series["loss"].highest == 2.0
    assert_harmless(page(record))


def test_only_the_settings_that_differ_are_marked(folder: RunFolder) -> None:
    found = {f"{row.section}.{row.name}": row for row in read_settings(folder.path).rows}
    assert found["data.train"].value == "/nowhere"
    assert found["data.train"].default == '""'
    assert found["loss.student_temp"].default is None
    assert read_settings(folder.path / "missing").rows == ()


def test_a_config_of_another_version_is_shown_as_it_is(folder: RunFolder) -> None:
    folder.config.write_text("train: {length: 3st, tomorrow: [1, 2]}\nloose: 4\n")
    found = read_settings(folder.path)
    assert [(row.section, row.name, row.value) for row in found.rows] == [
        *(("train", "length", "3st"), ("train", "tomorrow", "[1, 2]"), ("loose", "", "4"))
    ]
    assert "tomorrow" in found.notes[0]


@pytest.fixture
def pictured(folder: RunFolder) -> Callable[..., RunFolder]:
    """`pictured(tag)`: the run with crops, three attention sheets and histograms, written as a run writes them."""

    def write(tag: str = "crops/local") -> RunFolder:
        with folder.begin_attempt() as attempt:
            ledger = Ledger(attempt, rank=0)
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
            writer.image_grid(1, tag, images[:, :, :8, :8], **style)
            for step in (10, 20, 30):
                writer.log(step, {"loss": 3.0 / step, "knn_top1": step / 40, "step_s": 0.5, "images_per_s": 24.0})
                writer.attention(step, images, torch.rand(4, 2, 4, 4), **style)
                writer.histogram(step, "health/prototype_usage", torch.rand(256) * 2)
            writer.close()
            ledger.append("save", step=30, why="step-00000030 committed", seconds=0.1)
            ledger.append("stop", step=30, why="reached train.length", exit_code=0)
        return folder

    return write


def test_pictures_and_histograms_are_read(pictured: Callable[..., RunFolder]) -> None:
    sights = read_sights(pictured().tensorboard)
    assert {tag: [picture.step for picture in found] for tag, found in sights.pictures.items()} == {
        "attention/cls": [10, 20, 30],
        "crops/global": [1],
        "crops/local": [1],
    }
    assert [sum(histogram.counts) for histogram in sights.histograms["health/prototype_usage"]] == [256.0] * 3
    assert sights.notes == ()


def test_damaged_event_files_cost_pictures_only(pictured: Callable[..., RunFolder], rng: random.Random) -> None:
    folder = pictured()
    file = next(folder.tensorboard.glob("events.out.tfevents.*"))
    whole = file.read_bytes()
    for _ in range(8):
        damaged = bytearray(whole[: rng.randrange(100, len(whole))])
        for _ in range(rng.randrange(4)):
            damaged[rng.randrange(len(damaged))] ^= 0xFF
        file.write_bytes(damaged)
        assert_harmless(page(read(folder)))


def test_large_pictures_are_shrunk_and_broken_ones_left_out(folder: RunFolder) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder.tensorboard))
    board.add_image("noise", torch.randint(0, 256, (3, 600, 2400), dtype=torch.uint8), 1)
    png = a_large_png()
    for step, content in ((2, png[:1000]), (3, b"no picture"), (4, b"")):
        image = Summary.Image(height=1, width=1, colorspace=3, encoded_image_string=content)
        board.file_writer.add_summary(Summary(value=[Summary.Value(tag="noise", image=image)]), step)
    board.close()
    sights = read_sights(folder.tensorboard)
    (picture,) = sights.pictures["noise"]
    assert (picture.media_type, picture.width_px, picture.height_px) == ("image/webp", 1800, 450)
    assert len(picture.content) < len(png)
    assert len(sights.notes) == 3
    assert "a picture of noise at step 3 cannot be decoded" in page(read(folder))


def a_large_png() -> bytes:
    """A PNG large enough to be shrunk."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (600, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_name_is_escaped(pictured: Callable[..., RunFolder], tmp_path: Path) -> None:
    folder = pictured(HOSTILE)
    record = read(hostile(folder, tmp_path), facts=((HOSTILE, HOSTILE),), notes=(HOSTILE,))
    text = page(record)
    assert_harmless(text)
    assert Reader(text).words.count("owned") > 20, "it is all there, as text"
    text.encode("utf-8")


def hostile(folder: RunFolder, tmp_path: Path) -> RunFolder:
    """Hostile words wherever a run's files have words of others."""
    with open(folder.metrics, "a") as file:
        file.write(json.dumps({"step": 30, HOSTILE: 1.0, "knn_" + HOSTILE: 0.5, "linear_\ud800": 0.5}) + "\n")
    words = {"why": HOSTILE + "\ud800", "host": HOSTILE, HOSTILE: [HOSTILE]}
    with open(folder.ledger, "a") as file:
        for kind in ("fault", "signal", "save", "start", HOSTILE):
            file.write(json.dumps(event(2, 100, kind, 30, **words)) + "\n")
        file.write(
            json.dumps(event(2, 101, "fault", 30, **words, alarm=HOSTILE, stacks={HOSTILE: HOSTILE * 200})) + "\n"
        )
    config = load_config(str(TINY), [f"run.dir={folder.path}", f"data.train={json.dumps(HOSTILE)}"])
    folder.config.write_text(to_yaml(config))
    moved = tmp_path / NO_SLASH
    folder.path.rename(moved)
    return RunFolder(moved)


def test_only_a_report_is_replaced(folder: RunFolder, tmp_path: Path) -> None:
    standing = Standing(state="NEW", now_s=BEGIN_S)
    out = tmp_path / "page.html"
    first = write_report(folder.path, out, standing)
    assert out.read_text(encoding="utf-8").startswith(FIRST_LINE)
    assert first.size_bytes == out.stat().st_size
    write_report(folder.path, out, standing)
    folder.metrics.write_text("precious")
    with pytest.raises(UserError, match=r"metrics\.jsonl is there already and is no report"):
        write_report(folder.path, folder.metrics, standing)
    assert folder.metrics.read_text() == "precious"
    with pytest.raises(UserError, match="is a folder"):
        write_report(folder.path, tmp_path, standing)
    for bad in (tmp_path / "missing" / "page.html", out / "page.html", Path("/proc/page.html"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot be written"):
            write_report(folder.path, bad, standing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"], "no temporary file stays"


def test_the_command(killed_once: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(killed_once.path, None, True)
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(killed_once.path / "report.html")
    assert Path(found["report"]).is_file()
    assert (found["attempts"], found["restarts"], found["steps_done_again"], found["goodput"]) == (2, 1, 4, 0.5)
    with pytest.raises(UserError, match="no run folder"):
        report(tmp_path / "nowhere", None, False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        report(tmp_path / "empty", None, False)
