"""Lists of queries and gallery: both layouts mean what they say, and whatever is wrong is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dino_dist.errors import UserError
from dino_dist.eval.relevance_list import read_relevance_list
from dino_dist.eval.retrieval import EASY, HARD, JUNK

GOOD: dict[str, Any] = {
    "imlist": ["a", "b", "c", "d"],
    "qimlist": ["p", "q"],
    "gnd": [
        {"easy": [0], "hard": [2], "junk": [3], "bbx": [1.5, 2, 30, 40]},
        {"easy": [], "hard": [], "junk": []},
    ],
}


def written(folder: Path, text: str, name: str = "list.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_published_layout(tmp_path: Path) -> None:
    found = read_relevance_list(written(tmp_path, json.dumps(GOOD)))
    assert found.gallery == ("a", "b", "c", "d")
    assert found.queries == ("p", "q")
    assert found.relation(slice(0, 2)).tolist() == [[EASY, 0, HARD, JUNK], [0, 0, 0, 0]]
    assert found.relation(slice(1, 2)).tolist() == [[0, 0, 0, 0]]
    assert found.boxes == ((1.5, 2.0, 30.0, 40.0), None)
    assert found.graded


def test_lines_of_groups(tmp_path: Path) -> None:
    lines = [
        "# a comment",
        "query\tq1.jpg\ttower",
        "gallery\tg1.jpg\ttower",
        "",
        "gallery\tg2.jpg\ttower\thard",
        "gallery\tg3.jpg\ttower\tjunk",
        "gallery\tnobody.jpg",
        "both\tb.jpg\tbridge\teasy",
        "both\tc.jpg\tbridge",
        "query\tlost.jpg\t",
    ]
    found = read_relevance_list(written(tmp_path, "\n".join(lines), "list.tsv"))
    assert found.queries == ("q1.jpg", "b.jpg", "c.jpg", "lost.jpg")
    assert found.gallery == ("g1.jpg", "g2.jpg", "g3.jpg", "nobody.jpg", "b.jpg", "c.jpg")
    assert found.relation(slice(0, 4)).tolist() == [
        [EASY, HARD, JUNK, 0, 0, 0],
        [0, 0, 0, 0, JUNK, EASY],
        [0, 0, 0, 0, EASY, JUNK],
        [0, 0, 0, 0, 0, 0],
    ]


def _with(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


def _first(**changes: Any) -> str:
    return _with(gnd=[GOOD["gnd"][0] | changes, GOOD["gnd"][1]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "must hold an object"),
        (_with(imlist=None), "imlist must be a list"),
        (_with(qimlist=["p", 3]), "qimlist must be a list"),
        (_with(gnd=GOOD["gnd"][:1]), "one entry for each of the 2 queries"),
        (_with(gnd=[1, 2]), r"gnd\[0\] must be an object"),
        (_first(easy=3), r"gnd\[0\].easy must be a list"),
        (_first(easy=[4]), r"gnd\[0\].easy has 4: numbers of imlist go from 0 to 3"),
        (_first(easy=[-1]), "has -1"),
        (_first(easy=[True]), "has True"),
        (_first(easy=[2]), r"gallery image 2 twice"),
        (_first(bbx=[1, 2, 3]), "bbx must be four numbers"),
        (_first(bbx=[5, 2, 3, 4]), "is no box"),
        (_first(bbx=[1, 2, 10**400, 4]), "is no box"),
        ('{"imlist": [], "qimlist": [], "gnd": []}', "0 queries and 0 gallery images"),
    ],
)
def test_a_wrong_json_list_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        read_relevance_list(written(tmp_path, text))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("querry\ta\tg", "line 2 must read ROLE"),
        ("query", "line 2 must read ROLE"),
        ("gallery\t\tg", "line 2 must read ROLE"),
        ("gallery\ta\tg\teasy\tmore", "line 2 must read ROLE"),
        ("gallery\ta\tg\tsimple", "grade 'simple'"),
        ("query\ta\tg\thard", "grade 'hard' of a query"),
        ("both\tx\tg", "x is twice among the queries"),
    ],
)
def test_a_wrong_line_is_refused(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_relevance_list(written(tmp_path, f"query\tx\tg\n{line}\ngallery\ty\tg\n", "list.tsv"))


def test_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="convert the published pickle to JSON"):
        read_relevance_list(written(tmp_path, "", "gnd_roxford5k.pkl"))
    with pytest.raises(UserError, match=r"must end in \.json"):
        read_relevance_list(tmp_path / "list.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_relevance_list(tmp_path / "absent.json")
