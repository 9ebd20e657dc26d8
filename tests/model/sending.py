"""Producers in the model of a reshard (runtime/producer.py, rerouting.py): they send, call, go to the children."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.shards import Shards
from tests.model.states import OPEN, SEALED, Producer, State, Steps, Table, bits, put


class Sending(Shards):
    """Their steps."""

    def producer_steps(self, state: State) -> Steps:
        for number, own in enumerate(state.producers):
            for name, after, changes in self._producer(state, number, own):
                producers = (*state.producers[:number], after, *state.producers[number + 1 :])
                yield f"producer {number}: {name}", changes._replace(producers=producers)

    def _producer(self, state: State, number: int, own: Producer) -> Iterator[tuple[str, Producer, State]]:
        table = self.tables[state.control.table]
        if not own.route:
            yield "connects", own._replace(route=table), state
            return
        if own.sent < len(self.sends[number]):
            yield self._send(state, number, own)
        if own.flight is None:
            for shard, buffer in enumerate(own.buffers):
                if buffer:
                    flight = (shard, buffer, own.batch, "")
                    buffers = put(own.buffers, shard, ())
                    yield "calls", own._replace(flight=flight, buffers=buffers, batch=own.batch + 1), state
        elif not own.flight[3]:
            yield self._append(state, number, own)
        else:
            yield "loses the answer", own._replace(flight=(*own.flight[:3], "")), state
            yield from self._answered(state, own, table)
        if "a range leaves with its SEALED" in self.without and own.route != table:
            yield "reads the table", own._replace(route=table), state

    def _send(self, state: State, number: int, own: Producer) -> tuple[str, Producer, State]:
        """Producer.send"""
        message = self.sends[number][own.sent]
        key = self.keys[message]
        same = sum(1 << other for other, its in enumerate(self.keys) if its == key)
        shard = own.route[key]
        buffers = put(own.buffers, shard, (*own.buffers[shard], message))
        before = put(state.before, message, state.acknowledged & same)
        return f"sends {message}", own._replace(sent=own.sent + 1, buffers=buffers), state._replace(before=before)

    def _append(self, state: State, number: int, own: Producer) -> tuple[str, Producer, State]:
        """scripts/append.lua"""
        assert own.flight is not None
        at, messages, batch, _ = own.flight
        shard = state.home.shards[at]
        known = shard.answers[number] >= batch and "a stored batch keeps its answer" not in self.without
        if shard.state in (OPEN, SEALED) and known:
            return f"batch of {at} is known", own._replace(flight=(at, messages, batch, "ok")), state
        if shard.state != OPEN:
            return f"{at} is sealed", own._replace(flight=(at, messages, batch, "sealed")), state
        home = self.with_shard(
            state.home,
            at,
            log=(*shard.log, *(m for m in messages if m not in self.delayed)),
            delayed=(*shard.delayed, *(m for m in messages if m in self.delayed)),
            answers=put(shard.answers, number, batch),
        )
        return f"{at} stores {messages}", own._replace(flight=(at, messages, batch, "ok")), self.changed(state, home)

    def _answered(self, state: State, own: Producer, table: Table) -> Iterator[tuple[str, Producer, State]]:
        assert own.flight is not None
        at, messages, _, answer = own.flight
        if answer == "ok":
            if state.behind == state.home:  # durability "replica"
                acknowledged = state.acknowledged | bits(messages)
                yield "is answered", own._replace(flight=None), state._replace(acknowledged=acknowledged)
        elif at not in table:  # else it reads the table again, or carries out the plan itself
            yield "goes to the children", self._rerouted(own, at, messages, table), state

    def _rerouted(self, own: Producer, at: int, refused: tuple[int, ...], table: Table) -> Producer:
        """Rerouting._reroute, _move: all that is unstored of the shard's buffer, in order, before anything newer of its
        keys."""
        buffers = list(own.buffers)
        waiting = (*refused, *buffers[at])
        if "older messages first" in self.without:
            waiting = (*buffers[at], *refused)
        buffers[at] = ()
        for message in waiting:
            target = table[self.keys[message]]
            buffers[target] = (*buffers[target], message)
        route = tuple(table[key] if shard == at else shard for key, shard in enumerate(own.route))
        return own._replace(route=route, buffers=tuple(buffers), flight=None)
