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


class Candidates(NamedTuple):
    """What a shell offers for an argument: names, and paths of a kind (`file`, `directory`, or none)."""

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
            if candidates := _candidates(action, command.prog):
                action.complete = _complete(candidates)  # type: ignore[attr-defined]  # where shtab looks
    print(shtab.complete(root, options.shell) + BASH_WRAPPER * (options.shell == "bash"))


def _commands(command: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, and those of all commands below it."""
    yield command
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _commands(below)


def _candidates(action: argparse.Action, program: str) -> Candidates | None:
    """The candidates of an argument, by its name and its metavar; None: unknown, or shtab's own (choices)."""
    shown = action.metavar if isinstance(action.metavar, str) else ""
    paths = "file" if action.type is Path or "FILE" in shown or shown in ("SOURCE", "PLACE", "DATA") else ""
    if shown.startswith(("RUN", "DIR")):
        paths = "directory"
    if action.dest == "set":
        return Candidates(_keys(study=" study " in program))
    names: Sequence[str] = {
        "preset": presets.NAMES,
        "like": presets.NAMES,
        "sampler": tuple(SAMPLERS),
        "sweep": _keys(study=False),
        "study": _studies(),
    }.get(action.dest, ())
    if shown.startswith("RUN") and action.dest != "out":
        names = sorted(pretrained_models())
    return Candidates(tuple(names), paths) if names or paths else None


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


def _complete(candidates: Candidates) -> dict[str, Any]:
    """What shtab puts into each shell's script: functions for bash and zsh, a pattern for tcsh."""
    names, paths = " ".join(candidates.names), candidates.paths  # letters, digits, `.`, `-`, `_`, `+`, `=`: no quotes
    function = f"_dit_in_dit_{paths}_{crc32(repr(candidates).encode()):x}"  # by `_dir` bash ends folders with a slash
    bash, zsh = [], []
    if names:
        space = "-S '' " if names.endswith("=") else ""
        bash, zsh = [f"compgen -W '{names}' -- \"$1\""], [f'compadd "$@" {space}-- {names}']
    if paths:
        bash.append(f'compgen -{paths[0]} -- "$1"')
        zsh.append('_files "$@"' + " -/" * (paths == "directory"))
    bodies = {"bash": bash, "zsh": zsh}
    preamble = {shell: f"{function}() {{ {'; '.join(lines)}; }}" for shell, lines in bodies.items()}
    tcsh = f"({names})" if names and paths != "directory" else paths[0]  # a list or paths, not both
    return {**dict.fromkeys(bodies, function), "tcsh": tcsh, "preamble": preamble}
