"""Judges journals of handler starts and ends: what was lost, repeated, out of order, side by side. Pure."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fact:
    process: str
    kind: str
    id: str
    key: str
    value: Any
    at_ns: int
    fence: int


@dataclass(frozen=True)
class Verdict:
    """`lost`: sent ids never handled to the end. `repeated`: ids handled to the end more than once. `disorder`: pairs of
    one key first handled in another order than sent. `overlaps`: ids of one key handled at the same time."""

    lost: set[str]
    repeated: set[str]
    disorder: list[tuple[str, str]]
    overlaps: list[tuple[str, str]]
    handled: int


def read_journal(folder: Path) -> list[Fact]:
    facts = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            kind, id_, key, value, at_ns, fence = json.loads(line)
            facts.append(Fact(path.stem, kind, id_, key, value, at_ns, fence))
    return sorted(facts, key=lambda fact: fact.at_ns)


def judge(sent: Mapping[str, list[str]], facts: Iterable[Fact]) -> Verdict:
    """`sent` maps each key to the ids of its messages in the order they were sent."""
    ends: dict[str, int] = defaultdict(int)
    first_start: dict[str, int] = {}
    spans: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    begun: dict[tuple[str, str], int] = {}
    for fact in facts:
        if fact.kind == "start":
            first_start.setdefault(fact.id, fact.at_ns)
            begun[fact.process, fact.id] = fact.at_ns
        else:
            ends[fact.id] += 1
            spans[fact.key].append((begun[fact.process, fact.id], fact.at_ns, fact.id))
    ids = {id_ for of_key in sent.values() for id_ in of_key}
    disorder = [
        (before, after)
        for of_key in sent.values()
        for before, after in zip(of_key, of_key[1:], strict=False)
        if first_start.get(after, 0) < first_start.get(before, 1 << 80) and after in first_start
    ]
    overlaps = []
    for of_key_spans in spans.values():
        ordered = sorted(of_key_spans)
        overlaps += [(a[2], b[2]) for a, b in zip(ordered, ordered[1:], strict=False) if b[0] < a[1]]
    repeated = {id_ for id_, count in ends.items() if count > 1}
    return Verdict(ids - ends.keys(), repeated, disorder, overlaps, len(ends))
