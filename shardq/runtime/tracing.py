"""What the runtime knows of tracing: two protocols, and nothing of any library. `Client.tracing` holds a Tracer or
None; shardq/otel.py has the one there is.

Who is traced is decided where a producer is made and where a worker's handler is wrapped, so what is not traced runs
the very code that it would run if there were no tracing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from shardq.core.records import Headers, Key


class Sending(Protocol):
    """The span of one call that sends. `headers` are to be sent in place of the caller's."""

    @property
    def headers(self) -> Headers | None: ...

    def stored(self, message_id: str) -> None:
        """The message is stored under this id."""

    def stored_many(self, count: int) -> None:
        """So many messages are stored."""

    def end(self, error: BaseException | None = None) -> None:
        """The call is over, by this error if it failed. For any thread; what comes after the first time is ignored."""


class Tracer(Protocol):
    """Makes spans. Nothing here raises: what can't be traced is sent and handled all the same."""

    def send(self, queue: str, key: Key, body_bytes: int | None, headers: Headers | None) -> Sending:
        """One message is being sent, from the current context."""

    def send_many(self, queue: str) -> Sending:
        """Any number of messages are being sent by one call."""

    def carry(self, headers: Headers | None) -> Headers | None:
        """The headers of a message that is sent without a span of its own, with the current context in them."""

    def wrap(
        self, handler: Callable[[Any], Awaitable[Any]], queue: str, group: str, attempts: int
    ) -> Callable[[Any], Awaitable[Any]]:
        """A span around each call of a handler that takes a message, or a list of messages of one shard; after
        `attempts` tries a message is a dead letter."""
