"""Judges journals of handler starts and ends: what was lost, repeated, out of order, side by side. Pure."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

Pauses = Mapping[str, tuple[int, int]]


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
    """
    lost      sent ids never handled to the end
    repeated  ids handled to the end more than once
    disorder  pairs of one key first handled in another order than sent
    overlaps  pairs of one key handled at the same time, but for handlers that slept through a pause of their process
    stale     ids whose handler started under an older lease than one that had handled the key before
    """

    lost: set[str]
    repeated: set[str]
    disorder: list[tuple[str, str]]
    overlaps: list[tuple[str, str]]
    stale: list[str]
    handled: int


def read_journal(folder: Path) -> list[Fact]:
    """Of processes that may go on writing: a line counts once its end is there."""
    facts = []
    for path in sorted(folder.glob("*.jsonl")):
        *lines, _ = path.read_bytes().split(b"\n")
        for line in lines:
            kind, id_, key, value, at_ns, fence = json.loads(line)
            facts.append(Fact(path.stem, kind, id_, key, value, at_ns, fence))
    return sorted(facts, key=lambda fact: fact.at_ns)


def judge(sent: Mapping[str, list[str]], facts: Iterable[Fact], paused: Pauses = MappingProxyType({})) -> Verdict:
    """`sent` maps each key to the ids of its messages in the order they were sent; `paused` each process that was
    stopped to when it was stopped and when it went on (ns)."""
    ends: dict[str, int] = defaultdict(int)
    first_start: dict[str, int] = {}
    spans: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    begun: dict[tuple[str, str], int] = {}
    newest_fence: dict[str, int] = {}
    stale = []
    for fact in facts:
        if fact.kind == "start":
            first_start.setdefault(fact.id, fact.at_ns)
            begun[fact.process, fact.id] = fact.at_ns
            if fact.fence < newest_fence.get(fact.key, 0):
                stale.append(fact.id)
            newest_fence[fact.key] = max(fact.fence, newest_fence.get(fact.key, 0))
        else:
            ends[fact.id] += 1
            start_ns = begun[fact.process, fact.id]
            stopped_ns, woken_ns = paused.get(fact.process, (0, 0))
            if not start_ns <= stopped_ns <= woken_ns <= fact.at_ns:
                spans[fact.key].append((start_ns, fact.at_ns, fact.id))
    ids = {id_ for of_key in sent.values() for id_ in of_key}
    disorder = [
        (before, after)
        for of_key in sent.values()
        for before, after in pairwise(of_key)
        if first_start.get(after, 0) < first_start.get(before, 1 << 80) and after in first_start
    ]
    overlaps = []
    for of_key_spans in spans.values():
        ordered = sorted(of_key_spans)
        overlaps += [(a[2], b[2]) for a, b in pairwise(ordered) if b[0] < a[1]]
    repeated = {id_ for id_, count in ends.items() if count > 1}
    return Verdict(ids - ends.keys(), repeated, disorder, overlaps, stale, len(ends))
