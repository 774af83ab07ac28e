"""JSON from untrusted files, with a size limit and one-line errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError, truncate

MOST_BYTES = 2**28  # five times the labels of ImageNet


def parse_json(content: str | bytes, what: str, advice: str = "write it again") -> Any:
    """The value of a JSON text.

    Raises:
        UserError: the text is not JSON or not UTF-8, nests beyond Python's recursion limit, or holds a number of
            thousands of digits. The message starts with `what` and ends with `advice`.
    """
    try:
        return json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    except RecursionError:
        problem = "nests too deeply"
    except ValueError as error:
        problem = f"is not valid JSON: {truncate(error, 70)}"
    raise UserError(f"{what} {problem}; {advice}")


def read_json(path: Path, what: str = "", advice: str = "write it again") -> dict[str, Any]:
    """The JSON object of a file of at most MOST_BYTES.

    Raises:
        UserError: the file cannot be read, is too long, or holds no JSON object. The message gives `what`, the kind of
            file (such as `the plan `), and the path, and ends with `advice`.
    """
    shown = f"{what}{truncate(path)}"
    try:
        with path.open("rb") as file:  # a bounded read: a device has no end
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {shown}: {problem}; {advice}") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{shown} must hold at most {MOST_BYTES} bytes of JSON: got more; is it the right file?")
    value = parse_json(content, shown, advice)
    if not isinstance(value, dict):
        raise UserError(f"{shown} must hold a JSON object ({{...}}): got {type(value).__name__}; {advice}")
    return value


def parse_lines(lines: Sequence[bytes], what: str, advice: str) -> list[dict[str, Any]]:
    """The objects of JSON lines, parsed together. If a line is not an object, a UserError names `what` and ends with
    `advice`."""
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) != len(lines) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{what} holds a line that is not a JSON object: {advice}")
    return rows


def has_form(value: object, form: Any) -> bool:
    """Whether a JSON value matches a form: a type, (types) for any of these types, {key: form} for at least these
    keys, [form] for a list of any length. True and false do not count as numbers.

    >>> has_form({"a": [1, 2], "b": None}, {"a": [int]})
    True
    """
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and has_form(value[key], form[key]) for key in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(one, form[0]) for one in value)
    types = form if isinstance(form, tuple) else (form,)
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def json_difference(a: Any, b: Any) -> str:
    """`path: this / that` of the first field in which two JSON values differ; empty when they are equal."""
    waiting = [("", a, b)]  # no recursion: JSON may nest as deeply as Python's stack
    while waiting:
        where, a, b = waiting.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            names = reversed({**a, **b})
            waiting += [(f"{where}.{name}" if where else str(name), a.get(name), b.get(name)) for name in names]
        elif a != b:
            return f"{where}: {json.dumps(a)} / {json.dumps(b)}"
    return ""
