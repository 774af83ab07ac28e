"""A module imports its own room and lower floors only, not other rooms of its floor."""

from __future__ import annotations

import ast
from pathlib import Path

import dit_in_dit

ROOT = Path(dit_in_dit.__file__).parent
FLOORS = (
    {"config"},
    {"runtime", "model", "diffusion", "reporting"},
    {"runs", "inspection"},
    {"data", "curves", "sampling"},
    {"interop"},
    {"training"},
    {"metrics", "doctor", "benchmark"},
    {"study", "attention_maps"},
    {"api"},
    {"app"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    """Rooms of the package that a module imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("dit_in_dit.")}
    return rooms & FLOOR.keys()


def test_modules_import_lower_floors_only():
    seen = 0
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        assert room in FLOOR, f"{path}: give the room {room!r} a floor"
        for used in imports(path) - {room}:
            same_ground = FLOOR[used] == FLOOR[room] == 0
            assert FLOOR[used] < FLOOR[room] or same_ground, f"{path.relative_to(ROOT)} must not import {used}"
            seen += 1
    assert seen > 30  # the test reads real imports


def test_only_the_cli_prints():
    for path in ROOT.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        assert not prints or "cli" in path.parts, path


# A file above 300 lines or a function above 50 is here with its reason, or fails; and leaves when it is shorter.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "inspection/trace.py: _trace": "a hook for each line of the table",
    "interop/pipeline.py: __call__": "the signature and checks of a pipeline of diffusers",
    "runs/checkpoint.py: save": "one order of writes, whose every break is tested",
}


def test_only_listed_files_and_functions_are_long():
    files, functions = set(), set()
    for path in ROOT.rglob("*.py"):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if text.count("\n") > 300:
            files.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 50:
                functions.add(f"{name}: {node.name}")
    assert files == LONG_FILES.keys()
    assert functions == LONG_FUNCTIONS.keys()


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Public top-level definitions of a module, by name."""
    named: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            named[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return {name: node for name, node in named.items() if not name.startswith("_")}


def uses(tree: ast.Module) -> set[tuple[str, str]]:
    """(module, name) of each name that a module uses from another module of the package."""
    taken, modules = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dit_in_dit"):
            taken |= {(str(node.module), alias.name) for alias in node.names}
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    read = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    return taken | {(modules[node.value.id], node.attr) for node in read if node.value.id in modules}


SAME_EVERYWHERE = {
    "add",  # every command has its own, which the table of commands calls
    *("evaluate", "match"),  # `dit_in_dit` offers them under the names of what they call
}


def test_a_public_name_is_defined_once_in_the_package():
    """A constant is public where another module takes it. The stand-ins of `interop/remote` keep the names of what
    they stand for."""
    trees = {
        ".".join(("dit_in_dit", *path.relative_to(ROOT).with_suffix("").parts)): ast.parse(path.read_text())
        for path in ROOT.rglob("*.py")
        if "remote" not in path.parts
    }
    taken, homes = set().union(*map(uses, trees.values())), dict[str, list[str]]()
    for module, tree in trees.items():
        for name, node in definitions(tree).items():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) or (module, name) in taken:
                homes.setdefault(name, []).append(module)
    assert len(homes) > 500
    assert {name: where for name, where in homes.items() if len(where) > 1 and name not in SAME_EVERYWHERE} == {}


def test_no_modules_import_each_other_in_a_circle():
    """Imports at the top of a module and inside its functions count alike."""
    graph: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(("dit_in_dit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        imports = {part for module, used in uses(ast.parse(path.read_text())) for part in (module, f"{module}.{used}")}
        graph[name] = imports - {name, "dit_in_dit"}  # the package's own file offers names of all rooms, when asked
    del graph["dit_in_dit"]
    assert sum(map(len, graph.values())) > 500
    while leaves := {name for name, used in graph.items() if not used & graph.keys()}:
        graph = {name: used for name, used in graph.items() if name not in leaves}
    assert not graph, f"in a circle, or importing one: {sorted(graph)}"
