"""Time shares between log rows, from a given clock."""

from __future__ import annotations

from dino_dist.throughput import ThroughputMeter


def test_throughput_from_a_given_clock() -> None:
    now_s = [0.0]
    meter = ThroughputMeter(clock=lambda: now_s[0])
    for _ in range(4):
        with meter.waiting():
            now_s[0] += 1.0
        now_s[0] += 3.0
        meter.step_done(images=32)
    with meter.paused():
        now_s[0] += 100.0
    assert meter.read() == {"images_per_s": 8.0, "step_s": 4.0, "data_wait": 0.25}
    assert meter.read() == {}
