"""Groups in the model of a reshard: they own shards, pass gates, handle (scripts/lease.lua, step.lua, timed.lua)."""

from __future__ import annotations

from tests.model.explore import Broken
from tests.model.shards import Shards
from tests.model.states import OPEN, OWNED, SEALED, SHUT, Home, Shard, State, Steps, bits, put


class Handling(Shards):
    """Their steps, and what must be true at each."""

    def group_steps(self, state: State) -> Steps:
        home = state.home
        for number, shard in enumerate(home.shards):
            if shard.state not in (OPEN, SEALED):
                continue
            for message in shard.delayed:
                rest = tuple(other for other in shard.delayed if other != message)
                due = self.with_shard(home, number, log=(*shard.log, message), delayed=rest)
                yield f"{message} is due on {number}", self.changed(state, due)
            for group in range(self.groups):
                if shard.gates[group] == SHUT and self._may_own(home, number, group):
                    self._check_gate(home, number, group)
                    opened = self.with_shard(home, number, gates=put(shard.gates, group, OWNED))
                    yield f"group {group} acquires {number}", self.changed(state, opened)
                elif shard.gates[group] == OWNED:
                    yield from self._handle(state, number, shard, group)

    def _may_own(self, home: Home, number: int, group: int) -> bool:
        """lease_gated: asks reshard_left of every parent."""
        return not any(self._left(home, parent, group) for parent in self.parents[number])

    def _check_gate(self, home: Home, number: int, group: int) -> None:
        for other in self._all_ancestors(number):
            shard = home.shards[other]
            if bits(shard.log) & ~home.done[group] or (shard.state == OPEN):
                raise Broken("gate", f"group {group} owns {number} before it has finished {other}")

    def _handle(self, state: State, number: int, shard: Shard, group: int) -> Steps:
        """step: the first message of each key that is not done; it may fail once, and waits then"""
        home, seen = state.home, set[int]()
        for message in shard.log:
            key = self.keys[message]
            if home.done[group] >> message & 1 or key in seen:
                continue
            seen.add(key)
            self._check_order(state, number, message, group)
            bit = 1 << message
            waits = home.waiting[group] & bit
            done = home._replace(
                done=put(home.done, group, home.done[group] | bit),
                waiting=put(home.waiting, group, home.waiting[group] & ~bit),
            )
            yield f"group {group} handles {message} of {number}", self.changed(state, done)
            if state.retries and not waits:
                later = home._replace(waiting=put(home.waiting, group, home.waiting[group] | bit))
                yield f"{message} waits for a retry", self.changed(state, later, retries=state.retries - 1)

    def _check_order(self, state: State, number: int, message: int, group: int) -> None:
        """What was acknowledged when it was sent, and what its producer sent before, is done. Only between two steps of
        a reset, which takes parents first, a child may be ahead."""
        if message in self.delayed:
            return
        wanted = state.before[message]
        for own in self.sends:
            if message in own:
                wanted |= sum(1 << other for other in own if other < message and self.keys[other] == self.keys[message])
        missing = wanted & ~(state.home.done[group] | state.home.removed)
        mine = state.home.shards[number].resets[group]
        for other in range(len(self.keys)):
            if missing >> other & 1 and other not in self.delayed:
                places = [shard for shard in state.home.shards if other in shard.log]
                if not any(shard.resets[group] > mine for shard in places):
                    raise Broken("order", f"group {group} handles {message} before {other}")
