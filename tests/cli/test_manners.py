"""What every command has in common: help with an example, --json where it prints data, one line for an error, and the
exit statuses that docs/guide/command-line.md names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from shardq.cli.app import cli, run
from shardq.cli.complete import group_names, queue_names
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.nodes import free_ports
from tests.cli.screen import terminal
from tests.cli.support import until

# What prints no data of its own: it runs until it is stopped, prints one URL, or what is JSON or a script already.
WITHOUT_JSON = {"up", "work", "coordinator", "exporter", "archive", "completion", "console"}
QUESTION = {"delete": ["q", "0/1-0/0"], "queue delete": ["q"], "dead purge": ["q", "0/1-0", "--group", "g"]}


def _commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield " ".join((*words, name)), command
        if isinstance(command, click.Group):
            yield from _commands(command, (*words, name))


ALL = dict(_commands(cli))
LEAVES = {name: command for name, command in ALL.items() if not isinstance(command, click.Group)}
# Arguments that are right in form, so that a command gets as far as its cluster.
GIVEN = {
    "job": ["orders/3/9f86d081884c7d65"],
    "delete": ["q", "0/1-0/0", "--yes"],
    "trim": ["q", "--before", "latest"],
    "queue create": ["q", "--shards", "2"],
    "queue change": ["q", "--jobs"],
    "queue delete": ["q", "--yes"],
    "queue list": [],
    "queue scale": ["q", "--shards", "4"],
    "split": ["q", "0"],
    "merge": ["q", "0", "1"],
    "group create": ["q", "g"],
    "group pause": ["q", "g"],
    "group resume": ["q", "g"],
    "group reset": ["q", "g", "--to", "earliest"],
    "group delete": ["q", "g"],
    "dead list": ["q", "--group", "g"],
    "dead show": ["q", "0/1-0", "--group", "g"],
    "dead replay": ["q", "--group", "g", "--all"],
    "dead purge": ["q", "--group", "g", "--all", "--yes"],
    "schedule set": ["q", "n", "* * * * *"],
    "schedule remove": ["q", "n"],
    "archive": ["q", "--to", "files"],
    "coordinator": ["q", "--group", "g"],
    "status": [],
    "top": [],
    "doctor": [],
    "install": [],
    "console": ["--port", "0"],
    "bench produce": [],
    "bench consume": [],
}
# These take signals or stdin over, so they get a process of their own; the others share this one, which is quicker.
ALONE = {"archive", "console", "coordinator", "tail", "top", "produce", "bench produce", "bench consume"}
NO_CLUSTER = {"demo", "up", "acl", "completion", "work"}
WAITS = {"exporter"}  # for its cluster: tests/ops/test_exporter.py


@pytest.mark.parametrize("name", ALL)
def test_help_has_an_example_of_the_command(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*name.split(), "--help"]) == 0
    shown = capfd.readouterr().out
    assert f"shardq {name}" in shown.partition("Example: ")[2].replace("\n  ", " ")


@pytest.mark.parametrize("name", LEAVES)
def test_what_prints_data_takes_json(name: str) -> None:
    options = {option for each in LEAVES[name].params for option in each.opts}
    assert ("--json" in options) is (name not in WITHOUT_JSON)


@pytest.mark.parametrize("name", LEAVES)
def test_an_unknown_option_is_one_line_and_status_2(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*name.split(), "--never"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: No such option")
    assert captured.err.endswith(" (--help tells more)\n")
    assert f"Usage: shardq {name}" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(LEAVES.keys() - NO_CLUSTER - WAITS))
def test_no_cluster_is_one_line_and_status_1(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_ports("127.0.0.1", 1)[0]
    arguments = [*name.split(), *GIVEN.get(name, ["q"]), "--url", f"redis://127.0.0.1:{port}"]
    if name in ALONE:
        command = [sys.executable, "-m", "shardq", *arguments]
        status = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, check=False).returncode
    else:
        status = run(arguments)
    captured = capfd.readouterr()
    assert (status, captured.out) == (1, "")
    assert captured.err.startswith("error: ")
    assert f"127.0.0.1:{port}" in captured.err
    assert captured.err.count("\n") == 1


def test_a_group_alone_shows_its_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["queue"]) in (0, 2)  # as the version of click has it
    captured = capfd.readouterr()
    assert "Example: shardq queue create" in captured.out + captured.err


@pytest.mark.parametrize("name", QUESTION)
def test_a_question_that_nobody_answers_is_one_line_more_and_status_130(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert run([*name.split(), *QUESTION[name]]) == 130
    assert capfd.readouterr().err.endswith("error: nothing was done, the answer was not yes: --yes does not ask\n")


@pytest.mark.server_kinds("valkey9")
def test_ctrl_c_is_status_130_and_no_traceback(
    cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["queue", "create", queue_name, "--shards", "1", "--url", cluster.url]) == 0
    command = [sys.executable, "-m", "shardq", "produce", queue_name, "--url", cluster.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"1\n")
        process.stdin.flush()

        def is_under_way() -> bool:
            capfd.readouterr()
            assert run(["status", queue_name, "--json", "--over", "0", "--url", cluster.url]) == 0
            return '"appended": 1' in capfd.readouterr().out

        until(is_under_way, "the first line is stored")
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().strip() == b""
        assert process.wait(30) == 130


# -- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shell", "has"), [("bash", "complete -o"), ("zsh", "#compdef shardq"), ("fish", "complete ")])
def test_completion_prints_the_shells_script(shell: str, has: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capfd.readouterr().out
    assert has in script
    assert f"_SHARDQ_COMPLETE={shell}_complete" in script


def _completed(url: str, *words: str) -> list[str]:
    environment = {"COMP_WORDS": " ".join(("shardq", *words)), "COMP_CWORD": str(len(words)), "SHARDQ_URL": url}
    done = subprocess.run(
        [sys.executable, "-m", "shardq"],
        env={**os.environ, **environment, "_SHARDQ_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return [each.partition(",")[2] for each in done.stdout.splitlines() if each]


@pytest.mark.server_kinds("valkey9")
def test_names_are_completed_from_the_cluster(cluster: LocalCluster, queue_name: str) -> None:
    assert run(["queue", "create", queue_name, "--shards", "2", "--url", cluster.url]) == 0
    assert run(["group", "create", queue_name, "billing", "--url", cluster.url]) == 0
    assert _completed(cluster.url, "status", queue_name[:-1]) == [queue_name]
    assert _completed(cluster.url, "queue", "show", queue_name[:-1]) == [queue_name]
    assert _completed(cluster.url, "status", queue_name, "--group", "") == ["billing"]
    assert _completed(cluster.url, "group", "reset", queue_name, "b") == ["billing"]
    assert _completed(cluster.url, "status", "never", "--group", "") == []


def test_no_cluster_completes_nothing_in_silence() -> None:
    url = f"redis://127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"
    assert _completed(url, "status", "") == []
    assert "completion" in _completed(url, "comp")


@pytest.mark.parametrize("name", sorted(LEAVES.keys() - NO_CLUSTER - {"job", "bench produce", "bench consume"}))
def test_queues_and_groups_are_completed_everywhere(name: str) -> None:
    completes = {each.name: each._custom_shell_complete for each in LEAVES[name].params}
    new = name in ("queue create", "group create")
    for parameter, completion in completes.items():
        if parameter == "queue" and name != "doctor":
            assert completion is queue_names, parameter
        if parameter == "group" and not new:
            assert completion is group_names, parameter


# -- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.server_kinds("valkey9")
def test_long_work_shows_a_bar_on_a_terminal_and_none_elsewhere(
    cluster: LocalCluster, queue_name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", cluster.url]
    assert run(["queue", "create", queue_name, "--shards", "1", *url]) == 0
    with terminal("queue", "delete", queue_name, "--yes", *url) as shown:
        assert shown.end() == 0
        assert f"deleting {queue_name}".encode() in shown.written
        assert f"{queue_name}: deleted" in shown.text
    assert run(["queue", "create", queue_name, "--shards", "1", *url]) == 0
    capfd.readouterr()
    assert run(["queue", "delete", queue_name, "--yes", *url]) == 0
    assert capfd.readouterr() == (f"{queue_name}: deleted\n", "")
