"""Jinja2 templates of HTML and Markdown. Values are escaped, so that a name that a user chose never becomes markup."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


def render(room: str, template: str, **values: Any) -> str:
    """Render a template of the package, such as ("attention_maps", "page.html.j2").

    Values are escaped as HTML in `.html.j2` and as Markdown in `.md.j2`; `Markup` values are not escaped.
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
    return value if isinstance(value, Markup) else Markup(escape_markdown(str(value)))


def escape_markdown(text: str) -> str:
    """Text in one line with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))


def code(text: str) -> Markup:
    """A code span in Markdown, in one line."""
    fence, space = "`" * (_longest_run(text) + 1), " " if "`" in text else ""
    return Markup(f"{fence}{space}{' '.join(text.split())}{space}{fence}")


def code_block(text: str, language: str = "") -> Markup:
    """A fenced code block in Markdown, with a fence longer than any run of backticks in the text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
