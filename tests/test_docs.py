"""README and docs are tested: code blocks run with small sizes, and the parser accepts every command line.

Every command and block of the tutorials and how-to pages runs in tests/test_docs_run.py (`make test-docs`)."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

import dit_in_dit
from dit_in_dit.cli import main, parser
from dit_in_dit.config import presets
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.study.arms import arm_changes, configure
from dit_in_dit.study.plan import read_study_config

ROOT = Path(__file__).parents[1]
FOLDERS = ("tutorials", "how-to", "reference", "explanation")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(page for folder in FOLDERS for page in (ROOT / "docs" / folder).glob("*.md")),
    *sorted(ROOT.glob("models/*/README.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
SMALL = (
    "train.steps=4", "train.batch_size=2", "train.sample_every=2", "train.evaluate_every=0", "train.warmup=0",
    "sample.steps=2", "model.outer.width=32", "model.stages=outer inner",
)  # fmt: skip
REFERENCE = runpy.run_path(str(ROOT / "scripts/site/reference.py"))
TOOLS = ("dit-in-dit", "torchrun", "python", "make")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def shown(page: Path) -> list[str]:
    """The command lines of a page: in indented lines, in blocks without a language, and in running text."""
    text = page.read_text()
    lines = re.findall(r"^ {4}(.+)$", text, re.MULTILINE)
    lines += [line for language, block in blocks(page) if not language for line in block.splitlines()]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = [" ".join(command.split()) for command in re.findall(r"`(dit-in-dit [^`]+)`", prose)]
    return [line for line in (*joined.splitlines(), *found) if line.split()[:1] and line.split()[0] in TOOLS]


def meant(line: str) -> list[list[str]]:
    """Expand a synopsis into the command lines that it stands for, as lists of words after the program's name. `[x]`
    is optional, `x | y` means either x or y, and `...` means more arguments of the same kind."""
    words = shlex.split(line, comments=True)
    words = [word.strip("[]") if not word.startswith("set.") else word for word in words]
    if "dit_in_dit" in words:
        words = ["dit-in-dit", *words[words.index("dit_in_dit") + 1 :]]
    words = words[1:]
    if words[1:2] == ["..."]:
        words[1:2] = ["--preset", "NAME", "--out", "RUN"]
    words = ["1,2" if word == "A,B" else word.replace("=A,B", "=1,2") for word in words if word != "..."]
    if words[:2] == ["study", "list"]:
        return [["study", *part.split()] for part in " ".join(words[1:]).split(" | ")]
    units: list[list[list[str]]] = []  # of each place, what may stand there
    either = False
    for word in words:
        if word == "|":
            either = True
            continue
        last = units[-1][-1] if units else []
        if last and last[-1].startswith("--") and not word.startswith("--") and not either:
            units[-1][-1] = [*last, word]
        elif either:
            units[-1].append([word])
        else:
            units.append([[word]])
        either = False
    found = []
    for chosen in product(*units):
        parts = [
            word.split("|") if re.fullmatch(r"[\w.-]+(\|[\w.-]+)+", word) else [word] for u in chosen for word in u
        ]
        found += [list(one) for one in product(*parts)]
    return found


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in shown(page)})


def test_the_docs_hold_commands_to_test():
    assert len(COMMANDS) > 60
    assert meant("dit-in-dit x A | --b C --d e|f [--g] # why") == [
        ["x", *a, "--d", d, "--g"] for a in (["A"], ["--b", "C"]) for d in ("e", "f")
    ]


PARSED = pytest.mark.parametrize(("page", "line"), COMMANDS)


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_every_link_of_a_page_to_a_file_has_its_file():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_key_that_a_page_sets_exists():
    named = {(page, key) for page, line in COMMANDS for key in re.findall(r"--set ([a-z_]+\.[\w.]+)=", line)}
    assert len(named) > 40
    known = {*RunConfig.names(), *(f"set.{name}" for name in RunConfig.names()), "plugins.softmax.temperature"}
    assert {pair for pair in named if pair[1] not in known and not pair[1].startswith("budget.")} == set()


def test_every_message_that_the_docs_explain_is_in_the_code():
    """The first column of each table of the page, against the strings of the errors in the code."""
    page = (ROOT / "docs/troubleshooting.md").read_text().partition("### Without a line")[0]
    explained = re.findall(r"^\| `([^|]*)` \|", page, re.MULTILINE)
    assert len(explained) > 40
    sources = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    messages = [text for source in sources for text in REFERENCE["message_texts"](source)]
    for text in explained:
        parts = re.sub(r"\b(run|get|give) …", "…", text).split("…")
        pattern = ".*".join(re.escape(part.strip()) for part in parts if part.strip())
        assert any(re.search(pattern, message) for message in messages) or any(text in s for s in sources), text


def test_the_generated_pages_hold_every_key_command_and_public_name():
    keys, commands = REFERENCE["config_keys"](), REFERENCE["commands"]()
    for name in RunConfig.names():
        assert f"`{name}`" in keys or f"`{name}`: " in keys or name == "plugins", name
    done = subprocess.run([sys.executable, "-m", "dit_in_dit", "--help"], capture_output=True, text=True, check=True)
    for name in re.findall(r"^    ([a-z][\w-]+) ", done.stdout, re.MULTILINE):
        assert f"## `dit-in-dit {name}" in commands, name
    assert REFERENCE["undocumented"]() == []
    used = {name for page in PAGES for name in re.findall(REFERENCE["MARKER"], page.read_text(), re.MULTILINE)}
    assert used == set(REFERENCE["GENERATED"])


def test_every_page_is_in_the_navigation_of_the_site():
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    docs = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == docs | {"how-to/add-a-choice.md"}  # made from CONTRIBUTING.md


@PARSED
def test_the_parser_accepts_every_command_line_of_the_docs(page, line):
    first = line.split()[0]
    if first == "make":
        assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif first == "python" and "dit_in_dit" not in line:
        name = line.split()[1]  # of a script, here or on the page
        assert name == "-m" or (ROOT / name).exists() or f"\n# {name}\n" in (ROOT / page).read_text()
    elif "--help" in line or "--version" in line:
        with pytest.raises(SystemExit, match="0"):
            parser().parse_args(line.split()[1:])
    else:
        for words in meant(line):
            parser().parse_args(words)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(presets.PRESETS, "emoji", override(presets.get("emoji"), SMALL))
    pages = (ROOT / "README.md", ROOT / "docs/python.md")
    first, second = (text for page in pages for language, text in blocks(page) if language == "python")
    names: dict[str, object] = {}
    exec(first, names)
    assert names["images"].equal(dit_in_dit.sample(names["model"], names["config"], num=16))
    assert names["images"].shape == (16, 3, 32, 32)
    main(["export", "runs/mine", "--format", "pipeline", "--out", "folder"])
    exec(second, names)
    assert [image.size for image in names["images"]] == [(32, 32)] * 2


def test_the_python_of_the_readme_needs_no_other_import():
    """Names are imported on first use: a name that another test imported would be found in this process."""
    text = next(text for language, text in blocks(ROOT / "README.md") if language == "python")
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "for", "model"))]
    program = "\n".join([*lines, "dit_in_dit.train, dit_in_dit.sample, dit_in_dit.load"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_remaining_code_blocks_hold_a_study_or_commands(tmp_path):
    for page in PAGES:
        for language, text in blocks(page):
            assert language in ("", "python", "yaml", "text"), f"{page}: who tries a block of {language}?"
            if language == "python" and page.parent.name not in ("tutorials", "how-to"):  # test_docs_run.py
                assert page.name in ("README.md", "CONTRIBUTING.md", "python.md")  # tried above and below
            if language == "yaml" and "\narms:" in text:
                (tmp_path / "study.yaml").write_text(text)
                study = read_study_config(str(tmp_path / "study.yaml"))
                for changes, _ in arm_changes(study).values():
                    configure(study, changes)


def test_the_class_in_contributing_equals_the_tested_plug_in(tmp_path):
    """The plug-in on the page runs unchanged, and gives the same output as the tested plug-in in tests/plugin."""
    shown = [text for language, text in blocks(ROOT / "CONTRIBUTING.md") if language == "python"]
    assert len(shown) == 2  # the class, and its own config keys
    (tmp_path / "shown_idea.py").write_text("\n".join(shown))
    words = ["inspect", "--preset", "emoji-reference", "--set", "model.inner.aggregate=softmax", "--json"]
    words += ["--set", "plugins.softmax.temperature=2"]
    told = []
    for path in (tmp_path / "shown_idea.py", ROOT / "tests/plugin/my_idea.py"):
        line = [sys.executable, "-m", "dit_in_dit", *words, "--plugin", str(path)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0] == told[1]


def test_tutorials_begin_with_their_result_and_time_and_their_pictures_are_small():
    tutorials = [page for page in PAGES if page.parent.name == "tutorials" and page.name != "index.md"]
    assert len(tutorials) == 6
    for page in tutorials:
        assert re.match(r"# .+\n\n\*\*You will have\*\* .+\n\*\*Time\*\*: .*minutes", page.read_text()), page.name
    pictures = list((ROOT / "docs/tutorials/pictures").iterdir())
    named = {name for page in tutorials for name in re.findall(r"\(pictures/([\w.-]+)\)", page.read_text())}
    assert {picture.name for picture in pictures} == named
    assert all(picture.stat().st_size < 150_000 for picture in pictures)
