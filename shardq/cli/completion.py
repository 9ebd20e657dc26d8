"""`shardq completion`: prints a shell's completion script. Writes no file and changes no shell."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

_VARIABLE = "_SHARDQ_COMPLETE"


@click.command(epilog="Example: shardq completion fish > ~/.config/fish/completions/shardq.fish")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options, and the names of queues and groups.

    \b
    bash: eval "$(shardq completion bash)" in ~/.bashrc
    zsh:  eval "$(shardq completion zsh)" in ~/.zshrc, after compinit
    fish: shardq completion fish > ~/.config/fish/completions/shardq.fish

    Names come from the cluster of --url or SHARDQ_URL, when it answers within a second.
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    # Not kind.source: bash's looks for a bash here, which need not be where the script is used.
    click.echo(ShellComplete.source(kind(context.find_root().command, {}, "shardq", _VARIABLE)))
