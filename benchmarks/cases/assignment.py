"""The plan: who owns each of 16,384 shards among 1,000 workers; what moves when one leaves or joins."""

from __future__ import annotations

from time import perf_counter

from benchmarks.harness import Goal, Options, Result, Say
from shardq.core.assignment import assign
from shardq.core.plan import Plan

SHARDS, WORKERS = 16_384, 1_000
SIDES = {
    "first plan": "assign(shards, workers, {}): nobody owns anything yet",
    "one leaves": "assign(shards, workers but one, plan)",
    "one joins": "assign(shards, workers and one more, plan)",
    "one leaves, whole plan": "Plan.make(shards, workers but one, plan): owners, and for each shard who stands by",
}


async def measure(options: Options, say: Say) -> Result:
    shards, names = options.count(SHARDS, 64), [f"worker-{number:04}" for number in range(options.count(WORKERS, 4))]
    samples: dict[str, list[float]] = {side: [] for side in SIDES}
    moves: dict[str, list[int]] = {"leave": [], "join": []}
    for number in range(options.rounds):
        before, first = timed(shards, names, {})
        gone = names[number % len(names)]
        left, leaving = timed(shards, [name for name in names if name != gone], before)
        joined, joining = timed(shards, [*names, "worker-new"], before)
        whole = timed_whole(shards, [name for name in names if name != gone], before)
        for side, seconds in zip(SIDES, (first, leaving, joining, whole), strict=True):
            samples[side].append(seconds * 1000)
        # Beyond those that have to: the shards of whoever left, and those the newcomer gets.
        moves["leave"].append(sum(left[shard] != owner and owner != gone for shard, owner in before.items()))
        moves["join"].append(sum(owner not in (before[shard], "worker-new") for shard, owner in joined.items()))
        check(before, left, joined, shards)
        say(f"  round {number + 1}: {', '.join(f'{side} {ones[-1]:.1f} ms' for side, ones in samples.items())}")
    slowest = max(max(ones) for ones in samples.values())
    return Result(
        title="Assigning shards to workers",
        unit="ms",
        samples=samples,
        commands=SIDES,
        goals=[
            Goal("the slowest round of any, in ms", slowest, "<=", 100),
            Goal("shards that moved when one left, beside its own", max(moves["leave"]), "<=", 0),
            Goal("shards that moved when one joined, beside those it got", max(moves["join"]), "<=", 0),
        ],
        sizes={"shards": shards, "workers": len(names)},
        notes=["Pure CPU in one process, without Redis."],
    )


def timed(shards: int, names: list[str], before: dict[int, str]) -> tuple[dict[int, str], float]:
    started = perf_counter()
    owners = assign(range(shards), names, before)
    return owners, perf_counter() - started


def timed_whole(shards: int, names: list[str], before: dict[int, str]) -> float:
    started = perf_counter()
    Plan.make(range(shards), names, Plan(before))
    return perf_counter() - started


def check(before: dict[int, str], left: dict[int, str], joined: dict[int, str], shards: int) -> None:
    """A plan that forgets a shard or is not balanced to within one would be no plan, however fast."""
    for plan in (before, left, joined):
        counts: dict[str, int] = {}
        for owner in plan.values():
            counts[owner] = counts.get(owner, 0) + 1
        assert len(plan) == shards
        assert max(counts.values()) - min(counts.values()) <= 1
