"""Jinja2 templates of HTML and Markdown. What is put into one is text: no name of a user's becomes markup."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


def render(room: str, template: str, **values: Any) -> str:
    """The text of a template of the package, such as ("attention_maps", "page.html.j2").

    HTML is escaped in `.html.j2`, Markdown in `.md.j2`; values that are `Markup` already are not escaped.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: (files(f"dit_in_dit.{room}") / name).read_text(encoding="utf-8")),
        autoescape=True,
        finalize=_escape_markdown if template.endswith(".md.j2") else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template).render(**values)


def _escape_markdown(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(quoted(str(value)))


def quoted(text: str) -> str:
    """Text in one line whose characters mean nothing to Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))


def code(text: str) -> Markup:
    """A span of code in Markdown, in one line."""
    fence, space = "`" * (_longest_run(text) + 1), " " if "`" in text else ""
    return Markup(f"{fence}{space}{' '.join(text.split())}{space}{fence}")


def code_block(text: str, language: str = "") -> Markup:
    """A fenced block of Markdown; no run of backticks in the text ends it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
