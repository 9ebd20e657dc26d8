"""One owned shard, from the first fetch to the last commit: what the next step carries and asks for, and what follows
from its answer. What is in hand is in core/in_hand.py; how messages are made of what comes, in core/arrivals.py. Pure.

Invariants (tests/core/test_session.py holds a model of the store to them):
- What is handled later is known before any entry is fetched: while there is news of it, a step brings no entry. Pending
  entries come next, from ID 0 in order; only when they are through, new ones come, in the same step if there is room.
- A step is built once and sent until it is answered; what it carries is dropped only when the store says it applied it.
- After a step whose reply was lost, pending entries are read from ID 0 again, and those held already are skipped.
"""

from __future__ import annotations

from collections.abc import Callable

from shardq.core.appetite import IDLE_ROOM_BYTES, Appetite
from shardq.core.arrivals import Arrivals
from shardq.core.budget import Account, Budget
from shardq.core.in_hand import InHand
from shardq.core.jobs import job_of
from shardq.core.later import MAX_ITEMS, Later
from shardq.core.message import Message, Ownership
from shardq.core.step import FIRST, LEFT_PENDING, NEW, STEP_BYTES, Fetched, Step


class Session:
    """What the owner of one shard commits and fetches. `describe(message, error)` makes a dead letter of a message;
    `account` is the shard's part of the bytes that its worker may hold."""

    def __init__(
        self,
        owner: Ownership,
        number: int,
        later: Later,
        describe: Callable[[Message, str], bytes],
        account: Account | None = None,
    ) -> None:
        self.number = number
        self.later = later
        self.hand = InHand(owner, later)
        self.arrivals = Arrivals(self.hand, describe)
        self.account = account or Account(Budget())
        self.appetite = Appetite()
        self.cursor = FIRST
        self.loaded = False
        self.marks_version = b""
        self._seen: bytes | None = None
        self._gets: list[int] = []

    def set_marks(self, version: bytes, marks: frozenset[tuple[str, int]]) -> None:
        """The messages that are deleted as of this version: they are not handled any more, and the store is told so."""
        self.marks_version, self.arrivals.marks = version, marks
        self._seen = version

    # -- what is wanted --------------------------------------------------------------------------------------

    def ask(self, item_ids: list[int]) -> None:
        """These items are fetched with the next step."""
        self._gets += item_ids

    @property
    def hungry(self) -> bool:
        """Whether a step is due for what it would bring besides entries."""
        return bool(self._gets) or not self.loaded or self.later.behind or self._seen is not None

    @property
    def items_wanted(self) -> int:
        """How many items may be asked for now: some go on however much is in hand, for they hold up their keys. None
        while more is put off than one step takes: an item that is put back must not be fetched before it is."""
        if self.hand.crowded:
            return 0
        return (1 if self.account.short else self.appetite.items()) - len(self._gets)

    def entries_wanted(self, messages_max: int) -> int:
        """Entries to ask for so that about `messages_max` messages are in hand; 0 when there are enough."""
        want = messages_max - self.hand.outstanding
        if want <= 0 or self.later.suspects_wait or len(self.later.items) >= MAX_ITEMS:
            return 0
        entries = self.appetite.entries(want, self.account.most - self.hand.held_bytes)
        return entries if self.hand.outstanding else max(entries, 1)

    def reserve(self, entries: int, messages_max: int) -> int:
        """How many of so many entries there is room for, which is kept for the next step; 0 when it has to be waited
        for: then the account waits in line."""
        if not entries:
            return 0
        known = self.appetite.entry_bytes
        entry = known or self.account.first_entry_bytes
        needs = self.appetite.needs(messages_max - self.hand.outstanding, entry)
        pledge = self.account.ask(needs, int(known))
        if not known and 0 < pledge < needs:
            return 1
        return min(entries, int(pledge / entry) or 1) if pledge else 0

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand and nothing is known to come but by new entries."""
        return self.hand.empty and not self.hungry and self.cursor == NEW

    # -- steps -----------------------------------------------------------------------------------------------

    def next_step(self, entries_max: int, messages_max: int = 0) -> Step:
        """The next step: what is finished so far, as far as it fits, and a fetch of `entries_max` entries. If those
        leave room for more, below about `messages_max` messages in hand, more come with them."""
        self.number += 1
        full = bool(self._gets) or not self.loaded or self.later.behind
        step = Step(self.number, self.cursor, entries_max, self.later.known, full, 0, 0, [], [], [])
        step.gets, step.seen, self._gets, self._seen = self._gets, self._seen, [], None
        if entries_max:
            held = self.account.pledge or STEP_BYTES
            step.room = self.appetite.room(entries_max, messages_max - self.hand.outstanding, held)
        self.hand.load(step)
        return step

    def idle_step(self, entries_max: int, messages_max: int) -> Step:
        """A step for a shard of which nothing is in hand: it commits nothing and may be sent again and again, under a
        number of its own each time (`count_on`), for as long as nothing comes. It has none yet. What it brings nobody
        made room for: one entry, and few more if they are small."""
        entries_max = min(entries_max, 1)
        room = self.appetite.room(entries_max, messages_max, IDLE_ROOM_BYTES)
        return Step(0, self.cursor, entries_max, self.later.known, False, 0, 0, [], [], [], room=room)

    def count_on(self, step: Step) -> None:
        """Gives an idle step its next number: the one before was answered, and nothing had come."""
        self.number += 1
        step.number = self.number

    def last_step(self) -> Step:
        """The last step of an owner that goes in good order: what it fetched and did not handle does not count as
        delivered, so that nobody takes it for what its worker died of."""
        step = self.next_step(0)
        finished = {batch.entry for batch in step.finished}
        step.untouched = [entry for entry in self.hand.entries if entry not in finished]
        step.ungets = self.later.out
        step.full = step.full or bool(step.ungets)
        return step

    def amend(self, step: Step, message: Message, record: bytes) -> None:
        """The store refused an effect of `message` and applied nothing of the step: the message becomes a dead letter
        in the same step."""
        self.renumber(step)
        step.effects = [pair for pair in step.effects if pair[0] is not message]
        step.acked -= 1
        step.dead.append((1, record))
        step.full = True
        if message.headers and (named := job_of(message.headers)):
            step.jobs = [job for job in step.jobs if job[0] != named[0]]  # it is not done after all

    def renumber(self, step: Step) -> None:
        """A step that was refused is to be sent in another form, under a new number: the one it had is used up."""
        self.number += 1
        step.number = self.number

    # -- answers ---------------------------------------------------------------------------------------------

    def applied(self, step: Step) -> None:
        """The store applied the step."""
        self.hand.committed(step)

    def reread(self, step: Step, now_s: float) -> None:
        """A reply was lost: what it may have brought is pending, so look there first."""
        self.cursor = FIRST
        self.later.ask_again(now_s)
        self.later.next_item += len(step.lanes)  # its puts were applied: the index is to be read on
        self.appetite.answer_lost()
        self.account.settle(self.hand.held_bytes)

    def receive(self, step: Step, fetched: Fetched, now_s: float) -> list[list[Message]]:
        """Takes in what the step fetched; returns the messages to handle, in order, a list for each batch."""
        if fetched.items is not None or fetched.next_item > self.later.next_item:
            self._learn_items(step, fetched, now_s)
        entries, progress = fetched.entries, fetched.progress
        if step.cursor != NEW and step.entries_max:
            if fetched.left != LEFT_PENDING:
                self.cursor = NEW
            elif entries:
                self.cursor = entries[-1][0].decode()
        batches = self._open_items(step, fetched, now_s) if step.gets else []
        size = fresh = count = 0
        held_before = self.hand.held_bytes
        if entries:
            self.appetite.entries_came()
        in_hand, open_entry = self.hand.entries, self.arrivals.open_entry
        for position, (entry_id, fields) in enumerate(entries):
            entry = entry_id.decode()
            if entry in in_hand:
                continue
            messages = open_entry(entry, fields, progress[position] if position < len(progress) else b"")
            if messages:
                batches.append(messages)
                count += len(messages)
            size += sum(map(len, fields))
            fresh += 1
        if fresh:
            held = self.hand.held_bytes - held_before
            self.appetite.learn_entries(fresh, count, size, held, self.account.first_entry_bytes)
            self.account.learn(fresh, held)
        self.account.settle(self.hand.held_bytes)
        return batches

    def _learn_items(self, step: Step, fetched: Fetched, now_s: float) -> None:
        if fetched.items is not None:
            self.later.learn(fetched.items, fetched.next_item, fetched.now_ms, now_s)
            self.loaded = self.loaded or not self.later.behind
        else:
            self.later.next_item = fetched.next_item  # a dead letter was replayed: the next step asks for it

    def _open_items(self, step: Step, fetched: Fetched, now_s: float) -> list[list[Message]]:
        self.appetite.learn_items(len(step.gets), sum(map(len, fetched.records)))
        pairs = zip(step.gets, fetched.records, strict=True)
        opened = (self.arrivals.open_item(item, raw, now_s) for item, raw in pairs)
        return [[message] for message in opened if message is not None]
