"""Sending with a span around it: the producer of a client that is traced, and the answers of a SyncProducer that is.
Sends and decides nothing itself. What is not traced does not come here.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from typing import Any

from shardq.core import records
from shardq.core.conditions import JOB_KEEP_S
from shardq.core.records import Headers, Key
from shardq.errors import InvalidValue
from shardq.runtime.answers import AnyAnswer, MessageAnswer
from shardq.runtime.jobs import Job
from shardq.runtime.producer import Producer
from shardq.runtime.tracing import Sending, Tracer


class TracedProducer(Producer):
    """A producer whose calls are spans: one made with a tracer."""

    async def send(
        self,
        value: Any,
        *,
        key: Key = None,
        headers: Headers | None = None,
        delay: float | timedelta | None = None,
        at: float | datetime | None = None,
        dedupe_id: str | None = None,
        dedupe_window: float | timedelta | None = None,
    ) -> str:
        with self._sending(key, value, headers) as sending:
            message_id = await super().send(
                value,
                key=key,
                headers=sending.headers,
                delay=delay,
                at=at,
                dedupe_id=dedupe_id,
                dedupe_window=dedupe_window,
            )
            sending.stored(message_id)
        return message_id

    async def submit(
        self,
        value: Any,
        *,
        key: Key = None,
        headers: Headers | None = None,
        delay: float | timedelta | None = None,
        at: float | datetime | None = None,
        keep: float | timedelta = JOB_KEEP_S,
    ) -> Job:
        with self._sending(key, value, headers) as sending:
            job = await super().submit(value, key=key, headers=sending.headers, delay=delay, at=at, keep=keep)
            sending.stored(job.message_id)
        return job

    async def send_many(self, messages: Iterable[Any] | AsyncIterable[Any]) -> int:
        with _ending(self._traces.send_many(self._queue_name)) as sending:
            count = await super().send_many(messages)
            sending.stored_many(count)
        return count

    @property
    def _traces(self) -> Tracer:
        assert self._tracer is not None
        return self._tracer

    def _sending(self, key: Key, value: Any, headers: Headers | None) -> AbstractContextManager[Sending]:
        return _ending(self._traces.send(self._queue_name, key, _body_bytes(value), headers))


@contextmanager
def _ending(sending: Sending) -> Iterator[Sending]:
    try:
        yield sending
    except BaseException as error:
        sending.end(error)
        raise
    sending.end()


def _body_bytes(value: Any) -> int | None:
    try:
        return records.value_bytes(records.pack_value(value))
    except InvalidValue:
        return None  # sending it says so


def begin(tracer: Tracer, queue: str, answer: AnyAnswer) -> Sending:
    """A span for what a thread is about to hand to the loop, from that thread's own context. It ends with the answer;
    where that is never handed over, the caller ends it."""
    if isinstance(answer, MessageAnswer):
        sending = tracer.send(queue, answer.key, _body_bytes(answer.value), answer.headers)
        answer.headers = sending.headers
    else:
        sending = tracer.send_many(queue)

    def ended(done: Future[Any]) -> None:
        if done.cancelled():
            sending.end(CancelledError("withdrawn before it was sent"))
            return
        # Not the answer's own methods: asking them means that the caller was told of a failure.
        error = Future.exception(done)
        if error is None:
            result = Future.result(done)
            (sending.stored if isinstance(answer, MessageAnswer) else sending.stored_many)(result)
        sending.end(error)

    answer.add_done_callback(ended)
    return sending
