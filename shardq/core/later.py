"""What one owned shard handles later: retries, and messages held back behind one. An index in the owner's memory of
what the store keeps (the `later` set of scripts/step.lua); the messages themselves stay there until their turn comes.
Pure.

Invariants (tests/core/test_later.py holds a model to them):
- While a key is held, no message of it is handed out but the oldest kept one: order within the key. A key is held from
  the moment one of its messages is put off until the last of them is finished, also while the put is under way.
- A key may become held while messages of it are in their lane (a dead letter was replayed). They go on, and those that
  come meanwhile join them: kept, they would be before them in line when another owner reads these again.
- With `by_key` false nothing is held: each item comes when it is due.
- An item is handed out again only after it was put back, or the answer that should have brought it was lost.
- Suspects, items that were fetched SUSPECT_GETS times without an outcome, are handed out WAVE at a time: if the process
  dies then, only these can have done it. One that was fetched ALONE_GETS times is handed out only when it may run
  alone in its process: if the process dies then, it is known which message did it.

An item's member in the set is `<id>:<due, server's Unix ms>:<times fetched>:<tag>`; the tag is empty without a key,
else 'k' and the key's bytes.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shardq.core.lanes import lane_key
from shardq.core.records import Key

PAGE = 1000
MAX_ITEMS = 50_000
SUSPECT_GETS = 2
ALONE_GETS = 3
WAVE = 32
FATAL_GETS = 5  # two deaths alone: the first may have been another message's, not under suspicion yet, or nobody's
SUSPECT_PAUSE_S = 0.1
MAX_DIGITS = 16  # of any number in a member; beyond 2**53 the store's scores are not exact


def key_tag(key: Key) -> bytes:
    """How a key is written in an item's member; str and bytes of the same bytes are one key."""
    if key is None:
        return b""
    return b"k" + (key.encode() if isinstance(key, str) else key)


@dataclass(slots=True)
class Item:
    """One message that is handled later; `due_s` by the owner's own clock, `gets` the fetches without an outcome."""

    id: int
    due_s: float
    gets: int
    lane: str | None

    @property
    def suspect(self) -> bool:
        return self.gets >= SUSPECT_GETS

    @property
    def lone(self) -> bool:
        return self.gets >= ALONE_GETS


def parse_member(member: bytes, now_ms: int, now_s: float) -> Item | None:
    """An item as the store's index shows it; None for what shardq did not write. That stays where it is: it names no
    message that could be handled, and a broken item must not keep a shard from being served."""
    parts = member.split(b":", 3)
    if len(parts) != 4 or not all(map(_is_number, parts[:3])) or parts[3][:1] not in (b"", b"k"):
        return None
    lane = lane_key(parts[3][1:]) if parts[3] else None
    return Item(int(parts[0]), now_s + (int(parts[1]) - now_ms) / 1000, int(parts[2]), lane)


def _is_number(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= MAX_DIGITS


class Later:
    """The index of one shard; `holding` while any key is held. `lane_busy(key)` says whether messages of a key are in
    their lane right now; `alone` is the suspect that was handed out and has no outcome yet."""

    def __init__(self, *, by_key: bool, lane_busy: Callable[[str], bool] = lambda _: False) -> None:
        self.items: dict[int, Item] = {}
        self.known = 0
        self.next_item = 1
        self.alone: int | None = None
        self.holding = False
        self._by_key = by_key
        self._lane_busy = lane_busy
        self._lines: dict[str, deque[int]] = {}
        self._coming: Counter[str] = Counter()
        self._unshown: list[str] = []
        self._heap: list[tuple[float, int]] = []
        self._asleep: dict[str, int] = {}
        self._asked: set[int] = set()
        self._out: set[int] = set()
        self._wave: set[int] = set()
        self._wave_behind: deque[int] = deque()
        self._suspects: set[int] = set()

    # -- what is held ----------------------------------------------------------------------------------------

    def holds(self, lane: str | None) -> bool:
        return lane is not None and (lane in self._lines or lane in self._coming)

    def keeps_back(self, lane: str | None) -> bool:
        """Whether a message of this key that comes now has to be kept too."""
        return lane is not None and self.holds(lane) and not self._lane_busy(lane)

    def expect(self, lane: str | None) -> None:
        """A message of this key will be put with a coming step."""
        if self._by_key and lane is not None:
            self._coming[lane] += 1
            self.holding = True

    # -- what the store says ---------------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        """Whether the store has items that are not known here yet."""
        return self.known < self.next_item - 1

    def applied(self, lanes: Iterable[str | None]) -> None:
        """The store took puts of these keys; the index will show them."""
        if self._by_key:
            self._unshown += [lane for lane in lanes if lane is not None]

    def learn(self, members: Sequence[bytes], next_item: int, now_ms: int, now_s: float) -> None:
        """Takes in a page of the index, as a step brought it."""
        known = self.known
        for member in members:
            item = parse_member(member, now_ms, now_s)
            if item is not None and item.id > self.known:
                self.known = item.id
                self._add(item, now_s)
        self.next_item = next_item
        if len(members) < PAGE or self.known == known:  # a page of nothing but broken members would come for ever
            self.known = max(self.known, next_item - 1)
        self.shown()

    def shown(self) -> None:
        """When all is known, what was expected is there."""
        if not self.behind:
            for lane in self._unshown:
                self._coming[lane] -= 1
                if not self._coming[lane]:
                    del self._coming[lane]
            self._unshown = []
            self._look()

    def _look(self) -> None:
        self.holding = bool(self._lines or self._coming)

    def _add(self, item: Item, now_s: float) -> None:
        self.items[item.id] = item
        if self._by_key and item.lane is not None:
            line = self._lines.setdefault(item.lane, deque())
            line.append(item.id)
            self.holding = True
            if len(line) > 1:
                return
        if item.due_s > now_s:  # one that was postponed; nothing waits for a suspect whose time has not come
            heapq.heappush(self._heap, (item.due_s, item.id))
        else:
            self._wait(item, item.due_s)

    def _wait(self, item: Item, due_s: float) -> None:
        """The item is the next of its key: nothing but time is before it."""
        if item.suspect:
            self._suspects.add(item.id)
        heapq.heappush(self._heap, (due_s, item.id))

    # -- whose turn it is ------------------------------------------------------------------------------------

    def due_in_s(self, now_s: float) -> float:
        """Seconds until the next item is due; infinite when none is waiting."""
        return self._heap[0][0] - now_s if self._heap else float("inf")

    def take_due(self, now_s: float, most: int, may_run_alone: Callable[[], bool]) -> list[int]:
        """The ids of items to fetch now, at most `most`."""
        taken: list[int] = []
        while self._heap and self._heap[0][0] <= now_s and len(taken) < most:
            _, item_id = heapq.heappop(self._heap)
            item = self.items[item_id]
            if item.lane is not None and self._by_key and self._lane_busy(item.lane):
                self._asleep[item.lane] = item_id
            elif item.lone and not may_run_alone():
                heapq.heappush(self._heap, (now_s + SUSPECT_PAUSE_S, item_id))
            elif item.suspect and not item.lone and len(self._wave) >= WAVE:
                self._wave_behind.append(item_id)
            else:
                self._hand_out(item)
                taken.append(item_id)
        return taken

    def _hand_out(self, item: Item) -> None:
        if item.lone:
            self.alone = item.id
        elif item.suspect:
            self._wave.add(item.id)
        self._suspects.discard(item.id)
        item.gets += 1
        self._asked.add(item.id)
        self._out.add(item.id)

    @property
    def suspects_wait(self) -> bool:
        """Whether suspects whose turn it is have not been handed out yet: nothing new is fetched before they are. Not
        for one behind another of its key, which may wait for hours."""
        return bool(self._suspects)

    @property
    def out(self) -> list[int]:
        """Items that were handed out and have no outcome."""
        return sorted(self._out)

    def lane_free(self, lane: str, now_s: float) -> None:
        """No message of the key is in its lane any more."""
        item_id = self._asleep.pop(lane, None)
        if item_id is not None:
            heapq.heappush(self._heap, (now_s, item_id))

    def got(self, item_id: int) -> None:
        """The item's message came."""
        self._asked.discard(item_id)

    def ask_again(self, now_s: float) -> list[int]:
        """An answer was lost: what it should have brought is due again. Returns those items."""
        asked, self._asked = sorted(self._asked), set()
        for item_id in asked:
            self._over(item_id)
            item = self.items[item_id]
            item.gets -= 1  # nobody died of it
            self._wait(item, now_s)
        return asked

    # -- outcomes --------------------------------------------------------------------------------------------

    def put_back(self, item_id: int, due_s: float) -> None:
        """The item failed again and waits until then; it keeps its place before the others of its key."""
        item = self.items[item_id]
        item.due_s, item.gets = due_s, 0
        self._over(item_id)
        heapq.heappush(self._heap, (due_s, item_id))

    def postpone(self, item_id: int, due_s: float) -> int:
        """The item was fetched before it might be handled, and waits until then; returns its fetches without an
        outcome, this one not counted."""
        item = self.items[item_id]
        item.due_s = due_s
        item.gets -= 1
        self._over(item_id)
        heapq.heappush(self._heap, (due_s, item_id))
        return item.gets

    def finish(self, item_id: int, now_s: float) -> None:
        """The item is done or dead: the next one of its key has its turn."""
        item = self.items.pop(item_id)
        self._over(item_id)
        if not self._by_key or item.lane is None:
            return
        line = self._lines[item.lane]
        line.remove(item_id)
        if line:
            following = self.items[line[0]]
            self._wait(following, max(following.due_s, now_s))
        else:
            del self._lines[item.lane]
            self._look()

    def _over(self, item_id: int) -> None:
        if self.alone == item_id:
            self.alone = None
        self._out.discard(item_id)
        self._suspects.discard(item_id)
        self._wave.discard(item_id)
        while self._wave_behind and len(self._wave) < WAVE:
            behind = self._wave_behind.popleft()
            if behind in self.items:
                heapq.heappush(self._heap, (self.items[behind].due_s, behind))
                break
