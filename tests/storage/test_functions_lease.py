"""The lease functions on real servers: who may take, offer, hand over and give back the right to one shard."""

from __future__ import annotations

import time

import pytest

from shardq.errors import LeaseLost, StoreRefused
from shardq.storage import counters
from tests.storage.rig import Rig

pytestmark = pytest.mark.anyio


async def test_a_free_lease_goes_to_who_asks(shard: Rig) -> None:
    free = await shard.counters()
    assert (free.held, free.owner, free.epoch) == (False, "", 0)
    taken = await shard.acquire("n")
    assert (taken.status, taken.step) == ("OK", 0)
    held = await shard.counters()
    assert (held.held, held.owner, held.epoch, held.renewals) == (True, "worker-n", taken.epoch, "0")


async def test_a_held_lease_says_what_to_watch(shard: Rig) -> None:
    taken = await shard.acquire("n")
    for seen in (None, (taken.epoch - 1, "0"), (taken.epoch, "1"), (taken.epoch, "")):
        told = await shard.acquire("m", seen)
        assert (told.status, told.epoch, told.renewals, told.owner) == ("HELD", taken.epoch, "0", "worker-n")
    assert (await shard.counters()).owner == "worker-n"


async def test_a_lease_that_stood_still_is_taken(shard: Rig) -> None:
    token = await shard.own("n")
    told = await shard.acquire("m")
    taken = await shard.acquire("m", (told.epoch, told.renewals))
    assert taken.status == "OK"
    assert taken.epoch > told.epoch
    with pytest.raises(LeaseLost):
        await shard.step(token)
    await shard.step(f"{taken.epoch}:m")


async def test_a_lease_seen_before_a_promotion_is_not_taken(shard: Rig) -> None:
    """A promoted replica may lack renewals that its old master answered: it has another replication history."""
    await shard.own("n")
    told = await shard.acquire("m")
    assert told.history == await shard.history()
    for history in ("0" * 40, "unknown"):
        assert (await shard.acquire("m", (told.epoch, told.renewals), history=history)).status == "HELD"
    assert (await shard.acquire("m", (told.epoch, told.renewals))).status == "OK"


async def test_a_lease_that_was_renewed_is_not_taken(shard: Rig) -> None:
    token = await shard.own("n")
    told = await shard.acquire("m")
    await shard.step(token, renew=True)
    again = await shard.acquire("m", (told.epoch, told.renewals))
    assert (again.status, again.epoch, again.renewals) == ("HELD", told.epoch, "1")
    await shard.step(token)
    assert (await shard.acquire("m", (again.epoch, again.renewals))).status == "OK"


async def test_asking_again_gets_the_same_answer(shard: Rig) -> None:
    token = await shard.own("n")
    await shard.step(token)
    await shard.step(token)
    again = await shard.acquire("n")
    assert (again.status, f"{again.epoch}:n", again.step) == ("OK", token, 2)


async def test_asking_again_renews(shard: Rig) -> None:
    """An owner trusts its lease from its last acquire on: a taker that watched since the first one must start anew."""
    await shard.own("n")
    told = await shard.acquire("m")
    await shard.acquire("n")
    assert (await shard.acquire("m", (told.epoch, told.renewals))).status == "HELD"


async def test_an_heir_that_claims_what_it_was_given_renews(shard: Rig) -> None:
    token = await shard.own("n")
    assert await shard.lease("offer", 1, "worker-h", "h") == "OK"
    assert await shard.lease("ready", "h") == "OK"
    assert await shard.lease("transfer", token) == "OK"
    told = await shard.acquire("m", plan=1)
    claimed = await shard.acquire("h", plan=1)
    assert (claimed.status, claimed.epoch) == ("OK", told.epoch)
    assert (await shard.acquire("m", (told.epoch, told.renewals), plan=1)).status == "HELD"


async def test_an_older_plan_is_refused(shard: Rig) -> None:
    token = await shard.own("n")
    assert (await shard.acquire("n", plan=0)).status == "OK"
    assert await shard.lease("offer", 5, "worker-h", "h") == "OK"
    assert await shard.lease("offer", 4, "worker-m", "m") == "OLDPLAN"
    epoch = int(token.split(":")[0])
    assert (await shard.acquire("m", (epoch, "0"), plan=4)).status == "OLDPLAN"
    assert (await shard.acquire("n", plan=4)).status == "OK", "who holds it holds it, whatever it has heard of plans"
    assert await shard.lease("release", token) == "OK"
    assert (await shard.acquire("m", plan=4)).status == "OLDPLAN"
    assert (await shard.acquire("m", plan=5)).status == "OK"


async def test_the_epoch_rises_at_every_change_of_owner(shard: Rig) -> None:
    epochs = [0]
    for turn in range(10):
        owner, heir = f"a{turn}", f"b{turn}"
        epochs.append((await shard.acquire(owner, plan=turn)).epoch)
        assert await shard.lease("offer", turn, f"worker-{heir}", heir) == "OK"
        assert await shard.lease("ready", heir) == "OK"
        assert await shard.lease("transfer", f"{epochs[-1]}:{owner}") == "OK"
        epochs.append((await shard.counters()).epoch)
        assert await shard.lease("release", f"{epochs[-1]}:{heir}") == "OK"
    assert epochs == sorted(set(epochs))


async def test_the_epoch_rises_though_the_stored_one_is_ahead(shard: Rig) -> None:
    """A clock that was set back, or a failover to a machine whose clock is behind, changes nothing."""
    ahead = (int(time.time()) + 10**6) * 10**6
    await shard.command("HSET", shard.shard.group("g"), "epoch", ahead)
    assert (await shard.acquire("n")).epoch == ahead + 1


async def test_the_epoch_rises_above_one_that_a_failover_rolled_back(shard: Rig) -> None:
    first = await shard.acquire("n")
    await shard.command("HSET", shard.shard.group("g"), "epoch", 0, "token", "")
    assert (await shard.acquire("m")).epoch > first.epoch


async def test_only_the_owner_gives_the_lease_back(shard: Rig) -> None:
    token = await shard.own("n")
    assert await shard.lease("release", "1:n") == "FENCED"
    assert await shard.lease("release", "") == "FENCED"
    assert await shard.lease("release", token) == "OK"
    assert await shard.lease("release", token) == "FENCED"
    assert not (await shard.counters()).held


async def test_a_handover_goes_offer_ready_transfer(shard: Rig) -> None:
    await shard.append("p", 1, "a", "b")
    token = await shard.own("n")
    (entry,) = await shard.fetch(token)
    assert await shard.lease("transfer", token) == "NOHEIR"
    assert await shard.lease("ready", "h") == "NOHEIR"
    assert await shard.lease("offer", 1, "worker-h", "h") == "OK"
    assert (await shard.acquire("h", plan=1)).heir == "h"
    assert await shard.lease("transfer", token) == "NOHEIR", "the heir has not said ready"
    assert (await shard.step(token)).heir == ""
    assert await shard.lease("ready", "x") == "NOHEIR"
    assert await shard.lease("ready", "h") == "OK"
    assert (await shard.step(token)).heir == "h"
    await shard.step(token, acked=2, finished=[entry])
    assert await shard.lease("transfer", "1:n") == "FENCED"
    assert await shard.lease("transfer", token) == "OK"
    assert await shard.lease("transfer", token) == "FENCED"
    own = await shard.counters()
    assert (own.held, own.owner, own.heir) == (True, "worker-h", "")
    await shard.step(f"{own.epoch}:h")
    with pytest.raises(LeaseLost):
        await shard.step(token)


async def test_a_withdrawn_offer_ends_the_handover(shard: Rig) -> None:
    token = await shard.own("n")
    assert await shard.lease("offer", 1, "worker-h", "h") == "OK"
    assert await shard.lease("ready", "h") == "OK"
    assert await shard.lease("offer", 2, "", "") == "OK"
    assert await shard.lease("ready", "h") == "NOHEIR"
    assert await shard.lease("transfer", token) == "NOHEIR"
    assert (await shard.step(token)).heir == ""
    assert (await shard.counters()).owner == "worker-n"


async def test_another_heir_must_say_ready_itself(shard: Rig) -> None:
    token = await shard.own("n")
    await shard.lease("offer", 1, "worker-h", "h")
    await shard.lease("ready", "h")
    assert await shard.lease("offer", 1, "worker-h", "h") == "OK"
    assert (await shard.step(token)).heir == "h", "the same offer again takes nothing back"
    assert await shard.lease("offer", 2, "worker-m", "m") == "OK"
    assert await shard.lease("transfer", token) == "NOHEIR"
    assert await shard.lease("ready", "h") == "NOHEIR"
    assert await shard.lease("ready", "m") == "OK"
    assert await shard.lease("transfer", token) == "OK"


async def test_an_offer_to_the_owner_itself_withdraws_the_one_before(shard: Rig) -> None:
    token = await shard.own("n")
    await shard.lease("offer", 1, "worker-h", "h")
    await shard.lease("ready", "h")
    assert await shard.lease("offer", 2, "worker-n", "n") == "OWNED"
    assert await shard.lease("transfer", token) == "NOHEIR"


async def test_an_offer_dies_with_the_owner(shard: Rig) -> None:
    token = await shard.own("n")
    await shard.lease("offer", 1, "worker-h", "h")
    await shard.lease("ready", "h")
    await shard.lease("release", token)
    assert await shard.lease("ready", "h") == "NOHEIR"
    assert await shard.lease("offer", 1, "worker-h", "h") == "FREE"
    other = await shard.acquire("m", plan=1)
    assert await shard.lease("transfer", f"{other.epoch}:m") == "NOHEIR"


async def test_a_shard_without_the_group_stays_without_it(shard: Rig) -> None:
    """An offer must not leave a hash behind that open_group would take for a group."""
    assert (await shard.acquire("n", group="other")).status == "MISSING"
    keys = [shard.shard.group("other")]
    for function, args in (("offer", [1, "w", "n"]), ("ready", ["n"]), ("release", ["1:n"]), ("transfer", ["1:n"])):
        await shard.call(function, keys, *args, shard.shard.bell)
    assert await shard.command("EXISTS", *keys) == 0
    await shard.open_group("other")
    assert (await shard.acquire("n", group="other")).status == "OK"


async def test_a_group_deleted_by_hand_is_fenced(shard: Rig) -> None:
    await shard.open_group("other")
    token = await shard.own("n", "other")
    await shard.command("DEL", shard.shard.group("other"))
    with pytest.raises(LeaseLost):
        await shard.step(token, group="other")
    assert "other" not in (await counters.inspect(shard.pipes, shard.shard, ["other"])).groups


@pytest.mark.parametrize("function", ["acquire", "release", "offer", "ready", "transfer"])
async def test_misuse_is_refused(shard: Rig, function: str) -> None:
    with pytest.raises(StoreRefused, match="report it"):
        await shard.call(function, [shard.shard.group("g")], "x")
    assert not (await shard.counters()).held
