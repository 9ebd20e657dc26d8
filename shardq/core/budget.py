"""The bytes that one worker may hold of messages that are not finished, shared by its shards. Pure; counts what it is
told and fetches nothing.

A shard that is about to fetch is pledged room; what came takes its place when the step is answered. Where there is too
little room, shards wait in line.

Invariants (tests/core/test_budget.py):
- What is held and pledged stays within the bound, but for three things: one fetch may come beyond it, of a shard's part
  or of one entry, however large that is; entries may be larger than those before them led to expect; and messages that
  are tried again come one at a time though there is no room, for they hold up their keys.
- First in line, first served, and nobody else while somebody waits, but shards that hold nothing before all others: no
  shard starves.
- A shard that holds something leaves room for those that hold nothing: half of all there is, divided among all shards.
  What it holds may stay for ever, behind handlers that never end, and they have something to handle all the same.
- Where too little is free for a shard that holds nothing, its fetch comes beyond the bound, one at a time. So its entry
  may be larger than all that handlers which never end leave free, or than all there is. Until it is through, or all
  that is held fits again, its shard is given no more, and the next one waits.
- Entries larger than what is left to each shard that holds nothing have a line of their own, and take nothing of what
  is left to others: should the one before never be through, others do not wait for it.
- A shard with nothing more to fetch is pledged nothing and waits for nothing.

Every call takes the same time however many shards there are, but for those that are let out of the line by it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from shardq.core.step import STEP_BYTES

DEFAULT_BYTES = 128 * 1024 * 1024

_Line = OrderedDict["Account", None]


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
        self._beyond: Account | None = None  # whose fetch came though there was no room
        self._line: _Line = OrderedDict()  # of those that hold nothing
        self._large: _Line = OrderedDict()  # of those too, with entries larger than what is left to each
        self._more: _Line = OrderedDict()  # of those that hold something

    @property
    def free(self) -> int:
        """Below 0 when more is held than there should be; what came beyond the bound does not count."""
        beyond = self._beyond
        return self._most - self.used - self.pledged + (beyond.held + beyond.pledge if beyond is not None else 0)

    @property
    def share(self) -> int:
        """What a shard may have that is treated like all others."""
        return self._most // max(self.shards, 1)

    @property
    def contended(self) -> bool:
        """Whether some shard waits for room."""
        return bool(self._line or self._large or self._more)

    def _kept_for(self, empty: int) -> int:
        """Room that is for so many shards which hold nothing."""
        return min(empty * max(self.share // 2, int(self.first_entry_bytes)), self._most // 2) if empty > 0 else 0

    def _is_large(self, account: Account) -> bool:
        """Whether its next entry is larger than what is left to a shard that holds nothing."""
        return account.least > self._kept_for(1)

    def _pledge(self, account: Account) -> bool:
        """Whether there was room for what the account needs."""
        free, empty = self.free, self.shards - self._holders
        spare = free - self._kept_for(empty if account.held else empty - 1)
        ample = min(free // 2, spare)
        if account.needs <= ample and account is not self._beyond:  # as nearly always
            account.pledge = account.needs
            self.pledged += account.pledge
            return True
        least, room = self._least(account, free, empty), free
        if account.held or self._is_large(account):
            room = spare
        if least <= room and account is not self._beyond:
            account.pledge = min(account.needs, max(least, ample))
        elif account.held or self._beyond is not None or not (account.least or self._learnt):
            return False  # while nothing at all has come yet, what comes makes room, and tells how large entries are
        else:
            self._beyond = account
            account.pledge = least
        self.pledged += account.pledge
        return True

    def _least(self, account: Account, free: int, empty: int) -> int:
        """At least a shard's part: were it as little as is free, many small fetches would take the place of a few."""
        part = min(self.share, STEP_BYTES)
        if not account.held and part > free - (empty - 1) * (self.share // 2):
            part //= 2  # or others would have less
        return min(account.needs, max(account.least or int(self.first_entry_bytes), part))

    def _line_of(self, account: Account, held: int) -> _Line:
        if account is self._beyond:
            return self._large  # as the next one like it does, it waits until this is through
        if held:
            return self._more
        return self._large if self._is_large(account) else self._line

    def _fits_again(self) -> None:
        """Something is given back: what came beyond the bound may be through, or be within it."""
        beyond = self._beyond
        if beyond is None or (beyond.held + beyond.pledge and self.used + self.pledged > self._most):
            return
        self._beyond = None
        if beyond.line is not None:
            beyond.wait_in(self._line_of(beyond, beyond.held))

    def _freed(self) -> None:
        self._fits_again()
        # Of the room those with small entries are first, of the place beyond it those with large ones.
        if self._beyond is None and self._large:
            self._let_out(self._large)
        for line in (self._line, self._large, self._more):
            while line:
                if not self._let_out(line):
                    break
            if line and line is not self._large:
                return

    def _let_out(self, line: _Line) -> bool:
        """Whether there was room for the first in line, or it is now one of the large."""
        account = next(iter(line))
        if line is self._line and self._is_large(account):
            account.wait_in(self._large)
            return True
        if not self._pledge(account):
            return False
        account.leave_line()
        account.on_room()
        return True


class Account:
    """One shard's."""

    __slots__ = ("_budget", "held", "least", "line", "needs", "on_room", "pledge")

    def __init__(self, budget: Budget, on_room: Callable[[], None] = lambda: None) -> None:
        self._budget, self.on_room = budget, on_room
        self.held = self.pledge = 0
        self.needs = self.least = 0
        self.line: _Line | None = None

    @property
    def waits(self) -> bool:
        """Whether it is in line; `on_room` is called when room was pledged to it."""
        return self.line is not None

    def wait_in(self, line: _Line) -> None:
        """At its end, and in no other."""
        self.leave_line()
        line[self] = None
        self.line = line

    def leave_line(self) -> None:
        if self.line is not None:
            del self.line[self]
            self.line = None

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
        if self.pledge or self.line is not None:
            return self.pledge
        budget = self._budget
        self.needs, self.least = needs, least or (int(budget.first_entry_bytes) if budget._learnt else 0)
        line = budget._line_of(self, self.held)
        if line or (self.held and budget._line) or not budget._pledge(self):
            self.wait_in(line)
        return self.pledge

    def withdraw(self) -> None:
        """Nothing is to be fetched now, or what was asked for has come."""
        budget = self._budget
        if self.line is not None:
            self.leave_line()
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
            budget._holders += 1 if held else -1
            if self.line is not None:
                self.wait_in(budget._line_of(self, held))
        self.held = held
        budget.used += held - before
        budget.pledged -= self.pledge
        more = self.pledge > held - before
        self.pledge = 0
        if more if budget._beyond is not None else budget.contended:
            budget._freed()

    def close(self) -> None:
        """The lease is gone, and what was held with it."""
        self.settle(0)
        self.withdraw()
