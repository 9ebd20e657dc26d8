"""One check and how it is run over what it is about. Knows no check in particular."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from shardq.core.findings import Finding
from shardq.ops.doctor.facts import Limits

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True)
class Check(Generic[Subject]):
    """One question to each of several subjects.

    id      of the check; what it finds has ids of its own
    fine    what is said where it found nothing
    judge   the findings about one subject
    knows   whether enough is known of a subject to judge it; one that is not judged is not called fine either
    """

    id: str
    fine: str
    judge: Callable[[Subject, Limits], Iterator[Finding]]
    knows: Callable[[Subject], bool]


def run_checks(
    checks: Iterable[Check[Subject]], subjects: Sequence[Subject], limits: Limits, what: str
) -> Iterator[Finding]:
    """All findings, and for each check without any that it is fine; `what` is one of the subjects."""
    for check in checks:
        known = [subject for subject in subjects if check.knows(subject)]
        found = [finding for subject in known for finding in check.judge(subject, limits)]
        yield from found
        if known and not found:
            yield Finding("ok", f"{check.id}.ok", f"{len(known)} {what}{'s' * (len(known) != 1)}", check.fine)
