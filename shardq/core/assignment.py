"""Who should own which shard: balanced to within one, sticky, with the fewest moves, and the same on every machine.

Every member gets floor(S / M) shards and S mod M of them one more; the "one more" goes to the members that already
own most, so the shards that must leave a live owner are exactly sum(max(0, owned - quota)), the lower bound.
Never looks at load, leases or liveness: whoever is passed as a member can take shards, nobody else can. Only
wishes: nothing here moves a lease.

How shards and members are paired. Homeless shards (no owner among the members, or above the owner's quota: highest
ids leave) are sorted by id. Openings (one for each shard a member lacks to its quota) are sorted by (number of
shards the member has by then, name): the order in which the least loaded member is served. The k-th shard takes
the k-th opening.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class _Start(NamedTuple):
    """What is so before anything moves; every list of shards is in ascending order."""

    owned: dict[str, list[int]]  # by member, in order of name; members without shards too
    orphans: list[int]
    rank: dict[str, int]  # 0 for the member that owns most; ties by name


class _Pairing(NamedTuple):
    """The k-th homeless shard goes to the member of the k-th opening."""

    homeless: list[int]
    openings: list[str]


def assign(shards: Iterable[int], members: Iterable[str], current: Mapping[int, str]) -> dict[int, str]:
    """Return the owner of every shard id in `shards` (duplicates count once), in order of id; {} without members.

    `current` is who owns what now; entries for unknown shards or by owners who are no members count as no owner.
    Depends on neither the order of the arguments nor anything else but their content. Cost O(S log S + M log M).
    """
    start = _start(shards, members, current)
    if not start.owned:
        return {}
    total = len(start.orphans) + sum(map(len, start.owned.values()))
    floor, bonuses = divmod(total, len(start.owned))
    wanted = dict(zip(*_pairing(start, floor, bonuses), strict=True))
    for member, kept in start.owned.items():
        for shard in kept:
            wanted.setdefault(shard, member)
    return dict(sorted(wanted.items()))


def standby(owners: Mapping[int, str], members: Iterable[str]) -> dict[int, str]:
    """Return for every shard of `owners` who takes it if its owner alone goes away, in order of id.

    By definition `assign(owners, members - {owner}, owners)[shard]`; a shard is absent when nobody else is there.
    Computed for all owners together, in O(S log S + M log M), also when `owners` is far from balanced.
    """
    start = _start(owners, members, owners)
    heirs: dict[int, str] = {}
    if start.orphans:  # their owner is no member: without it the members are the same, so plain assign tells
        without = assign(owners, start.owned, owners)
        heirs.update((shard, without[shard]) for shard in start.orphans if without)
    if len(start.owned) > 1:
        _add_heirs(start, len(owners), heirs)
    return dict(sorted(heirs.items()))


def _add_heirs(start: _Start, total: int, heirs: dict[int, str]) -> None:
    # With one member away the quotas of the others do not depend on who it is, except that when it ranks among
    # the bonuses, one more of the others moves up into them. So two pairings of all members serve every case,
    # with the part of the one who is away skipped.
    floor, bonuses = divmod(total, len(start.owned) - 1)
    low, high = _pairing(start, floor, bonuses), _pairing(start, floor, bonuses + 1)
    low_openings, high_openings = _positions(low.openings), _positions(high.openings)
    for member in start.owned:
        if start.rank[member] < bonuses:
            _add_heirs_of(member, start, high, high_openings.get(member, []), floor + 1, heirs)
        else:
            _add_heirs_of(member, start, low, low_openings.get(member, []), floor, heirs)


def _add_heirs_of(
    member: str, start: _Start, pairing: _Pairing, own_openings: list[int], quota: int, heirs: dict[int, str]
) -> None:
    # Opening p of the others is opening p + n of all, n being how many of the member's own lie before it.
    ahead = [position - i for i, position in enumerate(own_openings)]
    skip = 0
    for k, shard in enumerate(start.owned[member]):
        # Homeless before this one: others' shards with a lower id, and the member's k lower ones. Of the latter
        # the pairing already lists those above its quota.
        place = bisect_left(pairing.homeless, shard) - max(0, k - quota) + k
        while skip < len(ahead) and ahead[skip] <= place:
            skip += 1
        heirs[shard] = pairing.openings[place + skip]


def _start(shards: Iterable[int], members: Iterable[str], current: Mapping[int, str]) -> _Start:
    owned: dict[str, list[int]] = {name: [] for name in sorted(set(members))}
    orphans: list[int] = []
    for shard in sorted(set(shards)):
        owner = current.get(shard)
        (orphans if owner is None else owned.get(owner, orphans)).append(shard)
    by_count = sorted(owned, key=lambda name: -len(owned[name]))  # stable, so ties stay in order of name
    return _Start(owned, orphans, {name: rank for rank, name in enumerate(by_count)})


def _pairing(start: _Start, floor: int, bonuses: int) -> _Pairing:
    homeless = list(start.orphans)
    levels: list[list[str]] = [[] for _ in range(floor + 1)]
    for member, kept in start.owned.items():
        quota = floor + (start.rank[member] < bonuses)
        homeless += kept[quota:]
        for level in range(len(kept), quota):
            levels[level].append(member)
    return _Pairing(sorted(homeless), [member for level in levels for member in level])


def _positions(openings: list[str]) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for position, member in enumerate(openings):
        positions.setdefault(member, []).append(position)
    return positions
