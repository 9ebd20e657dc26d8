"""A run's events put together: what became of each message, who handled it when, when processes stood still and faults
went on; and what Redis held at the end. Pure; says what was, judges nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.faults.history import Change, Event, Handle, Lease, Process, Send, Strike

Name = tuple[str, int]
NS = 1_000_000_000


def shard_of(id_: str) -> int:
    """The shard that a message id names."""
    return int(id_.partition("/")[0])


@dataclass(slots=True)
class Sent:
    """One send. `ended_ns` is None when nobody knows when (or whether) it ended. `outcome`: "ok", "fail", "unknown"."""

    name: Name
    key: str
    fails: bool
    invoked_ns: int
    outcome: str = "unknown"
    ended_ns: int | None = None
    id: str = ""
    error: str = ""

    @property
    def stored_by_ns(self) -> int | None:
        """When it was stored for sure; None when that is not known."""
        return self.ended_ns if self.outcome == "ok" else None


@dataclass(slots=True)
class Span:
    """One handler from start to end; `end_ns` is None and `how` "" when its process did not live to write it down."""

    process: str
    shard: int
    epoch: int
    id: str
    key: str
    name: Name
    attempt: int
    start_ns: int
    end_ns: int | None = None
    how: str = ""


@dataclass(slots=True)
class Struck:
    """One fault; `healed_ns` is None when it never was."""

    number: int
    name: str
    strike_ns: int
    healed_ns: int | None = None
    failed: str = ""

    def away_ns(self, at_ns: int, end_ns: int) -> int:
        """How long before it began or after it was over; 0 while it went on."""
        return max(self.strike_ns - at_ns, at_ns - (self.healed_ns or end_ns), 0)


@dataclass(frozen=True, slots=True)
class Effect:
    """What a handled message left in the list of its key, in one step with its acknowledgement."""

    name: Name
    epoch: int
    process: str
    id: str

    @property
    def shard(self) -> int:
        return shard_of(self.id)


@dataclass(frozen=True, slots=True)
class Dead:
    """A dead letter of the group."""

    name: Name
    key: str
    id: str
    error: str


@dataclass(frozen=True, slots=True)
class ShardState:
    """
    counts: what Redis keeps of one shard and group; messages, but for `pending` (entries)
    memory: bytes of the shard's own keys by what they are, before the traffic and after all was handled
    """

    shard: int
    appended: int
    acked: int
    dead: int
    delivered: int
    backlog: int
    pending: int
    waiting: int
    dead_letters: int
    memory_before: Mapping[str, int] = field(default_factory=dict)
    memory_after: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FinalState:
    """
    effects    of each key, in the order of its list
    strays     keys of the queue that should not be there any more
    resumed_s  after the last fault: until every producer had a message stored; None when that did not come in time
    drained_s  after the producers stopped: until nothing was left to handle; None when that did not come in time
    lab        what is wrong with the cluster itself after all was healed; empty when nothing is
    phase      of the changes of the number of shards (`ReshardState`); "" when nothing is left of any
    stay       why each retired shard is still there
    unmoved    delayed messages that retired shards still have
    """

    effects: Mapping[str, Sequence[Effect]]
    dead: Sequence[Dead]
    shards: Sequence[ShardState]
    strays: Sequence[str] = ()
    resumed_s: float | None = 0.0
    drained_s: float | None = 0.0
    lab: str = ""
    phase: str = ""
    stay: Mapping[int, str] = field(default_factory=dict)
    unmoved: int = 0


@dataclass
class Story:
    """
    spans    of each key, in the order of their starts
    leases   of each shard: who took which epoch when
    pauses   of each process: from when to when it was stopped, to the end of time if it never went on
    deaths   of each process that was killed or died: when
    """

    sent: dict[Name, Sent] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))
    leases: dict[int, list[Lease]] = field(default_factory=lambda: defaultdict(list))
    pauses: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    deaths: dict[str, int] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    faults: dict[int, Struck] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    began_ns: int = 0
    ended_ns: int = 0

    def seconds(self, at_ns: int) -> float:
        return (at_ns - self.began_ns) / NS

    def all_spans(self) -> Iterable[Span]:
        return (span for spans in self.spans.values() for span in spans)

    def end_of(self, span: Span) -> int:
        """When the handler was surely over."""
        if span.end_ns is not None:
            return span.end_ns
        return self.deaths.get(span.process, self.ended_ns)

    def paused_within(self, process: str, from_ns: int, to_ns: int) -> bool:
        """Whether the process stood still at some time between."""
        return any(stop < to_ns and start > from_ns for stop, start in self.pauses.get(process, ()))

    def faults_within(self, from_ns: int, to_ns: int) -> list[Struck]:
        return [f for f in self.faults.values() if f.strike_ns <= to_ns and (f.healed_ns or self.ended_ns) >= from_ns]


def tell(events: Sequence[Event]) -> Story:
    """The story of events in the order of their times."""
    story = Story()
    if events:
        story.began_ns, story.ended_ns = events[0].at_ns, events[-1].at_ns
    open_spans: dict[tuple[str, int, str], Span] = {}
    for event in events:
        match event:
            case Send():
                _tell_send(story, event)
            case Handle():
                _tell_handle(story, event, open_spans)
            case Lease():
                if event.what == "taken":
                    story.leases[event.shard].append(event)
            case Process():
                _tell_process(story, event)
            case Change():
                story.changes.append(event)
            case Strike():
                _tell_fault(story, event)
    return story


def _tell_send(story: Story, event: Send) -> None:
    name = (event.process, event.number)
    if event.what == "invoke":
        assert name not in story.sent, f"{name} was sent twice: the history is wrong"
        story.sent[name] = Sent(name, event.key, event.fails, event.at_ns)
        return
    sent = story.sent[name]
    sent.outcome, sent.ended_ns, sent.id, sent.error = event.what, event.at_ns, event.id, event.error


def _tell_handle(story: Story, event: Handle, open_spans: dict[tuple[str, int, str], Span]) -> None:
    known = (event.process, event.epoch, event.id)
    if event.what == "start":
        name = (event.producer, event.number)
        place = event.process, event.shard, event.epoch, event.id, event.key
        open_spans[known] = span = Span(*place, name, event.attempt, event.at_ns)
        story.spans[event.key].append(span)
    elif (begun := open_spans.pop(known, None)) is not None:
        begun.end_ns, begun.how = event.at_ns, event.how


def _tell_process(story: Story, event: Process) -> None:
    story.processes.append(event)
    pauses = story.pauses[event.process]
    match event.what:
        case "paused":
            pauses.append((event.at_ns, 1 << 63))
        case "resumed" if pauses:
            pauses[-1] = (pauses[-1][0], event.at_ns)
        case "killed" | "died" | "ended":
            story.deaths.setdefault(event.process, event.at_ns)


def _tell_fault(story: Story, event: Strike) -> None:
    struck = story.faults.setdefault(event.number, Struck(event.number, event.name, event.at_ns))
    if event.what == "healed":
        struck.healed_ns = event.at_ns
    elif event.what == "failed":
        struck.failed = event.text


# -- told to a person --------------------------------------------------------------------------------------------------


def about(story: Story, name: Name) -> list[str]:
    """Everything known of one message, a line each, in the order it happened."""
    lines: list[tuple[int, str]] = []
    sent = story.sent.get(name)
    if sent is None:
        lines.append((0, f"message {name[0]}/{name[1]}: nobody sent it"))
    else:
        lines.append((sent.invoked_ns, f"{name[0]} sends number {name[1]} of {sent.key}"))
        end = {"ok": f"stored as {sent.id}", "fail": f"not stored: {sent.error}", "unknown": f"unknown: {sent.error}"}
        lines.append((sent.ended_ns or sent.invoked_ns, end[sent.outcome]))
    key = sent.key if sent is not None else None
    for span in story.all_spans() if key is None else story.spans.get(key, ()):
        if span.name == name:
            who = f"{span.process} epoch {span.epoch} of shard {span.shard}, {span.id}, try {span.attempt}"
            lines.append((span.start_ns, f"handler starts: {who}"))
            lines.append((story.end_of(span), f"handler ends: {span.how or 'with its process'} ({span.process})"))
    times = [at for at, _ in lines if at]
    if times:
        low, high = min(times) - 5 * NS, max(times) + NS
        near = [change for change in story.changes if low <= change.at_ns <= high]
        lines += [(change.at_ns, f"[{change.process} {change.what}: {change.text}]") for change in near]
        for fault in story.faults_within(min(times) - 5 * NS, max(times) + NS):
            until = f"until {story.seconds(fault.healed_ns):.3f} s" if fault.healed_ns else "and never healed"
            lines.append((fault.strike_ns, f"[fault {fault.name}, {until}]"))
    return [f"{story.seconds(at):9.3f} s  {text}" if at else f"{'':9}    {text}" for at, text in sorted(lines)]
