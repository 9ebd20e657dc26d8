"""Replies of our functions are untrusted input: what does not have the shape that the .lua file's header states raises
CorruptData. Knows no function in particular.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shardq.errors import CorruptData


@contextmanager
def shape(function: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, IndexError, AttributeError, KeyError, UnicodeDecodeError) as error:
        msg = f"the reply of {function} does not have its shape: do all nodes run the same shardq functions?"
        raise CorruptData(msg) from error
