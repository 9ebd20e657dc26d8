"""`message.atomic()`: writes that are carried out with the message's acknowledgement, in one step. Collects and checks
them; sends nothing.

Effects of a message happen exactly once: they run inside the function that commits the message (scripts/effect.lua), so
they are there if and only if the message is finished. A handler that raises, or a worker that dies before the commit,
leaves none of them.

Refused before anything runs (UsageError): a key on another slot, a command or an argument that Redis could not take.
What only Redis can know, a key of another type or a number that is none, makes the message a dead letter, all effects
undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from shardq.core import records
from shardq.core.records import Headers, Key
from shardq.core.slots import key_slot
from shardq.errors import UsageError

MAX_EFFECTS = 1000
MAX_ARGUMENTS = 2000
_INT64 = 1 << 63
_MAX_INT_BITS = 4096

Argument = str | bytes | int | float


class Place(Protocol):
    """Where a message of another queue goes."""

    @property
    def stream(self) -> str: ...
    @property
    def meta(self) -> str: ...
    @property
    def bell(self) -> str: ...
    @property
    def slot(self) -> int: ...


class Destination(Protocol):
    """A queue that messages are sent to: `shardq.Queue`."""

    @property
    def name(self) -> str: ...

    def place_of(self, key: Key) -> Place:
        """The shard of a key."""

    async def refresh(self) -> bool:
        """Looks whether other shards have its keys by now."""

    def encode_one(self, key: Key, value: Any, headers: Headers | None, now_ms: int) -> bytes:
        """A record batch of one message."""


class Effect(NamedTuple):
    """One write. `meta` is the second key of a message that is sent, `to` the queue it is for and its key."""

    key: str
    command: str
    args: tuple[str | bytes, ...]
    meta: str = ""
    to: tuple[Destination, Key] | None = None


def redirected(effect: Effect, slot: int) -> Effect | None:
    """A message that is sent, to the shard that has its key as its queue knows by now; None where that is in a slot
    that this commit does not reach, and for what is not sent."""
    if effect.to is None:
        return None
    queue, key = effect.to
    place = queue.place_of(key)
    if place.slot != slot:
        return None
    return effect._replace(key=place.stream, args=(place.bell, *effect.args[1:]), meta=place.meta)


class Atomic:
    """Collects the effects of one message. Get it from `message.atomic()`; a plain function enters it with `with`."""

    def __init__(self, slot: int, now_ms: Callable[[], int], keep: Callable[[list[Effect]], None]) -> None:
        self._slot, self._now_ms, self._keep = slot, now_ms, keep
        self._effects: list[Effect] | None = None

    async def __aenter__(self) -> Atomic:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def __enter__(self) -> Atomic:
        if self._effects is not None:
            msg = "this message.atomic() is in use already: call message.atomic() again for another block"
            raise UsageError(msg)
        self._effects = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        effects, self._effects = self._effects, None
        if kind is None and effects:
            self._keep(effects)

    # -- strings ---------------------------------------------------------------------------------------------

    def set(self, key: str, value: Argument, *, ttl: float | None = None) -> None:
        """SET, with a time to live in seconds if `ttl` is given."""
        self._add(key, "SET", value, *(() if ttl is None else ("PX", _ms(ttl))))

    def incrby(self, key: str, amount: int = 1) -> None:
        self._add(key, "INCRBY", _int64(amount))

    def incrbyfloat(self, key: str, amount: float) -> None:
        self._add(key, "INCRBYFLOAT", _finite(amount))

    def append(self, key: str, value: Argument) -> None:
        self._add(key, "APPEND", value)

    # -- hashes ----------------------------------------------------------------------------------------------

    def hset(self, key: str, mapping: Mapping[str, Argument]) -> None:
        self._add(key, "HSET", *_some("hset", tuple(part for pair in _items(mapping) for part in pair)))

    def hdel(self, key: str, *fields: str) -> None:
        self._add(key, "HDEL", *_some("hdel", fields))

    def hincrby(self, key: str, field: str, amount: int = 1) -> None:
        self._add(key, "HINCRBY", field, _int64(amount))

    def hincrbyfloat(self, key: str, field: str, amount: float) -> None:
        self._add(key, "HINCRBYFLOAT", field, _finite(amount))

    # -- sets, sorted sets, lists ----------------------------------------------------------------------------

    def sadd(self, key: str, *members: Argument) -> None:
        self._add(key, "SADD", *_some("sadd", members))

    def srem(self, key: str, *members: Argument) -> None:
        self._add(key, "SREM", *_some("srem", members))

    def zadd(self, key: str, mapping: Mapping[str, float]) -> None:
        """Members with their scores."""
        parts = tuple(part for member, score in _items(mapping) for part in (_number(score), member))
        self._add(key, "ZADD", *_some("zadd", parts))

    def zincrby(self, key: str, amount: float, member: Argument) -> None:
        self._add(key, "ZINCRBY", _number(amount), member)

    def zrem(self, key: str, *members: Argument) -> None:
        self._add(key, "ZREM", *_some("zrem", members))

    def lpush(self, key: str, *values: Argument) -> None:
        self._add(key, "LPUSH", *_some("lpush", values))

    def rpush(self, key: str, *values: Argument) -> None:
        self._add(key, "RPUSH", *_some("rpush", values))

    # -- any type --------------------------------------------------------------------------------------------

    def delete(self, key: str) -> None:
        self._add(key, "DEL")

    def expire(self, key: str, ttl: float) -> None:
        """Gives the key a time to live, in seconds."""
        self._add(key, "PEXPIRE", _ms(ttl))

    # -- another queue ---------------------------------------------------------------------------------------

    def send(self, queue: Destination, value: Any, *, key: Key = None, headers: Headers | None = None) -> None:
        """Sends to a queue with as many shards as this one, in the same commit. With `key=message.key` the message's
        shard there is always in reach; for another key UsageError is raised unless it happens to be."""
        place = queue.place_of(key)
        if place.slot != self._slot:
            msg = (
                f"key {key!r} of queue {queue.name!r} is in slot {place.slot}, this message in {self._slot}: send with "
                "key=message.key to a queue with equal shards, or use a producer of its own (not atomic)"
            )
            raise UsageError(msg)
        batch = queue.encode_one(key, value, headers, self._now_ms())
        self._put(Effect(place.stream, "SEND", (place.bell, "1", batch), place.meta, (queue, key)))

    # -- checks ----------------------------------------------------------------------------------------------

    def _add(self, key: str, command: str, *args: Argument) -> None:
        if type(key) is not str:
            msg = f"a key is a str: use message.local_key(name), not {key!r}"
            raise UsageError(msg)
        _wire(key)  # refuses surrogates
        slot = key_slot(key.encode())
        if slot != self._slot:
            msg = f"key {key!r} is in slot {slot}, this message in {self._slot}: name it with message.local_key(name)"
            raise UsageError(msg)
        if len(args) > MAX_ARGUMENTS:
            msg = f"an effect has at most {MAX_ARGUMENTS} arguments, not {len(args)}: write it in parts"
            raise UsageError(msg)
        self._put(Effect(key, command, tuple(_wire(arg) for arg in args)))

    def _put(self, effect: Effect) -> None:
        if self._effects is None:
            msg = "effects are added inside `async with message.atomic() as tx:`"
            raise UsageError(msg)
        if len(self._effects) >= MAX_EFFECTS:
            msg = f"a message has at most {MAX_EFFECTS} effects: write fewer, larger ones"
            raise UsageError(msg)
        self._effects.append(effect)


def _wire(value: object) -> str | bytes:
    if isinstance(value, bool) or not isinstance(value, (str, bytes, int, float)):
        msg = f"an effect's argument is str, bytes, int or float, not {type(value).__name__}"
        raise UsageError(msg)
    if isinstance(value, float):
        return repr(_number(value))
    if isinstance(value, int):
        if value.bit_length() > _MAX_INT_BITS:
            msg = f"an effect's argument is an int of at most {_MAX_INT_BITS} bits, not {value.bit_length()}"
            raise UsageError(msg)
        return str(int(value))
    if isinstance(value, str):
        records.pack_value(str(value))  # refuses surrogates
    return value


def _number(value: Any) -> float:
    """A score: infinite ones too, but not nan."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        msg = f"an effect's number is an int or a float, not {value!r:.80}"
        raise UsageError(msg)
    try:
        return float(value)
    except OverflowError as error:
        msg = "an effect's number is larger than a float holds"
        raise UsageError(msg) from error


def _finite(value: Any) -> float:
    number = _number(value)
    if math.isinf(number):
        msg = "an effect can't add what is infinite"
        raise UsageError(msg)
    return number


def _int64(amount: Any) -> int:
    if type(amount) is not int or not -_INT64 <= amount < _INT64:
        msg = f"an increment is an int of 64 bits, not {amount!r}"
        raise UsageError(msg)
    return amount


def _ms(seconds: Any) -> int:
    if type(seconds) not in (int, float) or not 0.001 <= seconds <= 1e10:
        msg = f"a time to live is 0.001 to 1e10 seconds, not {seconds!r}"
        raise UsageError(msg)
    return int(seconds * 1000)


def _some(name: str, values: tuple[Argument, ...]) -> tuple[Argument, ...]:
    if not values:
        msg = f"{name} was given nothing to write"
        raise UsageError(msg)
    return values


def _items(mapping: Any) -> Iterable[tuple[Argument, Argument]]:
    if not isinstance(mapping, Mapping):
        msg = f"this effect takes a mapping, not {type(mapping).__name__}"
        raise UsageError(msg)
    return mapping.items()
