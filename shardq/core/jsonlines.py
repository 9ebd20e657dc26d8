"""A record as a line of JSON, in two forms. `exact` can be read back to the very same record: archives hold it.
`readable` is for people and for programs that only look: it shows text wherever there is text.

What JSON can't carry is an object with one field whose name begins with `$`:

    {"$utf8": "text"}         bytes that are UTF-8 (exact form; the readable one shows them as the text)
    {"$base64": "AAE="}       other bytes
    {"$msgpack": "gaF4AQ=="}  anything else (NaN, a timestamp, an extension, a map with keys that are no text, or with a
                              field beginning with `$`): the base64 of its msgpack

The readable form writes NaN and infinities, timestamps and map keys that are no text as text.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from math import isfinite
from typing import Any

import msgspec

from shardq.core.history import Record
from shardq.core.ids import MessageId
from shardq.errors import CorruptData, UsageError

_SAME = frozenset((str, int, bool, type(None)))
_BROKEN = (msgspec.MsgspecError, ValueError, TypeError, AttributeError, RecursionError, UsageError)


class _Line(msgspec.Struct):
    id: str
    stored_at_ms: int
    sent_at_ms: int
    key: Any
    headers: Any
    value: Any


_json_encode = msgspec.json.Encoder().encode
_json_decode = msgspec.json.Decoder(_Line).decode
_msgpack_decode = msgspec.msgpack.Decoder().decode


def exact(record: Record) -> bytes:
    """One line, without its line break, that `read_exact` reads back."""
    key, headers, value = _tagged(record.key), _tagged(record.headers), _tagged(record.value)
    return _json_encode(_Line(record.id, record.stored_at_ms, record.sent_at_ms, key, headers, value))


def read_exact(line: bytes) -> Record:
    """The record that `exact` wrote. Raises CorruptData."""
    try:
        found = _json_decode(line)
        key, value, headers = map(_read, (found.key, found.value, found.headers))
        shard = MessageId.parse(found.id).shard
        return Record(found.id, shard, key, value, headers, found.sent_at_ms, found.stored_at_ms)
    except _BROKEN as error:
        msg = f"a line is not one of an archive's: {error}"
        raise CorruptData(msg) from error


def readable(record: Record) -> dict[str, Any]:
    """An object for `--json`; `error` only where there is one."""
    shown = {
        "id": record.id,
        "shard": record.shard,
        "stored_at_ms": record.stored_at_ms,
        "sent_at_ms": record.sent_at_ms,
        "key": readable_value(record.key),
        "headers": readable_value(record.headers),
        "value": readable_value(record.value),
    }
    return shown if record.error is None else {**shown, "error": record.error}


def readable_value(value: Any) -> Any:
    """What `json.dumps` can take, with text wherever there is text."""
    try:
        return _readable(value)
    except RecursionError:
        return _packed(value)


# -- exact -------------------------------------------------------------------------------------------------------------


def _tagged(value: Any) -> Any:
    try:
        return _exact(value)
    except RecursionError:  # msgpack's own limit of depth lies higher than Python's here
        return _packed(value)


def _exact(value: Any) -> Any:
    kind = type(value)
    if kind in _SAME or (kind is float and isfinite(value)):
        return value
    if kind is bytes:
        return _bytes(value)
    if kind is list:
        return [_exact(item) for item in value]
    if kind is dict and all(type(name) is str and name[:1] != "$" for name in value):
        return {name: _exact(item) for name, item in value.items()}
    return _packed(value)


def _bytes(value: bytes) -> dict[str, str]:
    try:
        return {"$utf8": value.decode()}
    except UnicodeDecodeError:
        return {"$base64": base64.b64encode(value).decode()}


def _packed(value: Any) -> dict[str, str]:
    return {"$msgpack": base64.b64encode(msgspec.msgpack.encode(value)).decode()}


def _read(value: Any) -> Any:
    if type(value) is list:
        return [_read(item) for item in value]
    if type(value) is not dict:
        return value
    if len(value) == 1:
        ((name, inner),) = value.items()
        if name[:1] == "$":
            return _read_tagged(name, inner)
    return {name: _read(item) for name, item in value.items()}


def _read_tagged(name: str, inner: str) -> Any:
    match name:
        case "$utf8":
            return inner.encode()
        case "$base64":
            return base64.b64decode(inner, validate=True)
        case "$msgpack":
            return _msgpack_decode(base64.b64decode(inner, validate=True))
    msg = f"{name!r} is no mark that this shardq knows"
    raise ValueError(msg)


# -- readable ----------------------------------------------------------------------------------------------------------


def _readable(value: Any) -> Any:
    if type(value) in _SAME:
        return value
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, bytes):
        shown = _bytes(value)
        return shown.get("$utf8", shown)
    if isinstance(value, Mapping):
        return {_name(name): _readable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    if isinstance(value, msgspec.msgpack.Ext):
        return _packed(value)
    return str(value)  # a timestamp


def _name(name: Any) -> str:
    shown = _readable(name)
    return shown if isinstance(shown, str) else _json_encode(shown).decode()
