"""Where messages of one shard wait for the limit of their key. Pure: the clock is handed in.

A message whose key may begin one now goes on to those that are ready; the others wait here, no runner held, nothing of
another key behind them. Leave is used up only when a runner takes the message (`spend`): a message that found no runner
before its leave lapsed comes back.

Invariants (tests/core/test_gate.py):
- No message passes a runner without leave of its key; messages without a key need none.
- Messages of one key that wait here leave in the order they came.
- A key takes memory only while messages of it wait, or leave of it has not lapsed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable

from shardq.core.lanes import lane_key, let_go
from shardq.core.later import key_tag
from shardq.core.limits import Grant, Tokens
from shardq.core.message import Message

ASK_AT_ONCE = 500
ASK_MOST = 1000


class KeyGate:
    """`on_ready(message)` is given what may be handled now; `behind(message)` says how many more of its key wait
    elsewhere; `on_change()` is called when something is to be asked or the time of the next look may have changed."""

    def __init__(
        self,
        on_ready: Callable[[Message], None],
        behind: Callable[[Message], int],
        now_s: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._on_ready, self._behind, self._now_s, self._on_change = on_ready, behind, now_s, on_change
        self._lines: dict[str, deque[Message]] = {}
        self._tokens: dict[str, Tokens] = {}
        self._asks: dict[str, None] = {}
        self._due: list[tuple[float, str]] = []
        self._looked_for_s = float("-inf")
        self.waiting = 0

    # -- in and out ------------------------------------------------------------------------------------------

    def append(self, message: Message) -> None:
        """The message's turn has come, but for the limit."""
        if message.key is None:
            self._on_ready(message)
            return
        lane, now = lane_key(message.key), self._now_s()
        if lane not in self._lines and lane in self._tokens and self._tokens[lane].usable(now):
            self._on_ready(message)
            return
        self.waiting += 1
        self._lines.setdefault(lane, deque()).append(message)
        self._look(lane, now)

    def extend(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self.append(message)

    def spend(self, message: Message, now_s: float) -> bool:
        """A runner begins the message now. False when it may not: then it waits here again."""
        if message.key is None:
            return True
        tokens = self._tokens.get(lane_key(message.key))
        if tokens is not None and tokens.spend(now_s):
            return True
        self.append(message)
        return False

    def pass_due(self, now_s: float) -> float:
        """Lets through what may go now. Returns the seconds until it should be called again, at the most."""
        while self._due and self._due[0][0] <= now_s:
            _, lane = heapq.heappop(self._due)
            self._let_through(lane, now_s)
        self._looked_for_s = self._due[0][0] if self._due else float("inf")
        return self._looked_for_s - now_s

    def _let_through(self, lane: str, now_s: float) -> None:
        line, tokens = self._lines.get(lane), self._tokens.get(lane)
        if line is None:
            if tokens is not None and tokens.next_s(now_s) == float("inf"):
                del self._tokens[lane]
            elif tokens is not None:
                self._forget_later(lane)
            return
        for _ in range(min(len(line), tokens.count_usable(now_s) if tokens is not None else 0)):
            self.waiting -= 1
            self._on_ready(line.popleft())
        if line:
            self._look(lane, now_s)
        else:
            del self._lines[lane]
            self._forget_later(lane)

    def _forget_later(self, lane: str) -> None:
        tokens = self._tokens.get(lane)
        if tokens is not None:
            heapq.heappush(self._due, (tokens.end_s() + 0.001, lane))

    def _look(self, lane: str, now_s: float) -> None:
        """Messages of the key wait: there is leave to come, or it has to be asked for."""
        tokens = self._tokens.get(lane)
        next_s = tokens.next_s(now_s) if tokens is not None else float("inf")
        if next_s < float("inf"):
            heapq.heappush(self._due, (max(next_s, now_s), lane))
            if next_s < self._looked_for_s:
                self._looked_for_s = next_s
                self._on_change()
        else:
            self._asks[lane] = None
            if len(self._asks) == 1:
                self._on_change()

    # -- asking ----------------------------------------------------------------------------------------------

    def asks(self) -> list[tuple[str, bytes, int]]:
        """Keys whose leave is to be asked for now: lane, tag, for how many messages. They count as asked for."""
        asked: list[tuple[str, bytes, int]] = []
        while self._asks and len(asked) < ASK_AT_ONCE:
            lane = next(iter(self._asks))
            del self._asks[lane]
            if line := self._lines.get(lane):
                asked.append((lane, key_tag(line[0].key), min(len(line) + self._behind(line[-1]), ASK_MOST)))
        return asked

    def ask_again(self, lanes: Iterable[str]) -> None:
        """They got no answer."""
        for lane in lanes:
            self._asks[lane] = None

    def granted(self, lane: str, grant: Grant, sent_s: float, received_s: float) -> float:
        """Takes in what was answered; returns the seconds until a message of the key may be handled."""
        if not grant.given:
            again_s = received_s + grant.again_us / 1e6
            heapq.heappush(self._due, (again_s, lane))
            return max(grant.first_us / 1e6, 0.0)
        tokens = self._tokens.setdefault(lane, Tokens())
        tokens.add(grant, sent_s, received_s)
        # All of it lapsed if the call took too long: then a look now finds that it has to be asked again.
        heapq.heappush(self._due, (min(tokens.next_s(received_s), max(tokens.end_s(), received_s)), lane))
        return max(grant.first_us / 1e6, 0.0)

    def waits_again(self, lane: str) -> bool:
        """Whether the message of the key that waits here was put off once, and fetched again since."""
        line = self._lines.get(lane)
        return line is not None and line[0].batch.item > 0

    def take_out(self, lane: str) -> list[Message]:
        """All that wait here of a key leave unhandled."""
        line = self._lines.pop(lane, deque())
        self.waiting -= len(line)
        self._asks.pop(lane, None)
        self._forget_later(lane)
        return list(line)

    def clear(self) -> None:
        """The shard is not this worker's any more."""
        for line in self._lines.values():
            for message in line:
                let_go(message)
        self._lines.clear()
        self._asks.clear()
        self._tokens.clear()
        self._due.clear()
        self.waiting = 0
