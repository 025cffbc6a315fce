"""Options of a job: what the user may write, what it means, and that anything else is one clear line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_dist.errors import UserError
from launch.job_options import JobOptions, parse_nodes, parse_slurm, parse_time_min, signal_delay_s


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("90m", 90),
        ("72h", 72 * 60),
        ("2d", 2 * 24 * 60),
        ("01:30:00", 90),
        ("100:00:00", 6000),
        ("10:30", 11),
        ("0:01", 1),
        ("3-00:00:00", 3 * 24 * 60),
        ("1-2", 26 * 60),
        ("1-2:30", 26 * 60 + 30),
        ("0-00:00:01", 1),
        (" 5 ", 5),
    ],
)
def test_times_are_whole_minutes_rounded_up(text: str, minutes: int) -> None:
    assert parse_time_min(text) == minutes


@pytest.mark.parametrize(
    "text",
    ["", "5x", "h", "-5", "1.5h", "1:2:3:4", "1-24", "1-0:60", "0:60:00", "10:60", "1-", "1h30", "٣", "5 m", "9" * 9],
)
def test_what_is_no_time_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(UserError, match=r"--time .*give minutes as in 30, or 90m, 72h, 2d"):
        parse_time_min(text)


@pytest.mark.parametrize("text", ["0", "0h", "00:00", "0-0"])
def test_no_time_at_all_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="at least one minute"):
        parse_time_min(text)


@given(days=st.integers(0, 99), hours=st.integers(0, 23), minutes=st.integers(0, 59), seconds=st.integers(0, 59))
def test_the_forms_of_one_time_agree(days: int, hours: int, minutes: int, seconds: int) -> None:
    total_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total_s:
        return
    by_days = parse_time_min(f"{days}-{hours:02d}:{minutes:02d}:{seconds:02d}")
    assert by_days == parse_time_min(f"{days * 24 + hours}:{minutes:02d}:{seconds:02d}")
    assert by_days == parse_time_min(f"{total_s // 60}:{seconds:02d}")
    assert (by_days - 1) * 60 < total_s <= by_days * 60


@pytest.mark.parametrize(("text", "nodes"), [("4", (4, 4)), ("2-8", (2, 8)), (" 1-1 ", (1, 1))])
def test_nodes(text: str, nodes: tuple[int, int]) -> None:
    assert parse_nodes(text) == nodes


@pytest.mark.parametrize("text", ["", "0", "0-2", "-1", "2-", "many", "1.5", "2-1", "1-2-3", "9" * 8])
def test_what_is_no_number_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--nodes"):
        parse_nodes(text)


def test_further_options_of_sbatch() -> None:
    assert parse_slurm(["reservation=a=b", "--exclusive", "core_spec=2", "nice=true"]) == {
        "reservation": "a=b",
        "exclusive": "true",
        "core-spec": "2",
        "nice": "true",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes=3", "use --nodes"),
        ("ntasks_per_node=3", "use --tasks-per-node"),
        ("time=3", "use --time"),
        ("output=x", "launch sets this itself"),
        ("no-requeue", "launch sets this itself"),
        ("N=3", "long option"),
        ("=3", "long option"),
        ("a b=3", "long option"),
    ],
)
def test_options_that_are_not_free_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_slurm([text])


@pytest.mark.parametrize(
    "wrong",
    [
        {"comment": "two\nlines"},
        {"partition": ""},
        {"account": "a\0b"},
        {"setup": ("a\nb",)},
        {"slurm": {"reservation": "x\n#SBATCH --wrap"}},
        {"nodes_min": 3},
        {"nodes_min": 0},
        {"tasks_per_node": 0},
        {"gpus_per_node": -1},
        {"cpus_per_task": 0},
        {"time_min": 0},
    ],
)
def test_values_that_would_break_the_script_or_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError) as refused:
        JobOptions(**{"nodes_min": 1, "nodes_max": 2} | wrong)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_ranks_of_a_range_of_nodes() -> None:
    options = JobOptions(nodes_min=2, nodes_max=4, tasks_per_node=8)
    assert (options.world_min, options.world_max, options.nodes) == (16, 32, "2-4")


@given(st.integers(1, 10**6))
def test_the_warning_leaves_most_of_the_time_to_work(time_min: int) -> None:
    delay_s = signal_delay_s(time_min)
    assert 1 <= delay_s <= 120
    assert 4 * delay_s <= 60 * time_min
    assert delay_s == 120 or time_min < 8
