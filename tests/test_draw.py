"""The figure of a model: valid for every preset and choice, with the numbers of `inspect`; words fit their boxes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from PIL import ImageFont

import dit_in_dit as dd
from conftest import small_model, smallest_and_largest
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.model import TokensConfig
from dit_in_dit.config.program import parse_stages
from dit_in_dit.inspection.cost import macs, stage_macs
from dit_in_dit.inspection.diagram import Outline, fold_program
from dit_in_dit.inspection.diagram_svg import WIDTH, Box, Join, Repeat, Row
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, SPREADS
from dit_in_dit.model.condition import CONDITIONS
from dit_in_dit.model.mixers import MIXERS

SVG = "{http://www.w3.org/2000/svg}"
SMALL = [name for name in presets.NAMES if dd.cost.macs(presets.get(name).model)["total"] < 5e8]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def model_rows(model) -> list[Row]:
    return Outline(model).rows


@cache
def font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, wider than the other usual system fonts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / name, size)


Area = tuple[float, float, float, float]  # left, top, right, bottom


def text_areas(svg: str) -> Iterator[tuple[str, Area]]:
    """Every text and where it is."""
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        kinds, text = (element.get("class") or "").split(), element.text or ""
        size = 20 if "title" in kinds else 14 if "strong" in kinds else 13
        width = font(size, bool({"title", "strong"} & set(kinds))).getlength(text)
        x, y = float(element.get("x", "")), float(element.get("y", ""))
        left = x - width * (1 if "end" in kinds else 0.5 if "middle" in kinds else 0)
        yield text, (left, y - 0.75 * size, left + width, y + 0.2 * size)


def areas(svg: str, kind: str) -> list[Area]:
    """Where the rectangles of a kind are."""
    found = [
        [float(element.get(key, 0)) for key in ("x", "y", "width", "height")]
        for element in ElementTree.fromstring(svg).iter(f"{SVG}rect")
        if kind in (element.get("class") or "").split()
    ]
    return [(x, y, x + width, y + height) for x, y, width, height in found]


def overlap(one: Area, other: Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def check_layout(svg: str) -> None:
    """No text leaves its box or the page, or meets another text or a pictogram."""
    texts_at, cells, boxes = list(text_areas(svg)), areas(svg, "cell"), areas(svg, "box")
    for text, area in texts_at:
        assert area[0] >= 0, text
        assert area[2] <= WIDTH, text
        assert not any(overlap(area, cell) for cell in cells), text
        for left, top, right, bottom in boxes:
            inside = area[0] >= left and area[2] <= right - 8 and area[1] >= top and area[3] <= bottom
            assert inside or not overlap(area, (left, top, right, bottom)), text
    for (one, area), (other, place) in combinations(texts_at, 2):
        assert not overlap(area, place), (one, other)


@pytest.mark.parametrize("name", smallest_and_largest(presets.NAMES))
def test_every_preset_is_drawn_without_overlaps(name):
    model = presets.get(name).model
    boxes = [box for row in model_rows(model) if isinstance(row, tuple) for box in row]
    blocks = sum(int(box.title.split()[0]) for box in boxes if " block" in box.title)
    assert blocks == model.blocks("outer") + model.blocks("inner")  # no preset is folded
    check_layout(dd.draw(model, title=name).svg)


def test_names_and_numbers_of_any_length_stay_in_their_boxes():
    wide = {"width": 65536, "num_heads": 1024, "norm": "rms", "mlp": "swiglu", "rope": "extent", "modulation": "post"}
    model = small_model(
        "(inner*11 outer*11)*3", outer=wide, inner={"condition": "sub_patch", "mixer": "window"}, qk_norm=True
    )
    svg = dd.draw(model, title="m" * 200).svg
    check_layout(svg)
    assert "RoPE (extent)" in " ".join(texts(svg))


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
    check_layout(figure.svg)
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
    one, two = ("inner", 1), ("outer", 4)
    assert fold_program(parse_stages("outer*2 (inner outer*4)*7 inner")) == ((("outer", 2),), (one, two), 7, (one,))
    assert fold_program(parse_stages("(inner outer*4 inner outer*3)*3"))[1:3] == ((one, two, one, ("outer", 3)), 3)
    assert fold_program(parse_stages("inner outer*4 inner outer*4"))[2] == 1
    rows = model_rows(small_model("(inner outer*2)*4"))
    assert [row.times for row in rows if isinstance(row, Repeat)] == [4, 0]
    titles = [box.title for row in rows if isinstance(row, tuple) for box in row if isinstance(box, Box)]
    assert sum(" block" in title for title in titles) == 2
    assert [row.to for row in rows if isinstance(row, Join)] == ["inner", "outer"]


@pytest.mark.parametrize("stages", ["(inner outer*2)*4", "(outer*2 inner)*4 outer"])
def test_an_arrow_into_the_first_stage_of_a_group_begins_with_its_second_time(stages):
    joins = [row.text for row in model_rows(small_model(stages)) if isinstance(row, Join)]
    assert ["not the first time" in text for text in joins] == [True] + [False] * (len(joins) - 1)


@pytest.mark.parametrize("stages", ["outer*4", "inner*2 outer*3", "outer inner (outer*2 inner)*3", "(inner outer*2)*4"])
def test_stages_have_all_macs_of_the_blocks(stages):
    model = small_model(stages, tokens=TokensConfig(label=3, start=1) if "inner" not in stages else TokensConfig())
    parts = macs(model)
    assert sum(stage_macs(model)) == parts["outer_blocks"] + parts["inner_blocks"]
    costs = " ".join(box.cost for row in model_rows(model) if isinstance(row, tuple) for box in row)
    shares = [float(share) for share in re.findall(r"\(([\d.]+)%\)", costs)]
    assert 90 < sum(shares) <= 100.1  # the embeddings of t and y, and the arrows, have the rest


def test_special_parts_are_named():
    keys = ["model.internal_head=4", "train.terms.internal=0.5", "train.token_drop=0.5", "data.flip=false"]
    svg = dd.draw(override(presets.get("jit-b16"), [*keys, "data.augment=0.1"])).svg
    words = " ".join(texts(svg))
    check_layout(svg)
    for part in (
        "32 class tokens from outer block 5 on",
        "9 augmentation labels",
        "128 of 256 patches in blocks 3 to 10",
    ):
        assert part in words
    for part in ("internal head after outer block 4", "SwiGLU", "RMSNorm", "QK-norm", "RoPE", "bottleneck 128"):
        assert part in words
    assert "class y" not in " ".join(texts(dd.draw(small_model(num_classes=0)).svg))


def test_a_name_of_a_preset_or_a_run_is_drawn():
    assert dd.draw("emoji").svg == dd.draw(dd.preset("emoji")).svg
    assert dd.draw("models/emoji").svg == dd.draw(dd.load("models/emoji", device="cpu")).svg
    with pytest.raises(UserError, match=r"no preset, file or run 'emojy'.*emoji"):
        dd.draw("emojy")


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
    main(["draw", "models/emoji", "--theme", "dark", "--out", "run.svg"])
    assert (tmp_path / "run.svg").read_text() == dd.draw("models/emoji", theme="dark", title="emoji").svg
    monkeypatch.setattr(presets, "NAMES", ("emoji", "emoji-dit"))
    main(["draw", "--all", "--out", "figures"])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"emoji.svg", "emoji-dit.svg", "index.html"}
    assert '<img src="emoji-dit.svg"' in (tmp_path / "figures/index.html").read_text()
    capsys.readouterr()
    for arguments, words in (
        (["--preset", "emoji", "--out", "a.png"], "--out must end in .svg"),
        (["--all", "--preset", "emoji"], "leave out RUN, --preset"),
        (["models/emoji", "--preset", "emoji"], "RUN, --preset and --config exclude each other"),
        (["runs/none"], "no run at runs/none"),
        ([], "name what to start from"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["draw", *arguments])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
