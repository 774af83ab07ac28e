"""MkDocs hook: pages from the repository's root, generated reference pages, links, and the checks of a strict build.

A page of docs is written for GitHub, too. A marker `<!-- generated: NAME -->` in it is replaced by the text that
`reference.GENERATED` makes, and a link to a file outside of docs leads to a copy in the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import github
import reference

ROOT = Path(__file__).resolve().parents[2]
COPIED = "repository"  # the site's folder for files from outside of docs
PAGES = {"CONTRIBUTING.md": "how-to/add-a-choice.md", "README.md": "index.md"}  # file of the root: its page
# What a browser fetches by itself, from anywhere but the site.
EXTERNAL = re.compile(
    r"<(?:script|img|iframe|source|link|video|audio)\b[^>]*?\b(?:src|srcset|href)=[\"']?(?:https?:)?//[^\"'\s>]+", re.I
)


def on_files(files: Files, config: Any) -> Files:
    """Add CONTRIBUTING.md, the pictures that pages name outside of docs, and the figures of presets."""
    _add(files, config, PAGES["CONTRIBUTING.md"], content=(ROOT / "CONTRIBUTING.md").read_text())
    for page in files.documentation_pages():
        folder = Path(config.docs_dir, page.src_uri).parent
        for target in github.targets(page.content_string):
            path = (folder / target).resolve()
            if path.is_relative_to(ROOT) and not path.is_relative_to(config.docs_dir) and path.is_file():
                copy = f"{COPIED}/{path.relative_to(ROOT)}"
                if path.suffix != ".md" and copy not in files.src_uris:
                    _add(files, config, copy, abs_src_path=str(path))
    for name in reference.FIGURES:
        for theme in ("light", "dark"):
            _add(files, config, f"figures/{name}-{theme}.svg", content=reference.figure(name, theme))
    return files


def _add(files: Files, config: Any, uri: str, **content: str) -> None:
    files.append(File.generated(config, uri, **content))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill the markers and lead links to the site's pages, in Markdown that Python-Markdown reads as GitHub does."""
    source = page.file.src_uri

    def place(target: str) -> str:
        """The link that leads from this page to `target`, a path that is relative to the file in the repository."""
        origin = ROOT if source == PAGES["CONTRIBUTING.md"] else Path(config.docs_dir, source).parent
        path = (origin / target).resolve()
        if not path.is_relative_to(ROOT):
            return target
        inside = path.relative_to(ROOT).as_posix()
        there = inside.removeprefix("docs/") if inside.startswith("docs/") else PAGES.get(inside, f"{COPIED}/{inside}")
        return PurePosixPath(*[".."] * source.count("/"), there).as_posix()

    markdown = reference.fill(markdown)
    markdown = github.link_pages(markdown, {f.src_uri for f in files.documentation_pages()} - {source}, source)
    return github.to_python_markdown(github.move_links(markdown, place))


def on_post_build(config: Any) -> None:
    """Refuse a site whose pages fetch anything from elsewhere, and one that leaves a public name out."""
    missing = reference.undocumented()
    if missing:
        raise PluginError(f"public names without a docstring, or not in docs/reference/python.md: {', '.join(missing)}")
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        if found := EXTERNAL.search(page.read_text()):
            raise PluginError(f"{page.name} fetches from outside: {found[0][:200]}")
