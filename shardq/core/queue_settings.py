"""What a queue is declared with beside its shards: how long it keeps messages, how many wait at most, and so on. Pure.

A QueueSettings is always whole and sound: what does not fit together can't be made.

Wire format: byte 0x01 (the format version), then a msgpack map from field names to values. So that versions may add
settings, a reader ignores names it does not know and takes the default of one that is missing, and a change keeps what
it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, TypedDict, get_args

import msgspec

from shardq.core.compression import Compression
from shardq.core.slots import HASH_SPACE
from shardq.errors import CorruptData, UsageError

Overflow = Literal["block", "reject", "drop-oldest"]

MAX_NUMBER = (1 << 53) - 1
"""Numbers in server-side functions are doubles, exact up to here."""

MAX_RETENTION_S = 36500 * 86400

_FORMAT = b"\x01"
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_AMOUNT = re.compile(r"([1-9][0-9]{0,15})([A-Za-z]+)")


class SettingsChange(TypedDict, total=False):
    """The settings a user names; those left out are not asked for. See QueueSettings for what each means."""

    retention: str
    max_backlog: int | None
    overflow: Overflow
    compression: Compression | None
    jobs: bool


class QueueSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a whole queue. Raises UsageError when made with what is wrong.

    retention_s      finished messages stay so many seconds after they were stored
    retention_bytes  finished messages stay while the queue is smaller than this
                     (without either they go once every group has finished them)
    max_backlog      messages that the slowest group has not finished, at most; None: no bound
    overflow         what a send does beyond it: "block" waits, "reject" raises, "drop-oldest" makes room by dropping
                     the oldest messages, finished or not
    compression      "zlib", "zstd" or None: how producers compress what they send
    jobs             every message that `send` stores is a tracked job (those of send_many and tx.send are not)
    """

    retention_s: int | None = None
    retention_bytes: int | None = None
    max_backlog: int | None = None
    overflow: Overflow = "block"
    compression: Compression | None = None
    jobs: bool = False

    def __post_init__(self) -> None:
        if self.retention_s is not None and self.retention_bytes is not None:
            raise UsageError("a queue is kept by time or by size, not both: choose one retention")
        _check_range("a retention in seconds", self.retention_s, MAX_RETENTION_S)
        _check_range("a retention in bytes", self.retention_bytes, MAX_NUMBER)
        _check_range("max_backlog", self.max_backlog, MAX_NUMBER)
        if self.overflow != "block" and self.max_backlog is None:
            raise UsageError(
                f"overflow={self.overflow!r} says what happens at the bound, so it needs max_backlog=N (messages); "
                "without a bound leave overflow at 'block'"
            )

    @property
    def retention(self) -> str:
        """As a user writes it: "done", or like "7d" or "10GB"."""
        if self.retention_s is not None:
            return _written(self.retention_s, _SECONDS)
        return "done" if self.retention_bytes is None else _written(self.retention_bytes, _BYTES)

    def shown(self) -> dict[str, Any]:
        """The settings by the names and in the form a user gives them."""
        return {name: getattr(self, name) for name in _CHECKS}

    def changed(self, change: Mapping[str, Any]) -> Self:
        """These settings with what a user asks for. Raises UsageError, saying what is right."""
        return msgspec.structs.replace(self, **parse(change))

    def difference(self, change: Mapping[str, Any]) -> str:
        """Says where these settings are not what a user asks for; '' when they are. Raises UsageError."""
        wanted = {name for name, value in parse(change).items() if getattr(self, name) != value}
        names = [name for name in change if wanted & _FIELDS_OF.get(name, {name})]
        return " and ".join(f"{name}={self.shown()[name]!r}, not {change[name]!r}" for name in names)

    def share_of_backlog(self, shards: int) -> int | None:
        """`max_backlog` of each of so many shards."""
        return -(-self.max_backlog // shards) if self.max_backlog is not None else None

    def for_shard(self, shards: int) -> dict[str, str | int]:
        """What each of so many shards has to know, by the names of its meta hash: its share of the bounds."""
        return self._bounds(lambda total: -(-total // shards))

    def for_range(self, low: int, high: int) -> dict[str, str | int]:
        """The same for the shard of the key hashes from `low` to below `high`, of 2**32."""
        return self._bounds(lambda total: _share(total, high - low))

    def _bounds(self, share_of: Callable[[int], int]) -> dict[str, str | int]:
        totals = {"max_backlog": self.max_backlog, "retention_bytes": self.retention_bytes}
        own: dict[str, str | int] = {name: share_of(total) for name, total in totals.items() if total is not None}
        if self.max_backlog is not None:
            own["overflow"] = self.overflow
        if self.retention_s is not None:
            own["retention_ms"] = self.retention_s * 1000
        return own

    def to_bytes(self, stored: bytes = b"") -> bytes:
        """The settings as they are stored in place of `stored`, whose unknown names are kept."""
        return _FORMAT + msgspec.msgpack.encode({**_read(stored, dict[str, Any]), **msgspec.structs.asdict(self)})

    @classmethod
    def from_bytes(cls, stored: bytes) -> Self:
        """The stored settings; the defaults when nothing is stored. Raises CorruptData."""
        settings: Self = _read(stored, cls)
        return settings


def _share(total: int, width: int) -> int:
    """Rounded up. Ranges of an equal cut differ by one hash, and have the same share."""
    shards = round(HASH_SPACE / width)
    equal = HASH_SPACE // shards <= width <= -(-HASH_SPACE // shards)
    return -(-total // shards) if equal else -(-total * width // HASH_SPACE)


def _read(stored: bytes, kind: Any) -> Any:
    if not stored:
        return kind()
    if stored[:1] != _FORMAT:
        raise CorruptData(
            f"the stored queue settings have format {stored[:1]!r}, this version reads format {_FORMAT!r}: "
            "a newer shardq may have written them (upgrade this one), or the key was overwritten"
        )
    try:
        return msgspec.msgpack.decode(memoryview(stored)[1:], type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, UsageError) as error:
        raise CorruptData(
            f"the stored queue settings are not what this version knows ({error}): upgrade it if a newer shardq wrote "
            "them; else remove the field `settings` of the queue's routing hash and change them anew"
        ) from error


# -- what a user writes -----------------------------------------------------------------------------------------------


def parse(change: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of QueueSettings that a user's settings stand for. Raises UsageError."""
    unknown = [name for name in change if name not in _CHECKS]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no setting of a queue; they are {', '.join(_CHECKS)}")
    fields: dict[str, Any] = {}
    for name, value in change.items():
        fields |= _CHECKS[name](name, value)
    return fields


def _retention(_: str, value: Any) -> dict[str, Any]:
    match = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    unit = match[2] if match else ""
    if match and unit in _SECONDS:
        seconds = int(match[1]) * _SECONDS[unit]
        _check_range("a retention in seconds", seconds, MAX_RETENTION_S)
        return {"retention_s": seconds, "retention_bytes": None}
    if match and unit in _BYTES:
        size = int(match[1]) * _BYTES[unit]
        _check_range("a retention in bytes", size, MAX_NUMBER)
        return {"retention_s": None, "retention_bytes": size}
    if isinstance(value, str) and value == "done":
        return {"retention_s": None, "retention_bytes": None}
    raise UsageError(
        f"retention {value!r} is not one: write 'done', a time like '7d', '12h', '30m' or '45s', "
        "or a size like '10GB', '512MB' or '64MiB'"
    )


def _count(name: str, value: Any) -> dict[str, Any]:
    if value is not None and (type(value) is not int or not 1 <= value <= MAX_NUMBER):
        raise UsageError(f"{name} is a number of messages, 1 or more, or None for no bound, not {value!r}")
    return {name: value}


def _choice(name: str, value: Any) -> dict[str, Any]:
    if value not in _CHOICES[name]:
        raise UsageError(f"{name} is one of {', '.join(map(repr, _CHOICES[name]))}, not {value!r}")
    return {name: value}


def _flag(name: str, value: Any) -> dict[str, Any]:
    if type(value) is not bool:
        raise UsageError(f"{name} is True or False, not {value!r}")
    return {name: value}


def _check_range(what: str, number: int | None, most: int) -> None:
    if number is not None and not 1 <= number <= most:
        raise UsageError(f"{what} is 1 to {most}, not {number}")


def _written(number: int, units: Mapping[str, int]) -> str:
    """The number in the largest unit that it is a whole number of."""
    size, unit = max((size, unit) for unit, size in units.items() if number % size == 0)
    return f"{number // size}{unit}"


_CHECKS = {"retention": _retention, "max_backlog": _count, "overflow": _choice, "compression": _choice, "jobs": _flag}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "overflow": get_args(Overflow),
    "compression": (None, *sorted(get_args(Compression))),
}
_FIELDS_OF = {"retention": {"retention_s", "retention_bytes"}}
