"""Whatever is given for settings, drawn or damaged at random, is taken or refused in one line."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_dist.config import Config, leaves
from dino_dist.config_checks import check
from dino_dist.config_file import load_config, recipe_path
from dino_dist.errors import UserError

TRAIN = "data.train=shards"


def one_line_at_most(load: Callable[[], Config]) -> None:
    """Loading gives a config that passes the check, or one line; any other exception gets out."""
    said = ""
    try:
        check(load())
    except UserError as error:
        said = str(error)
    assert "\n" not in said, said


def only_user_errors(text: str, folder: Path) -> None:
    file = folder / "fuzzed.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    one_line_at_most(lambda: load_config(str(file)))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["10ep", "${a}", "???", "vit_small", "1e400", "0x10", "2020-01-01", "!!binary aaaa", "<<", "&a *a"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([key for key, _, _ in leaves(Config())])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(entries=st.lists(st.tuples(KEYS, VALUES), max_size=4))
def test_any_value_under_any_key_is_taken_or_refused_in_one_line(
    entries: list[tuple[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sections: dict[str, Any] = {"data": {"train": "shards"}}
    for key, value in entries:
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    only_user_errors(yaml.safe_dump(sections, allow_unicode=True), tmp_path_factory.getbasetemp())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(key=KEYS | st.text(max_size=12), value=st.text(max_size=12))
def test_any_override_is_taken_or_refused_in_one_line(key: str, value: str) -> None:
    one_line_at_most(lambda: load_config(None, [TRAIN, f"{key}={value}"]))


def test_damaged_recipes_are_taken_or_refused_in_one_line(tmp_path: Path) -> None:
    seed = 20
    generator = random.Random(seed)
    text = recipe_path("dino_vitb8_in1k_300ep").read_text(encoding="utf-8")
    text = text[text.index("model:") :] + "data:\n  train: shards\n"
    for _ in range(80):
        damaged = list(text)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(damaged))
            action = generator.randrange(3)
            if action == 0:
                del damaged[place]
            elif action == 1:
                damaged.insert(place, generator.choice("[]{}:,#&*!|>'\"%@`\t\n -0\x00\ud800\u2028"))
            else:
                damaged[place] = chr(generator.randrange(1, 0x300))
        only_user_errors("".join(damaged), tmp_path)
