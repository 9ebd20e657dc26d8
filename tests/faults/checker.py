"""Judges a run: `judge(events, final, promises)` holds what happened against what shardq promises. Pure: it reads no
file, asks no server and knows no time of its own, so that it can be tested like any other function.

The promises are DESIGN's invariants as far as they can be seen from outside; each check says in one line what it asks.
Why a check may ask that, also after failovers, is said at the top of checks_messages.py and checks_owners.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.faults import checks_messages as messages
from tests.faults import checks_owners as owners
from tests.faults import checks_state as state
from tests.faults.checks_messages import Finding
from tests.faults.history import Event
from tests.faults.story import FinalState, Story, about, tell

_TOLD_WHOLE = 3


@dataclass(frozen=True, slots=True)
class Promises:
    """
    losing          names of the faults that may lose messages acknowledged at this durability
    repeating       names of the faults after which messages may be handled again
    drain_within_s  how long the workers may take to finish what is left
    """

    losing: frozenset[str] = frozenset()
    repeating: frozenset[str] = frozenset()
    drain_within_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Check:
    """`looked_at` counts what it was asked of, in `unit`; `note` is what it measured and did not mind."""

    name: str
    asks: str
    looked_at: int
    unit: str
    findings: Sequence[Finding]
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """`counts` are figures of the run for a person."""

    checks: Sequence[Check]
    counts: dict[str, int]
    story: Story = field(repr=False)

    @property
    def findings(self) -> int:
        return sum(len(check.findings) for check in self.checks)

    def found(self) -> set[str]:
        """Names of the checks that found something."""
        return {check.name for check in self.checks if check.findings}

    def evidence(self, check: Check, most: int = _TOLD_WHOLE) -> Iterable[str]:
        """The first findings of a check with the stories of their messages, a line each."""
        for finding in check.findings[:most]:
            yield finding.text
            for name in finding.names:
                yield from (f"    {line}" for line in about(self.story, name))
        if len(check.findings) > most:
            yield f"and {len(check.findings) - most} more"


def judge(events: Sequence[Event], final: FinalState, promises: Promises) -> Verdict:
    """`events` in the order of their times."""
    story = tell(events)
    counts = count(story, final)
    checks = [
        *_message_checks(story, final, promises, counts),
        *_owner_checks(story, final, counts),
        *_state_checks(story, final, promises),
    ]
    return Verdict(checks, counts, story)


def _message_checks(story: Story, final: FinalState, promises: Promises, counts: dict[str, int]) -> Iterable[Check]:
    ends, stored = counts["ended"], counts["acknowledged"]
    gone = messages.lost(story, final)
    blamed = Counter(messages.may_be_lost(story, sent, promises.losing) for sent in gone)
    del blamed[None]
    measured = ", ".join(f"{number:,} at {name}" for name, number in sorted(blamed.items(), key=str))
    note = f"{blamed.total():,} of {stored:,} lost, which this durability allows: {measured}" if blamed else ""

    def check(name: str, asks: str, findings: Iterable[Finding], number: int, unit: str, note: str = "") -> Check:
        return Check(name, asks, number, unit, list(findings), note)

    yield check(
        "lost",
        "every acknowledged message came to an end",
        messages.check_lost(story, final, promises.losing),
        stored,
        "sends",
        note,
    )
    yield check("phantom", "nothing was handled that was not sent", messages.check_phantoms(story, final), ends, "ends")
    yield check("twice", "every message came to one end only", messages.check_twice(story, final), ends, "ends")
    yield check(
        "ids", "a message is handled under the id its send returned", messages.check_ids(story, final), ends, "ends"
    )
    yield check(
        "dead",
        "dead letters are those that always fail",
        messages.check_burials(story, final),
        len(final.dead),
        "letters",
    )
    yield check("order", "messages of a key are handled in order", messages.check_order(story, final), ends, "ends")
    again = f"{counts['handled again']} handled again after a fault" if counts["handled again"] else ""
    yield check(
        "again",
        "nothing is handled again without a crash, a pause or an outage",
        messages.check_again(story, promises.repeating),
        counts["handlings"],
        "handlings",
        again,
    )


def _owner_checks(story: Story, final: FinalState, counts: dict[str, int]) -> Iterable[Check]:
    handlings, leases = counts["handlings"], counts["leases"]
    slept = counts["slept through"]
    note = f"{slept} beside one that was stopped in the middle" if slept else ""
    yield Check(
        "overlap", "one message of a key at a time", handlings, "handlings", list(owners.check_overlaps(story)), note
    )
    yield Check("owners", "one owner in an epoch", leases, "leases", list(owners.check_owners(story, final)))
    yield Check(
        "stale",
        "no handler begins once a newer lease was taken",
        handlings,
        "handlings",
        list(owners.check_stale(story)),
    )
    ends = counts["ended"]
    yield Check(
        "gates",
        "keys go on where they went after all before is done",
        ends,
        "ends",
        list(owners.check_gates(story, final)),
    )
    yield Check(
        "fencing",
        "no commit is accepted once a newer owner has committed",
        counts["ended"],
        "ends",
        list(owners.check_fencing(story, final)),
    )


def _state_checks(story: Story, final: FinalState, promises: Promises) -> Iterable[Check]:
    shards, processes = len(final.shards), len({event.process for event in story.processes})
    keys = sum(len(shard.memory_after) for shard in final.shards)
    alive = state.check_alive(story, final, promises.drain_within_s)
    yield Check("counters", "appended = acked + dead", shards, "shards", list(state.check_counters(story, final)))
    yield Check("left", "nothing is left to handle", shards, "shards", list(state.check_left(story, final)))
    yield Check("memory", "memory is given back", keys, "keys", list(state.check_memory(story, final)))
    begun = sum(1 for change in story.changes if change.what == "begun")
    yield Check(
        "plans", "no change of shards is left half done", begun, "changes", list(state.check_plans(story, final))
    )
    yield Check("alive", "all goes on once the faults are over", 2, "waits", list(alive))
    yield Check(
        "processes",
        "clients outlive the faults, and end when told to",
        processes,
        "processes",
        list(state.check_processes(story)),
    )
    yield Check(
        "lab",
        "every fault was carried out and healed",
        len(story.faults),
        "faults",
        list(state.check_lab(story, final)),
    )


def count(story: Story, final: FinalState) -> dict[str, int]:
    """Figures of a run."""
    outcomes = Counter(sent.outcome for sent in story.sent.values())
    slept = sum(
        1 for spans in story.spans.values() for pair in owners.overlaps(story, spans) if owners.excused(story, *pair)
    )
    return {
        "sent": len(story.sent),
        "acknowledged": outcomes["ok"],
        "unknown": outcomes["unknown"],
        "refused": outcomes["fail"],
        "handlings": sum(map(len, story.spans.values())),
        "handled again": len(messages.handled_again(story)),
        "cut short": sum(1 for span in story.all_spans() if span.how in ("", "cancelled")),
        "slept through": slept,
        "leases": sum(map(len, story.leases.values())),
        "ended": messages.endings(final).total(),
        "dead letters": len(final.dead),
        "shards": len(final.shards),
    }
