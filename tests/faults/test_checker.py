"""The checker: it finds nothing in runs that keep every promise, and each thing that is planted in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.faults.checker import judge
from tests.faults.history import Event, Handle, Lease, Process, Send, Strike, in_order
from tests.faults.stories import PROMISES, World
from tests.faults.story import NS, Dead, Effect, FinalState, ShardState, Story, tell

Run = tuple[list[Event], FinalState]
Plant = Callable[[list[Event], FinalState, Random], Run]

runs = st.builds(lambda seed, steps: World(Random(seed)).run(steps), st.integers(0, 10**9), st.integers(50, 600))
chances = st.integers(0, 10**9).map(Random)
thorough = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@thorough
@given(runs)
def test_a_run_that_keeps_every_promise_is_clean(run: Run) -> None:
    events, final = run
    verdict = judge(events, final, PROMISES)
    assert [line for check in verdict.checks for line in verdict.evidence(check)] == []


def test_true_runs_have_what_makes_judging_hard() -> None:
    """Else the test above would show little."""
    counts = [judge(*World(Random(seed)).run(600), PROMISES).counts for seed in range(20)]
    for name in ("unknown", "refused", "handled again", "cut short", "slept through", "dead letters"):
        assert sum(count[name] for count in counts) > 5, name
    assert sum(count["shards"] > 4 for count in counts) > 5
    finals = [World(Random(seed)).run(600)[1] for seed in range(20)]
    places = [[effect.shard for effect in effects] for final in finals for effects in final.effects.values()]
    assert sum(len(set(of_key)) > 1 for of_key in places) > 20
    told = [tell(World(Random(seed)).run(600)[0]) for seed in range(20)]
    names = {name for story in told for name in (fault.name for fault in story.faults.values())}
    assert names == {"crash", "pause", "failover", "lossy"}
    late = [story for story in told if any(sent.outcome == "unknown" for sent in story.sent.values())]
    assert late


# -- planted ---------------------------------------------------------------------------------------------------------


def effects_of(final: FinalState, key: str, new: Sequence[Effect]) -> FinalState:
    return replace(final, effects={**final.effects, key: list(new)})


def shard_of(final: FinalState, chance: Random, **new: object) -> FinalState:
    shards: list[ShardState] = list(final.shards)
    index = chance.randrange(len(shards))
    shards[index] = replace(shards[index], **new)  # type: ignore[arg-type] # fields of any type
    return replace(final, shards=shards)


def some_effect(final: FinalState, chance: Random, wanted: Callable[[Effect], bool] = bool) -> tuple[str, int, Effect]:
    """Key, place in its list, effect."""
    found = [(key, i, e) for key, effects in final.effects.items() for i, e in enumerate(effects) if wanted(e)]
    assume(found)
    return chance.choice(found)


def end_of_time(events: list[Event]) -> int:
    return events[-1].at_ns


def calm(events: list[Event]) -> tuple[list[Event], Story]:
    """The same without faults, and as a story: what they explained has no explanation any more."""
    left: list[Event] = [event for event in events if not isinstance(event, Strike)]
    return left, tell(left)


def drop_message(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Lost, and counted as if it had never been."""
    events, story = calm(events)
    key, place, effect = some_effect(final, chance, lambda e: story.sent[e.name].outcome == "ok")
    final = effects_of(final, key, [e for i, e in enumerate(final.effects[key]) if i != place])
    number = int(effect.id.partition("/")[0])
    shards = [
        replace(s, appended=s.appended - 1, acked=s.acked - 1, delivered=s.delivered - 1) if s.shard == number else s
        for s in final.shards
    ]
    return events, replace(final, shards=shards)


def drop_long_before_the_fault(events: list[Event], final: FinalState, chance: Random) -> Run:
    """A fault that may lose messages excuses no loss of what was acknowledged long before."""
    events, final = drop_message(events, final, chance)
    at = end_of_time(events) + 60 * NS
    return [*events, Strike("strike", at, 999, "lossy"), Strike("healed", at + NS, 999, "lossy")], final


def drop_at_another_fault(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Nor does a fault that may lose nothing."""
    events, final = drop_message(events, final, chance)
    first, last = Strike("strike", events[0].at_ns, 999, "crash"), Strike("healed", end_of_time(events), 999, "crash")
    return in_order([first, *events, last]), final


def swap_pair(events: list[Event], final: FinalState, chance: Random) -> Run:
    story = tell(events)
    pairs = [
        (key, i, j)
        for key, effects in final.effects.items()
        for i, one in enumerate(effects)
        for j, other in enumerate(effects[i + 1 :], i + 1)
        if (story.sent[one.name].stored_by_ns or 1 << 63) < story.sent[other.name].invoked_ns
    ]
    assume(pairs)
    key, i, j = chance.choice(pairs)
    new = list(final.effects[key])
    # Names alone, or fencing might find it too.
    new[i], new[j] = replace(new[i], name=new[j].name, id=new[j].id), replace(new[j], name=new[i].name, id=new[i].id)
    return events, effects_of(final, key, new)


def handle_swapped(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Only the handlers' starts show it: the first start of an earlier message comes after a later one's."""
    story = tell(events)
    pairs = []
    for key, spans in story.spans.items():
        names = list(dict.fromkeys(span.name for span in spans))
        sent = [story.sent[name] for name in names]
        pairs += [(key, a, b) for a, b in pairwise(sent) if (a.stored_by_ns or 1 << 63) < b.invoked_ns]
    assume(pairs)
    _, a, b = chance.choice(pairs)
    exchange = {a.name: b, b.name: a}

    def swapped(event: Event) -> Event:
        if isinstance(event, Handle) and (event.producer, event.number) in exchange:
            other = exchange[event.producer, event.number]
            return msgspec.structs.replace(event, producer=other.name[0], number=other.name[1])
        return event

    return [swapped(event) for event in events], final


def double_effect(events: list[Event], final: FinalState, chance: Random) -> Run:
    key, place, effect = some_effect(final, chance)
    new = list(final.effects[key])
    new.insert(place, effect)
    return events, effects_of(final, key, new)


def store_twice(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Counted as two, and handled as two."""
    key, place, effect = some_effect(final, chance)
    number, _, rest = effect.id.partition("/")
    new = list(final.effects[key])
    new.insert(place + 1, replace(effect, id=f"{number}/9{rest}"))
    final = effects_of(final, key, new)
    more = {name: getattr(final.shards[int(number)], name) + 1 for name in ("appended", "acked", "delivered")}
    shards = [replace(s, **more) if s.shard == int(number) else s for s in final.shards]
    return events, replace(final, shards=shards)


def bury_and_do(events: list[Event], final: FinalState, chance: Random) -> Run:
    assume(final.dead)
    letter = chance.choice(final.dead)
    new = [*final.effects[letter.key], Effect(letter.name, 10**9, "worker-0", letter.id)]
    return events, effects_of(final, letter.key, new)


def wrong_id(events: list[Event], final: FinalState, chance: Random) -> Run:
    story = tell(events)
    key, place, effect = some_effect(final, chance, lambda e: bool(story.sent[e.name].id))
    new = list(final.effects[key])
    new[place] = replace(effect, id=f"{effect.id}7")
    return events, effects_of(final, key, new)


def two_owners(events: list[Event], final: FinalState, chance: Random) -> Run:
    taken = [event for event in events if isinstance(event, Lease)]
    assume(taken)
    lease = chance.choice(taken)
    return in_order([*events, Lease("taken", lease.at_ns, "worker-77", lease.shard, lease.epoch)]), final


def other_committed(events: list[Event], final: FinalState, chance: Random) -> Run:
    """The same, seen in Redis alone."""
    key, place, effect = some_effect(final, chance)
    new = list(final.effects[key])
    new[place] = replace(effect, process="worker-77")
    return events, effects_of(final, key, new)


def commit_under_old_epoch(events: list[Event], final: FinalState, chance: Random) -> Run:
    pairs = [(key, list(enumerate(effects))[1:]) for key, effects in final.effects.items()]
    found = [(key, i) for key, own in pairs for i, e in own if final.effects[key][i - 1].shard == e.shard]
    assume(found)
    key, place = chance.choice(found)
    new = list(final.effects[key])
    new[place] = replace(new[place], epoch=new[place - 1].epoch - 1)
    return events, effects_of(final, key, new)


def phantom(events: list[Event], final: FinalState, chance: Random) -> Run:
    key, place, effect = some_effect(final, chance)
    new = list(final.effects[key])
    new.insert(place + 1, replace(effect, name=("producer-9", 1), id=f"{effect.id}7"))
    return events, effects_of(final, key, new)


def stored_though_refused(events: list[Event], final: FinalState, chance: Random) -> Run:
    """One whose outcome was unknown, as if its send had said that it is not stored."""
    story = tell(events)
    _, _, effect = some_effect(final, chance, lambda e: story.sent[e.name].outcome == "unknown")

    def refused(event: Event) -> Event:
        if isinstance(event, Send) and event.what == "unknown" and (event.process, event.number) == effect.name:
            return Send("fail", event.at_ns, event.process, event.key, event.number, event.fails)
        return event

    return [refused(event) for event in events], final


def wrong_key(events: list[Event], final: FinalState, chance: Random) -> Run:
    key, place, effect = some_effect(final, chance)
    other = next(name for name in final.effects if name != key)
    final = effects_of(final, key, [e for i, e in enumerate(final.effects[key]) if i != place])
    return events, effects_of(final, other, [*final.effects[other], effect])


def bury_without_reason(events: list[Event], final: FinalState, chance: Random) -> Run:
    key, place, effect = some_effect(final, chance)
    final = effects_of(final, key, [e for i, e in enumerate(final.effects[key]) if i != place])
    return events, replace(final, dead=[*final.dead, Dead(effect.name, key, effect.id, "?")])


def count_wrong(name: str) -> Plant:
    def plant(events: list[Event], final: FinalState, chance: Random) -> Run:
        index, off = chance.randrange(len(final.shards)), chance.choice((-1, 1))
        shards = list(final.shards)
        shards[index] = replace(shards[index], **{name: getattr(shards[index], name) + off})
        return events, replace(final, shards=shards)

    return plant


def count_one_more_everywhere(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Adds up on its shard, but nobody saw that message."""
    shard = final.shards[0]
    more = {name: getattr(shard, name) + 1 for name in ("appended", "acked", "delivered")}
    return events, replace(final, shards=[replace(shard, **more), *final.shards[1:]])


def leave(name: str) -> Plant:
    return lambda events, final, chance: (events, shard_of(final, chance, **{name: 1}))


def overlap(events: list[Event], final: FinalState, chance: Random) -> Run:
    """A second handler of a key within one that nothing stopped."""
    spans = [span for span in tell(events).all_spans() if span.how == "ok" and span.end_ns]
    story = tell(events)
    spans = [span for span in spans if not story.pauses.get(span.process)]
    assume(spans)
    span = chance.choice(spans)
    assert span.end_ns is not None
    place = "worker-77", span.shard, span.epoch + 10**6, span.id, span.key, *span.name, 1
    middle = (span.start_ns + span.end_ns) // 2
    return in_order([*events, Handle("start", middle, *place), Handle("end", middle + 1, *place, "cancelled")]), final


def begin_under_old_lease(events: list[Event], final: FinalState, chance: Random) -> Run:
    spans = [span for span in tell(events).all_spans() if not tell_paused(events, span.process)]
    assume(spans)
    span = chance.choice(spans)
    taken = Lease("taken", span.start_ns - 1, "worker-77", span.shard, span.epoch + 10**6)
    return in_order([*events, taken]), final


def tell_paused(events: list[Event], process: str) -> bool:
    return any(isinstance(event, Process) and event.process == process for event in events)


def begin_after_waking(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Having slept excuses what was begun before, not what begins a second after it woke."""
    events, final = begin_under_old_lease(events, final, chance)
    at, newest = end_of_time(events), max(span.epoch for span in tell(events).all_spans())
    lease = next(e for e in events if isinstance(e, Lease) and e.process == "worker-77")
    span = next(s for s in tell(events).all_spans() if s.shard == lease.shard)
    pause = [Process("paused", at + NS, span.process), Process("resumed", at + 2 * NS, span.process)]
    place = span.process, span.shard, newest, span.id, span.key, *span.name, 1
    begun = [Handle("start", at + 3 * NS, *place), Handle("end", at + 3 * NS + 1, *place, "cancelled")]
    left = [event for event in events if not (isinstance(event, Handle) and event.shard == span.shard)]
    return [*left, *pause, *begun], final


def resharded(final: FinalState) -> tuple[str, int]:
    """A key, and the place of its first effect on another shard than the one before."""
    found = [
        (key, place)
        for key, effects in final.effects.items()
        for place in range(1, len(effects))
        if effects[place].shard != effects[place - 1].shard
    ]
    assume(found)
    return found[0]


def commit_on_a_child_first(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Of two that were sent at the same time, for all anybody knows: only the gate says which comes first."""
    key, place = resharded(final)
    new = list(final.effects[key])
    new[place - 1], new[place] = new[place], new[place - 1]
    names = {effect.name for effect in new[place - 1 : place + 1]}
    left = [e for e in events if not (isinstance(e, Send) and e.what != "invoke" and (e.process, e.number) in names)]
    return left, effects_of(final, key, new)


def handle_on_a_child_first(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Only a start of a handler shows it, of a message that was cut short then and handled in its turn later."""
    key, place = resharded(final)
    effect, first = final.effects[key][place], events[0].at_ns
    where = "worker-77", effect.shard, 1, effect.id, key, *effect.name, 1
    early = [Handle("start", first - 2, *where), Handle("end", first - 1, *where, "cancelled")]
    return [*early, *events], final


def commit_under_old_epoch_of_a_child(events: list[Event], final: FinalState, chance: Random) -> Run:
    """Each shard counts its own epochs."""
    key, place = resharded(final)
    new = list(final.effects[key])
    new.insert(place + 1, replace(new[place], epoch=new[place].epoch - 1))
    return events, effects_of(final, key, new)


def stop_half_way(events: list[Event], final: FinalState, chance: Random) -> Run:
    return events, replace(final, phase=chance.choice(("opening", "sealing")))


def keep_delayed(events: list[Event], final: FinalState, chance: Random) -> Run:
    return events, replace(final, unmoved=1)


def keep_retired(events: list[Event], final: FinalState, chance: Random) -> Run:
    return events, replace(final, stay={**final.stay, 0: "messages that group g has not finished"})


def forget_retired(events: list[Event], final: FinalState, chance: Random) -> Run:
    """A retired shard goes with what it had counted."""
    used = [shard for shard in final.shards if shard.appended]
    assume(used)
    gone = chance.choice(used)
    return events, replace(final, shards=[shard for shard in final.shards if shard is not gone])


def handle_again(events: list[Event], final: FinalState, chance: Random) -> Run:
    events, story = calm(events)
    spans = [span for span in story.all_spans() if span.how == "ok"]
    assume(spans)
    span, at = chance.choice(spans), end_of_time(events)
    place = span.process, span.shard, span.epoch, span.id, span.key, *span.name, 1
    return [*events, Handle("start", at + 1, *place), Handle("end", at + 2, *place, "ok")], final


def keep_memory(events: list[Event], final: FinalState, chance: Random) -> Run:
    return events, shard_of(final, chance, memory_after={"stream": 20_000, "meta": 200})


def keep_key(events: list[Event], final: FinalState, chance: Random) -> Run:
    return events, replace(final, strays=["shardq:q:{x}:0:forgotten"])


def never_drained(events: list[Event], final: FinalState, chance: Random) -> Run:
    return events, replace(final, drained_s=None)


def never_resumed(events: list[Event], final: FinalState, chance: Random) -> Run:
    return events, replace(final, resumed_s=None)


def die(events: list[Event], final: FinalState, chance: Random) -> Run:
    return [*events, Process("died", end_of_time(events), "worker-1", "status 1")], final


def stay(events: list[Event], final: FinalState, chance: Random) -> Run:
    return [*events, Process("overdue", end_of_time(events), "worker-1", "waited 45 s")], final


def fail_to_strike(events: list[Event], final: FinalState, chance: Random) -> Run:
    at = end_of_time(events)
    return [*events, Strike("strike", at, 999, "crash"), Strike("failed", at, 999, "crash", "no")], final


def leave_broken(events: list[Event], final: FinalState, chance: Random) -> Run:
    return events, replace(final, lab="7001 is down")


PLANTS: list[tuple[str, Plant]] = [
    ("lost", drop_message),
    ("lost", drop_long_before_the_fault),
    ("lost", drop_at_another_fault),
    ("order", swap_pair),
    ("order", handle_swapped),
    ("twice", double_effect),
    ("twice", store_twice),
    ("twice", bury_and_do),
    ("ids", wrong_id),
    ("owners", two_owners),
    ("owners", other_committed),
    ("fencing", commit_under_old_epoch),
    ("fencing", commit_under_old_epoch_of_a_child),
    ("gates", commit_on_a_child_first),
    ("gates", handle_on_a_child_first),
    ("plans", stop_half_way),
    ("plans", keep_delayed),
    ("plans", keep_retired),
    ("counters", forget_retired),
    ("phantom", phantom),
    ("phantom", stored_though_refused),
    ("phantom", wrong_key),
    ("dead", bury_without_reason),
    *(("counters", count_wrong(name)) for name in ("appended", "acked", "dead", "delivered", "dead_letters")),
    ("counters", count_one_more_everywhere),
    *(("left", leave(name)) for name in ("backlog", "pending", "waiting")),
    ("overlap", overlap),
    ("stale", begin_under_old_lease),
    ("stale", begin_after_waking),
    ("again", handle_again),
    ("memory", keep_memory),
    ("memory", keep_key),
    ("alive", never_drained),
    ("alive", never_resumed),
    ("processes", die),
    ("processes", stay),
    ("lab", fail_to_strike),
    ("lab", leave_broken),
]


@pytest.mark.parametrize(("check", "plant"), PLANTS, ids=[f"{c}-{i}" for i, (c, _) in enumerate(PLANTS)])
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(run=runs, chance=chances)
def test_what_is_planted_is_found(check: str, plant: Plant, run: Run, chance: Random) -> None:
    events, final = plant(*run, chance)
    verdict = judge(events, final, PROMISES)
    assert check in verdict.found()
    assert list(verdict.evidence(next(c for c in verdict.checks if c.name == check)))


def test_every_check_is_shown_to_find_something() -> None:
    events, final = World(Random(1)).run(100)
    assert {check for check, _ in PLANTS} == {check.name for check in judge(events, final, PROMISES).checks}


def test_a_loss_that_the_durability_allows_is_counted() -> None:
    lossy = [judge(*World(Random(seed)).run(600), PROMISES) for seed in range(40)]
    notes = [check.note for verdict in lossy for check in verdict.checks if check.name == "lost" and check.note]
    assert notes
    assert all("at lossy" in note for note in notes)
