"""The worker of tests/runtime/effects_app.py as a newer version of shardq would run it: its functions are a build of
their own with one more in it, which it calls on every master at its start.

Only for a process of its own: importing it makes a process newer.
"""

from __future__ import annotations

from unittest import mock

import shardq
from shardq.storage import cluster, functions, safety
from tests.faults.faults_server import library_of
from tests.runtime.effects_app import worker

NEWER = functions.BUILD + 1
_FRESH = (
    "redis.register_function{function_name='shardq_1_fresh', callback=function() return 42 end, flags={'no-writes'}}"
)
_SOURCE = f"{library_of(NEWER)}\n{_FRESH}\n"


@worker.on_start
async def use_what_is_new(client: shardq.Client) -> None:
    for slot in (0, 8000, 16000):
        assert await client.pipes.call(slot, "fresh", []) == 42


for module in (cluster, safety):
    mock.patch.object(module, "BUILD", NEWER).start()
mock.patch.object(cluster, "library_source", return_value=_SOURCE).start()
