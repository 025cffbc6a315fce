"""Signals become one agreed word; workers neither take the word nor die of it."""

from __future__ import annotations

import multiprocessing
import signal
import time

import pytest
import torch

from dino_dist.errors import StopAsked
from dino_dist.preemption import (
    GO_ON,
    SAVE_AND_EXIT,
    SAVE_AND_REQUEUE,
    AgreedWord,
    StopReason,
    StopSignals,
    TimeLimit,
)
from dino_dist.slurm import SlurmError

FORK = multiprocessing.get_context("fork")
STOPPING = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize(
    ("sent", "word"),
    [
        ([], GO_ON),
        ([signal.SIGUSR2], SAVE_AND_REQUEUE),
        ([signal.SIGTERM], SAVE_AND_REQUEUE),
        ([signal.SIGINT], SAVE_AND_EXIT),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2], SAVE_AND_REQUEUE),
        ([signal.SIGTERM, signal.SIGINT], SAVE_AND_EXIT),
        ([signal.SIGINT, signal.SIGTERM], SAVE_AND_EXIT),
        ([signal.SIGCONT], GO_ON),
        # A terminal and a launcher both pass one Ctrl-C on.
        ([signal.SIGINT, signal.SIGINT], SAVE_AND_EXIT),
    ],
)
def test_signals_set_the_word_and_its_first_reason(sent: list[signal.Signals], word: int) -> None:
    with StopSignals() as signals:
        for number in sent:
            signal.raise_signal(number)
        assert signals.word == word
        named = signals.reason.name if signals.reason else None
        assert named == (sent[0].name if word else None)


def test_second_interrupt_of_a_human_ends_at_once() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.reason is not None
        signals.reason = StopReason(name="SIGINT", at_s=signals.reason.at_s - 5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_repeated_interrupt_in_a_job_is_no_human() -> None:
    with StopSignals(at_a_terminal=False) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.reason is not None
        signals.reason = StopReason(name="SIGINT", at_s=signals.reason.at_s - 5)
        signal.raise_signal(signal.SIGINT)
        assert signals.word == SAVE_AND_EXIT


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (*STOPPING, signal.SIGCONT)]
    with StopSignals():
        during = [signal.getsignal(number) for number in (*STOPPING, signal.SIGCONT)]
    assert not set(during) & set(before)
    assert [signal.getsignal(number) for number in (*STOPPING, signal.SIGCONT)] == before


def test_time_limit_leaves_room_for_two_saves() -> None:
    signals = StopSignals(margin_s=30)
    end_s = time.time() + 1000
    signals.time_limit = TimeLimit(lambda: end_s)
    assert signals.word == GO_ON
    signals.save_s = 400
    assert signals.word == GO_ON
    signals.save_s = 600
    assert signals.word == SAVE_AND_REQUEUE
    assert signals.reason is not None
    assert signals.reason.name == "time limit"
    signals.save_s = 0
    assert signals.word == SAVE_AND_REQUEUE, "once given, the word stays"


def test_more_time_given_by_an_administrator_is_taken() -> None:
    ends_s = [time.time() + 100]
    limit = TimeLimit(lambda: ends_s[-1])
    ends_s.append(time.time() + 10_000)
    assert not limit.is_near(step_s=0, save_s=100, margin_s=30)
    assert limit.is_near(step_s=0, save_s=6000, margin_s=30)


def test_an_unmeasured_save_takes_at_most_a_quarter_of_a_short_job() -> None:
    end_s = time.time() + 120
    limit = TimeLimit(lambda: end_s)
    assert not limit.is_near(step_s=0, save_s=None, margin_s=30)


def test_slow_steps_are_allowed_for() -> None:
    end_s = time.time() + 100
    limit = TimeLimit(lambda: end_s)
    assert not limit.is_near(save_s=1, step_s=10, margin_s=30)
    assert limit.is_near(save_s=1, step_s=40, margin_s=30)


def test_a_job_without_a_limit_never_ends() -> None:
    assert not TimeLimit(lambda: None).is_near(step_s=0, save_s=1e9, margin_s=30)


def test_a_controller_that_does_not_answer_changes_nothing() -> None:
    answers: list[float | None] = [time.time() + 100, None]

    def ask() -> float | None:
        answer = answers.pop(0)
        if answer is None:
            raise SlurmError("unable to contact the controller")
        return answer

    assert TimeLimit(ask).is_near(step_s=0, save_s=100, margin_s=30)


def test_before_the_first_step_a_word_is_an_exception() -> None:
    with StopSignals() as signals:
        signals.raise_if_asked()
        signal.raise_signal(signal.SIGUSR2)
        with pytest.raises(StopAsked) as asked:
            signals.raise_if_asked()
    assert asked.value.word == SAVE_AND_REQUEUE


def test_agreed_word_is_read_one_step_late() -> None:
    agreed = AgreedWord()
    assert agreed.read() is None
    assert agreed.latest() is None
    vector = torch.zeros(3)
    for step in range(5):
        vector.fill_(step)
        agreed.post(vector)
        vector.fill_(-1)
        assert agreed.read() == (None if step == 0 else [step - 1.0] * 3)
        assert agreed.latest() == [float(step)] * 3
