"""Ends a run in which a rank died, was stopped or hangs, and says which: threads beside the training thread.

Every rank sets its pulse in the rendezvous store at each heartbeat; rank 0 reads all and judges; the others read what
rank 0 tells. Two threads a rank: one keeps contact and may block in the store for ever, the other never touches it and
sees to the end. The training thread only writes attributes of its `Pulse`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Final

from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]

from dino_dist.liveness import LEFT, AwakeClock, DataWaits, Fault, Limits, Observation, Pulse, RollCall, judge, named
from dino_dist.stacks import all_stacks, main_stack

_NEWS: Final = "news"


@dataclass(frozen=True, kw_only=True)
class News:
    """What rank 0 tells all others at each of its beats."""

    beat: int = 0
    host: str = ""
    ended: str = ""
    """How rank 0 ended; empty: it has not."""
    suspects: str = ""
    """One line on ranks that miss beats or have ended."""
    deputy: int = 1
    """Who reports if rank 0 cannot: the first rank on another host, since a host may be lost as a whole."""
    verdict: dict[str, Any] | None = None
    """The fault that ends the run."""


class Watchdog:
    """Watches over all ranks while its `with` block runs; see the module for how.

    All ranks are gone within twice `timeout_s` after progress stopped (for time-outs over 20 s; a shorter one leaves
    the seconds that stacks and the report take), even if the main thread is stuck in C code, as long as that released
    the interpreter lock. A rank that holds the lock is as good as dead to the others, and its starter must end it.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        size: int,
        host: str,
        pulse: Pulse,
        limits: Limits,
        report: Callable[[Fault], None],
        heartbeat_s: float | None = None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """`store`: a connection of its own, for a store is locked during a call; fresh keys at each start.

        `report` is called in a thread of its own, on rank 0 (or one rank in its place), for each straggler and once for
        the fault that ends the run. `leave(1)` ends this process if nothing else did. `heartbeat_s` is at most 5 s.
        """
        self._store, self._rank, self._size, self._host = store, rank, size, host
        self._pulse, self._limits, self._report, self._leave = pulse, limits, report, leave
        self._heartbeat_s = min(5.0, limits.timeout_s / 10) if heartbeat_s is None else heartbeat_s
        if not 0 < self._heartbeat_s <= limits.timeout_s / 4:
            raise ValueError(f"heartbeat_s={self._heartbeat_s:g} must be at most a quarter of {limits.timeout_s:g}")
        self._quiet_s = 2 * self._heartbeat_s
        """After so much silence a rank is suspected, though not yet judged."""
        self._gather_s = 2 * self._heartbeat_s + 1.0
        self._report_s = min(5.0, max(1.0, limits.timeout_s / 8))
        self._grace_s = max(2.0, limits.timeout_s / 4)

        self.fault: Fault | None = None
        """What ends the run; None while nothing does."""
        self._fault_lock = threading.Lock()
        self._alarm = threading.Event()
        """Wakes the guard: there is a fault, or this rank leaves."""
        self._told = threading.Event()
        """The fault was reported, or could not be in time."""
        self._wake = threading.Event()
        """Lets the next heartbeat come at once."""
        self._ending = ""
        self._beats = 0
        self._news = News()
        self._unheard_s = 0.0
        self._broken = ""
        """Why the connection to the store is lost for good."""
        self._clock = AwakeClock(3 * self._heartbeat_s)
        self._roll = RollCall(size)
        self._heard_by = [0] * size
        """The newest beat of rank 0 that each rank has read."""
        self._data_waits = DataWaits()
        self._named: set[tuple[str, int, int]] = set()
        self._teller: threading.Thread | None = None
        self._contact = threading.Thread(target=self._keep_contact, name="watchdog-contact", daemon=True)
        self._guard = threading.Thread(target=self._stand_guard, name="watchdog-guard", daemon=True)

    def __enter__(self) -> Watchdog:
        self._contact.start()
        self._guard.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Tell the others that this rank leaves, in good order or because of `error`, so that none takes it for dead.

        After a fault the report is awaited, and the process ends by `leave(1)` if it is still there after the grace.
        """
        self._ending = self._ending or (LEFT if error is None else f"{type(error).__name__}: {_one_line(error)}")
        self._wake.set()
        if self.fault is None:
            self._contact.join(self._gather_s + self._report_s)
        if self.fault is None:
            self._alarm.set()
            self._guard.join(self._heartbeat_s)
        else:
            self._told.wait(self._gather_s + self._report_s)

    def suspects(self) -> str:
        """Who is probably to blame for a collective that just failed: silent ranks and those that ended, in one line.

        Waits until a dead rank must have missed its beats, four heartbeats at most; empty if all seem alive.
        """
        patience = threading.Event()
        end_s = time.monotonic() + 2 * self._quiet_s
        while not (line := self._suspects_now()) and time.monotonic() < end_s:
            self._wake.set()
            patience.wait(self._heartbeat_s / 4)
        return line

    def _suspects_now(self) -> str:
        if self.fault is not None:
            return self.fault.why
        if self._rank and self._news.ended:  # perhaps for the same cause, which it told first
            return "; ".join(filter(None, (self._news.suspects, f"{self._first()} {_how(self._news.ended)}")))
        if self._rank and (self._broken or (self._news.beat and self._unheard_s > self._quiet_s)):
            return f"{self._first()} {self._broken or 'does not answer'}"
        return self._news.suspects

    # The thread that keeps contact.

    def _keep_contact(self) -> None:
        while not (self._broken or self.fault is not None or (self._rank and self._news.ended)):
            ending = self._ending
            self._try_round(ending)
            if ending:
                return
            self._wake.wait(self._heartbeat_s)
            self._wake.clear()

    def _try_round(self, ending: str) -> None:
        try:
            self._round(ending)
        except DistStoreError:
            return  # too late an answer: the next may come in time, and the guard counts
        except RuntimeError as error:  # of the transport; a store never connects again
            self._broken = f"cannot be reached ({_one_line(error)})"

    def _round(self, ending: str) -> None:
        self._send_pulse(ending)
        if self._rank == 0:
            self._lead(ending)
        elif ending:
            self._store.check([_NEWS])  # an answer means that the last pulse has arrived
        else:
            self._follow()

    def _send_pulse(self, ending: str) -> None:
        self._beats += 1
        pulse = self._pulse.standing._asdict() | {
            "beats": self._beats,
            "host": self._host,
            "pid": os.getpid(),
            "ended": ending,
            "heard": self._news.beat,
        }
        self._store.set(_pulse_key(self._rank), json.dumps(pulse))

    def _follow(self) -> None:
        if not self._news.beat and not self._store.check([_NEWS]):
            return
        self._news = News(**json.loads(self._store.get(_NEWS)))
        if self._news.ended:
            self._send_pulse("")  # rank 0 waits until all know; then its store goes
        elif self._news.verdict is not None:
            fault = Fault.from_json(self._news.verdict)
            if self._begin_end(fault):
                with suppress(RuntimeError):  # rank 0 is gone already
                    self._store.set(_stack_key(self._rank), main_stack())
                self._tell_end(fault, reports=False)

    def _lead(self, ending: str) -> None:
        if self._beats == 1:
            for rank in range(1, self._size):
                self._store.compare_set(_pulse_key(rank), "", "{}")  # so that reading all never waits for one
        now_s = self._clock.tick()
        heard = self._take_roll(now_s)
        seen = self._roll.observations
        self._publish(ending, now_s)
        if ending:
            self._wait_for_all_to_hear(now_s)
            return
        fault = judge(seen, now_s, self._limits)
        if fault is None:
            fault = self._data_waits.take(seen, now_s) if heard == self._size else None
        if fault is None:
            return
        if not fault.ends:
            self._tell_once(fault)
        elif self._begin_end(fault):
            stacks = {0: main_stack()}
            with suppress(RuntimeError):  # without the store this rank still reports
                self._news = replace(self._news, verdict=fault.to_json())
                self._publish(ending, now_s)
                stacks |= self._gather_stacks(now_s)
            self._tell_end(replace(fault, stacks=stacks), reports=True)

    def _take_roll(self, now_s: float) -> int:
        """Read all pulses; how many ranks have ever spoken."""
        pulses = [
            json.loads(value) for value in self._store.multi_get([_pulse_key(rank) for rank in range(self._size)])
        ]
        self._roll.take(pulses, now_s)
        self._heard_by = [int(pulse.get("heard", 0)) for pulse in pulses]
        return sum(bool(pulse) for pulse in pulses)

    def _publish(self, ending: str, now_s: float) -> None:
        others = self._roll.observations[1:]
        elsewhere = [one.rank for one in others if one.beats and one.host != self._host]
        self._news = replace(
            self._news,
            beat=self._news.beat + 1,
            host=self._host,
            ended=ending,
            suspects=_suspects(others, now_s, self._quiet_s),
            deputy=elsewhere[0] if elsewhere else 1,
        )
        self._store.set(_NEWS, json.dumps(asdict(self._news)))

    def _answering(self, now_s: float) -> list[int]:
        """The other ranks that are alive, as far as their beats tell."""
        others = self._roll.observations[1:]
        return [one.rank for one in others if one.beats and not one.ended and now_s - one.beat_at_s <= self._quiet_s]

    def _wait_for_all_to_hear(self, now_s: float) -> None:
        patience = threading.Event()
        end_s = time.monotonic() + self._gather_s
        while time.monotonic() < end_s:
            if all(self._heard_by[rank] >= self._news.beat for rank in self._answering(now_s)):
                return
            patience.wait(0.02)
            now_s = self._clock.tick()
            self._take_roll(now_s)

    def _gather_stacks(self, now_s: float) -> dict[int, str]:
        """The stacks of the other ranks that answer in time; each of them has seen the verdict then."""
        patience = threading.Event()
        keys = {rank: _stack_key(rank) for rank in self._answering(now_s)}
        end_s = time.monotonic() + self._gather_s
        while keys and not self._store.check(list(keys.values())) and time.monotonic() < end_s:
            patience.wait(0.05)
        came = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: self._store.get(key).decode() for rank, key in came.items()}

    # The thread that sees to the end.

    def _stand_guard(self) -> None:
        clock = AwakeClock(3 * self._heartbeat_s)
        beat, progress, heard_at_s, moved_at_s = 0, 0, 0.0, 0.0
        while not self._alarm.wait(self._heartbeat_s):
            now_s = clock.tick()
            if self._news.beat != beat:
                beat, heard_at_s = self._news.beat, now_s
            if self._pulse.standing.progress != progress:
                progress, moved_at_s = self._pulse.standing.progress, now_s
            self._unheard_s = now_s - heard_at_s
            why = self._alone(unheard_s=self._unheard_s, still_s=now_s - moved_at_s)
            if why:
                self._end_alone(why)
        if self.fault is not None:
            self._told.wait(self._gather_s + self._report_s)
            threading.Event().wait(self._grace_s)
            self._leave(1)

    def _alone(self, *, unheard_s: float, still_s: float) -> str:
        """Why this rank must end without word from rank 0; empty if it need not."""
        phase = self._pulse.standing.phase
        if self._rank and self._news.ended:  # nobody judges any more, so each rank looks to itself
            if still_s <= self._limits.of(phase):
                return ""
            return f"{self._first()} ended ({self._news.ended}) and rank {self._rank} on {self._host} cannot go on"
        started = self._news.beat > 0 and phase != "leaving"
        if unheard_s <= (self._limits.timeout_s if started else self._limits.timeout_start_s):
            return ""
        who = self._first() if self._rank else "the rendezvous store"
        return (
            f"{who} {self._broken or 'does not answer'} since {unheard_s:.3g} s: dead or stopped, or its node is lost"
        )

    def _end_alone(self, why: str) -> None:
        phase, step, _, _ = self._pulse.standing
        fault = Fault(
            kind="hang" if self._rank and self._news.ended else "lost contact",
            ranks=(0,),
            hosts=(self._news.host,),
            step=step,
            phase=phase,
            why=f"{why} (rank {self._rank} on {self._host} is at step {step} in phase {phase})",
            stacks={self._rank: main_stack()},
        )
        if self._begin_end(fault):
            self._tell_end(fault, reports=self._rank in (0, self._news.deputy))

    def _first(self) -> str:
        return f"rank 0 on {self._news.host or 'an unknown host'}"

    # What both do.

    def _begin_end(self, fault: Fault) -> bool:
        """Set the fault that ends this rank; False if there was one already."""
        with self._fault_lock:
            if self.fault is not None:
                return False
            self.fault = fault
        self._alarm.set()
        return True

    def _tell_end(self, fault: Fault, *, reports: bool) -> None:
        """Say what happened, for a few seconds at most: the disk may be what hangs."""
        text = f"rank {self._rank} on {self._host} ends: {fault.kind}: {fault.why}\n{all_stacks()}"
        tellers = [_in_a_thread(lambda: _say(text))]
        if reports:
            tellers.append(_in_a_thread(lambda: self._report(fault)))
        end_s = time.monotonic() + self._report_s
        for teller in tellers:
            teller.join(max(0.0, end_s - time.monotonic()))
        self.fault = fault
        self._told.set()

    def _tell_once(self, fault: Fault) -> None:
        """Report what ends nothing, once for each rank and step; it is dropped while an earlier one hangs."""
        new = {(fault.kind, rank, fault.step) for rank in fault.ranks} - self._named
        if not new or (self._teller is not None and self._teller.is_alive()):
            return
        self._named |= new

        def tell() -> None:
            _say(f"{fault.kind}: {fault.why}\n")
            self._report(fault)

        self._teller = _in_a_thread(tell)


def _suspects(others: list[Observation], now_s: float, quiet_s: float) -> str:
    silent = [one for one in others if one.beats and not one.ended and now_s - one.beat_at_s > quiet_s]
    parts = [f"no sign of life from {named(silent)}"] if silent else []
    parts += [f"{named([one])} {_how(one.ended)}" for one in others if one.ended]
    return "; ".join(parts)


def _how(ended: str) -> str:
    return "has left" if ended == LEFT else f"failed ({ended})"


def _pulse_key(rank: int) -> str:
    return f"pulse/{rank}"


def _stack_key(rank: int) -> str:
    return f"stacks/{rank}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())[:200]


def _say(text: str) -> None:
    # Not through sys.stderr, whose lock a stuck thread may hold.
    os.write(2, text.encode(errors="replace"))


def _in_a_thread(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action, name="watchdog-report", daemon=True)
    thread.start()
    return thread
