"""Whole runs on real clusters: one that must be clean, and two in which Redis is changed behind shardq's back, which
must be found. Longer ones are for people: `python -m tests.faults`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq.errors import StoreError
from shardq.ops.local_cluster import find_server
from tests.faults.__main__ import main, settings_of
from tests.faults.clients import effects_key
from tests.faults.driver import Report, Settings, run
from tests.faults.lab import Lab
from tests.faults.report import command_of, report_lines

PROCESS_FAULTS = (
    "worker-killed",
    "worker-stopped",
    "producer-killed",
    "producer-stopped",
    "leader-killed",
    "leader-stopped",
    "coordinator-killed",
    "coordinator-stopped",
    "workers-rolled",
)


def shown(report: Report) -> str:
    return "\n".join(report_lines(report))


# On Redis 7.0 workers and producers are killed in runtime/test_crashes.py, and below while shards change.
@pytest.mark.server_kinds("redis8", "valkey9")
def test_a_run_with_faults_of_the_processes_is_clean(server_binary: Path, tmp_path: Path) -> None:
    settings = Settings(
        12, seed=9, faults=PROCESS_FAULTS, gap_s=(0.1, 0.8), lasts_s=(0.3, 3.0), server=server_binary, folder=tmp_path
    )
    report = run(settings)
    assert report.verdict.findings == 0, shown(report)
    assert {fault.name for fault in report.verdict.story.faults.values()} == set(PROCESS_FAULTS)
    assert report.verdict.counts["acknowledged"] > 500, shown(report)
    assert "nothing wrong was found" in shown(report)


RESHARDS = ("shard-split", "shards-split", "shards-merged", "shards-scaled", "reshard-cut-off")


@pytest.mark.server_kinds("redis7")
def test_a_run_that_changes_its_shards_is_clean(server_binary: Path, tmp_path: Path) -> None:
    faults = (*RESHARDS, "worker-killed", "producer-stopped", "failover")
    settings = Settings(
        12, seed=4, faults=faults, gap_s=(0.1, 0.8), lasts_s=(0.1, 1.5), server=server_binary, folder=tmp_path
    )
    report = run(settings)
    assert report.verdict.findings == 0, shown(report)
    assert {fault.name for fault in report.verdict.story.faults.values()} >= set(RESHARDS), shown(report)
    done = [change for change in report.verdict.story.changes if change.what == "done"]
    assert len(done) >= len(RESHARDS) - 1
    moved = [effects for effects in report.state.effects.values() if len({effect.shard for effect in effects}) > 1]
    assert moved, "no key was handled on two shards"


def on_its_master(lab: Lab, command: str, key: str, *words: str | int) -> Any:
    for server in lab.masters():
        try:
            return lab.command(server, command, key, *words)
        except StoreError:
            continue  # MOVED: it is another's
    raise AssertionError(f"no master has {key}")


def forget_an_effect(lab: Lab, queue: shardq.Queue) -> None:
    on_its_master(lab, "LPOP", queue.local_key(effects_key("key-1"), "key-1"))


def repeat_an_effect(lab: Lab, queue: shardq.Queue) -> None:
    key = queue.local_key(effects_key("key-1"), "key-1")
    on_its_master(lab, "RPUSH", key, on_its_master(lab, "LINDEX", key, 0))


# What is planted does not depend on the server.
@pytest.mark.server_kinds("redis7")
@pytest.mark.parametrize(
    ("plant", "checks"),
    [(forget_an_effect, {"lost", "counters"}), (repeat_an_effect, {"twice", "counters"})],
    ids=["forgotten", "repeated"],
)
def test_what_is_done_behind_its_back_is_found(
    plant: Callable[[Lab, shardq.Queue], None], checks: set[str], server_binary: Path, tmp_path: Path
) -> None:
    settings = Settings(
        3,
        seed=1,
        faults=(),
        server=server_binary,
        folder=tmp_path,
        workers=1,
        coordinators=0,
        replicas=0,
        at_drain=plant,
    )
    report = run(settings)
    assert checks <= report.verdict.found(), shown(report)
    text = shown(report)
    assert command_of(settings) in text
    assert "sends number" in text, "the evidence tells the message's story"


def test_the_command_repeats_the_run() -> None:
    settings = Settings(12, seed=4, server=find_server(None), keys=7, gap_s=(0.1, 0.8), lasts_s=(0.5, 1.5))
    words = shlex.split(command_of(settings))
    assert settings_of(words[words.index("--minutes") :]) == settings


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--faults", "nonsense"], "No such fault: nonsense. There are clients-"),
        (["--minutes", "0"], "must be above 0"),
        (["--workers", "-1"], "--workers must be 0 or more"),
        (["--gap", "2", "1"], "--gap must be two numbers"),
        (["--server", "/nowhere"], "is no Redis or Valkey server"),
    ],
)
def test_what_can_not_be_run(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_folder_with_another_run_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.jsonl").write_text("")
    assert main(["--keep", str(tmp_path)]) == 2
    assert "another run" in capsys.readouterr().err


def test_the_list_of_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert "worker-killed" in capsys.readouterr().out
