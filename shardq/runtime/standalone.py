"""A coordinator on its own: a member of a group that takes no shards, so it can lead wherever no worker should have to.
Owns no shard, handles no message, and makes neither the queue nor the group.
"""

from __future__ import annotations

import logging

import anyio

from shardq.core.autosplit import AutoSplit
from shardq.runtime.autosplit import KEYS_WITHIN_S, AutoSplitter, newest_keys
from shardq.runtime.bells import Bells
from shardq.runtime.client import Client
from shardq.runtime.deletion import DeletionWatch
from shardq.runtime.member import Member, made_up_name
from shardq.runtime.outages import Outages
from shardq.runtime.queue import Queue
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.table import TableFollower
from shardq.runtime.tasks import one_error, outliving_tasks
from shardq.storage.keys import check_name
from shardq.storage.pipes import Pipes

_log = logging.getLogger("shardq")


async def coordinate(
    client: Client,
    queue: str,
    group: str,
    settings: WorkerSettings,
    stop: anyio.Event,
    *,
    autosplit: AutoSplit | None = None,
) -> None:
    """Beats, and leads when it is elected, until `stop` is set or it is cancelled; then it resigns at once.

    `settings` must have the lease times and the balance of the group's workers. With `autosplit` it splits hot shards
    within these bounds while it leads. Raises UnknownQueue, also when the queue is deleted meanwhile, and UnknownGroup
    when the group is.
    """
    check_name("group", group)
    joined = await client.queue(queue)
    with one_error():
        await _coordinate(client, joined, group, settings, stop, autosplit)


async def _coordinate(
    client: Client,
    joined: Queue,
    group: str,
    settings: WorkerSettings,
    stop: anyio.Event,
    autosplit: AutoSplit | None,
) -> None:
    async with outliving_tasks() as plumbing:
        # Its pipes outlive the heartbeats: they carry the goodbye.
        pipes = Pipes(client.cluster, plumbing, client.on_retry)
        bells = Bells(client.cluster)
        outages = Outages()
        table = TableFollower(joined, on_change=lambda: member.nudge() if member.leads else None, outages=outages)
        member = Member(
            pipes=pipes,
            keys=joined.keys,
            group=group,
            table=table,
            name=made_up_name("coordinator"),
            settings=settings,
            takes_shards=False,
            on_change=lambda: None,
            outages=outages,
            samples_loads=autosplit is not None,
            meters=client.meters.group(joined.name, group) if client.meters is not None else None,
        )
        deletion = DeletionWatch(pipes, joined, group, outages, member.contact)
        await deletion.look()
        bells.listen(joined.keys.control_slot, joined.keys.control_bell(group), member.ring)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(bells.run, tasks)
                tasks.start_soon(member.run)
                tasks.start_soon(deletion.run, member.until_beat)
                if autosplit is not None:
                    splitter = AutoSplitter(
                        autosplit,
                        joined.name,
                        loads=lambda: member.leadership.loads.details,
                        ranges=lambda: {shard.id: (shard.low, shard.high) for shard in joined.table.shards},
                        keys=lambda shard: newest_keys(joined, shard, KEYS_WITHIN_S),
                        split=joined.split,
                    )
                    tasks.start_soon(splitter.run, settings.load_sample_s)
                _log.info("coordinator %s stands by for %s/%s", member.name, joined.name, group)
                await stop.wait()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(settings.leader_lease_s, shield=True):
                await member.say_goodbye()
