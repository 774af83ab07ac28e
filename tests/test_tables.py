"""Tables that commands print."""

from __future__ import annotations

import sys

import pytest

from dit_in_dit.cli import options
from dit_in_dit.reporting.tables import text_table


def test_numbers_are_aligned_right_and_words_left():
    table = text_table(["arm", "steps", "of"], [["plain", 12, "a"], ["nested", "1,234", "b c"]])
    assert table.splitlines() == [
        "  arm     steps  of",
        "  plain      12  a",
        "  nested  1,234  b c",
    ]


def test_tables_without_headers_cells_or_rows_are_printed():
    assert text_table([], [["a", None], ["bb", 2]]).splitlines() == ["  a   -", "  bb  2"]
    assert text_table(["", "x"], []) == ""


@pytest.mark.parametrize("name", ["[red]arm[/red]", "[/]", ":smile:", "<script>", "a\\[b]", "50% [bold]"])
def test_names_in_tables_are_not_read_as_markup(name):
    assert text_table(["", "x"], [[name, 1]]).splitlines()[1] == f"  {name}  1"
    assert name in text_table([name], [["a"]])


def test_wide_characters_are_aligned():
    first, second = text_table([], [["日本", "|"], ["abcd", "|"]]).splitlines()
    assert (first, second) == ("  日本  |", "  abcd  |")


def test_no_cell_is_truncated_at_any_width():
    words, numbers = " ".join(["word"] * 60), [f"{n}" * 12 for n in range(1, 10)]
    rows = [[words, *numbers, "of " + words]]
    (line,) = text_table([], rows).splitlines()  # a pipe: one line
    assert line.split() == [*words.split(), *numbers, "of", *words.split()]
    for width in (20, 80, 200):
        lines = text_table([], rows, width=width).splitlines()
        assert len(lines) > 1
        assert "".join(lines).count("word") == 120
        assert all(number in lines[0] for number in numbers)  # numbers do not wrap


def test_tables_wrap_on_a_terminal_but_not_in_a_pipe(monkeypatch, capsys):
    row = ["name", "word " * 40]
    options.print_table(["a", "b"], [row], title="title")
    assert capsys.readouterr().out.splitlines()[:2] == ["", "title"]
    monkeypatch.setenv("COLUMNS", "60")
    options.print_table(["a", "b"], [row])
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    options.print_table(["a", "b"], [row])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 60
