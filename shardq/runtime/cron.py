"""Cron expressions as ticks in Unix seconds, through cronsim and zoneinfo. The only user of either; decides nothing.

Five fields are read as Debian's cron reads them, daylight saving included: a time that a change of the clocks leaves
out comes right after it, one that it repeats comes once, and what has `*` in the minutes or hours follows real time.
Six fields have the seconds first and follow real time throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from shardq.errors import UsageError

LONGEST = 200
"""Characters of a cron expression or the name of a zone."""

_OF_THE_MACHINE = ("localtime", "posixrules", "Factory")  # they mean something else elsewhere
_FOLD_S = 2 * 3600  # no zone puts its clocks back by more at once


class Cron:
    """One cron expression in one time zone. Raises UsageError when either can't be used."""

    def __init__(self, expression: str, timezone: str) -> None:
        self._expression = expression
        self._zone = _zone(timezone)
        try:
            _check_text(expression)
            CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC))
        except (CronSimError, ValueError, AssertionError) as error:
            msg = (
                f"{str(expression)[:LONGEST]!r} is not a cron expression ({error}): write minute, hour, day of month, "
                "month, day of week, as in '*/5 * * * *'; seconds, if any, go first"
            )
            raise UsageError(msg) from error

    def until(self, now_s: int) -> Iterator[int]:
        """Every tick at or before `now_s`, newest first."""
        start = datetime.fromtimestamp(now_s + 1, self._zone)
        if start.fold:
            # In an hour that comes twice cronsim goes by its first coming: from its end it sees all of it.
            start = datetime.fromtimestamp(now_s + 1 + _FOLD_S, self._zone)
        try:
            for moment in CronSim(self._expression, start, reverse=True):
                tick = int(moment.timestamp())
                if tick <= now_s:
                    yield tick
        except OverflowError:
            return  # the year 1

    def after(self, moment_s: int) -> int | None:
        """The first tick after `moment_s`; None when there is none in 50 years."""
        try:
            for moment in CronSim(self._expression, datetime.fromtimestamp(moment_s, self._zone)):
                tick = int(moment.timestamp())
                if tick > moment_s:
                    return tick
        except OverflowError:
            pass  # the year 9999
        return None

    def iso(self, tick_s: int) -> str:
        """The tick in ISO 8601, by the zone's clocks, with their distance from UTC."""
        return datetime.fromtimestamp(tick_s, self._zone).isoformat()


def _check_text(expression: object) -> None:
    if not isinstance(expression, str):
        msg = f"it is {type(expression).__name__}, not str"
        raise ValueError(msg)
    if len(expression) > LONGEST:
        msg = f"it is longer than {LONGEST} characters"
        raise ValueError(msg)


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC  # also where the system has no time zones
    try:
        if not 1 <= len(name) <= LONGEST or name in _OF_THE_MACHINE:
            raise ValueError
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        msg = (
            f"time zone {str(name)[:LONGEST]!r} is not known here: use a name like 'Europe/Berlin'; "
            "a system without time zones gets them by `pip install tzdata`"
        )
        raise UsageError(msg) from error
