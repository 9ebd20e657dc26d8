"""Handler slots that several workers of one process share, handed out by weight. Who is next is core/fair_share.py's
decision; this keeps count of the slots and wakes the runners. Runs no task of its own.

Invariants:
- Never more handlers run than there are slots. A slot is free, held for a share that was woken for it, or in use.
- A slot goes to nobody's account but that of who begins a message with it: one that could not be used is given back.
- While some share could begin a message, no slot stays free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardq.core.fair_share import FairShare


class Slots:
    """`count` slots for as many shares as there are weights."""

    def __init__(self, count: int, weights: Sequence[int]) -> None:
        self.count = self.free = count
        self._fair = FairShare(weights)
        self.shares = [Share(self, number) for number in range(len(weights))]

    def dispatch(self, caller: Share | None = None) -> None:
        """Promises free slots to those that can use them. The caller looks for its own by itself."""
        while self.free > 0:
            wanting = [share.number for share in self.shares if share.wants]
            if not wanting:
                return
            chosen = self.shares[self._fair.next(wanting)]
            self.free -= 1
            chosen.promised += 1
            if chosen is not caller or chosen.promised > 1:
                chosen.wake(1)

    def take_back(self, share: Share, count: int) -> None:
        self.free += count
        for _ in range(count):
            self._fair.give_back(share.number)


class Share:
    """One worker's part. `demand()` is how many messages it could begin now; `wake(count)` wakes its idle runners."""

    def __init__(self, slots: Slots, number: int) -> None:
        self.slots, self.number = slots, number
        self.promised = 0
        self._in_hand = 0
        self.demand: Callable[[], int] = int
        self.wake: Callable[[int], None] = _nobody

    @property
    def wants(self) -> bool:
        return self.promised < self.demand() + self._in_hand

    def enter(self) -> bool:
        """A runner with a message in hand asks for a slot. False: it is woken when its turn comes."""
        if not self.promised:
            self._in_hand = 1
            self.slots.dispatch(self)
            self._in_hand = 0
        if not self.promised:
            return False
        self.promised -= 1
        return True

    def leave(self) -> None:
        """The message that was begun is through."""
        self.slots.free += 1
        self.slots.dispatch(self)

    def give_back(self) -> None:
        """No message was begun with the slot."""
        self.slots.take_back(self, 1)
        self.slots.dispatch(self)

    def decline(self) -> None:
        """There is nothing to begin: what was promised goes to others."""
        if self.promised:
            promised, self.promised = self.promised, 0
            self.slots.take_back(self, promised)
            self.slots.dispatch(self)

    def open(self, demand: Callable[[], int], wake: Callable[[int], None]) -> None:
        """Its worker runs from now on."""
        self.demand, self.wake = demand, wake

    def close(self) -> None:
        """Its worker has ended."""
        self.demand, self.wake = int, _nobody
        self.decline()


def _nobody(_count: int) -> None:
    return
