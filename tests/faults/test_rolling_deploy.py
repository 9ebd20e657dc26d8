"""Two versions of shardq on one cluster: their builds of the functions replace each other under traffic.

What happens: who connects with a newer build puts it on every master; who has an older one leaves it there. A master
that gets its functions from an older process (it was empty, or away when the newer one came) has the older build until
a newer process connects, or misses a function of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shardq.storage.functions import BUILD, LIBRARY
from tests.faults.faults_server import library_of
from tests.faults.lab import Lab
from tests.faults.survival import survival
from tests.runtime.harness import until

pytestmark = pytest.mark.anyio

NEWER = BUILD + 1
NEWER_APP = "tests.faults.newer_app:worker"


def builds(lab: Lab) -> set[int]:
    return {lab.insist(server, "FCALL_RO", f"{LIBRARY}_build", 0) for server in lab.masters()}


@pytest.mark.server_kinds("redis8")
async def test_newer_workers_join_older_ones_and_go(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.flows()
        assert builds(lab) == {BUILD}
        newer = running.start(NEWER_APP)
        await until(lambda: newer.says("handles"), 30, "the newer worker")
        assert builds(lab) == {NEWER}
        await running.flows()
        # An older process takes them to an empty master first; the next newer one renews them.
        for server in lab.masters():
            lab.insist(server, "FUNCTION", "LOAD", "REPLACE", library_of(BUILD))
        await running.flows()
        assert builds(lab) == {BUILD}
        another = running.start(NEWER_APP)
        await until(lambda: another.says("handles"), 30, "another newer worker")
        assert builds(lab) == {NEWER}
        # Only newer ones are left; an older producer goes on.
        for worker in running.crew:
            worker.process.terminate()
            await worker.wait()
        await running.flows()
        newer.process.terminate()
        await newer.wait()
        await running.flows()


HEAD = "local function append(keys, args)\n"
OLDER = {
    "lacks a function": (f"'{LIBRARY}_append'", f"'{LIBRARY}_not_there'"),
    "takes other arguments": (HEAD, f"{HEAD}  if true then return misuse('as an older one may') end\n"),
}


@pytest.mark.server_kinds("redis7")
@pytest.mark.parametrize("which", OLDER)
async def test_an_older_build_is_replaced_that(which: str, lab: Lab, queue_name: str, tmp_path: Path) -> None:
    ours, theirs = OLDER[which]
    older = library_of(BUILD - 1).replace(ours, theirs)
    assert older.count(theirs) == 1
    async with survival(lab, queue_name, tmp_path) as running:
        await running.ready()
        await running.flows()
        for server in lab.masters():
            lab.insist(server, "FUNCTION", "LOAD", "REPLACE", older)
        await running.flows()
        assert builds(lab) == {BUILD}
