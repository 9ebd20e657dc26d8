"""What a shell completes the names of queues and groups with: those of the cluster that the command line means."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem

from shardq.cli.options import DEFAULT_URL


def queue_names(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """For an argument's `shell_complete`."""
    from shardq.ops.complete import queues

    return _items(queues(_url(context)), typed)


def group_names(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """The same for a group of the queue that stands before it."""
    from shardq.ops.complete import groups

    # A line that ends in `--group` is not a right one yet, and click leaves its words as they are.
    words = [word for word in context.args if not word.startswith("-")]
    queue = context.params.get("queue") or context.params.get("name") or next(iter(words), None)
    return _items(groups(_url(context), queue), typed) if isinstance(queue, str) else []


def _items(names: Sequence[str], typed: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(typed)]


def _url(context: click.Context) -> str:
    words = context.args
    if "--url" in words[:-1]:
        return words[words.index("--url") + 1]
    return context.params.get("url") or os.environ.get("SHARDQ_URL") or DEFAULT_URL
