"""A class of this package and all that it is made of, as the text of one module that needs no package.

What diffusers loads from a folder under `trust_remote_code` is single files. They are put together from the
package's own sources, definition by definition, so that there is one model and not two.
"""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from symtable import symtable

PACKAGE = __name__.split(".", maxsplit=1)[0]
# Modules that stay at home, and what goes in their place.
STAND_INS = {
    f"{PACKAGE}.config.choices": f"{PACKAGE}.interop.remote.choices",  # tables that a user's classes join
    f"{PACKAGE}.model.tiny": f"{PACKAGE}.interop.remote.tiny",  # a kernel is registered once per process
    f"{PACKAGE}.interop.carried": f"{PACKAGE}.interop.remote.carried",  # bundles from the package's sources
}
HEADER = f"""# Made by {PACKAGE} from its own sources: those are to be read and changed. Licence: Apache-2.0.

from __future__ import annotations

"""


@dataclass(frozen=True)
class Statement:
    """A statement at the top of a module: its text with what stands above it, what it defines and what it names."""

    text: str
    defines: frozenset[str]
    names: frozenset[str]
    late: str  # a module of the package that it imports by itself


@dataclass
class Module:
    """A module's statements in order, and where its imported names come from."""

    name: str
    about: str  # the first line of its docstring
    statements: list[Statement] = field(default_factory=list)
    inside: dict[str, tuple[str, str]] = field(default_factory=dict)  # name here: module and name there
    outside: dict[str, tuple[str, str]] = field(default_factory=dict)  # name here: module ("": a whole one) and name


@dataclass(frozen=True)
class Definition:
    """Statement `number` of a module."""

    module: str
    number: int


def bundle(module: str, name: str) -> str:
    """The source of a module that defines `name` of `module` and all of the package that it needs.

    Raises:
        NotImplementedError: the package's sources cannot be put into one file as they are written.
    """
    order, needed, imports = _gather(module, name)
    _check_names(needed)
    text = HEADER + _import_lines(imports)
    for each in order:
        numbers = sorted(found.number for found in needed if found.module == each)
        if numbers:
            text += f"\n\n# {'-' * 20} {each}\n# {_read(each).about}\n"
            text += "".join(_read(each).statements[number].text for number in numbers)
    return text


def _import_lines(imports: set[tuple[str, str]]) -> str:
    """`import` lines, then `from` lines with the names of one module together."""
    together: dict[str, set[str]] = {}
    for module, name in imports:
        together.setdefault(module, set()).add(name)
    plain = sorted(f"import {name}\n" for name in together.pop("", ()))
    return "".join(plain + [f"from {m} import {', '.join(sorted(names))}\n" for m, names in sorted(together.items())])


def _gather(module: str, name: str) -> tuple[list[str], set[Definition], set[tuple[str, str]]]:
    """Modules in the order of their imports, the statements needed, and the imports from outside."""
    needed: set[Definition] = set()
    imports: set[tuple[str, str]] = set()
    waiting = [(module, name)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        home, wanted = place
        here = _read(home)
        if wanted in here.inside:
            if here.inside[wanted][1] != wanted:
                raise NotImplementedError(f"{home}: {here.inside[wanted][1]} is imported as {wanted}")
            waiting.append(here.inside[wanted])
        elif wanted in here.outside:
            imports.add(here.outside[wanted])
        else:
            for number in _defining(here, wanted):
                if late := here.statements[number].late:
                    raise NotImplementedError(f"{home}: {wanted} imports {late} when it is too late")
                needed.add(Definition(home, number))
                waiting += [(home, used) for used in here.statements[number].names]
    return _order(module), needed, imports


def _defining(module: Module, name: str) -> list[int]:
    """Statements that define `name`, and those that define nothing and are about it (a registration)."""
    found = [i for i, s in enumerate(module.statements) if name in s.defines]
    if not found and not hasattr(builtins, name) and name not in ("__name__", "__file__"):
        raise NotImplementedError(f"{module.name}: {name} is defined in no place that a bundle can see")
    return found + [i for i, s in enumerate(module.statements) if not s.defines and name in s.names and found]


def _order(module: str, done: tuple[str, ...] = ()) -> list[str]:
    """The module and those it imports, each after what it imports."""
    order: list[str] = list(done)
    for home, _ in dict.fromkeys(_read(module).inside.values()):
        if home not in order:
            order = _order(home, tuple(order))
    return [*order, module] if module not in order else order


def _check_names(needed: set[Definition]) -> None:
    """One file has one namespace: no two modules may define the same name."""
    homes: dict[str, str] = {}
    for found in needed:
        for name in _read(found.module).statements[found.number].defines:
            if homes.setdefault(name, found.module) != found.module:
                raise NotImplementedError(f"{homes[name]} and {found.module} both define {name}: rename one")


@cache
def _read(name: str) -> Module:
    spec = find_spec(STAND_INS.get(name, name))
    if spec is None or spec.origin is None:
        raise NotImplementedError(f"the source of {name} is not there")
    text = Path(spec.origin).read_text()
    tree, lines, last = ast.parse(text), text.splitlines(keepends=True), 0
    made = Module(name, (ast.get_docstring(tree) or "").partition("\n")[0])
    for node in tree.body:
        body = "".join(lines[last : node.end_lineno])
        last = node.end_lineno or last
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_import(made, node)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # not the docstring
            made.statements.append(Statement(body, *_scan(body), _late_import(node)))
    return made


def _note_import(module: Module, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        here = alias.asname or alias.name
        renamed = f" as {alias.asname}" if alias.asname else ""
        if isinstance(node, ast.Import):
            module.outside[here.split(".")[0]] = ("", f"{alias.name}{renamed}")
        elif _is_ours(node.module):
            module.inside[here] = (str(node.module), alias.name)
        elif node.module != "__future__":
            module.outside[here] = (str(node.module), f"{alias.name}{renamed}")


def _scan(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a statement defines in its module, and what it takes from it, as Python's own compiler sees it."""
    top = symtable(text, "statement", "exec")
    defines = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    names = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    inner = top.get_children()
    while inner:
        scope = inner.pop()
        names |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
        inner += scope.get_children()
    return frozenset(defines), frozenset(names - defines)


def _late_import(node: ast.stmt) -> str:
    """A module of the package that is imported within a statement."""
    inside = (part.module for part in ast.walk(node) if isinstance(part, ast.ImportFrom))
    return next((str(module) for module in inside if _is_ours(module)), "")


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".", maxsplit=1)[0] == PACKAGE
