"""Errors and warnings for users: one line with the rule, the value and the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from operator import index
from typing import Any

LINE = 200  # characters of a message as the command prints it


class UserError(ValueError):
    """A user's mistake; the message is one line with the rule, the value and the way out.

    >>> dd.preset("emojy")
    Traceback (most recent call last):
    dit_in_dit.config.errors.UserError: unknown preset 'emojy'; did you mean 'emoji'?
    """

    code = 2  # exit code of the command
    quiet = False  # true if another process prints the message


class LeftOutWarning(UserWarning):
    """A part of the input is not used; the message is one line."""


class PluginWarning(UserWarning):
    """A plug-in differs from the one that a run was trained with; the message is one line."""


def check_whole(value: Any, name: str, low: int, high: int) -> int:
    """The value as an int. UserError unless it is a whole number from `low` to `high`."""
    try:
        number = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = -1
    if not low <= number <= high:
        raise UserError(f"{name} must be a whole number from {low} to {high}: got {truncate(value, 40)}")
    return number


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the closest of `names`. If none is close: all names, or the three closest of many."""
    known = sorted(set(names))
    if not known:
        return ""
    close = difflib.get_close_matches(name[:LINE], known, n=3, cutoff=0.0)
    if close and difflib.SequenceMatcher(None, name[:LINE], close[0]).ratio() >= 0.6:
        return f"; did you mean {close[0]!r}?"
    if len(listed := ", ".join(known)) <= LINE // 2:
        return f"; choose from {listed}"
    return f"; the nearest of {len(known)} are {', '.join(close)}"


def truncate(value: object, most: int = 80) -> str:
    """A value as one line of at most `most` characters. Unprintable characters are escaped; a long text loses its
    middle."""
    try:
        text = str(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = "a number of thousands of digits"
    if len(text) > 4 * most:  # no more work than the result is worth
        text = f"{text[: 2 * most]}{text[-2 * most :]}"
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(line) <= most:
        return line
    return f"{line[: most // 3]}...{line[len(line) - (most - 3 - most // 3) :]}"


def one_line(message: str, most: int = LINE) -> str:
    """The message in at most `most` characters. Paths and other long words lose their middle first, so that the way out
    at the end of the message stays."""
    line = truncate(message, max(most, len(message) * 10))
    for room in (80, 60, 40, 25):
        if len(line) > most:
            line = " ".join(truncate(word, room) for word in line.split(" "))
    return truncate(line, most)


def hide_passwords(text: str) -> str:
    """The text with `***` in place of the passwords in its URLs."""
    text = re.sub(r"(\w://[^\s:/@]*:)\S*@", r"\1***@", text)
    return re.sub(r"([?&]\w*(?:pass|pwd)\w*=)[^\s&]+", r"\1***", text, flags=re.IGNORECASE)
