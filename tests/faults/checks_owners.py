"""What must be true of leases: one owner per epoch, an end to its handlers and its commits when a newer one begins, one
message of a key at a time. Pure.

A process that was stopped (SIGSTOP) can't know what it missed: a handler that it was in the middle of goes on when it
wakes, beside its successor's. That is allowed, and only that: no handler may begin then, and no commit may be accepted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from tests.faults.checks_messages import Finding
from tests.faults.story import NS, Effect, FinalState, Name, Span, Story

# A process that is stopped between its last look at the clock and the handler's first line writes that line down when
# it wakes; and it is awake for a moment before the one who woke it says so.
WAKING_NS = NS // 4


def check_owners(story: Story, final: FinalState) -> Iterator[Finding]:
    """Two processes in one epoch of a shard."""
    owners: dict[tuple[int, int], set[str]] = defaultdict(set)
    for shard, leases in story.leases.items():
        for lease in leases:
            owners[shard, lease.epoch].add(lease.process)
    for span in story.all_spans():
        owners[span.shard, span.epoch].add(span.process)
    for effects in final.effects.values():
        for effect in effects:
            owners[effect.shard, effect.epoch].add(effect.process)
    for (shard, epoch), names in sorted(owners.items()):
        if len(names) > 1:
            yield Finding(f"shard {shard}: {' and '.join(sorted(names))} both had epoch {epoch}")


def check_fencing(story: Story, final: FinalState) -> Iterator[Finding]:
    """The list of a key grows by commits, one after the other, and a failover takes back the last ones with the lease
    under which they came: the epochs of a shard never fall."""
    for key, effects in final.effects.items():
        newest_of: dict[int, Effect] = {}
        for effect in effects:
            newest = newest_of.get(effect.shard)
            if newest is not None and effect.epoch < newest.epoch:
                yield Finding(
                    f"effects of {key}: {effect.process} committed {effect.name} under epoch {effect.epoch} after"
                    f" {newest.process} had committed under {newest.epoch}",
                    (effect.name, newest.name),
                )
            if newest is None or effect.epoch > newest.epoch:
                newest_of[effect.shard] = effect


def check_gates(story: Story, final: FinalState) -> Iterator[Finding]:
    """A key's messages on a shard come after all those on the shards that had the key before, whose ids are smaller:
    in what the handlers left, and in when each message was first handled. All shards of a key are of one home, which
    a failover takes back as a whole."""
    for key, effects in final.effects.items():
        for before, after in _going_back([(effect.shard, effect.name) for effect in effects]):
            yield _gate_finding(f"effects of {key}", before, after)
    for key, spans in story.spans.items():
        first: dict[str, Span] = {}
        for span in spans:
            first.setdefault(span.id, span)
        for before, after in _going_back([(span.shard, span.name) for span in first.values()]):
            yield _gate_finding(f"handlers of {key}", before, after)


Place = tuple[int, Name]


def _going_back(places: list[Place]) -> Iterator[tuple[Place, Place]]:
    for one, other in pairwise(places):
        if other[0] < one[0]:
            yield one, other


def _gate_finding(what: str, before: Place, after: Place) -> Finding:
    text = (
        f"{what}: {before[1]} of shard {before[0]} comes before {after[1]} of shard {after[0]}, which was there first"
    )
    return Finding(text, (after[1], before[1]))


def check_stale(story: Story) -> Iterator[Finding]:
    """A handler begins under an epoch although a newer lease of its shard was taken."""
    taken: dict[int, list[tuple[int, int]]] = {}
    for shard, leases in story.leases.items():
        newest = 0
        taken[shard] = []
        for lease in leases:
            newest = max(newest, lease.epoch)
            taken[shard].append((lease.at_ns, newest))
    for span in story.all_spans():
        of_shard = taken.get(span.shard, [])
        at = bisect_right(of_shard, (span.start_ns, 0)) - 1
        if at >= 0 and of_shard[at][1] > span.epoch and not _waking(story, span):
            text = f"shard {span.shard}: {span.process} handles {span.name} under epoch {span.epoch}"
            yield Finding(f"{text} although {of_shard[at][1]} was taken", (span.name,))


def _waking(story: Story, span: Span) -> bool:
    return story.paused_within(span.process, span.start_ns - WAKING_NS, span.start_ns)


def check_overlaps(story: Story) -> Iterator[Finding]:
    """Two messages of one key (or one twice) handled at the same time, but for who slept through it."""
    for key, spans in story.spans.items():
        for one, other in overlaps(story, spans):
            if not excused(story, one, other):
                later = story.seconds(other.start_ns)
                text = f"{key}: {other.process} handles {other.name} from {later:.3f} s, while {one.process} handles"
                yield Finding(
                    f"{text} {one.name} until {story.seconds(story.end_of(one)):.3f} s", (one.name, other.name)
                )


def overlaps(story: Story, spans: list[Span]) -> Iterator[tuple[Span, Span]]:
    """Each span with those that start while it lasts, of spans in the order of their starts."""
    lasting: list[Span] = []
    for span in spans:
        lasting = [other for other in lasting if story.end_of(other) > span.start_ns]
        for other in lasting:
            yield other, span
        lasting.append(span)


def excused(story: Story, one: Span, other: Span) -> bool:
    """The one of the older epoch slept meanwhile. Of two shards that had the key one after the other, either did: a
    failover may take back what was done on the older one while the handler of the younger one sleeps."""
    if one.shard != other.shard:
        return slept(story, one, other) or slept(story, other, one)
    if one.epoch == other.epoch:
        return False
    return slept(story, one, other) if one.epoch < other.epoch else slept(story, other, one)


def slept(story: Story, old: Span, new: Span) -> bool:
    end_ns = min(story.end_of(old), story.end_of(new))
    return story.paused_within(old.process, old.start_ns - WAKING_NS, end_ns)
