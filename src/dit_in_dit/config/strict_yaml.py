"""YAML from untrusted files: plain values only, every key once, and no small file that expands in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dit_in_dit.config.errors import UserError, truncate

MOST_BYTES = 2**16  # ten times the longest config; PyYAML may take seconds to parse as much
DEEPEST = 50  # nested brackets; PyYAML's time grows with the square of the depth


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys (PyYAML silently keeps the last) and deeply nested brackets."""

    def fetch_flow_collection_start(self, kind: Any) -> None:
        if self.flow_level >= DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(kind)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node)
            if name in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"key {truncate(repr(name), 60)} is given twice, the second on line {line}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text; UserError if it is not safe YAML, repeats a key, or is too large with its aliases
    expanded."""
    if len(text) > MOST_BYTES:
        raise UserError(f"{what} must be at most {MOST_BYTES} characters of YAML: got more; is it the right file?")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MOST_BYTES:
            raise UserError(f"{what}: its aliases (*) stand for more than {MOST_BYTES} characters: use fewer")
        return loader.construct_document(node)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{what} nests too deeply, or contains itself: write it with fewer levels") from None
    except (yaml.YAMLError, TypeError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{what} is not valid YAML{where}: {truncate(problem, 70)}; fix it") from None


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of characters of a node with its children, aliases expanded; RecursionError if a node contains itself."""
    if id(node) not in known:
        if isinstance(node, yaml.ScalarNode):
            known[id(node)] = len(node.value) + 1
        else:
            parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


def read_yaml(path: Path, what: str = "") -> Any:
    """The value of a YAML file. In the message of a UserError, `what` is the kind of file.

    At most MOST_BYTES are read, so that a device, a pipe or a large file costs no memory.
    """
    shown = truncate(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{shown} must hold at most {MOST_BYTES} bytes of YAML: got more; is it the right file?")
        text = content.decode("utf-8-sig")
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"cannot read {what}{shown}: it is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {what}{shown}: {problem}; name a YAML file") from None
    return parse_yaml(text, shown)
