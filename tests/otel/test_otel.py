"""Tracing on a real cluster: who is whose parent, what spans say, and that nothing it meets breaks a message."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import shardq
import shardq.otel
from shardq.core.records import Headers
from shardq.ops.local_cluster import LocalCluster
from shardq.otel import OtelTracer
from tests.runtime.harness import GROUP, check_equation, drained, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("valkey9")]

ROOT = Path(__file__).parents[2]
OTHER = "00-11111111111111111111111111111111-2222222222222222-01"
QUICK = shardq.Retry(attempts=3, base=0.05, jitter=0)


class Traces:
    """Every span that ended, in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def traces() -> Iterator[Traces]:
    found = Traces()
    yield found
    found.provider.shutdown()


def attribute(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(name)


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return (span.parent.trace_id, span.parent.span_id) if span.parent is not None else None


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


@asynccontextmanager
async def traced(cluster: LocalCluster, traces: Traces, **options: Any) -> AsyncIterator[shardq.Client]:
    async with shardq.connect(cluster.url) as client:
        assert shardq.otel.instrument(client, traces.provider, **options) is client
        yield client


async def handled(client: shardq.Client, worker: shardq.Worker, queue: shardq.Queue) -> None:
    async with running(client, worker):
        await until(lambda: drained(queue, worker.group), 30, "an empty backlog")
    await check_equation(queue, worker.group)


def noting(queue: str, seen: list[Any], **options: Any) -> shardq.Worker:
    """A worker that notes what each message was, and in which span it ran."""
    worker = shardq.Worker(queue, group=GROUP, **options)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        seen.append((message, trace.get_current_span().get_span_context()))

    return worker


# -- one message ---------------------------------------------------------------------------------------------


async def test_a_handler_runs_in_the_trace_of_its_message(
    cluster: LocalCluster, queue_name: str, traces: Traces
) -> None:
    seen: list[Any] = []
    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            with traces.tracer.start_as_current_span("request"):
                message_id = await producer.send({"sku": "a"}, key="secret-key")
        await handled(client, noting(queue_name, seen), queue)
    ((message, inside),) = seen
    sent, processed = traces.one(f"send {queue_name}"), traces.one(f"process {queue_name}")
    assert parent(sent) == ids(traces.one("request"))
    assert parent(processed) == ids(sent)
    assert linked(processed) == [ids(sent)]
    assert (inside.trace_id, inside.span_id) == ids(processed)
    assert (sent.kind, processed.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    common = {"messaging.system": "shardq", "messaging.destination.name": queue_name}
    here = {"messaging.message.id": message_id, "messaging.destination.partition.id": message_id.partition("/")[0]}
    assert dict(sent.attributes or {}) == common | here | {
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.message.body.size": 7,  # of msgpack
    }
    assert dict(processed.attributes or {}) == common | here | {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": GROUP,
        "messaging.shardq.message.attempt": 1,
        "messaging.shardq.fence": message.fence,
        "messaging.shardq.outcome": "handled",
    }
    assert {sent.status.status_code, processed.status.status_code} == {StatusCode.UNSET}


async def test_keys_are_named_only_if_asked_for(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    async with traced(cluster, traces, keys=True) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send(b"v", key=b"k\xff")
            await producer.send(b"v")
        await handled(client, noting(queue_name, []), queue)
    for name in ("send", "process"):
        keys = [attribute(span, "messaging.shardq.message.key") for span in traces.named(f"{name} {queue_name}")]
        assert sorted(map(str, keys)) == ["None", "k\\xff"]


async def test_an_on_start_may_instrument_and_threads_have_the_context(
    cluster: LocalCluster, queue_name: str, traces: Traces
) -> None:
    """Instrumented by the worker's own on_start; plain functions run in threads, with the context."""
    inside: list[int] = []
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.on_start
    def trace_it(client: shardq.Client) -> None:
        shardq.otel.instrument(client, traces.provider)

    @worker.handler
    def handle(message: shardq.Message) -> None:
        with traces.tracer.start_as_current_span("query") as span:
            inside.append(span.get_span_context().span_id)

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            await producer.send("x")  # before it was instrumented
        await handled(client, worker, queue)
    processed, query = traces.one(f"process {queue_name}"), traces.one("query")
    assert parent(processed) is None
    assert parent(query) == ids(processed)
    assert inside == [ids(query)[1]]
    assert traces.named(f"send {queue_name}") == []


async def test_delayed_messages_and_jobs_carry_the_context(
    cluster: LocalCluster, queue_name: str, traces: Traces
) -> None:
    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer() as producer:
            await producer.send("later", delay=0.2, headers={"own": "h"})
            job = await producer.submit("job")
        seen: list[Any] = []
        async with running(client, noting(queue_name, seen)):
            await until(lambda: len(seen) == 2, 30, "both messages")
            assert (await job.wait(timeout=30)) is None
    sent = {ids(span) for span in traces.named(f"send {queue_name}")}
    assert {parent(span) for span in traces.named(f"process {queue_name}")} == sent
    assert len(sent) == 2
    assert {"own", "traceparent"} <= {name for message, _ in seen for name in message.headers}
    assert job.message_id in {attribute(span, "messaging.message.id") for span in traces.named(f"send {queue_name}")}


async def test_every_try_is_a_span_of_its_own(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    worker = shardq.Worker(queue_name, group=GROUP, retry=QUICK)

    class Spiteful(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        match message.value, message.attempt:
            case "reject", _:
                raise shardq.Reject("no address")
            case "later", _:
                raise shardq.RetryLater(0.05)
            case "fails", 1:
                raise Spiteful
            case "fails", 2:
                raise ValueError("broken")

    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=1)
        senders: dict[str, tuple[int, int]] = {}
        async with queue.producer() as producer:
            for value in ("reject", "later", "fails"):
                await producer.send(value, key=value)
                senders[value] = ids(traces.named(f"send {queue_name}")[-1])
        await handled(client, worker, queue)
    spans = traces.named(f"process {queue_name}")
    found = {
        value: [
            (
                attribute(span, "messaging.shardq.message.attempt"),
                attribute(span, "messaging.shardq.outcome"),
                span.status.status_code,
                attribute(span, "error.type"),
                len(span.events),
            )
            for span in spans
            if parent(span) == sender
        ]
        for value, sender in senders.items()
    }
    ok, error = StatusCode.UNSET, StatusCode.ERROR
    spiteful = f"{Spiteful.__module__}.{Spiteful.__qualname__}"
    assert found == {
        "reject": [(1, "dead", error, "shardq.core.retry.Reject", 0)],
        "later": [
            (1, "retry", ok, None, 0),
            (2, "retry", ok, None, 0),
            (3, "dead", error, "shardq.core.retry.RetryLater", 0),
        ],
        "fails": [
            (1, "retry", error, spiteful, 0),
            (2, "retry", error, "ValueError", 1),
            (3, "handled", ok, None, 0),
        ],
    }
    assert linked(spans[-1]) == [parent(spans[-1])]


async def test_a_message_that_the_worker_drops_when_it_stops_is_no_error(
    cluster: LocalCluster, queue_name: str, traces: Traces
) -> None:
    started = anyio.Event()
    worker = shardq.Worker(queue_name, group=GROUP, drain_limit=0.05)

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        started.set()
        await anyio.sleep_forever()

    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send("x")
        with anyio.fail_after(30):
            async with running(client, worker):
                await started.wait()
    span = traces.one(f"process {queue_name}")
    assert attribute(span, "messaging.shardq.outcome") == "interrupted"
    assert span.status.status_code == StatusCode.UNSET


# -- several -------------------------------------------------------------------------------------------------


async def test_a_list_links_to_every_message(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    lists: list[int] = []
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.batch_handler
    async def handle(messages: Sequence[shardq.Message]) -> None:
        lists.append(len(messages))

    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            async with anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(producer.send, number)
            assert await producer.send_many((None, number) for number in range(20)) == 20
        await handled(client, worker, queue)
    sends = traces.named(f"send {queue_name}")
    many = [span for span in sends if attribute(span, "messaging.batch.message_count")]
    assert [(span.kind, attribute(span, "messaging.batch.message_count")) for span in many] == [(SpanKind.CLIENT, 20)]
    single = sorted(ids(span) for span in sends if span not in many)
    spans = traces.named(f"process {queue_name}")
    assert sorted(link for span in spans for link in linked(span)) == single
    assert len(single) == 5
    assert [parent(span) for span in spans] == [None] * len(lists)
    assert [attribute(span, "messaging.batch.message_count") for span in spans] == lists
    assert sum(lists) == 25


async def test_a_message_sent_in_the_commit_goes_on_in_the_trace(
    cluster: LocalCluster, queue_name: str, traces: Traces
) -> None:
    second, seen = f"{queue_name}-2", list[Any]()
    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=2)
        parcels = await client.queue(second, shards=2)
        worker = shardq.Worker(queue_name, group=GROUP)

        @worker.handler
        def handle(message: shardq.Message) -> None:
            with message.atomic() as tx:
                tx.send(parcels, message.value, key=message.key, headers={"own": "h"})

        async with queue.producer() as producer:
            await producer.send("x", key="k")
        await handled(client, worker, queue)
        await handled(client, noting(second, seen), parcels)
    first, last = traces.one(f"process {queue_name}"), traces.one(f"process {second}")
    assert parent(last) == ids(first)
    assert ids(last)[0] == ids(traces.one(f"send {queue_name}"))[0]
    assert seen[0][0].headers["own"] == "h"


async def test_an_ambient_span_of_the_worker_is_linked(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send("x")
        with traces.tracer.start_as_current_span("main"):
            await handled(client, noting(queue_name, []), queue)
    processed = traces.one(f"process {queue_name}")
    sent = ids(traces.one(f"send {queue_name}"))
    assert parent(processed) == sent
    assert linked(processed) == [sent, ids(traces.one("main"))]


# -- headers -------------------------------------------------------------------------------------------------

GARBAGE: list[dict[str, str | bytes]] = [
    {"traceparent": ""},
    {"traceparent": "00-zz-zz-01"},
    {"traceparent": b"\xff\xfe\x00"},
    {"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01"},
    {"traceparent": "9" * 100_000},
    {"traceparent": OTHER, "tracestate": "=,;" * 100_000},
    {"baggage": b"\x80=%%%,==" * 50},
]


async def test_garbage_headers_break_nothing(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    seen: list[Any] = []
    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            for headers in GARBAGE:
                await producer.send("x", key="k", headers=headers)
        await handled(client, noting(queue_name, seen), queue)
    assert [message.headers for message, _ in seen] == GARBAGE, "own headers stay as they are"
    spans = traces.named(f"process {queue_name}")
    assert len(spans) == len(GARBAGE)
    assert sum(parent(span) is not None for span in spans) == 1, "only the sound traceparent is a parent"


async def test_a_messages_own_context_wins(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            with traces.tracer.start_as_current_span("request"):
                await producer.send("x", headers={"traceparent": OTHER})
        await handled(client, noting(queue_name, []), queue)
    other = (int("1" * 32, 16), int("2" * 16, 16))
    sent = traces.one(f"send {queue_name}")
    assert (sent.kind, linked(sent), parent(sent)) == (SpanKind.CLIENT, [other], ids(traces.one("request")))
    assert parent(traces.one(f"process {queue_name}")) == other


async def test_baggage_reaches_the_handler(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    found: dict[str, tuple[object, Headers]] = {}
    worker = shardq.Worker(queue_name, group=GROUP)

    @worker.handler
    def handle(message: shardq.Message) -> None:
        found[message.value] = baggage.get_baggage("tenant"), message.headers or {}

    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            token = context.attach(baggage.set_baggage("tenant", "7"))
            try:
                await producer.send("x")
                context.attach(baggage.set_baggage("tenant", "8" * 10_000))
                await producer.send("y")
            finally:
                context.detach(token)
        await handled(client, worker, queue)
    assert found["x"][0] == "7"
    assert found["y"][0] is None
    assert set(found["y"][1]) == {"traceparent"}, "what is too long for a header is left out"


class Broken(TextMapPropagator):
    """One with a fault."""

    def extract(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    def inject(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    @property
    def fields(self) -> set[str]:
        return {"b"}


async def test_a_broken_propagator_breaks_no_message(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    seen: list[Any] = []
    async with traced(cluster, traces, propagator=Broken()) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer() as producer:
            await producer.send("x", key="k")
            await producer.send("y", key="k", headers={"b": "own"})
        await handled(client, noting(queue_name, seen), queue)
    assert [message.headers for message, _ in seen] == [None, {"b": "own"}]
    assert len(traces.named(f"process {queue_name}")) == 2


# -- errors of sending ---------------------------------------------------------------------------------------


async def test_a_send_that_fails_is_an_error(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    bad: Any = 7
    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name, shards=1)
        async with queue.producer(max_message_bytes=100) as producer:
            with pytest.raises(shardq.InvalidValue):
                await producer.send(object())
            with pytest.raises(shardq.InvalidValue):
                await producer.send("x", headers=bad)
            with pytest.raises(shardq.MessageTooLarge):
                await producer.submit("x" * 200)
            with pytest.raises(shardq.MessageTooLarge):
                await producer.send_many([(None, "x" * 200)])
    spans = traces.named(f"send {queue_name}")
    assert [span.status.status_code for span in spans] == [StatusCode.ERROR] * 4
    names = [str(attribute(span, "error.type")).rpartition(".")[2] for span in spans]
    assert names == ["InvalidValue", "InvalidValue", "MessageTooLarge", "MessageTooLarge"]


def test_only_clients_are_instrumented() -> None:
    what: Any = "redis://127.0.0.1"
    with pytest.raises(shardq.UsageError, match=r"shardq\.connect"):
        shardq.otel.instrument(what)


# -- threads -------------------------------------------------------------------------------------------------


async def test_the_context_of_the_thread_that_sends(cluster: LocalCluster, queue_name: str, traces: Traces) -> None:
    def send() -> None:
        with shardq.otel.instrument(shardq.SyncProducer(cluster.url, queue_name, shards=1), traces.provider) as sync:
            with traces.tracer.start_as_current_span("one"):
                sync.send("a")
            with traces.tracer.start_as_current_span("two"):
                soon = sync.send_soon({"b": 1}, headers={"own": "h"})
            with traces.tracer.start_as_current_span("three"):
                assert sync.send_many([("k", "c"), ("k", "d")]) == 2
            with pytest.raises(shardq.InvalidValue):
                sync.send(object())
            soon.result(30)
            sync.flush()
        with pytest.raises(shardq.ClosedError):
            sync.send("e")

    await anyio.to_thread.run_sync(send)
    seen: list[Any] = []
    async with traced(cluster, traces) as client:
        queue = await client.queue(queue_name)
        await handled(client, noting(queue_name, seen), queue)
    by_parent = {parent(span): span for span in traces.named(f"send {queue_name}") if span.parent is not None}
    one, two, three = (by_parent[ids(traces.one(name))] for name in ("one", "two", "three"))
    assert attribute(three, "messaging.batch.message_count") == 2
    assert attribute(one, "messaging.message.id") in {message.id for message, _ in seen if message.value == "a"}
    assert sorted(parent(span) or (0, 0) for span in traces.named(f"process {queue_name}")) == sorted(
        [ids(one), ids(two), (0, 0), (0, 0)]
    )
    failed = [span for span in traces.named(f"send {queue_name}") if span.parent is None]
    names = [str(attribute(span, "error.type")).rpartition(".")[2] for span in failed]
    assert names == ["InvalidValue", "ClosedError"]


def test_a_failure_that_only_the_span_saw_is_still_raised_by_flush(cluster: LocalCluster, queue_name: str) -> None:
    traces = Traces()
    sync = shardq.otel.instrument(
        shardq.SyncProducer(cluster.url, queue_name, shards=1, max_message_bytes=10), traces.provider
    )
    sync.send_soon("x" * 100)
    with pytest.raises(shardq.NotStored):
        sync.close(timeout=30)
    assert traces.one(f"send {queue_name}").status.status_code == StatusCode.ERROR


# -- without a cluster ---------------------------------------------------------------------------------------


def test_a_propagator_of_ones_own_is_used() -> None:
    traces = Traces()
    tracer = OtelTracer(traces.provider, CompositePropagator([TraceContextTextMapPropagator()]))
    sending = tracer.send("q", None, None, {"baggage": "a=1"})
    assert sending.headers is not None
    assert set(sending.headers) == {"traceparent", "baggage"}, "baggage is none of its headers: the context is added"
    other = OtelTracer(traces.provider, W3CBaggagePropagator()).send("q", None, None, {"x": "1"})
    assert other.headers == {"x": "1"}
    sending.end(ValueError("first"))
    sending.end()
    other.end()
    assert [span.status.status_code for span in traces.named("send q")] == [StatusCode.ERROR, StatusCode.UNSET]


class Talkative(TextMapPropagator):
    """Writes more than it says, and more than fits."""

    read: list[list[str] | None]

    def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Any:
        self.read = [getter.get(carrier, name) for name in ("short", "long", "bytes", "none")]
        return context

    def inject(self, carrier: Any, context: Any = None, setter: Any = None) -> None:
        for name, value in (("a", "1"), ("own", "2"), ("long", "x" * 9000), ("umlaut", "ä")):
            setter.set(carrier, name, value)

    @property
    def fields(self) -> set[str]:
        return {"short"}


def test_what_a_propagator_reads_and_writes_is_bounded() -> None:
    traces, propagator = Traces(), Talkative()
    tracer = OtelTracer(traces.provider, propagator)
    assert tracer.send("q", None, None, {"own": "mine"}).headers == {"a": "1", "own": "mine"}
    own: Headers = {"short": "s", "long": "x" * 9000, "bytes": b"\xffb"}
    assert tracer.send("q", None, None, own).headers is own
    assert propagator.read == [["s"], None, ["\ufffdb"], None]


def test_links_of_a_list_are_bounded() -> None:
    traces = Traces()
    tracer = OtelTracer(traces.provider, None)

    def headers(number: int) -> Headers:
        return {"traceparent": f"00-{number // 2 + 1:032x}-{number % 2 + 1:016x}-01", "tracestate": "a=1"}

    class Sent:
        def __init__(self, number: int) -> None:
            self.headers = headers(number)

    given: Any = [Sent(number % 300) for number in range(900)]
    assert len(tracer._links(given)) == shardq.otel.MOST_LINKS
    assert len(tracer._links(given[:3] + given[300:303])) == 3


def test_without_the_extra_it_says_which(block: Callable[[str], str]) -> None:
    assert "pip install 'shardq[otel]'" in block("import shardq.otel")


def test_nothing_else_imports_it(block: Callable[[str], str]) -> None:
    names = "shardq.runtime.worker, shardq.runtime.sync, shardq.testing, shardq.cli.app, shardq.ops.work"
    assert block(f"import shardq, {names}; shardq.SyncProducer") == ""


@pytest.fixture
def block() -> Callable[[str], str]:
    """Runs code where OpenTelemetry can't be imported; gives the UsageError it ends with, or nothing."""

    def run(code: str) -> str:
        wrapped = f"""
import sys
sys.modules["opentelemetry"] = None
from shardq.errors import UsageError
try:
    {code}
except UsageError as error:
    print(error)
assert not [name for name in sys.modules if name.startswith("opentelemetry.")]
"""
        done = subprocess.run([sys.executable, "-c", wrapped], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return run
