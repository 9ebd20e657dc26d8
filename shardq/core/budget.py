"""The bytes that one worker may hold of messages that are not finished, shared by its shards. Pure; counts what it is
told and fetches nothing.

A shard that is about to fetch is pledged room; what came takes its place when the step is answered. Where there is too
little room, shards wait in line.

Invariants (tests/core/test_budget.py):
- What is held and pledged stays within the bound, but for three things: one entry may come when nothing is held or
  pledged, however large it is; entries may be larger than those before them led to expect; and messages that are tried
  again come one at a time though there is no room, for they hold up their keys.
- First in line, first served, and nobody else while somebody waits, but shards that hold nothing before all others: no
  shard starves, a large entry's neither.
- A shard that holds something leaves room for those that hold nothing: half of all there is, divided among all shards.
  What it holds may stay for ever, behind handlers that never end, and they have something to handle all the same.
- A shard with nothing more to fetch is pledged nothing and waits for nothing.

Every call takes the same time however many shards there are, but for those that are let out of the line by it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from shardq.core.step import STEP_BYTES

DEFAULT_BYTES = 128 * 1024 * 1024


class Budget:
    """`shards` is how many this worker has, or is about to have; `first_entry_bytes` what an entry counts as while it
    is not known how large those of its shard are."""

    def __init__(self, most_bytes: int = DEFAULT_BYTES) -> None:
        self.shards = 1
        self.used = self.pledged = 0
        self._most = most_bytes
        # Large enough for what producers send by default; in a small budget it must not keep everybody waiting.
        self.first_entry_bytes: float = max(1, min(STEP_BYTES // 2, most_bytes // 4))
        self._learnt = False
        self._holders = 0
        self._line: OrderedDict[Account, None] = OrderedDict()  # of those that hold nothing
        self._more: OrderedDict[Account, None] = OrderedDict()  # of those that hold something

    @property
    def free(self) -> int:
        """Below 0 when more is held than there should be."""
        return self._most - self.used - self.pledged

    @property
    def share(self) -> int:
        """What a shard may have that is treated like all others."""
        return self._most // max(self.shards, 1)

    @property
    def contended(self) -> bool:
        """Whether some shard waits for room."""
        return bool(self._line or self._more)

    def _kept_for(self, empty: int) -> int:
        """Room that is for so many shards which hold nothing."""
        return min(empty * max(self.share // 2, int(self.first_entry_bytes)), self._most // 2) if empty > 0 else 0

    def _pledge(self, account: Account) -> bool:
        """Whether there was room for what the account needs."""
        free, empty = self._most - self.used - self.pledged, self.shards - self._holders
        spare = free - self._kept_for(empty if account.held else empty - 1)
        ample = min(free // 2, spare)
        if account.needs <= ample:  # as nearly always
            account.pledge = account.needs
            self.pledged += account.pledge
            return True
        # At least a shard's part: were it as little as is free, many small fetches would take the place of a few.
        part, room = min(self.share, STEP_BYTES), free
        if account.held:
            room = spare
        elif part > free - (empty - 1) * (self.share // 2):
            part //= 2  # or others would have less
        least = min(account.needs, max(account.least or int(self.first_entry_bytes), part))
        if least > room and (self.used > 0 or self.pledged > 0):
            return False
        account.pledge = min(account.needs, max(least, ample))
        self.pledged += account.pledge
        return True

    def _line_of(self, account: Account) -> OrderedDict[Account, None]:
        return self._more if account.held else self._line

    def _freed(self) -> None:
        for line in (self._line, self._more):
            while line:
                account = next(iter(line))
                if not self._pledge(account):
                    return
                del line[account]
                account.waits = False
                account.on_room()


class Account:
    """One shard's. `waits`: it is in line, and `on_room` is called when room was pledged to it."""

    __slots__ = ("_budget", "held", "least", "needs", "on_room", "pledge", "waits")

    def __init__(self, budget: Budget, on_room: Callable[[], None] = lambda: None) -> None:
        self._budget, self.on_room = budget, on_room
        self.held = self.pledge = 0
        self.needs = self.least = 0
        self.waits = False

    @property
    def most(self) -> int:
        """What this shard should hold at most: at least what one step brings."""
        return max(STEP_BYTES, self._budget.share)

    @property
    def first_entry_bytes(self) -> float:
        """What an entry of this shard counts as before any came: as much as the large ones of others lately."""
        return self._budget.first_entry_bytes

    def learn(self, entries: int, held: int) -> None:
        """So many entries came, which take so much."""
        self._budget._learnt = True
        self._budget.first_entry_bytes = max(held / entries, 0.9**entries * self._budget.first_entry_bytes, 1.0)

    @property
    def short(self) -> bool:
        """Whether there is no room at all."""
        return self._budget.free <= 0

    @property
    def contended(self) -> bool:
        """Whether some shard of the worker waits for room."""
        return self._budget.contended

    def ask(self, needs: int, least: int) -> int:
        """Bytes that may be fetched now, up to `needs` (above 0); 0 when the shard is in line from now on. `least` is
        what its next entry takes, 0 where none came before: then as much as the large ones of others; if none came at
        all yet, as those that have come when its turn has."""
        if self.pledge or self.waits:
            return self.pledge
        budget = self._budget
        self.needs, self.least = needs, least or (int(budget.first_entry_bytes) if budget._learnt else 0)
        if budget._line or (self.held and budget._more) or not budget._pledge(self):
            budget._line_of(self)[self] = None
            self.waits = True
        return self.pledge

    def withdraw(self) -> None:
        """Nothing is to be fetched now, or what was asked for has come."""
        budget = self._budget
        if self.waits:
            self.waits = False
            del budget._line_of(self)[self]
        elif self.pledge:
            budget.pledged -= self.pledge
            self.pledge = 0
        else:
            return
        budget._freed()

    def settle(self, held: int) -> None:
        """The shard holds so much now, and no step of it is under way."""
        budget, before = self._budget, self.held
        if bool(held) != bool(before):
            self._changes_line(held)
        self.held = held
        budget.used += held - before
        budget.pledged -= self.pledge
        more = self.pledge > held - before
        self.pledge = 0
        if more and (budget._line or budget._more):
            budget._freed()

    def _changes_line(self, held: int) -> None:
        """It held nothing and does now, or the other way round."""
        budget = self._budget
        budget._holders += 1 if held else -1
        if self.waits:
            old, new = (budget._line, budget._more) if held else (budget._more, budget._line)
            del old[self]
            new[self] = None

    def close(self) -> None:
        """The lease is gone, and what was held with it."""
        self.settle(0)
        self.withdraw()
