"""`completion`: a script by which a shell completes commands, options, and names of presets, runs and config keys.

The script is static: while a user types, no Python starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from dit_in_dit.cli.options import Commands
from dit_in_dit.config import presets
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.samplers import SAMPLERS
from dit_in_dit.runs.pretrained import pretrained_models

SHELLS = ("bash", "zsh", "tcsh")
# Bash splits words at `=`. No space follows a key, and after `=` bash completes files, such as those of data.source.
BASH_WRAPPER = """
_dit_in_dit() {
  COMPREPLY=()
  [[ ${COMP_WORDS[COMP_CWORD]} == = || ${COMP_WORDS[COMP_CWORD-1]} == = ]] && return
  _shtab_dit_in_dit
  [[ ${COMPREPLY-} == *= ]] && compopt -o nospace 2>/dev/null  # bash 3 has no compopt
  return 0
}
complete -o bashdefault -o default -F _dit_in_dit dit-in-dit"""


class Values(NamedTuple):
    """The values that an argument takes: names, and paths of a kind (`file`, `directory`, or none)."""

    names: Sequence[str] = ()
    paths: str = ""


def add(commands: Commands) -> None:
    """Add the command."""
    about = "print a script by which your shell completes commands, options and names (docs/commands.md)"
    command = commands.add("completion", _completion, about)
    command.add_argument("shell", choices=SHELLS, help="the shell that runs the script")


def _completion(options: argparse.Namespace) -> None:
    import shtab

    from dit_in_dit.cli import parser

    root = parser()
    for command in _commands(root):
        for action in command._actions:
            if isinstance(action.choices, range):
                action.choices = None  # nobody completes a number
            if values := _values(action, command.prog):
                action.complete = _complete(values)  # type: ignore[attr-defined]  # where shtab looks
    print(shtab.complete(root, options.shell) + BASH_WRAPPER * (options.shell == "bash"))


def _commands(command: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, and those of all commands below it."""
    yield command
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _commands(below)


def _values(action: argparse.Action, program: str) -> Values | None:
    """The values of an argument, by its name and the words of its metavar; None: shtab's own (choices) or unknown."""
    shown = action.metavar if isinstance(action.metavar, str) else ""
    paths = "file" if action.type is Path or "FILE" in shown or shown in ("SOURCE", "PLACE", "DATA") else ""
    if shown.startswith(("RUN", "DIR")):
        paths = "directory"
    if action.dest == "set":
        return Values(_keys(study=" study " in program))
    names: Sequence[str] = {
        "preset": presets.NAMES,
        "like": presets.NAMES,
        "sampler": tuple(SAMPLERS),
        "sweep": _keys(study=False),
        "study": _studies(),
    }.get(action.dest, ())
    if shown.startswith("RUN") and action.dest != "out":
        names = sorted(pretrained_models())
    return Values(tuple(names), paths) if names or paths else None


def _keys(*, study: bool) -> Sequence[str]:
    """The config keys with `=` after each; of a study, its own keys and those of its arms."""
    names = RunConfig.names()
    keys = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    if study:
        from dit_in_dit.study.plan import BUDGETS, StudyConfig

        own = [name.removeprefix(f"{StudyConfig.prefix}.") for name in StudyConfig.names()]
        keys = [*own, *(f"budget.{kind}" for kind in BUDGETS), *(f"set.{key}" for key in keys)]
    return tuple(f"{key}=" for key in keys)


def _studies() -> Sequence[str]:
    from dit_in_dit.study.plan import shipped_studies

    return tuple(shipped_studies())


def _complete(values: Values) -> dict[str, Any]:
    """What shtab puts into each shell's script: functions for bash and zsh, a pattern for tcsh."""
    name = f"_dit_in_dit_{values.paths}_{crc32(repr(values).encode()):x}"  # by `_dir` bash ends folders with a slash
    words, bash, zsh = " ".join(values.names), [], []  # names have letters, digits, `.`, `-`, `_` and `=`: no quotes
    if words:
        space = "-S '' " if words.endswith("=") else ""
        bash, zsh = [f"compgen -W '{words}' -- \"$1\""], [f'compadd "$@" {space}-- {words}']
    if values.paths:
        bash.append(f'compgen -{values.paths[0]} -- "$1"')
        zsh.append('_files "$@"' + " -/" * (values.paths == "directory"))
    functions = {shell: f"{name}() {{ {'; '.join(parts)}; }}" for shell, parts in (("bash", bash), ("zsh", zsh))}
    tcsh = f"({words})" if words and values.paths != "directory" else values.paths[0]  # a list or paths, not both
    return {"bash": name, "zsh": name, "tcsh": tcsh, "preamble": functions}
