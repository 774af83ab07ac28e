"""A module imports its own room and lower floors only; neighbours on a floor do not know each other."""

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
    {"training", "interop"},
    {"metrics", "doctor", "benchmark"},
    {"study", "attention_maps"},
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


def test_only_the_command_prints():
    for path in ROOT.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        assert not prints or "cli" in path.parts, path
