"""The command `dit-in-dit`: argument parsing, printing and error messages."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NoReturn

from dit_in_dit.runtime.process import gc_paused, is_main

with gc_paused():
    from dit_in_dit import __version__
    from dit_in_dit.cli.options import Commands, Parser
    from dit_in_dit.config import plugins
    from dit_in_dit.config.errors import LeftOutWarning, PluginWarning, UserError, hide_passwords, one_line
    from dit_in_dit.runs.integrity import DamagedWarning
    from dit_in_dit.runs.lock import LocklessWarning

ORDER = (  # order of commands in the help; modules of this folder that are not listed come last
    *("inspect", "draw", "recipe", "encode", "convert", "train", "sample", "evaluate"),
    *("average", "curves", "doctor", "maps", "match", "study", "bench", "verify_resume", "data", "completion"),
)
SMALLER = "make the model, the batch or the images smaller"
_python_line = warnings.formatwarning


def main(arguments: list[str] | None = None) -> None:
    """Run the command. A user's mistake prints one line on stderr and ends with exit code 2."""
    warnings.formatwarning = _line
    try:
        with gc_paused():
            options = parser().parse_args(arguments)
            for plugin in getattr(options, "plugin", ()):
                plugins.load_plugin(plugin)
        options.run(options)
    except UserError as error:
        _refuse("" if error.quiet else str(error), error.code)
    except KeyboardInterrupt:
        print(
            "dit-in-dit: stopped; --resume continues a run, the same command a study, from its last checkpoint",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # `dit-in-dit config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder where a file should go
        _refuse(str(error))
    except MemoryError:
        _refuse(f"not enough memory: {SMALLER}")
    except RuntimeError as error:  # PyTorch's errors of GPUs and of its CPU allocator
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        _refuse(f"not enough memory: {str(error).partition('. ')[0]}; {SMALLER}")


def _refuse(message: str, code: int = 2) -> NoReturn:
    """Print one line on stderr and exit with a code."""
    if message:
        print(one_line(f"dit-in-dit: {hide_passwords(message)}"), file=sys.stderr, flush=True)
    if code != 2:  # a process is lost, and torch.distributed would wait for it again at exit
        os._exit(code)
    sys.exit(code)


def _line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """A warning as text: one line for this package's warnings, Python's format for others."""
    if issubclass(category, LeftOutWarning) and not is_main():
        return ""  # printed by rank 0 only
    if issubclass(category, (DamagedWarning, LeftOutWarning, LocklessWarning, PluginWarning)):
        return one_line(f"dit-in-dit: {message}") + "\n"
    return _python_line(message, category, *where, **more)


def parser() -> Parser:
    """The parser of all commands."""
    main_parser = Parser(prog="dit-in-dit", description="Nested diffusion transformers, written as data.")
    main_parser.add_argument("--version", action="version", version=f"dit-in-dit {__version__}")
    commands = Commands(main_parser)
    modules = {module.name for module in iter_modules(__path__)} - {"options"}
    for name in sorted(modules, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
        import_module(f"{__name__}.{name}").add(commands)
    return main_parser
