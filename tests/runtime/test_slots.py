"""Handler slots that workers share: no more run than there are, none is lost, none stays free for no reason."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardq.runtime.slots import Share, Slots


class Part:
    """One worker as its share sees it: messages that wait, runners that were woken or run."""

    def __init__(self, share: Share) -> None:
        self.share, self.waiting, self.woken, self.running = share, 0, 0, 0
        share.open(lambda: self.waiting, self.wake)

    def wake(self, count: int) -> None:
        self.woken += count

    def come(self, count: int) -> None:
        self.waiting += count
        self.woken += count

    def run_one(self, *, refused: bool = False) -> None:
        """A runner that was woken does what runners do: with a message in hand it asks for a slot."""
        self.woken -= 1
        if not self.waiting:
            self.share.decline()
            return
        self.waiting -= 1
        if not self.share.enter():
            self.waiting += 1
        elif refused:  # the message's key has no leave: it goes elsewhere
            self.share.give_back()
            self.woken += 1
        else:
            self.running += 1

    def end_one(self) -> None:
        self.running -= 1
        self.share.leave()
        self.woken += 1  # the runner goes on


@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_slots_are_neither_lost_nor_made(count: int, weights: list[int], data: st.DataObject) -> None:
    slots = Slots(count, weights)
    parts = [Part(share) for share in slots.shares]

    def check() -> None:
        used = sum(part.running for part in parts)
        promised = sum(share.promised for share in slots.shares)
        assert slots.free >= 0
        assert slots.free + promised + used == count

    for _ in range(data.draw(st.integers(0, 40))):
        part = data.draw(st.sampled_from(parts))
        what = data.draw(st.sampled_from(["come", "run", "refused", "end"]))
        if what == "come":
            part.come(data.draw(st.integers(1, 3)))
        elif what == "end" and part.running:
            part.end_one()
        elif part.woken:
            part.run_one(refused=what == "refused")
        check()
    # Left to themselves they handle all that there is: no slot is forgotten with a share that sleeps.
    while any(part.woken or part.running for part in parts):
        part = next(part for part in parts if part.woken or part.running)
        part.run_one() if part.woken else part.end_one()
        check()
    assert sum(part.waiting for part in parts) == 0
    assert slots.free == count


def test_a_worker_that_ends_leaves_its_slots_to_the_others() -> None:
    slots = Slots(2, [1, 1])
    first, second = (Part(share) for share in slots.shares)
    first.come(2)
    first.run_one()
    second.come(3)
    for _ in range(3):
        second.run_one()
    assert (first.running, first.share.promised, second.running) == (1, 1, 0)
    first.share.close()
    first.running = 0
    first.share.leave()
    while second.woken:
        second.run_one()
    assert second.running == 2
