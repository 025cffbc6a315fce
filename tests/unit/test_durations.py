"""Durations: every way of writing one, and the steps it means."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_dist.durations import Duration
from dino_dist.errors import UserError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("5000st", 5000, "st"),
        ("5000", 5000, "st"),
        (" 10ep ", 10, "ep"),
        ("0.5ep", 0.5, "ep"),
        ("0ep", 0, "ep"),
        ("1.28Mim", 1.28e6, "im"),
        ("300kim", 3e5, "im"),
        ("5k", 5000, "st"),
        ("2kst", 2000, "st"),
        ("7im", 7, "im"),
    ],
)
def test_what_is_written_is_what_is_meant(text: str, amount: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(amount, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ep",
        "-1ep",
        "+1ep",
        "1 ep",
        "1e3",
        "1.",
        ".5ep",
        "10epochs",
        "10EP",
        "inf",
        "nanst",
        "1.5.2",
        "1kkst",
        "٣ep",
        "${a}",
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="5000st"):
        Duration.parse(text)


def test_a_number_beyond_floats_is_refused() -> None:
    with pytest.raises(UserError, match="5000st"):
        Duration.parse("9" * 400 + "ep")


@pytest.mark.parametrize(
    ("text", "batch_size", "dataset_size", "steps"),
    [
        ("0ep", 8, 100, 0),
        ("1ep", 8, 100, 13),  # 12.5 batches: a partial step is a step
        ("2ep", 8, 100, 25),
        ("10im", 8, 100, 2),
        ("8im", 8, 100, 1),
        ("1st", 8, 100, 1),
        ("0.1st", 8, 100, 1),
        ("0.1ep", 1, 30, 3),  # the float product 0.1 * 30 lies above 3
        ("300ep", 1056, 1_281_167, 363_968),
        ("1.28Mim", 1024, 1_281_167, 1250),
    ],
)
def test_steps(text: str, batch_size: int, dataset_size: int, steps: int) -> None:
    assert Duration.parse(text).steps(batch_size=batch_size, dataset_size=dataset_size) == steps


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    tenths=st.integers(0, 10_000),
    unit=st.sampled_from(["st", "ep", "im"]),
    batch_size=st.integers(1, 5000),
    dataset_size=st.integers(1, 2_000_000),
)
def test_steps_are_the_exact_quotient_rounded_up(tenths: int, unit: str, batch_size: int, dataset_size: int) -> None:
    images = Fraction(tenths, 10) * {"st": batch_size, "ep": dataset_size, "im": 1}[unit]
    steps = Duration.parse(f"{tenths // 10}.{tenths % 10}{unit}").steps(
        batch_size=batch_size, dataset_size=dataset_size
    )
    assert steps == math.ceil(images / batch_size)
