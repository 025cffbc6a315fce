"""The bounded memory of values used last."""

from __future__ import annotations

import pickle

from dino_dist.data.recent import Recent


def test_keeps_the_values_used_last() -> None:
    recent: Recent[int, int] = Recent(2)
    for key in (1, 2, 1, 3):
        assert recent.get(key, lambda key=key: key * 10) == key * 10
    assert len(recent) == 2
    assert recent.get(1, lambda: -1) == 10  # used after 2
    assert recent.get(3, lambda: -1) == 30
    assert recent.get(2, lambda: -1) == -1


def test_a_copy_for_another_process_starts_empty() -> None:
    recent: Recent[int, int] = Recent(2)
    recent.get(1, lambda: 10)
    copy = pickle.loads(pickle.dumps(recent))
    assert len(copy) == 0
    assert copy.get(1, lambda: 11) == 11
