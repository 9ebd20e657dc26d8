"""OpenTelemetry: spans for what a client sends and handles, and the trace context carried in the messages' headers.

    shardq.otel.instrument(client)  # before its producers are made and its workers run

Needs the extra `otel` (the API; the program itself sets up the SDK and what exports). Names and kinds are those of the
messaging conventions (semantic conventions 1.41, status Development), what is shardq's own begins with
`messaging.shardq.`; docs/guide/tracing.md lists them.

Invariants:
- Nothing that a message carries, or a propagator raises, makes a send or a handler fail.
- A message's own trace headers are never changed. Keys and values are in no span, unless keys are asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import shardq
from shardq.core.message import Message
from shardq.core.records import Headers, Key
from shardq.core.retry import Reject, RetryLater
from shardq.errors import UsageError
from shardq.runtime.client import Client
from shardq.runtime.failures import asked_to_stop, text_of
from shardq.runtime.sync import SyncProducer

try:
    from opentelemetry import context as contexts
    from opentelemetry import propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.propagators.textmap import Getter, Setter, TextMapPropagator
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, TracerProvider
except ImportError as error:
    _MISSING = "shardq.otel needs the API of OpenTelemetry: pip install 'shardq[otel]'"
    raise UsageError(_MISSING) from error

_log = logging.getLogger("shardq")

SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"
MOST_CHARACTERS = 8192  # of one header, written or read: what W3C allows for baggage
MOST_LINKS = 128  # of one list of messages: the SDK keeps no more by default

BATCH_COUNT = "messaging.batch.message_count"
BODY_SIZE = "messaging.message.body.size"
ERROR_TYPE = "error.type"
MESSAGE_ID = "messaging.message.id"
PARTITION = "messaging.destination.partition.id"
ATTEMPT = "messaging.shardq.message.attempt"
FENCE = "messaging.shardq.fence"
KEY = "messaging.shardq.message.key"
OUTCOME = "messaging.shardq.outcome"

Handler = Callable[[Any], Awaitable[Any]]
Attributes = dict[str, str | int]
T = TypeVar("T", Client, SyncProducer)


def instrument(
    client: T,
    tracer_provider: TracerProvider | None = None,
    propagator: TextMapPropagator | None = None,
    *,
    keys: bool = False,
) -> T:
    """Traces what a client (or a `SyncProducer`) does from now on, and returns it. Before or after it is entered.

    tracer_provider   where spans go; default: the global one
    propagator        what writes and reads the headers; default: the global one (traceparent, tracestate, baggage)
    keys              whether spans name the messages' keys, which may be personal data

    Producers made, and workers run, before that are not traced. A worker looks when its `on_start` functions are
    through, so one of them may do this. Doing it again changes the settings. Raises UsageError for anything else than a
    client.
    """
    if not isinstance(client, Client | SyncProducer):
        msg = f"instrument() takes what shardq.connect(url) returns, or a shardq.SyncProducer, not {client!r:.200}"
        raise UsageError(msg)
    client.tracing = OtelTracer(tracer_provider, propagator, keys=keys)
    return client


class OtelTracer:
    """The `Tracer` of runtime/tracing.py."""

    def __init__(
        self, provider: TracerProvider | None, propagator: TextMapPropagator | None, *, keys: bool = False
    ) -> None:
        self._tracer = trace.get_tracer("shardq", shardq.__version__, provider, SCHEMA_URL)
        self._own_propagator, self._keys = propagator, keys

    # -- sending ---------------------------------------------------------------------------------------------

    def send(self, queue: str, key: Key, body_bytes: int | None, headers: Headers | None) -> _Sending:
        attributes = _attributes("send", queue)
        if body_bytes is not None:
            attributes[BODY_SIZE] = body_bytes
        if self._keys and isinstance(key, str | bytes):
            attributes[KEY] = _key_text(key)
        name, own = f"send {queue}", self._own_context(headers)
        if own is not None:
            # The message was given a context of its own, which stays; so this span is not where it comes from.
            links = [Link(own)] if own.is_valid else []
            return _Sending(
                self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes, links=links), headers
            )
        span = self._tracer.start_span(name, kind=SpanKind.PRODUCER, attributes=attributes)
        return _Sending(span, self._inject(headers, trace.set_span_in_context(span)))

    def send_many(self, queue: str) -> _Sending:
        span = self._tracer.start_span(f"send {queue}", kind=SpanKind.CLIENT, attributes=_attributes("send", queue))
        return _Sending(span, None)

    def carry(self, headers: Headers | None) -> Headers | None:
        return headers if self._own_context(headers) is not None else self._inject(headers, contexts.get_current())

    # -- handling --------------------------------------------------------------------------------------------

    def wrap(self, handler: Handler, queue: str, group: str, attempts: int) -> Handler:
        common: Attributes = {**_attributes("process", queue), "messaging.consumer.group.name": group}

        async def traced(given: Any) -> Any:
            if isinstance(given, Message):
                messages: Sequence[Message] = (given,)
                span, current = self._start_one(given, common)
            else:
                messages = given
                span, current = self._start_list(given, common)
            token = contexts.attach(trace.set_span_in_context(span, current))
            try:
                result = await handler(given)
                span.set_attribute(OUTCOME, "handled")
                return result
            except BaseException as error:
                _failed(span, error, any(message.attempt >= attempts for message in messages))
                raise
            finally:
                contexts.detach(token)
                span.end()

        return traced

    def _start_one(self, message: Message, common: Attributes) -> tuple[Span, Context]:
        """The producer's context is the parent, and linked as the conventions want it; the span that the worker runs
        in, if there is one, is linked then."""
        ambient = contexts.get_current()
        current = self._extract(message.headers, ambient)
        links: list[Link] = []
        if current is not ambient:
            around, sent = _span_context(ambient), _span_context(current)
            if sent != around:
                links = [Link(context) for context in (sent, around) if context.is_valid]
        span = self._start(message, common, current, links)
        if span.is_recording():
            span.set_attributes({MESSAGE_ID: message.id, ATTEMPT: message.attempt, FENCE: message.fence})
            if self._keys and message.key is not None:
                span.set_attribute(KEY, _key_text(message.key))
        return span, current

    def _start_list(self, messages: Sequence[Message], common: Attributes) -> tuple[Span, Context]:
        ambient, first = contexts.get_current(), messages[0]
        span = self._start(first, common, ambient, self._links(messages))
        span.set_attributes({BATCH_COUNT: len(messages), FENCE: first.fence})
        return span, ambient

    def _start(self, message: Message, common: Attributes, parent: Context, links: Sequence[Link]) -> Span:
        # What samplers may look at is there from the start; the rest only where it is recorded.
        attributes = {**common, PARTITION: str(message.shard)}
        name = f"process {message.queue}"
        return self._tracer.start_span(name, parent, kind=SpanKind.CONSUMER, attributes=attributes, links=links)

    def _links(self, messages: Iterable[Message]) -> list[Link]:
        """One for each context that messages were sent in."""
        found: dict[tuple[int, int], SpanContext] = {}  # a SpanContext itself can't be hashed
        empty = Context()
        for message in messages:
            if message.headers is not None and len(found) < MOST_LINKS:
                sent = _span_context(self._extract(message.headers, empty))
                if sent.is_valid:
                    found[sent.trace_id, sent.span_id] = sent
        return [Link(sent) for sent in found.values()]

    # -- headers ---------------------------------------------------------------------------------------------

    @property
    def _propagator(self) -> TextMapPropagator:
        return self._own_propagator or propagate.get_global_textmap()

    def _own_context(self, headers: Any) -> SpanContext | None:
        """The context that the caller's own headers name, invalid if it is garbage; None when they name none."""
        if not headers or not isinstance(headers, Mapping) or self._propagator.fields.isdisjoint(headers):
            return None  # what is no mapping is refused by whoever sends it
        return _span_context(self._extract(headers, Context()))

    def _inject(self, headers: Headers | None, context: Context) -> Headers | None:
        """The headers with the context added; as they are where that fails."""
        own: Any = headers
        if own is not None and not isinstance(own, Mapping):
            return headers
        carried: dict[str, str | bytes] = {}
        try:
            self._propagator.inject(carried, context, _SETTER)
        except Exception:
            _log.debug("a propagator failed: a message is sent without trace context", exc_info=True)
            return headers
        return {**carried, **(headers or {})} if carried else headers

    def _extract(self, headers: Headers | None, context: Context) -> Context:
        """`context`, with what the headers of a message say: anybody may have written them."""
        if not headers:
            return context
        try:
            return self._propagator.extract(headers, context, _GETTER)
        except Exception:
            _log.debug("the trace context of a message could not be read", exc_info=True)
            return context


class _Sending:
    """The `Sending` of runtime/tracing.py."""

    def __init__(self, span: Span, headers: Headers | None) -> None:
        self.headers = headers
        self._span, self._ended = span, False

    def stored(self, message_id: str) -> None:
        self._span.set_attribute(MESSAGE_ID, message_id)
        self._span.set_attribute(PARTITION, message_id.partition("/")[0])

    def stored_many(self, count: int) -> None:
        self._span.set_attribute(BATCH_COUNT, count)

    def end(self, error: BaseException | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        if error is not None:
            _set_error(self._span, error)
            _record(self._span, error)
        self._span.end()


class _HeaderGetter(Getter[Headers]):
    """Headers as text; what is none, or too long to be one of a trace, is not there."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        value = carrier.get(key)
        if value is None or len(value) > MOST_CHARACTERS:
            return None
        return [value if isinstance(value, str) else value.decode("ascii", "replace")]

    def keys(self, carrier: Headers) -> list[str]:
        return list(carrier)


class _HeaderSetter(Setter[dict[str, str | bytes]]):
    """Takes what a message can carry."""

    def set(self, carrier: dict[str, str | bytes], key: str, value: str) -> None:
        if len(value) <= MOST_CHARACTERS and value.isascii():
            carrier[key] = value


_GETTER, _SETTER = _HeaderGetter(), _HeaderSetter()


def _attributes(operation: str, queue: str) -> Attributes:
    return {
        "messaging.system": "shardq",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": queue,
    }


def _key_text(key: str | bytes) -> str:
    return key if isinstance(key, str) else key.decode(errors="backslashreplace")


def _span_context(context: Context) -> SpanContext:
    return trace.get_current_span(context).get_span_context()


def _failed(span: Span, error: BaseException, last: bool) -> None:
    """What a handler's exception means for the message, and whether it is one of the program."""
    if isinstance(error, asyncio.CancelledError) and asked_to_stop():
        span.set_attribute(OUTCOME, "interrupted")  # the worker stops or lost the lease: it is handled again
        return
    dead = last or isinstance(error, Reject)
    span.set_attribute(OUTCOME, "dead" if dead else "retry")
    if isinstance(error, RetryLater) and not dead:
        return
    _set_error(span, error)
    if not isinstance(error, Reject | RetryLater):
        _record(span, error)


def _record(span: Span, error: BaseException) -> None:
    try:
        span.record_exception(error)
    except Exception:  # of the exception's own __str__; its class is in the span already
        _log.debug("an exception could not be recorded in its span", exc_info=True)


def _set_error(span: Span, error: BaseException) -> None:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    span.set_attribute(ERROR_TYPE, name)
    span.set_status(StatusCode.ERROR, text_of(error) if isinstance(error, Exception) else name)
