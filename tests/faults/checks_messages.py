"""What must be true of messages: none lost, none made up, each handled to one end, those of a key in their order. Pure.

What an unknown outcome allows: the message may be stored at any time after it was sent, once, or never. What proves
that a message was handled is what Redis holds at the end: its effect, written in one step with its acknowledgement, or
its dead letter. A failover that takes commits back takes both, and the message is handled again; so at the end each
stored message has one of them exactly, whatever happened on the way.

Order is that of time: a message that was stored before another one was sent comes before it. Sends that were under way
at the same time, and those of unknown outcome, have no order but to come after what was stored before they were sent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from tests.faults.story import NS, FinalState, Name, Sent, Span, Story

# Suspicions of having killed a worker after which a message is a dead letter (docs/guide/retries-and-dead-letters.md).
FATAL_STARTS = 4
# How long after it was acknowledged a message may still be on no other node.
REACH_S = 15


@dataclass(frozen=True, slots=True)
class Finding:
    """`names`: the messages it is about, told whole as its evidence."""

    text: str
    names: tuple[Name, ...] = ()


def endings(final: FinalState) -> Counter[Name]:
    """How often each message came to an end."""
    ended = Counter(effect.name for effects in final.effects.values() for effect in effects)
    ended.update(letter.name for letter in final.dead)
    return ended


def lost(story: Story, final: FinalState) -> list[Sent]:
    """Those whose send returned and that came to no end."""
    ended = endings(final)
    return [sent for sent in story.sent.values() if sent.outcome == "ok" and sent.name not in ended]


def may_be_lost(story: Story, sent: Sent, losing: frozenset[str]) -> str | None:
    """The fault that may have lost it, the nearest of those that may; None when there was none at the time."""
    assert sent.ended_ns is not None
    stored_ns = sent.ended_ns
    near = story.faults_within(sent.invoked_ns - REACH_S * NS, stored_ns + REACH_S * NS)
    may = [fault for fault in near if fault.name in losing]
    return min(may, key=lambda fault: fault.away_ns(stored_ns, story.ended_ns)).name if may else None


def check_lost(story: Story, final: FinalState, losing: frozenset[str]) -> Iterator[Finding]:
    for sent in lost(story, final):
        if may_be_lost(story, sent, losing) is None:
            yield Finding(f"{_id(sent.name)} of {sent.key} was acknowledged and came to no end", (sent.name,))


def check_phantoms(story: Story, final: FinalState) -> Iterator[Finding]:
    """Handled or buried, but never sent, sent under another key, or refused when it was sent."""
    seen = [(effect.name, key, "an effect") for key, effects in final.effects.items() for effect in effects]
    seen += [(letter.name, letter.key, "a dead letter") for letter in final.dead]
    seen += [(span.name, span.key, "a handler") for span in story.all_spans()]
    for name, key, what in dict.fromkeys(seen):
        sent = story.sent.get(name)
        if sent is None:
            yield Finding(f"{what} of {_id(name)} under {key}, which nobody sent", (name,))
        elif sent.key != key:
            yield Finding(f"{what} of {_id(name)} under {key}, but it was sent under {sent.key}", (name,))
        elif sent.outcome == "fail":
            yield Finding(f"{what} of {_id(name)}, whose send said that it is not stored", (name,))


def check_twice(story: Story, final: FinalState) -> Iterator[Finding]:
    """More than one effect, more than one dead letter, or both."""
    ids: dict[Name, list[str]] = defaultdict(list)
    for effects in final.effects.values():
        for effect in effects:
            ids[effect.name].append(effect.id)
    for letter in final.dead:
        ids[letter.name].append(f"{letter.id} (dead letter)")
    for name, of_name in ids.items():
        if len(of_name) > 1:
            how = "it was stored twice" if len(set(of_name)) > 1 else "one stored message was finished twice"
            yield Finding(f"{_id(name)} came to {len(of_name)} ends, {', '.join(of_name)}: {how}", (name,))


def check_ids(story: Story, final: FinalState) -> Iterator[Finding]:
    """`send` returned the id under which its message was handled."""
    for effects in final.effects.values():
        for effect in effects:
            sent = story.sent.get(effect.name)
            if sent is not None and sent.id and sent.id != effect.id:
                yield Finding(f"{_id(sent.name)} was acknowledged as {sent.id}, handled as {effect.id}", (sent.name,))


def check_burials(story: Story, final: FinalState) -> Iterator[Finding]:
    """Dead letters are those whose handler always fails, and those that were there when too many workers died."""
    for letter in final.dead:
        sent = story.sent.get(letter.name)
        if sent is None or sent.fails:
            continue
        starts = sum(1 for span in story.spans.get(letter.key, ()) if span.name == letter.name and not span.how)
        if starts < FATAL_STARTS:
            yield Finding(
                f"{_id(letter.name)} is a dead letter, but its handler does not fail: {letter.error}", (letter.name,)
            )
    for key, effects in final.effects.items():
        for effect in effects:
            sent = story.sent.get(effect.name)
            if sent is not None and sent.fails:
                yield Finding(f"{_id(effect.name)} of {key} has an effect, but its handler always fails", (sent.name,))


def check_order(story: Story, final: FinalState) -> Iterator[Finding]:
    """Effects of a key in the order of its messages; and the same for when each of them was first handled."""
    for key, effects in final.effects.items():
        for before, after in out_of_order(story, [effect.name for effect in effects]):
            yield Finding(f"effects of {key}: {_id(before)} stands before {_id(after)}", (after, before))
    for key, spans in story.spans.items():
        first_starts = list(dict.fromkeys(span.name for span in spans))
        for before, after in out_of_order(story, first_starts):
            yield Finding(f"handlers of {key}: {_id(before)} was handled before {_id(after)}", (after, before))


def out_of_order(story: Story, names: Iterable[Name]) -> Iterator[tuple[Name, Name]]:
    """Pairs of which the second was stored before the first was sent."""
    newest: Sent | None = None
    for name in names:
        sent = story.sent.get(name)
        if sent is None:
            continue  # a phantom, which is a finding of its own
        if newest is not None and sent.stored_by_ns is not None and sent.stored_by_ns < newest.invoked_ns:
            yield newest.name, name
        if newest is None or sent.invoked_ns > newest.invoked_ns:
            newest = sent


def handled_again(story: Story) -> list[tuple[Span, Span]]:
    """Handlings to the end, each with the one of the same message that came next."""
    ended: dict[Name, list[Span]] = defaultdict(list)
    for spans in story.spans.values():
        for span in spans:
            if span.how == "ok":
                ended[span.name].append(span)
    return [pair for of_name in ended.values() for pair in pairwise(of_name)]


def check_again(story: Story, repeating: frozenset[str]) -> Iterator[Finding]:
    """Handled to the end twice (with one effect) is for crashes, pauses, outages. A graceful stop repeats nothing."""
    for one, other in handled_again(story):
        faults = story.faults_within(one.start_ns - REACH_S * NS, other.start_ns)
        if not any(fault.name in repeating for fault in faults):
            yield Finding(f"{_id(one.name)} was handled twice, and no fault near it explains that", (one.name,))


def _id(name: Name) -> str:
    return f"message {name[0]}/{name[1]}"
