"""`SyncProducer`: sending from threads, Django, plain scripts. One event loop in a background thread serves them all
(background.py). Sends nothing itself, and never blocks where an event loop runs.

It starts at the first use: a producer made when a module is imported has no thread, loop or connection yet, so a
preforking server may import first and fork later. Forks and the program's end are seen to in process.py.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, TypedDict, Unpack, cast

from shardq.core import records
from shardq.core.records import Headers, Key
from shardq.errors import ClosedError, InvalidValue, NotStored, ShardqError, StoreTimeout, UsageError
from shardq.runtime import process
from shardq.runtime.answers import AnyAnswer, JobAnswer, Losses, MessageAnswer, SendOptions, too_late, wait
from shardq.runtime.background import Background
from shardq.runtime.client import connect
from shardq.runtime.feed import Feed
from shardq.runtime.process import EXIT_WITHIN_S
from shardq.runtime.producer import Producer
from shardq.runtime.queue import Durability
from shardq.runtime.traced import begin
from shardq.runtime.tracing import Tracer
from shardq.storage.keys import check_name

_log = logging.getLogger("shardq")

MOST_BYTES = 32 * 1024 * 1024  # what `send_soon` takes before it waits, unless `max_buffered_bytes` says otherwise


class ProducerOptions(TypedDict, total=False):
    """The options of `Queue.producer`, where they are explained."""

    durability: Durability | None
    replicas: int | None
    max_batch_messages: int
    max_batch_bytes: int
    max_message_bytes: int
    max_buffered_bytes: int
    delivery_timeout: float


class SyncProducer:
    """Sends to one queue without async; any number of threads may share it.

        producer = shardq.SyncProducer("redis://localhost:7000", "orders", shards=64)
        producer.send({"sku": 7}, key="user:42")  # returned = stored

    Make one for each queue and process, at module level if you like: it connects at its first use. `shards` declares
    the queue if it does not exist; `options` are those of `Queue.producer`. Its errors are those of the async producer;
    where it can't connect, the call raises what `shardq.connect` raises, and the next call tries again.

    close() it, or leave its `with` block, to hear what is not stored. A program that just ends gives what is under way
    10 s, then logs what is left. Children of `multiprocessing` that were forked run no exit handlers: close it there.
    Under uWSGI set `enable-threads`. Not for signal handlers, which may come while a lock of it is held.
    """

    def __init__(
        self,
        url: str,
        queue: str,
        *,
        shards: int | None = None,
        prefix: str = "shardq",
        **options: Unpack[ProducerOptions],
    ) -> None:
        check_name("queue", queue)
        check_name("prefix", prefix)
        _check_names("SyncProducer", options, ProducerOptions)
        self._url, self._queue, self._shards, self._prefix, self._options = url, queue, shards, prefix, options
        self.tracing: Tracer | None = None  # set by shardq.otel.instrument
        self._closed = False
        self._renew()
        process.producers.add(self)

    def _renew(self) -> None:
        """As it is before its first use in a process."""
        self._lock = threading.Lock()
        self._losses = Losses()
        self._background: Background | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def _leave_to_parent(self) -> None:
        """In the child of a fork: nothing of the parent's is touched, also no lock: who holds it is not here."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._renew()

    def __repr__(self) -> str:
        return f"<shardq.SyncProducer of {self._queue!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is made anew where it arrives: a process that was spawned can be given one."""
        make = functools.partial(type(self), shards=self._shards, prefix=self._prefix, **self._options)
        return make, (self._url, self._queue)

    def __enter__(self) -> SyncProducer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close(timeout=EXIT_WITHIN_S)
        except ShardqError as failure:  # the block's own error is the one to be raised
            _log.warning("producer of %s left by an error: %s", self._queue, failure)

    # -- sending ---------------------------------------------------------------------------------------------

    def send(
        self,
        value: Any,
        *,
        key: Key = None,
        headers: Headers | None = None,
        timeout: float | None = None,
        **options: Unpack[SendOptions],
    ) -> str:
        """Sends one message and returns its id when it is stored; `options` are those of `Producer.send`.

        timeout   seconds to wait, connecting included. StoreTimeout after that: where it has `outcome_unknown`, the
                  message may be stored still, until `delivery_timeout`; else it was not sent. Default: 15 s to connect,
                  10 s to find the queue, then `delivery_timeout`
        """
        _check_timeout(timeout)
        answer = MessageAnswer(self._losses, key, value, headers, _given(options))
        self._post(answer)
        return wait(answer, timeout, "the message was not stored")

    def send_soon(
        self, value: Any, *, key: Key = None, headers: Headers | None = None, **options: Unpack[SendOptions]
    ) -> Future[str]:
        """Sends one message and returns at once: a concurrent.futures.Future of its id.

        The value may be changed afterwards. One thread's messages of a key are stored in the order it sent them. Waits
        only while 10,000 messages or `max_buffered_bytes` are under way. An error of which the future was never asked
        is raised by `flush` or `close` as NotStored. A callback of the future runs in the loop: keep it short.
        """
        size = 0
        try:
            value = records.pack_value(value)
            size = records.value_bytes(value)
        except InvalidValue:
            pass  # the loop finds it out again, for the future
        headers = dict(headers) if isinstance(headers, Mapping) else headers
        answer = MessageAnswer(self._losses, key, value, headers, _given(options), size)
        self._post(answer, wait_for_room=True)
        return answer

    def send_many(self, pairs: Iterable[tuple[Key, Any]]) -> int:
        """Sends (key, value) pairs, in order per key, and returns their number when all are stored.

        The iterable runs in the calling thread. Memory stays bounded however many pairs there are. Errors are those of
        `Producer.send_many`. What was taken from an iterable that raises, or by a call that is interrupted, is sent
        all the same; `flush` waits for it.
        """
        feed = Feed()
        answer = JobAnswer(self._losses, feed.carry, on_stop=feed.refuse)
        answer.add_done_callback(feed.refuse)
        self._post(answer)
        try:
            complete = feed.fill(pairs)
            sent = answer.result()
        except NotStored as error:
            raise feed.with_rest(error) from error.__cause__
        except BaseException:
            answer.left = True
            raise
        if not complete:
            msg = f"the producer was closed while this was sent: {sent} messages were taken and are stored"
            raise ClosedError(msg)
        return sent

    def flush(self, *, timeout: float | None = None) -> None:
        """Waits until every message sent so far, by any thread, is stored.

        Raises NotStored when some are not, or not known to be, and nobody was told so; StoreTimeout after `timeout`
        seconds.
        """
        _refuse_in_loop()
        _check_timeout(timeout)
        background = self._background
        if background is not None:
            answer = JobAnswer(self._losses, background.flush)
            if background.post(answer):
                try:
                    answer.exception(timeout)  # that of a thread which ended: those who wait for messages got it too
                except TimeoutError:
                    raise too_late(answer, timeout, "not all messages were stored", answer.cancel()) from None
        self._raise_losses()

    def close(self, *, timeout: float | None = None) -> None:
        """Flushes, then ends the thread and its connections. Raises like `flush`; closed it is in any case."""
        _refuse_in_loop()
        _check_timeout(timeout)
        with self._lock:
            self._closed = True
            background = self._background
        if background is not None:
            background.stop()
            if not background.join(timeout):
                msg = f"{background.open} messages are not known to be stored after {timeout:g} s; they are tried still"
                raise StoreTimeout(msg)
        self._raise_losses()

    # -- between the threads ---------------------------------------------------------------------------------

    def _post(self, answer: AnyAnswer, *, wait_for_room: bool = False) -> None:
        _refuse_in_loop()
        sending = begin(self.tracing, self._queue, answer) if self.tracing is not None else None
        try:
            while not self._running().post(answer, wait_for_room=wait_for_room):
                pass  # that one could not connect, or was stopped just now: another one, unless this was closed
        except BaseException as error:
            if sending is not None:
                sending.end(error)
            raise

    def _running(self) -> Background:
        with self._lock:
            if self._closed:
                msg = "this producer is closed: make another shardq.SyncProducer"
                raise ClosedError(msg)
            if self._background is None or self._background.over:
                self._start()
            assert self._background is not None
            return self._background

    def _start(self) -> None:
        # Not a method of this object: the thread must not keep it from being collected.
        opened = functools.partial(_opened, self._url, self._prefix, self._queue, self._shards, self._options)
        most_bytes = self._options.get("max_buffered_bytes", MOST_BYTES)
        background = Background(f"shardq-{self._queue}", opened, self._losses, most_bytes, process.running.discard)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, background.abandon)
        self._finalizer.atexit = False
        process.running.add(background)
        background.start()
        self._background = background

    def _raise_losses(self) -> None:
        lost = self._losses.take()
        if lost is not None:
            raise lost


@asynccontextmanager
async def _opened(
    url: str, prefix: str, queue: str, shards: int | None, options: ProducerOptions
) -> AsyncIterator[Producer]:
    async with connect(url, prefix=prefix) as client:
        declared = await client.queue(queue, shards=shards)
        async with declared.producer(**options) as producer:
            yield producer


def _given(options: SendOptions) -> SendOptions:
    if not options:
        return options
    _check_names("send", options, SendOptions)
    given: Any = {name: value for name, value in options.items() if value is not None}
    return cast("SendOptions", given)


def _check_names(call: str, given: Mapping[str, object], known: type) -> None:
    if unknown := sorted(given.keys() - known.__annotations__.keys()):
        msg = f"{call}() got an unexpected keyword argument {unknown[0]!r}"
        raise TypeError(msg)


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not timeout > 0:
        msg = f"timeout must be above 0 (seconds), or None for no limit of its own, not {timeout}"
        raise UsageError(msg)


def _refuse_in_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    msg = (
        "SyncProducer was called where an event loop runs (or in a callback of its own future) and would block it: "
        "use `async with queue.producer() as producer:` and `await producer.send(...)` there"
    )
    raise UsageError(msg)
