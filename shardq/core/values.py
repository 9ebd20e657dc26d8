"""The type of a queue's values and where their key is, declared once by who sends and who handles. Pure.

A sender's values are checked (cheaply: they are of the type already) and carried as what msgpack makes of them: a map
for a Struct, a dataclass or a TypedDict, so that readers that declare no type get a dict. A reader's are converted,
which looks at every part: anybody may have sent them. Nothing of the type travels, and nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, itemgetter
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, is_typeddict

import msgspec

from shardq.core.records import Key
from shardq.errors import InvalidKey, InvalidValue, UsageError

KeyOf = str | Callable[[Any], Key]
M = TypeVar("M")

# Without this, msgspec would read a str as the base64 of bytes.
_CARRIED = (bytes, bytearray)
_PLAIN = (bool, int, float, str, bytes, bytearray, list, tuple, set, frozenset, dict, type(None), Any)


class ValueType:
    """What a queue's values are.

    kind   anything msgspec converts to: a Struct, dataclass, TypedDict, int, list[Order], Order | None; None: any value
    key    the field that is a message's key, or a function from value to key; None: values say nothing of their key

    Raises UsageError for a type that msgspec can't convert to and for a field that it does not have.
    """

    def __init__(self, kind: Any = None, key: KeyOf | None = None) -> None:
        self.kind, self.key = kind, key
        self.name: str = kind.__name__ if isinstance(kind, type) else str(kind)
        self._required = _required_keys(kind, self.name)
        if key is not None:
            _check_key(kind, self.name, key)
        self._classes = _classes(kind)
        self._get = _getter(kind, key) if isinstance(key, str) else key

    def check(self, value: Any) -> None:
        """Raises InvalidValue unless `value` is of the type, as far as that is told quickly: what a Struct, a dataclass
        or a TypedDict holds is looked at when it is read."""
        if self._classes:
            fits = isinstance(value, self._classes)
        elif self._required is not None:
            fits = isinstance(value, dict) and self._required <= value.keys()
        else:
            fits = self.kind is None or _converts(value, self.kind)
        if not fits:
            msg = f"a value of type {type(value).__name__} is no {self.name}, which this queue is declared with"
            if isinstance(value, tuple) and self.key is not None:
                msg += ": it has a key declared, so send_many takes values, not (key, value) pairs"
            raise InvalidValue(msg)

    def key_of(self, value: Any) -> Key:
        """The message's key: str, bytes, or None for a message without one. Raises InvalidKey."""
        if self._get is None:
            return None
        try:
            key = self._get(value)
        except Exception as error:
            where = f"field {self.key!r}" if isinstance(self.key, str) else "key function"
            msg = (
                f"a value of type {type(value).__name__} has no key by the {where} that the queue is declared with "
                f"({type(error).__name__}: {error}); give the key with key="
            )
            raise InvalidKey(msg) from error
        if key is None or isinstance(key, str | bytes):
            return key
        if type(key) is int and isinstance(self.key, str):
            return str(key)
        msg = (
            f"a message key is str or bytes (or None), and a value's {self.key!r} is {type(key).__name__}: "
            "declare key= as a function that makes one of it"
        )
        raise InvalidKey(msg)

    def pair(self, item: Any) -> tuple[Key, Any]:
        """The key and the checked value of what a sender of many gives: values where a key is declared, else (key,
        value) pairs. Raises InvalidValue, InvalidKey."""
        if self.key is not None:
            self.check(item)
            return self.key_of(item), item
        try:
            key, value = item
        except (TypeError, ValueError) as error:
            msg = f"send_many takes (key, value) pairs, for this queue has no key declared, not {type(item).__name__}"
            raise InvalidValue(msg) from error
        self.check(value)
        return key, value

    def convert(self, raw: Any) -> Any:
        """The value that was carried as `raw`, checked in full; one that is of the type already stays as it is. Raises
        InvalidValue, saying what does not fit and where."""
        if self.kind is None:
            return raw
        try:
            return msgspec.convert(raw, self.kind, builtin_types=_CARRIED)
        except Exception as error:  # also what the type's own __post_init__ raises
            msg = f"the value is no {self.name}: {error}" if str(error) else f"the value is no {self.name}: {error!r}"
            raise InvalidValue(msg) from error

    def sort(self, messages: Iterable[M]) -> tuple[list[M], list[tuple[M, InvalidValue]]]:
        """Gives messages (anything with a `value`) their converted values; returns those that fit, and the others with
        why they don't, their values untouched."""
        fit: list[M] = []
        misfits: list[tuple[M, InvalidValue]] = []
        for message in messages:
            holder: Any = message
            try:
                holder.value = self.convert(holder.value)
            except InvalidValue as error:
                misfits.append((message, error))
            else:
                fit.append(message)
        return fit, misfits


def _required_keys(kind: Any, name: str) -> frozenset[str] | None:
    """The keys that every value of a TypedDict has; None for other types. Raises UsageError for what can be no type."""
    if kind is None:
        return None
    from msgspec import inspect  # a few milliseconds that only typed queues pay

    try:
        info = inspect.type_info(kind)
    except Exception as error:
        msg = f"type={name} can't be the type of a queue's values: {error}"
        raise UsageError(msg) from error
    if isinstance(info, inspect.TypedDictType):
        return frozenset(field.name for field in info.fields if field.required)
    if isinstance(info, inspect.CustomType):
        msg = (
            f"type={name} can't be the type of a queue's values: use a msgspec.Struct, a dataclass, a TypedDict or "
            "another type that msgspec converts to"
        )
        raise UsageError(msg)
    return None


def _classes(kind: Any) -> tuple[type, ...]:
    """The classes whose instances are of the type; none where that takes more than to look at the class."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    plain = [part for part in parts if not isinstance(part, type) or is_typeddict(part) or part in _PLAIN]
    return parts if not plain or (plain == [type(None)] and len(parts) > 1) else ()


def _check_key(kind: Any, name: str, key: Any) -> None:
    if not isinstance(key, str):
        if not callable(key):
            msg = f"key={key!r} is neither the name of a field nor a function from value to key"
            raise UsageError(msg)
        return
    fields = getattr(kind, "__struct_fields__", None) or getattr(kind, "__dataclass_fields__", None)
    if fields is None and is_typeddict(kind):
        fields = kind.__annotations__
    if fields is not None and key not in fields and not hasattr(kind, key):
        msg = f"key={key!r}: {name} has no such field; it has {', '.join(fields)}"
        raise UsageError(msg)


def _getter(kind: Any, field: str) -> Callable[[Any], Any]:
    if is_typeddict(kind):
        return itemgetter(field)
    if isinstance(kind, type) and kind not in _PLAIN:
        return attrgetter(field)

    def get(value: Any) -> Any:
        return value[field] if isinstance(value, Mapping) else getattr(value, field)

    return get


def _converts(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind, builtin_types=_CARRIED)
    except Exception:
        return False
    return True
