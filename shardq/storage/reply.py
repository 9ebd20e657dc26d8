"""Replies are untrusted input: what does not have the shape that the .lua file's header, or Redis's manual, states
raises CorruptData. Knows no function in particular.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from shardq.core.ids import entry_key
from shardq.errors import CorruptData, UsageError

# Ids whose numbers are below 2**64 for their length alone, as those of our time are.
_PLAIN_ID = re.compile(rb"[1-9][0-9]{0,18}-(?:0|[1-9][0-9]{0,18})")

_BYTES = frozenset((bytes,))
_MISSHAPEN = (TypeError, ValueError, IndexError, AttributeError, KeyError, OverflowError)


class shape:  # noqa: N801  # read like a function; a generator's context manager costs three times as much, a step
    """`with shape("step"):` around what reads its reply."""

    __slots__ = ("_function",)

    def __init__(self, function: str) -> None:
        self._function = function

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, _MISSHAPEN):
            msg = f"the reply of {self._function} does not have its shape: do all nodes run the same shardq functions?"
            raise CorruptData(msg) from error


def text(reply: Any) -> bytes:
    """A reply that is a string. Raises TypeError: bytes() of a number would be so many zeros."""
    if type(reply) is not bytes:
        raise TypeError
    return reply


def texts(reply: Any) -> list[bytes]:
    """A reply that is a list of strings. Raises TypeError."""
    if type(reply) is not list or (reply and not _BYTES.issuperset(map(type, reply))):
        raise TypeError
    return reply


def entries_of(reply: Any) -> list[tuple[str, list[bytes]]]:
    """Stream entries as XRANGE and XREADGROUP give them: their ids, and their fields, none for one that was deleted.
    Raises TypeError or ValueError."""
    if type(reply) is not list:
        raise TypeError
    return [(_entry_id(entry), texts(fields or [])) for entry, fields in reply]


def checked_entries(reply: Any) -> list[tuple[bytes, Sequence[bytes]]]:
    """The same with the ids as they came, for the step, which fetches so many."""
    if type(reply) is not list:
        raise TypeError
    found: list[tuple[bytes, Sequence[bytes]]] = []
    for entry, fields in reply:
        if _PLAIN_ID.fullmatch(text(entry)) is None:
            _entry_id(entry)
        found.append((entry, texts(fields or [])))
    return found


def _entry_id(entry: Any) -> str:
    found = text(entry).decode()
    try:
        entry_key(found)
    except UsageError as error:
        raise ValueError from error
    return found
