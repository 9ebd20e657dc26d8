"""The timer behind waits and readings, with a clock and an event loop of the test's own. No server."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from shardq.storage import alarm
from shardq.storage.alarm import NEVER, Alarm


class Clock:
    """Stands for time.monotonic and for the event loop; `fired` counts the timers that came, `made` all there were."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[Timer] = []
        self.fired = self.made = 0

    def __call__(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        self.made += 1
        self.timers.append(Timer(self, self.now_s + delay_s, call))
        assert len(self.timers) == 1
        return self.timers[0]

    def advance(self, by_s: float) -> None:
        end_s = self.now_s + by_s
        while self.timers and self.timers[0].at_s <= end_s:
            timer = self.timers.pop()
            self.now_s = max(self.now_s, timer.at_s)
            self.fired += 1
            timer.call()
        self.now_s = end_s


class Timer:
    def __init__(self, clock: Clock, at_s: float, call: Callable[[], None]) -> None:
        self._clock, self.at_s, self.call = clock, at_s, call

    def cancel(self) -> None:
        self._clock.timers.remove(self)


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.came_s = Clock(), list[float]()
        monkeypatch.setattr(alarm, "monotonic", self.clock)
        self.alarm = Alarm(lambda: self.came_s.append(self.clock.now_s))
        monkeypatch.setattr(self.alarm, "_loop", self.clock)

    def wait_again_and_again(self, pauses_s: Sequence[float], limit_s: float) -> None:
        """Each wait ends after its pause, long before the limit."""
        for pause_s in pauses_s:
            self.alarm.set(self.clock.now_s + limit_s)
            self.clock.advance(pause_s)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_it_comes_at_the_moment_that_was_set_last(rig: Rig) -> None:
    rig.alarm.set(120.0)
    rig.clock.advance(1.0)
    for moment_s in (140.0, 130.0, 131.0):  # later, sooner, and a little later
        rig.alarm.set(moment_s)
    assert rig.alarm.moment_s == 131.0
    rig.clock.advance(60.0)
    assert rig.came_s == [131.0]
    assert rig.alarm.moment_s == NEVER
    assert not rig.clock.timers


def test_what_is_set_to_never_does_not_come(rig: Rig) -> None:
    rig.alarm.set(120.0)
    rig.alarm.set(NEVER)
    rig.clock.advance(60.0)
    assert rig.came_s == []
    assert not rig.clock.timers


def test_what_is_over_already_comes_at_once(rig: Rig) -> None:
    rig.alarm.set(99.0)
    rig.clock.advance(0.0)
    assert rig.came_s == [100.0]


def test_waits_that_take_most_of_their_time_are_not_woken_by_the_timer_of_an_earlier_one(rig: Rig) -> None:
    rig.wait_again_and_again([0.012] * 100, 0.02)
    assert rig.clock.fired == 0


def test_short_waits_make_no_timer_each(rig: Rig) -> None:
    rig.wait_again_and_again([0.001] * 100, 0.02)
    assert (rig.came_s, rig.clock.fired) == ([], 0)
    assert rig.clock.made <= 10
