"""Rename what modules define, and every use of it, by the table in docs/glossary.md.

    python scripts/rename.py        (with LibCST: pip install libcst)

A use is a name that a file imports from its module, or an attribute of the imported module. A file that binds the new
name itself is named and left for a person.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import libcst as cst

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dit_in_dit"
ROW = re.compile(r"^\| ([\w.]+) \| (\w+) \| (\w+) \|$", re.MULTILINE)


def table() -> dict[tuple[str, str], str]:
    """(module, old name): new name."""
    text = (ROOT / "docs" / "glossary.md").read_text().partition("## Renamed")[2]
    rows = [row for row in ROW.findall(text) if row[0] != "module"]
    return {(f"{PACKAGE}.{module}", old): new for module, old, new in rows if not defines(module, new)}


def defines(module: str, name: str) -> bool:
    """Whether a module of the package has the name already: its row is done."""
    path = ROOT / "src" / PACKAGE / f"{module.replace('.', '/')}.py"
    if not path.is_file():  # the module moved later
        return True
    tree = ast.parse(path.read_text())
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return name in {n.name for n in named} | {t.id for t in targets if isinstance(t, ast.Name)}


class Uses(ast.NodeVisitor):
    """What a file calls the things of the table, and the modules that have them."""

    def __init__(self, renames: dict[tuple[str, str], str], module: str) -> None:
        self.renames = renames
        self.names = {old: new for (home, old), new in renames.items() if home == module}
        self.modules: dict[str, str] = {}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if new := self.renames.get((node.module or "", alias.name)):
                self.names[alias.name] = new
            if any(home == f"{node.module}.{alias.name}" for home, _ in self.renames):
                self.modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"


class Renamer(cst.CSTTransformer):
    """Names in place of names, and attributes of modules likewise."""

    def __init__(self, uses: Uses) -> None:
        self.uses = uses

    def leave_Name(self, original: cst.Name, updated: cst.Name) -> cst.Name:
        return updated.with_changes(value=self.uses.names.get(updated.value, updated.value))

    def leave_Attribute(self, original: cst.Attribute, updated: cst.Attribute) -> cst.Attribute:
        attribute = original.attr.value
        module = self.uses.modules.get(original.value.value) if isinstance(original.value, cst.Name) else None
        return updated.with_changes(attr=cst.Name(self.uses.renames.get((module or "", attribute), attribute)))

    def leave_Arg(self, original: cst.Arg, updated: cst.Arg) -> cst.Arg:
        return updated.with_changes(keyword=original.keyword)

    def leave_SimpleString(self, original: cst.SimpleString, updated: cst.SimpleString) -> cst.SimpleString:
        text = updated.value
        for (home, old), new in self.uses.renames.items():
            text = text.replace(f"{home}.{old}", f"{home}.{new}")
            text = re.sub(rf"(from {re.escape(home)} import (?:\w+, )*){old}\b", rf"\g<1>{new}", text)
            if self.uses.names.get(old) == new:
                text = text.replace(f"`{old}`", f"`{new}`")
        return updated.with_changes(value=text)


def bound(tree: ast.AST, name: str) -> bool:
    """Whether a file binds a name by itself, as a variable, an argument or a definition."""
    return any(
        (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.arg) and node.arg == name)
        or (isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name)
        for node in ast.walk(tree)
    )


def main() -> int:
    """Rename in src, tests and scripts; what is left for a person is printed."""
    renames, left = table(), 0
    for path in sorted(p for folder in ("src", "tests", "scripts") for p in (ROOT / folder).rglob("*.py")):
        if (ROOT / "tests" / "old") in path.parents or path == Path(__file__).resolve():
            continue
        text = path.read_text()
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts) if ROOT / "src" in path.parents else ""
        tree, uses = ast.parse(text), Uses(renames, module)
        uses.visit(tree)
        for old, new in list(uses.names.items()):
            taken = (
                new
                if new not in uses.names and bound(tree, new)
                else old
                if (module, old) not in renames and bound(tree, old)
                else ""
            )
            if taken:
                print(f"{path.relative_to(ROOT)}: {old} -> {new}: {taken} is bound here")
                left += 1
        renamed = cst.parse_module(text).visit(Renamer(uses)).code
        if renamed != text:
            path.write_text(renamed)
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
