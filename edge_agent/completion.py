"""Shell completion: a parser's commands, and the options of each.

After a command, words that do not begin with `-` are paths, which the shell completes by itself.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SHELLS = ("bash", "zsh")
_BASH = """\
_edge_agent() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words
    if [ "${{COMP_WORDS[COMP_CWORD-1]}}" = --print-completion ]; then
        COMPREPLY=($(compgen -W "{shells}" -- "$word")); return
    fi
    if [ "$COMP_CWORD" -gt 1 ]; then
        case "$word" in -*) ;; *) COMPREPLY=(); return ;; esac
    fi
    case "$COMP_CWORD,${{COMP_WORDS[1]}}" in
        1,*) words="{first}" ;;
{commands}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _edge_agent edge-agent
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


class PrintCompletion(argparse.Action):
    """An option that prints lines for a shell's start-up file, and exits.

    Args:
        commands: the parser of each command, by name.
        options: arguments of `argparse.Action`.
    """

    def __init__(self, *, commands: Mapping[str, argparse.ArgumentParser], **options: Any) -> None:
        super().__init__(**options, choices=_SHELLS)
        self._commands = commands

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        _option: str | None = None,
    ) -> None:
        """Print the lines for the shell `values`, and exit."""
        first = " ".join([*self._commands, _options(parser)])
        cases = (f'        *,{n}) words="{_options(c)}" ;;' for n, c in self._commands.items())
        print(_ZSH if values == "zsh" else "", end="")
        shells = " ".join(_SHELLS)
        print(_BASH.format(first=first, shells=shells, commands="\n".join(cases)), end="")
        parser.exit()


def _options(parser: argparse.ArgumentParser) -> str:
    return " ".join(dict.fromkeys(["--help", *re.findall(r"--[\w-]+", parser.format_usage())]))
