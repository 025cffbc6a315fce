"""Signals become one agreed word; workers neither take the word nor die of it."""

from __future__ import annotations

import multiprocessing
import signal
import time

import pytest
import torch

from dino_dist.preemption import (
    GO_ON,
    SAVE_AND_EXIT,
    SAVE_AND_REQUEUE,
    AgreedWord,
    StopReason,
    StopSignals,
)

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


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (*STOPPING, signal.SIGCONT)]
    with StopSignals():
        during = [signal.getsignal(number) for number in (*STOPPING, signal.SIGCONT)]
    assert not set(during) & set(before)
    assert [signal.getsignal(number) for number in (*STOPPING, signal.SIGCONT)] == before


def test_time_limit_leaves_room_for_two_saves() -> None:
    signals = StopSignals(deadline_s=time.monotonic() + 1000, margin_s=30)
    assert signals.word == GO_ON
    signals.save_s = 400
    assert signals.word == GO_ON
    signals.save_s = 600
    assert signals.word == SAVE_AND_REQUEUE
    assert signals.reason is not None
    assert signals.reason.name == "time limit"
    signals.save_s = 0
    assert signals.word == SAVE_AND_REQUEUE, "once given, the word stays"


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
