"""The figure of a model: valid for every preset and choice, with the numbers of `inspect`; words fit their boxes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

import dit_in_dit as dd
from conftest import small_model
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.program import parse_stages
from dit_in_dit.inspection.diagram import fold_program, model_rows
from dit_in_dit.inspection.diagram_svg import BOX, LETTER, WIDTH, Box, Join, Repeat, wrap_lines
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, SPREADS
from dit_in_dit.model.condition import CONDITIONS
from dit_in_dit.model.mixers import MIXERS

SVG = "{http://www.w3.org/2000/svg}"
SMALL = [name for name in presets.NAMES if dd.cost.macs(presets.get(name).model)["total"] < 2e9]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", presets.NAMES)
def test_every_preset_has_rows_whose_words_fit_their_boxes(name):
    model = presets.get(name).model
    boxes = [box for row in model_rows(model) if isinstance(row, tuple) for box in row]
    for box in boxes:
        room = BOX - 28 - (48 if box.sees else 0)
        assert len(box.title) * 8 <= room + 28, box.title  # bold letters of 14 pixels
        for line in wrap_lines(box):
            assert len(line) * LETTER <= room
    blocks = sum(int(box.title.split()[0]) for box in boxes if " block" in box.title)
    repeated = any(isinstance(row, Repeat) for row in model_rows(model))
    assert repeated or blocks == model.blocks("outer") + model.blocks("inner")


@pytest.mark.parametrize("name", SMALL)
def test_the_figure_has_the_numbers_of_inspect(name):
    config = presets.get(name)
    svg, counts = dd.draw(config).svg, dd.inspect(config)
    for column in ("parameters", "macs"):
        word = "MACs" if column == "macs" else column
        shown = [int(text.split()[0].replace(",", "")) for text in texts(svg) if re.fullmatch(rf"[\d,]+ {word}", text)]
        assert sum(shown) == counts[column]["total"]
    bars = [element for element in ElementTree.fromstring(svg).iter(f"{SVG}rect") if element.get("height") == "12"]
    assert len(bars) >= 3
    assert all(float(bar.get("x")) + float(bar.get("width")) <= WIDTH for bar in bars)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")  # no font, picture or link from elsewhere


CHOICES = [
    *(("mixer", name) for name in MIXERS),
    *(("aggregate", name) for name in AGGREGATORS),
    *(("condition", name) for name in CONDITIONS),
    *(("spread", name) for name in SPREADS),
    *(("fuse", name) for name in FUSIONS),
]


@pytest.mark.parametrize(("key", "name"), CHOICES, ids=lambda value: value)
def test_every_choice_is_drawn(key, name):
    stages = "outer inner" if key == "fuse" and name == "replace" else "inner outer inner"
    try:
        model = small_model(stages, inner={key: name})
    except UserError:  # a condition that goes with other keys: the presets have it
        assert name in {getattr(presets.get(preset).model.inner, key) for preset in presets.NAMES}
        return
    figure = dd.draw(model)
    ElementTree.fromstring(figure.svg)
    joins = [row.text for row in model_rows(model) if isinstance(row, Join)]
    assert joins
    if key in ("aggregate", "spread", "fuse") and name != "none" and stages.count("inner") == 2:
        assert any(f"{key}: {name}" in text for text in joins)


def test_arrows_are_where_the_levels_change():
    first, last = (
        [row.to if isinstance(row, Join) else row[0].title.split(",")[0] for row in model_rows(small_model(of))[2:-2]]
        for of in ("inner*2 outer*3", "outer*3 inner*2")
    )
    assert first == ["2 inner blocks", "outer", "3 outer blocks"]
    assert last == ["3 outer blocks", "inner", "2 inner blocks"]


def test_repeated_stages_are_drawn_once():
    program = parse_stages("outer*2 (inner outer*4)*7 inner")
    assert fold_program(program)[1:3] == ((("outer", 2), ("inner", 1)), 1) or fold_program(program)[2] == 7
    rows = model_rows(small_model("(inner outer*2)*4"))
    assert [row.times for row in rows if isinstance(row, Repeat)] == [4, 0]
    titles = [box.title for row in rows if isinstance(row, tuple) for box in row if isinstance(box, Box)]
    assert sum(" block" in title for title in titles) == 2
    assert [row.to for row in rows if isinstance(row, Join)] == ["inner", "outer"]


def test_themes_and_titles(tmp_path):
    auto, dark, light = (
        dd.draw(small_model(), theme=theme, title="<a & b>").svg for theme in ("auto", "dark", "light")
    )
    assert "prefers-color-scheme" in auto
    assert "prefers-color-scheme" not in dark + light
    assert dark != light
    assert texts(auto)[0] == "<a & b>"
    figure = dd.draw(small_model())
    assert figure._repr_svg_() == figure.svg
    figure.save(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text() == figure.svg
    with pytest.raises(UserError, match=r"theme must be one of auto, light, dark: got 'drak'.*dark"):
        dd.draw(small_model(), theme="drak")


def test_the_command_draws_a_config_and_a_gallery(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["draw", "--preset", "emoji", "--set", "model.inner.mixer=patch"])
    assert any("attention in each patch" in text for text in texts((tmp_path / "emoji.svg").read_text()))
    monkeypatch.setattr(presets, "NAMES", ("emoji", "emoji-dit"))
    main(["draw", "--all", "--out", "figures"])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"emoji.svg", "emoji-dit.svg", "index.html"}
    assert '<img src="emoji-dit.svg"' in (tmp_path / "figures/index.html").read_text()
    capsys.readouterr()
    for arguments, words in (
        (["--preset", "emoji", "--out", "a.png"], "--out must end in .svg"),
        (["--all", "--preset", "emoji"], "leave out --preset"),
        ([], "name what to start from"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["draw", *arguments])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
