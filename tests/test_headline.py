"""Tables of studies in the README and the docs equal the result files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from dit_in_dit.study.plan import read_plan, read_study_config, shipped_studies
from dit_in_dit.study.statistics import Difference

SCRIPT = Path(__file__).parents[1] / "scripts" / "headline.py"
spec = importlib.util.spec_from_file_location("headline", SCRIPT)
headline = sys.modules["headline"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(headline)


@pytest.mark.parametrize("page", headline.PAGES, ids=lambda page: page.name)
def test_tables_in_the_docs_equal_the_result_files(page):
    text = page.read_text()
    assert len(headline.MARKS.findall(text)) == text.count("<!-- /") > 0  # every mark has its other
    assert headline.filled(text) == text


KEPT = Path(__file__).parents[1] / "results" / "studies"
AS_SHIPPED = ("field", "nesting", "nesting-64", "patches", "prediction")  # others were run with a smaller budget


def test_a_kept_study_can_be_taken_up_again_by_its_command():
    """`study run NAME --from results/studies/NAME` refuses the rows of another plan."""
    assert set(AS_SHIPPED) <= set(shipped_studies())
    studies = {name: name for name in AS_SHIPPED}
    studies |= {path.parent.name: str(path) for path in KEPT.glob("*/study.yaml")}
    kept = {name: study for name, study in studies.items() if (KEPT / name / "plan.json").exists()}
    assert len(kept) > 15
    other = [name for name, study in kept.items() if read_plan(KEPT / name).study != read_study_config(study)]
    assert not other


def test_a_changed_number_in_a_table_is_detected():
    page = headline.PAGES[1].read_text()
    name, what, table = headline.MARKS.search(page).groups()
    assert headline.filled(page.replace(table, "")) == page
    with pytest.raises((KeyError, FileNotFoundError)):
        headline.filled(page.replace(f"{name} {what}", f"{name}-of-another {what}"))


@pytest.mark.parametrize(
    ("percent", "interval", "wanted", "said"),
    [
        (-30, (-40, -20), 25, "met"),
        (-20, (-30, -10), 25, "not met"),
        (-30, (-70, 10), 25, "mean alone"),
        (-1, (-3, 1), 0, "met"),
        (1, (-1, 3), 0, "not shown"),
        (3, (1, 5), 0, "not met"),
    ],
)
def test_a_goal_is_judged_by_mean_and_interval(percent, interval, wanted, said):
    change = Difference((0, 1, 2), percent, 1.0, *interval, *interval)
    assert headline.verdict(change, wanted) == said
