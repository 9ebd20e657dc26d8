"""What must be true at the end: counters that add up, nothing left to handle, memory given back, processes that ended
when they were told to and not before, a cluster that is whole. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.checks_messages import Finding, endings
from tests.faults.story import FinalState, ShardState, Story

# What a key may keep when it is empty again: a stream's last node and its group, a few fields more in a hash.
_STAYS_BYTES = 4096
# A producer is remembered on each shard for an hour, so that a batch it sends again is known.
_PRODUCER_BYTES = 512
# What a retired shard may wait for when all is handled (runtime/reshard_state.py has the words).
MAY_STAY = ("dead letters", "producers, which may ask")


def check_counters(story: Story, final: FinalState) -> Iterator[Finding]:
    for shard in final.shards:
        yield from _of_shard(shard)
    stored, ended = sum(shard.appended for shard in final.shards), endings(final).total()
    if stored != ended:
        yield Finding(f"{stored} messages were counted as appended, but {ended} came to an end")
    dead = sum(shard.dead for shard in final.shards)
    if dead != len(final.dead):
        yield Finding(f"{dead} dead letters were counted, but there are {len(final.dead)}")


def _of_shard(shard: ShardState) -> Iterator[Finding]:
    if shard.appended != shard.acked + shard.dead + shard.backlog:
        yield Finding(
            f"shard {shard.shard}: appended {shard.appended} is not acked {shard.acked} + dead {shard.dead}"
            f" + backlog {shard.backlog}"
        )
    if shard.delivered != shard.appended and not shard.backlog:
        yield Finding(f"shard {shard.shard}: appended {shard.appended}, all finished, but delivered {shard.delivered}")
    if shard.dead != shard.dead_letters:
        yield Finding(f"shard {shard.shard}: counted {shard.dead} dead letters, keeps {shard.dead_letters}")


def check_left(story: Story, final: FinalState) -> Iterator[Finding]:
    for shard in final.shards:
        left = {"backlog": shard.backlog, "pending entries": shard.pending, "waiting for a retry": shard.waiting}
        if any(left.values()):
            what = ", ".join(f"{count} {name}" for name, count in left.items() if count)
            yield Finding(f"shard {shard.shard}: {what} left")


def check_memory(story: Story, final: FinalState) -> Iterator[Finding]:
    producers = len({name[0] for name in story.sent})
    for shard in final.shards:
        for what, after in shard.memory_after.items():
            may = (
                shard.memory_before.get(what, 0) + _STAYS_BYTES + (_PRODUCER_BYTES * producers if what == "meta" else 0)
            )
            if what != "dead" and after > may:
                before = shard.memory_before.get(what, 0)
                yield Finding(f"shard {shard.shard}: {what} has {after} bytes after the drain, {before} before traffic")
    for key in final.strays:
        yield Finding(f"the key {key} is left")


def check_plans(story: Story, final: FinalState) -> Iterator[Finding]:
    """No change of the number of shards is left half done, also when whoever began it was killed; a retired shard that
    is still there has a reason that nobody has to do anything about, but for dead letters."""
    if final.phase in ("opening", "sealing"):
        yield Finding(f"a change of the number of shards is left half done: {final.phase}")
    if final.unmoved:
        yield Finding(f"{final.unmoved} delayed messages wait on retired shards")
    for shard, why in final.stay.items():
        if not why.startswith(MAY_STAY):
            yield Finding(f"retired shard {shard} is still there because of {why}")


def check_alive(story: Story, final: FinalState, drain_within_s: float) -> Iterator[Finding]:
    if final.resumed_s is None:
        yield Finding("after the last fault was healed not every producer could send again")
    if final.drained_s is None:
        yield Finding(f"the workers did not finish what was stored within {drain_within_s:g} s")


def check_processes(story: Story) -> Iterator[Finding]:
    for event in story.processes:
        at = f"{story.seconds(event.at_ns):.3f} s"
        if event.what == "died":
            yield Finding(f"{event.process} ended by itself at {at}: {event.text}")
        elif event.what == "overdue":
            yield Finding(f"{event.process} did not end in time when it was told to, at {at}: {event.text}")


def check_lab(story: Story, final: FinalState) -> Iterator[Finding]:
    """The run proves nothing about a fault that could not be carried out, or of a cluster that did not come back."""
    for fault in story.faults.values():
        if fault.failed:
            yield Finding(f"{fault.name} (number {fault.number}) could not be carried out or healed: {fault.failed}")
    if final.lab:
        yield Finding(f"the cluster is not whole at the end: {final.lab}")
