"""The report of a study: an HTML page, the same content as Markdown, numbers as CSV, and tables for a paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dit_in_dit.config.errors import UserError
from dit_in_dit.curves import plots
from dit_in_dit.curves.arms import RunGroup
from dit_in_dit.inspection.diagram import draw_model
from dit_in_dit.metrics.metric import explain_directions
from dit_in_dit.reporting import document
from dit_in_dit.reporting.document import Bullets, Chapter, DocumentPart, Drawing, Picture, Text, Verbatim
from dit_in_dit.reporting.plots import COLOURS
from dit_in_dit.runs import atomic
from dit_in_dit.study import exports, figures, relative_error, search, tables
from dit_in_dit.study.forest import draw_forest, forest_metrics
from dit_in_dit.study.plan import read_plan
from dit_in_dit.study.results import StudyResults, read_search, read_study
from dit_in_dit.study.summary import summarise_study

MATRIX = (
    "Differences by all ranked metrics: in percent of the other's mean, or (to 0) of their sizes, in the metric's own "
    "unit. Blue: better, orange: worse, grey: no difference seen. Corrected for the number of arms, not of metrics."
)
RELATIVE = (
    "Held-out error of each arm in percent above that of the arm it is compared with, at equal training MACs and the "
    "same seed (the other's error interpolated between its evaluations)."
)
SEEN_FIRST = ("Differences", "Key by key", "Samples")  # chapters before the summary
FIRST_ARMS = 6  # arms whose samples are shown before the summary
CURVES = {
    "held-out": "Held-out error of the averaged model's image estimate at each time t, for the whole image and for its "
    "high frequencies; line: mean over seeds, band: their range.",
    "loss": "Training loss.",
    "gradients": "Gradient norms: of all, of each level and of each part.",
    "throughput": "Images a second.",
}


@dataclass(frozen=True)
class StudyReport:
    """The summary in sentences, and the files of the report, each with a description."""

    summary: list[str]
    files: list[tuple[Path, str]]

    def __repr__(self) -> str:
        return "\n".join(self.summary)


def write_report(out: Path) -> StudyReport:
    """Write the report of a study, finished or not, into its folder; the same folder gives the same bytes.

    Nothing is deleted: figures of an earlier report stay, even if the new report has no figure of the same name.

    Raises:
        UserError: there is no study, a file of it is damaged, its trials were not evaluated alike, or a package is
            missing.
    """
    plan, curve_numbers = read_plan(out), None
    (out / "figures").mkdir(exist_ok=True)
    if plan.study.search:
        searched = read_search(out)
        summary, chapters = search.summarise_search(searched), search.chapters(searched, out)
        heads, rows, caption = search.search_paper_table(searched)
        numbers = search.search_csv(searched)
    else:
        study = read_study(out)
        summary = [*summarise_study(study), *tables.not_finite_metrics(study)]
        chapters = _chapters(study, out)
        heads, rows, caption = exports.paper_table(study)
        numbers, curve_numbers = exports.results_csv(study), exports.held_out_curves(study)
    pasted = {
        "table.md": document.markdown_table(heads, rows) + "\n",
        "table.tex": document.latex_table(heads, rows, caption),
    }
    to_paste = [
        Verbatim("Markdown", pasted["table.md"]),
        Verbatim("LaTeX, with booktabs and graphicx", pasted["table.tex"]),
    ]
    seen_first = [chapter for chapter in chapters if chapter.title in SEEN_FIRST]
    rest = [chapter for chapter in chapters if chapter.title not in SEEN_FIRST]
    whole = [*seen_first, Chapter("In short", [Bullets(summary)]), *rest, Chapter("Tables to paste", to_paste, True)]
    title, lead = f"Study: {plan.name}", plan.study.question
    written = {
        "report.html": (document.to_html(title, lead, whole), "the report, one page that needs no network"),
        "report.md": (document.to_markdown(title, lead, whole, out), "the same as Markdown, with figures/"),
        "results.csv": (numbers, "every number of every trial"),
        "table.md": (pasted["table.md"], "a table to paste"),
        "table.tex": (pasted["table.tex"], "the same for LaTeX"),
    }
    if curve_numbers is not None:
        written["curves.csv"] = (curve_numbers, "every held-out error on the way")
    for name, (text, _) in written.items():
        atomic.write_atomic(out / name, text)
    return StudyReport(summary, [(out / name, what) for name, (_, what) in written.items()])


def _chapters(study: StudyResults, out: Path) -> list[Chapter]:
    caption = f"{study.primary} against what it costs."
    has_primary = study.primary in study.ranked
    against_cost = [figures.save_picture(out, "cost", figures.draw_pareto(study), caption)] if has_primary else []
    first, others = _samples(study, out)
    protocol = tables.protocol_tables(study.plan, [result.protocol for result in study.done.values()])
    drawings = [
        Drawing(arm.name, draw_model(arm.config.model, theme="auto", title=arm.name, drop=arm.config.token_drop))
        for arm in study.shown
    ]
    chapters = [
        Chapter("Differences", _forest(study, out)),
        Chapter("Samples", first),
        Chapter("Results", _results(study, out)),
        Chapter("Cost", [tables.cost(study)]),
        Chapter("Error against cost", against_cost),
        Chapter("Curves", _curves(study, out)),
        Chapter("Convergence and stability", _convergence(study)),
        Chapter("Samples of all arms", others, True),
        Chapter("Trials without numbers", [tables.missing_trials(study)] if any(study.missing()) else []),
        Chapter("Architectures", drawings, True),
        Chapter("Protocol", protocol, True),
    ]
    return [chapter for chapter in chapters if chapter.blocks]


def _forest(study: StudyResults, out: Path) -> list[DocumentPart]:
    if not (study.compared and study.primary in study.ranked):
        return []
    others = " and by others" if len(forest_metrics(study)) > 1 else ""
    caption = f"Differences by the primary metric, {study.primary}{others}."
    return [figures.save_picture(out, "differences", draw_forest(study), caption)]


def _results(study: StudyResults, out: Path) -> list[DocumentPart]:
    if not study.done:
        return [Text("No trial is done yet.")]
    blocks: list[DocumentPart] = []
    if study.compared and study.primary in study.ranked:
        blocks.append(tables.primary(study))
    blocks += tables.means_table(study)
    if study.compared and study.ranked:
        blocks.append(figures.save_picture(out, "metrics", figures.draw_matrix(study), MATRIX))
        blocks += tables.differences(study)
    if len(study.compared) > len(study.drawn):
        blocks.append(Text(f"Pictures show the first {len(study.drawn)} of {len(study.compared)} arms; tables, all."))
    return [*blocks, Bullets(explain_directions(name for names in study.metrics.values() for name in names))]


def _curves(study: StudyResults, out: Path) -> list[DocumentPart]:
    groups = [[replace(arm, name=figures.picture_label(arm.name)) for arm in group] for group in _groups(study)]
    names = [f"curves-{number}" for number in range(1, len(groups) + 1)] if len(groups) > 1 else ["curves"]
    folders = [out / "figures" / name for name in names[: len(groups)]]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    try:
        drawn = [path for pair in zip(groups, folders, strict=True) for path in plots.draw_curves(*pair)]
    except UserError as error:  # held-out errors of different images or noise
        return [Text(f"Curves are not drawn: {error}.")]
    relative = relative_error.draw_relative(study)
    first = [figures.save_picture(out, "relative", relative, RELATIVE)] if relative else []
    clock = f" Time is of the machine that trained; {tables.BESIDE}."
    order = sorted(drawn, key=lambda path: (list(CURVES).index(path.stem), path))
    return [*first, *(Picture(path, CURVES[path.stem] + clock) for path in order)]


def _groups(study: StudyResults) -> list[list[RunGroup]]:
    """Groups of arms, one for each picture of curves. A group has at most as many arms as there are colours. It holds
    the control and, for each of its arms, the arm that this arm is compared with."""
    known = {arm.name: arm for arm in study.arms_of_curves()}
    control = study.plan.control.name
    groups: list[dict[str, None]] = [{control: None}]
    for arm in study.drawn:
        pair: dict[str, None] = {arm.against: None, arm.name: None}
        if len(groups[-1] | pair) > len(COLOURS):
            groups.append({control: None})
        groups[-1] |= pair
    logged = [[known[name] for name in group if name in known] for group in groups]
    return [group for group in logged if group]


def _convergence(study: StudyResults) -> list[DocumentPart]:
    if not study.logs:
        return []
    try:
        compared: list[DocumentPart] = [*tables.convergence(study)]
    except UserError as error:
        compared = [Text(f"Convergence is not compared: {error}.")]
    return [*compared, tables.stability_table(study)]


def _samples(study: StudyResults, out: Path) -> tuple[list[DocumentPart], list[DocumentPart]]:
    """Pictures of the first arms and, of more arms than FIRST_ARMS, of all of them."""
    rows: dict[str, Path] = {}
    for (arm, _), folder in study.folders.items():
        if (folder / "drawn.npz").exists():
            rows.setdefault(arm, folder / "drawn.npz")  # of the first seed with samples
    names = [arm.name for arm in study.shown if arm.name in rows]
    caption = "First seed of each arm: below each other, images of the same noise and class."

    def picture(name: str, arms: list[str]) -> list[DocumentPart]:
        drawn = figures.draw_samples({arm: rows[arm] for arm in arms})
        return [figures.save_picture(out, name, drawn, caption)]

    first = picture("samples", names[:FIRST_ARMS]) if names else []
    return first, picture("samples-all", names) if len(names) > FIRST_ARMS else []
