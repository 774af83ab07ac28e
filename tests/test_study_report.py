"""The report of a study, from folders whose numbers are known."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import replace_keys
from dit_in_dit.curves.logs import read_run
from dit_in_dit.inspection import cost
from dit_in_dit.reporting.document import Cell, latex, latex_table, markdown_table
from dit_in_dit.runs.integrity import seal
from dit_in_dit.study.arms import describe_changes
from dit_in_dit.study.forest import forest_metrics
from dit_in_dit.study.plan import Plan, StudyConfig, Trial
from dit_in_dit.study.relative_error import relative
from dit_in_dit.study.report import StudyReport, write_report
from dit_in_dit.study.results import read_study
from dit_in_dit.study.summary import summarise_study
from studies import PROTOCOL, plan_of, write_plan, write_study, write_trial
from test_plugins import IDEA, command

EMOJI = presets.get("emoji").model
PRIMARY = "held_out.0.2.high"
EVIL = "<script>alert('a&b')</script> 50% $x_1$ | *b*"
ARMS: dict[str, Any] = {
    "full": {},
    "plain": {"model.use_inner": False},
    "gate": {"model.inner.fuse": "gate"},
    "gate, mean": {"model.inner.fuse": "gate", "model.inner.aggregate": "attention", "against": "gate"},
}


def study_of(arms: dict[str, Any], seeds: tuple[int, ...] = (0, 1, 2), **keys: Any) -> Plan:
    return plan_of(StudyConfig(question="does it help?", arms=arms, seeds=seeds, budget={"steps": 40}, **keys))


def noisy(effects: dict[str, float], spread: float = 0.002) -> Any:
    """Metrics of arms whose primary metric differs by a factor; arms of a seed share part of the noise."""

    def metrics(arm: str, seed: int) -> dict[str, float]:
        shared = np.random.default_rng(seed).normal(0, 0.05)
        own = np.random.default_rng([seed, len(arm), ord(arm[-1])])
        factor = 1 + effects.get(arm, 0.0)
        return {
            PRIMARY: 0.01 * factor * math.exp(shared + own.normal(0, spread)),
            "held_out.0.2.whole": 0.02 * math.exp(own.normal(0, 0.05)),
            "spectrum.1/4": own.normal(0, 1),
            "precision": 0.5 + own.normal(0, 0.01),
            "memorised": 0.01,
        }

    return metrics


def says(out: Path) -> str:
    return "\n".join(summarise_study(read_study(out)))


class Page(HTMLParser):
    """The sources, tags, ids and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        known = dict(attributes)
        self.sources += [value for name in ("src", "href", "action", "data") if (value := known.get(name))]
        self.ids += [value for value in [known.get("id")] if value]

    def handle_data(self, data: str) -> None:
        self.text += data


# ------------------------------------------------------------------------------------------- a whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyReport]:
    """A study with a planted difference. One arm is not compared with the control, and one arm's name has special
    characters of every format. One trial failed, one is under way, and one never started."""
    out = write_plan(tmp_path_factory.mktemp("study") / "out", plan := study_of({**ARMS, EVIL: {"train.clip": 0}}))
    metrics = noisy({"plain": 0.3})
    for trial in plan.trials:
        if (trial.arm, trial.seed) == ("gate", 2):
            write_trial(out, trial, {}, state="failed", reason="loss is not finite at step 7")
        elif (trial.arm, trial.seed) == ("full", 1):
            write_trial(out, trial, None)
        elif (trial.arm, trial.seed) != (EVIL, 2):
            level = 1.3 if trial.arm == "plain" else 1.0
            write_trial(out, trial, metrics(trial.arm, trial.seed), floors={"memorised": 0.02}, level=level)
    return out, write_report(out)


def test_the_page_loads_no_other_files(whole: tuple[Path, StudyReport]):
    text = (whole[0] / "report.html").read_text()
    page = Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"https?:|url\(|@import|//cdn", text)
    assert not {"script", "iframe", "link rel=stylesheet", "object"} & set(page.tags)
    anchors = [source[1:] for source in page.sources if source.startswith("#")]
    assert len(anchors) > 5
    assert set(anchors) <= set(page.ids)


def test_the_page_shows_every_arm_metric_and_figure(whole: tuple[Path, StudyReport]):
    out, _ = whole
    page = Page((out / "report.html").read_text())
    for text in [*ARMS, EVIL, "does it help?", PRIMARY, "spectrum.1/4", "precision", "memorised", EMOJI.stages]:
        assert text in page.text, text
    figures = sorted(path for path in (out / "figures").rglob("*.png"))
    assert {path.stem for path in figures} >= {
        "differences", "metrics", "cost", "relative", "held-out", "loss", "gradients", "throughput", "samples"
    }  # fmt: skip
    assert sum(source.startswith("data:image/png") for source in page.sources) == len(figures)
    markdown = (out / "report.md").read_text()
    linked = re.findall(r"\]\((figures/[^)]*)\)", markdown)
    assert sorted(linked) == sorted(path.relative_to(out).as_posix() for path in figures)


def test_a_report_begins_with_pictures_and_folds_its_protocol(whole: tuple[Path, StudyReport]):
    out, _ = whole
    markdown = (out / "report.md").read_text()
    heads = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert heads[:4] == ["Differences", "Samples", "In short", "Results"]
    assert re.findall(r"<details>\n<summary>(.*)</summary>", markdown) == ["Protocol", "Tables to paste"]
    assert markdown.index("![differences]") < markdown.index("Primary metric:") < markdown.index("### The study")
    page = (out / "report.html").read_text()
    folded = re.findall(r"<details><summary><h2>(.*)</h2>", page)
    assert folded == ["Architectures", "Protocol", "Tables to paste"]
    drawings = re.findall(r"data:image/svg\+xml;base64,([^\"]*)", page)
    titles = [b64decode(each).decode() for each in drawings]
    assert all(f">{name}<" in title for name, title in zip(ARMS, titles, strict=False))
    assert len(titles) == len(ARMS) + 1


def test_samples_are_shown_three_times_as_large(whole: tuple[Path, StudyReport]):
    out, _ = whole
    with np.load(next((out / "runs").glob("*/drawn.npz"))) as drawn:
        real = drawn["real"][0]
    sheet = np.asarray(Image.open(out / "figures/samples.png"))
    shown = real.repeat(3, 0).repeat(3, 1)
    places = np.lib.stride_tricks.sliding_window_view(sheet[2 : 2 + len(shown)], shown.shape)
    assert (places == shown).all((-3, -2, -1)).any()


def test_the_forest_has_metrics_of_all_groups_in_percent_and_primary_alone_for_many_arms(tmp_path: Path):
    pixels = ("swd.8", "swd.16", "swd.32", "spectrum", "seam.8")
    held_out = [f"held_out.{t}.{kind}" for t in (0.2, 0.5, 0.8) for kind in ("high", "whole")]

    def metrics(arm: str, seed: int) -> dict[str, float]:
        draw = np.random.default_rng([seed, len(arm)])
        signed = {"spectrum.1/4": draw.normal(), "memorised": 0.1}  # of these, no percentages
        return {name: float(draw.uniform(1, 2)) for name in (*held_out, *pixels)} | signed

    few = read_study(write_study(tmp_path / "few", study_of({"a": {}, "b": {}}), metrics))
    assert forest_metrics(few) == [*held_out[:4], *pixels[:4]]
    many = read_study(write_study(tmp_path / "many", study_of({f"arm {n}": {} for n in range(12)}), metrics))
    assert forest_metrics(many) == [PRIMARY]


def test_trials_without_numbers_are_named_with_their_reason(whole: tuple[Path, StudyReport]):
    out, made = whole
    states = {(arm, seed): (state, reason) for arm, seed, state, reason in read_study(out).missing()}
    assert states == {
        ("gate", 2): ("failed", "loss is not finite at step 7"),
        ("full", 1): ("under way", "step 40 logged"),
        (EVIL, 2): ("not started", ""),
    }
    page = Page((out / "report.html").read_text())
    assert "loss is not finite at step 7" in page.text
    assert any("of 15 trials, 1 under way, 1 failed, 1 not started" in sentence for sentence in made.summary)
    assert any(sentence.startswith("Seeds of 'gate' failed") and "flatters" in sentence for sentence in made.summary)


def test_times_carry_a_warning_about_other_trials(whole: tuple[Path, StudyReport]):
    assert (whole[0] / "report.md").read_text().count("other trials may have run beside") >= 4


def test_csv_holds_every_number_exactly(whole: tuple[Path, StudyReport]):
    out, _ = whole
    rows = list(csv.DictReader((out / "results.csv").open(newline="")))
    study = read_study(out)
    for (arm, seed), result in study.done.items():
        mine = {r["metric"]: r for r in rows if (r["arm"], r["seed"]) == (arm, str(seed))}
        assert {name: float(row["value"]) for name, row in mine.items()} == result.metrics
        assert float(mine["memorised"]["floor"]) == 0.02
        assert {row["state"] for row in mine.values()} == {"done"}
    rest = {(r["arm"], r["seed"]): r["state"] for r in rows if not r["metric"]}
    assert rest == {("gate", "2"): "failed", ("full", "1"): "under way", (EVIL, "2"): "not started"}


def test_csv_holds_every_held_out_error_of_training(whole: tuple[Path, StudyReport]):
    out, _ = whole
    rows = list(csv.DictReader((out / "curves.csv").open(newline="")))
    assert rows
    for (arm, seed), log in read_study(out).logs.items():
        for (t, kind), errors in log.held_out.items():
            mine = [r for r in rows if (r["arm"], r["seed"], r["metric"]) == (arm, str(seed), f"held_out.{t}.{kind}")]
            assert [int(row["step"]) for row in mine] == log.evaluated.tolist()
            assert [float(row["value"]) for row in mine] == errors.tolist()


def test_the_same_folder_gives_the_same_bytes(whole: tuple[Path, StudyReport]):
    out, _ = whole
    names = ("report.html", "report.md", "results.csv", "table.md", "table.tex", "curves.csv")
    before = {name: (out / name).read_bytes() for name in names}
    made = write_report(out)
    assert {name: (out / name).read_bytes() for name in names} == before
    assert [path.name for path, _ in made.files] == list(names)


def test_a_new_report_keeps_other_files_in_the_figures_folder(tmp_path: Path):
    out = write_study(tmp_path / "out", study_of({"a": {}, "b": {}}, seeds=(0,)), noisy({}))
    mine = {"figures/poster.png": b"mine", "figures/talk/notes.txt": b"mine too", "figures/curves/loss.svg": b"redrawn"}
    for name, content in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    for _ in range(2):
        write_report(out)
        assert {name: (out / name).read_bytes() for name in mine} == mine
    assert (out / "figures/curves/loss.png").exists()
    for name in ("report.html", "report.md"):
        assert not any(Path(own).name in (out / name).read_text() for own in mine)
    (out / "runs/a-s0/result.json").write_text("{")  # a report that cannot be made takes no figure either
    with pytest.raises(UserError):
        write_report(out)
    assert (out / "figures/curves/loss.png").exists()


def test_names_are_escaped_in_html_markdown_and_latex(whole: tuple[Path, StudyReport]):
    out, _ = whole
    assert "<script" not in (out / "report.html").read_text()
    table = (out / "table.md").read_text().splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(re.findall(r"(?<!\\)\|", table[0]))}
    assert r"\<script\>" in (out / "table.md").read_text()
    tex = (out / "table.tex").read_text()
    assert r"50\% \$x\_1\$ \textbar{} *b*" in tex
    assert r"a\&b" in tex


def test_latex_escapes_all_ten_characters():
    assert latex("a_b & 5% #1 {x} $y$ ~^\\") == (
        r"a\_b \& 5\% \#1 \{x\} \$y\$ \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert r"$-$1.5 $\pm$ 0.2$^\dagger$" in latex_table(["a"], [["-1.5 ± 0.2†"]], "")


def test_toned_cells_are_bold_in_markdown():
    assert markdown_table(["a"], [[Cell("x_y", "worse")]]).endswith(r"| **x\_y** |")


# ------------------------------------------------------------------------------------ what it claims


def test_an_arm_with_equal_numbers_shows_no_difference(tmp_path: Path):
    plan = study_of({"a": {}, "a again": {}})
    text = says(write_study(tmp_path / "out", plan, lambda arm, seed: noisy({})("a", seed)))
    assert "A difference is seen for none" in text
    assert "'a again': equal in every seed." in text
    assert "a difference is seen in none" in text
    assert "better than" not in text
    assert "worse than" not in text


@pytest.mark.parametrize(("effect", "word"), [(0.2, "worse"), (-0.2, "better")])
def test_a_planted_difference_is_reported_with_its_sign(tmp_path: Path, effect: float, word: str):
    plan = study_of({"full": {}, "other": {}, "alike": {}})
    out = write_study(tmp_path / "out", plan, noisy({"other": effect}))
    text = says(out)
    assert "A difference is seen for 1 of them" in text
    assert f"'other' is {word} than 'full': {'+' if effect > 0 else '-'}" in text
    arm = next(arm for arm in plan.arms if arm.name == "other")
    found = read_study(out).difference(arm, PRIMARY)
    assert found.mean * found.scale == pytest.approx(100 * effect, abs=2)
    assert found.wide_low is not None
    assert "No difference is seen for 'alike'" in text


def test_a_higher_value_of_the_precision_metric_is_better(tmp_path: Path):
    plan = study_of({"a": {}, "b": {}}, primary="precision", metrics=("inception",))
    out = write_study(
        tmp_path / "out", plan, lambda arm, seed: {"precision": 0.5 + 0.1 * (arm == "b") + 0.001 * seed * (arm == "b")}
    )
    assert "'b' is better than 'a'" in says(out)


def test_a_signed_metric_nearer_to_zero_is_better(tmp_path: Path):
    plan = study_of({"a": {}, "b": {}}, primary="spectrum.1/4", metrics=("pixels",))
    levels = {"a": -3.0, "b": 1.0}
    draw = np.random.default_rng(0)
    text = says(
        write_study(tmp_path / "out", plan, lambda arm, _: {"spectrum.1/4": levels[arm] + draw.normal(0, 0.01)})
    )
    assert "'b' is better than 'a': -2, 95% interval" in text


def test_an_arm_not_compared_with_the_control_names_its_partner(tmp_path: Path):
    out = write_study(tmp_path / "out", study_of(ARMS), noisy({"gate": 0.2, "gate, mean": 0.2}))
    text = says(out)
    assert "'gate' is worse than 'full'" in text
    assert "'gate, mean' is" not in text


def test_noise_is_rarely_reported_as_a_difference(tmp_path: Path):
    """Of 200 studies of eight equal arms, 5% may claim a difference: ten studies, and up to ten more by chance."""
    plan = study_of({f"arm {name}": {} for name in "abcdefgh"})
    out = write_plan(tmp_path / "out", plan)
    for trial in plan.trials:
        write_trial(out, trial, {PRIMARY: 1.0})
    study, draw, claims = read_study(out), np.random.default_rng(0), 0
    for _ in range(200):
        drawn = {
            key: replace(result, metrics={PRIMARY: 1 + draw.normal(0, 0.1)}) for key, result in study.results.items()
        }
        claims += "seen for none" not in "\n".join(summarise_study(replace(study, results=drawn)))
    assert 0 < claims <= 20


def test_a_study_with_one_seed_makes_no_claim(tmp_path: Path):
    out = write_study(tmp_path / "out", study_of(ARMS, seeds=(0,)), noisy({"plain": 5.0}))
    text = says(out)
    assert "One seed: a lead, no claim." in text
    for claim in ("is better than", "is worse than", "is seen"):
        assert claim not in text
    assert "no claim" in write_report(out).summary[0]
    page = (out / "report.html").read_text()
    assert 'class="better"' not in page
    assert 'class="worse"' not in page


def test_a_single_common_seed_supports_no_claim(tmp_path: Path):
    plan = study_of({"a": {}, "b": {}})
    out = write_plan(tmp_path / "out", plan)
    for trial in plan.trials[:3]:  # both arms with seed 0, and one with seed 1
        write_trial(out, trial, {PRIMARY: 5.0 if trial.arm == "b" else 1.0})
    assert "'b': one seed: no claim" in says(out)


def test_a_metric_that_is_not_finite_is_reported_and_supports_no_claim(tmp_path: Path):
    plan = study_of({"a": {}, "b": {}})
    out = write_study(
        tmp_path / "out", plan, lambda arm, seed: {PRIMARY: math.nan if (arm, seed) == ("b", 1) else 1 + seed / 10}
    )
    made = write_report(out)
    assert "'b': not finite." in made.summary
    assert f"'b': {PRIMARY} is not finite in 1 seed." in made.summary
    assert "nan" in (out / "results.csv").read_text()


def test_a_study_without_results_has_a_report(tmp_path: Path):
    out = write_plan(tmp_path / "out", study_of(ARMS))
    made = write_report(out)
    assert "nothing can be said" in made.summary[0]
    assert "12 not started" in made.summary[-1]


def test_an_unmeasured_primary_metric_is_reported(tmp_path: Path):
    plan = study_of({"a": {}, "b": {}}, primary="FID", metrics=("held_out", "inception"))
    made = write_report(write_study(tmp_path / "out", plan, noisy({})))
    assert made.summary[0].startswith("No trial has ended with the primary metric FID")
    assert PRIMARY in made.summary[0]


def test_a_large_grid_has_complete_tables_and_partial_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dit_in_dit.study.results.MOST_DRAWN", 1)
    out = write_study(tmp_path / "out", study_of(ARMS), noisy({}))
    study = read_study(out)
    assert [arm.name for arm in study.shown] == ["full", "plain"]
    assert len(study.compared) == 3
    write_report(out)
    page = Page((out / "report.html").read_text())
    assert "Pictures show the first 1 of 3 arms; tables, all." in page.text


def test_unequal_costs_of_matched_arms_are_reported(tmp_path: Path):
    plan = study_of(ARMS, match="params")
    text = says(write_study(tmp_path / "out", plan, noisy({})))
    full, plain = (cost.macs(model)["total"] for model in (EMOJI, replace(EMOJI, use_inner=False)))
    less = 100 * (plain / full - 1)
    assert less < -20
    assert f"Matched by parameters. Not within 2 % of what an arm is compared with: MACs {less:.1f} to 0.0 %" in text


# ---------------------------------------------------------------------------------------- refusals


def test_different_evaluation_protocols_give_an_error_with_the_field(tmp_path: Path):
    plan = study_of({"a": {}, "b": {}})
    out = write_plan(tmp_path / "out", plan)
    other = {**PROTOCOL, "samples": {"sampler": "dpm++", "steps": 50}}
    for trial in plan.trials:
        write_trial(out, trial, {PRIMARY: 1.0}, protocol=other if trial.arm == "b" else PROTOCOL)
    with pytest.raises(UserError, match=r"cannot stand in one table, because.*samples\.steps: 25 / 50"):
        write_report(out)


def test_real_images_may_differ_between_seeds_but_not_within_a_seed(tmp_path: Path):
    plan = study_of({"a": {}, "b": {}})

    def written(out: Path, sha256: Any) -> Path:
        write_plan(out, plan)
        for trial in plan.trials:
            reference = {**PROTOCOL["reference"], "sha256": sha256(trial)}
            write_trial(out, trial, {PRIMARY: 1.0}, protocol={**PROTOCOL, "reference": reference})
        return out

    assert len(read_study(written(tmp_path / "endless", lambda trial: f"of seed {trial.seed}")).done) == len(
        plan.trials
    )
    with pytest.raises(UserError, match=r"cannot stand in one table.*reference\.sha256"):
        read_study(written(tmp_path / "other", lambda trial: trial.key))


def test_different_held_out_images_are_refused(tmp_path: Path):
    plan = study_of({"a": {}, "b": {"data.held_out": 0.3}})
    with pytest.raises(UserError, match=r"data\.held_out"):
        write_report(write_study(tmp_path / "out", plan, noisy({})))


def test_a_folder_without_a_study_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not a study's folder"):
        write_report(tmp_path)


def test_a_report_with_a_missing_plug_in_names_the_option(tmp_path: Path):
    out = write_study(tmp_path / "out", plan := study_of({"a": {}, "b": {}}, seeds=(0,)), noisy({}))
    checkpoint = out / "runs" / plan.trials[1].key / "checkpoints" / "0000040"
    checkpoint.mkdir(parents=True)
    manifest = {"step": 40, "config": "", "classes": [], "steady": True, "bytes": {}, "sha256": {}}
    manifest["plugins"] = [{"name": IDEA.name, "sha256": hashlib.sha256(IDEA.read_bytes()).hexdigest()}]
    (checkpoint / "manifest.json").write_bytes(seal(manifest))
    for path in (out / "plan.json", checkpoint.parents[1] / "config.yaml"):
        path.write_text(re.sub(r'(aggregate"?: "?)mean', r"\1softmax", path.read_text()))
    said = command("study", "report", out, code=2, plugin=False)
    assert "was made with a plug-in (" in said
    assert "got 'softmax'" in said
    assert said.endswith(": pass --plugin my_idea.py\n")
    assert said.count("\n") == 1
    assert "report.html" in command("study", "report", out)


def test_the_error_names_the_damaged_result_file(tmp_path: Path):
    plan = study_of({"a": {}, "b": {}})
    out = write_study(tmp_path / "out", plan, noisy({}))
    path = out / "runs" / plan.trials[0].key / "result.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=re.escape(str(path))):
        write_report(out)


# ------------------------------------------------------------------------------------------ curves


def test_held_out_errors_are_compared_at_equal_macs(tmp_path: Path):
    """A run with a third less MACs per step has the same error at each step, so its error at equal MACs is lower."""
    plan = study_of({"full": {}, "plain": {"model.use_inner": False}}, seeds=(0,))
    runs = [read_run(write_trial(tmp_path, trial, None)) for trial in plan.trials]
    same = relative(runs[0], runs[0], (0.2, "high"))
    assert np.abs(same[1]).max() < 1e-9
    macs, change = relative(runs[1], runs[0], (0.2, "high"))
    assert (change < 0).all()
    assert macs.max() <= runs[1].macs(runs[1].evaluated).max()
    at = runs[0].macs(runs[0].evaluated)
    line = np.exp(np.interp(np.log(macs), np.log(at), np.log(runs[0].held_out[0.2, "high"])))
    errors = runs[1].held_out[0.2, "high"][-len(macs) :]
    assert change == pytest.approx(100 * (errors - line) / line)


# ------------------------------------------------------------------------------------------ search


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyReport]:
    """A search of six trials: the third is the best, the fourth failed before it had a config, the fifth was pruned,
    and the sixth is not done."""
    search = {"model.inner.width": [16, 32, 64], "model.inner.aggregate": ["mean", "concat"]}
    study = StudyConfig(question="which width?", search=search, trials=8, budget={"steps": 40}, seeds=(0,))
    base = plan_of(StudyConfig(arms={"base": {}}, budget={"steps": 40}, seeds=(0,)))
    out = write_plan(tmp_path_factory.mktemp("search") / "out", Plan("widths", study, base.arms, base.made))
    for number, state in enumerate(["done", "done", "done", "failed", "pruned", ""]):
        changes = {
            "model.inner.width": (16, 32, 64)[number % 3],
            "model.inner.aggregate": ("mean", "concat")[number % 2],
        }
        trial = Trial(f"t{number}", 0, replace_keys(base.arms[0].config, changes))
        value = {PRIMARY: 0.5 - number / 10} if state == "done" else {}
        folder = write_trial(out, trial, value if state else None, state=state or "done", reason="no memory")
        (folder / "changes.json").write_text(json.dumps({"changes": changes, "number": number}))
        if state == "failed":
            (folder / "config.yaml").unlink()
    return out, write_report(out)


def test_a_search_lists_its_trials_best_first(searched: tuple[Path, StudyReport]):
    out, made = searched
    table = (out / "table.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == ["2", "1", "0"]
    assert made.summary[0] == "Tried: 6 of 8 configs (3 done, 1 pruned, 1 failed, 1 not done)."
    assert (
        f"number 2, {describe_changes({'model.inner.width': 64, 'model.inner.aggregate': 'mean'})}" in made.summary[1]
    )
    page = Page((out / "report.html").read_text())
    assert "no memory" in page.text
    assert sum(source.startswith("data:image/png") for source in page.sources) == 2


def test_a_search_claims_nothing_and_proposes_a_study_to_confirm_it(searched: tuple[Path, StudyReport]):
    out, made = searched
    assert "a lead, no claim" in made.summary[2]
    text = re.search(r"```\n(question: .*?)```", (out / "report.md").read_text(), re.DOTALL)
    assert text is not None
    proposed = StudyConfig.from_dict(yaml.safe_load(text[1]))
    assert list(proposed.arms) == ["base", "number 2", "number 1", "number 0"]
    assert 0 not in proposed.seeds
    assert len(proposed.seeds) > 1
    assert plan_of(proposed).control.name == "base"


def test_csv_holds_the_numbers_of_a_search(searched: tuple[Path, StudyReport]):
    rows = list(csv.DictReader((searched[0] / "results.csv").open(newline="")))
    assert [(row["number"], row["state"]) for row in rows] == [
        ("0", "done"), ("1", "done"), ("2", "done"), ("3", "failed"), ("4", "pruned"), ("5", "not done")
    ]  # fmt: skip
    assert float(rows[2]["value"]) == 0.5 - 2 / 10
