"""Each fault of single servers on its own, under traffic. One server kind each: they differ in little here.

A fault's length is what happens meanwhile (messages that flow, sends that wait), not a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardq
from shardq.errors import NotStored, StoreUnavailable
from tests.faults import machine
from tests.faults.faults import FAULTS
from tests.faults.lab import Lab, open_lab
from tests.faults.survival import survival

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def lab(server_binary: Path, server_kind: str) -> Iterator[Lab]:
    """What the machine lends is for the tests below that want it: clocks of their own make servers slower."""
    clocks = server_kind == "valkey9" and machine.why_no_clocks(server_binary) is None
    small_disk = server_kind == "redis7" and machine.why_no_disks() is None
    with open_lab(server_binary, clocks=clocks, small_disk=small_disk) as made:
        yield made


@pytest.mark.server_kinds("redis7")
def test_what_only_masters_take_passes_over_one_that_is_none_any_more(lab: Lab) -> None:
    for server in lab.pairs()[0]:
        lab.insist_while_master(server, "CONFIG", "SET", "slowlog-max-len", 77)
    assert [lab.setting(server, "slowlog-max-len") for server in lab.pairs()[0]] == ["77", "128"]


# Valkey 9 runs functions in an engine of its own.
@pytest.mark.server_kinds("valkey9")
async def test_functions_are_flushed(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        for _ in range(3):
            await running.under("functions-flushed")


@pytest.mark.server_kinds("redis7")
async def test_functions_are_replaced(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under("functions-replaced", running.flows)


@pytest.mark.server_kinds("redis8")
async def test_connections_are_killed(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under("clients-killed", lambda: running.flows(300))


@pytest.mark.server_kinds("redis7")
async def test_a_node_answers_no_client(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under("clients-paused", running.sends_wait)


@pytest.mark.server_kinds("valkey9")
async def test_a_node_is_slow(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under("node-slow", lambda: running.flows(100))


# 8 checks memory in other places than 7.
@pytest.mark.server_kinds("redis8")
async def test_memory_is_full(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:

        async def sends_wait_but_what_is_stored_is_handled() -> None:
            await running.sends_wait()
            await running.drains()
            assert running.waiting, "a producer waits for room until its delivery timeout"
            with pytest.raises(StoreUnavailable, match="maxmemory"):
                await send_within(running.queue, 1.0, next(iter(running.waiting)))

        await running.under("memory-full", sends_wait_but_what_is_stored_is_handled)


@pytest.mark.server_kinds("redis7")
async def test_a_disk_is_full(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    can(lab, "disk-full")
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under("disk-full", running.sends_wait)


@pytest.mark.server_kinds("valkey9")
async def test_a_clock_steps(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    can(lab, "clock-stepped")
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under("clock-stepped", running.flows)


async def send_within(queue: shardq.Queue, delivery_timeout: float, key: str) -> None:
    """Raises what the send raises."""
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(contextlib.suppress(NotStored))  # says at its end again what the send said
        producer = await stack.enter_async_context(queue.producer(delivery_timeout=delivery_timeout))
        await producer.send([0, 0, "ok"], key=key)


def can(lab: Lab, name: str) -> None:
    if why := FAULTS[name].needs(lab):
        pytest.skip(why)
