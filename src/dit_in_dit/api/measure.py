"""Costs, scores, studies and attention, as objects that a notebook shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np

from dit_in_dit.api.model import Model, load
from dit_in_dit.attention_maps.record import Maps, Views, record_maps
from dit_in_dit.config import files, presets
from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.coerce import as_image, as_source
from dit_in_dit.data.encode import open_decoder
from dit_in_dit.data.labels import class_numbers
from dit_in_dit.metrics import evaluate as evaluation
from dit_in_dit.metrics import report, subject
from dit_in_dit.reporting.tables import text_table
from dit_in_dit.runs.averages import evaluation_folder
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.pretrained import ROOM, find_run, pretrained_models, results_folder
from dit_in_dit.runtime.device import pick_device
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.sampling.fit import fit_to_device
from dit_in_dit.study import match as matching
from dit_in_dit.study import plan, planning
from dit_in_dit.study.report import StudyReport, write_report
from dit_in_dit.training.loop import Run

Trained = str | Path | Run | Model


def find_config(name: str, what: str) -> RunConfig:
    """The preset, or the config in a YAML file or in a run's folder; a UserError begins with `what`."""
    if name in presets.NAMES:
        return presets.get(name)
    if Path(name).suffix in (".yaml", ".yml"):
        return files.from_file(Path(name), what)
    if isdir(run := find_run(name)):  # False for a name that is too long, or has a NUL
        return read_config(run)
    known = [*presets.NAMES, *(f"{ROOM}/{shipping}" for shipping in pretrained_models())]
    raise UserError(f"{what}: no preset, file or run {truncate(name)!r}{did_you_mean(name, known)}")


def match(
    config: RunConfig | str,
    like: Trained | RunConfig,
    *,
    by: matching.By = "macs",
    tolerance: float = 0.01,
    fixed: Collection[str] = (),
) -> RunConfig:
    """The config with an outer transformer that makes its model cost what the model of `like` (a preset, a YAML file, a
    run, a model, a config) costs; keys or groups in `fixed` stay. UserError if none is within the tolerance.

    >>> dd.match(dd.preset("emoji", mixer="none"), like="emoji-dit").model.outer.width
    144
    """
    config = config if isinstance(config, RunConfig) else find_config(str(config), "config")
    fixed = {fixed} if isinstance(fixed, str) else fixed
    groups = {name.rpartition(".")[0] for name in RunConfig.names()}
    if unknown := [key for key in fixed if key not in {*RunConfig.names(), *groups}]:
        raise UserError(f"fixed: unknown key {unknown[0]!r}{did_you_mean(unknown[0], RunConfig.names())}")
    named = like if isinstance(like, RunConfig | Run | Model) else find_config(str(like), "like")
    other = named if isinstance(named, RunConfig) else named.config
    wanted = replace(config, model=other.model)  # step times compare only with equal training keys
    twin = matching.match(config, wanted, by, tolerance=tolerance, fixed=fixed, device=pick_device())
    return replace(config, model=twin.model)


@dataclass(frozen=True, repr=False)
class Scores:
    """Scores of evaluations with one protocol: by name, for each evaluation `value`, `low`, `high` (95%) and `floor`.

    >>> dd.compare("emoji", "emoji-dit").scores["swd.32"][0]["value"] < 0.1
    True
    """

    labels: list[str]
    scores: dict[str, list[dict[str, Any] | None]]
    folders: list[Path]

    def __repr__(self) -> str:
        return text_table(*report.score_table(self.scores, self.labels))


def evaluate(run: Trained, num: int = 500, *, data: Any = None, out: str | Path | None = None, seed: int = 0) -> Scores:
    """Measure `num` samples against real images, without a feature network, as the command `evaluate` does. UserError
    if there are too few images, or if the data cannot be read.

    Args:
        data: real images, as for `train`; None: those that the run was trained on.
        out: folder for the result; None: that of the command.

    >>> images, labels = np.zeros((99, 32, 32, 3), np.uint8), np.arange(99)
    >>> dd.evaluate("emoji", num=2, data=(images, labels), out="scores").labels
    ['emoji@6000']
    """
    model = run if isinstance(run, Model) else load(run.folder if isinstance(run, Run) else run)
    device = next(model.net.parameters()).device
    given = run.data if data is None and isinstance(run, Run) else data
    source = None if given is None else as_source(given, model.config)
    own: dict[str, Any] = {"decoder": partial(open_decoder, device=device), "seed": seed}
    own["averaged"] = model.average or True
    own["fit"] = partial(fit_to_device, num=num)
    own["source"] = None if isinstance(source, str) else source
    samples = subject.run_subject(model.folder, device, lambda config, names: (config, []), **own)
    folder = Path(out) if out else _results(model)
    for _ in evaluation.evaluate(samples, subject.reference(source, samples, wanted=2 * num), folder, num):
        pass
    return compare(folder)


def _results(model: Model) -> Path:
    """The folder of a model's evaluation."""
    return evaluation_folder(results_folder(model.folder, "evaluation") / f"{model.step:07d}", model.average)


def compare(*evaluated: Trained | Scores) -> Scores:
    """Scores beside each other: of results of `evaluate`, and of evaluated runs, models or folders. UserError if one is
    not evaluated, or if the protocols differ.

    >>> list(dd.compare("emoji", "emoji-dit").scores)[:2]
    ['swd.32', 'swd.16']
    """
    folders: list[Path] = []
    for each in evaluated:
        one = each.folder if isinstance(each, Run) else each
        if isinstance(one, Model):
            one = _results(one) if one.average else one.folder
        folders += one.folders if isinstance(one, Scores) else [find_run(str(one))]
    return Scores(*report.compare_evaluations(folders), folders)


def run_study(study: str | Path | Mapping[str, Any], out: str | Path | None = None) -> StudyReport:
    """Train and measure every arm with every seed, in this process, and write the report; a second call resumes.
    UserError if the study or its data is invalid, or if an arm cannot be matched.

    Args:
        study: a shipped study, a YAML file, or the keys of a study.
        out: the study's folder; None: studies/NAME.

    >>> keys = {"arms": {"plain": {"model.use_inner": False}, "nested": {}}, "match": "none", "seeds": [0]}
    >>> dd.run_study({**keys, "set": settings, "metrics": ["held_out"]}, "studies/tiny").files[0][0].name
    'report.html'
    """
    from dit_in_dit.study import queue, worker

    keys = study if isinstance(study, Mapping) else None
    config = plan.read_study_config(str(study)) if keys is None else plan.StudyConfig.from_dict(keys)
    name, device = "study" if keys is not None else Path(str(study)).stem, pick_device()
    folder = Path(out or Path("studies", name))
    folder.mkdir(parents=True, exist_ok=True)
    planned = planning.open_plan(folder, lambda: planning.plan_study(name, config, device), config)
    for _ in worker.run_trials(planned, folder, queue.Queue(planned, folder), device):
        pass
    return write_report(folder)


def attention(model: Trained, image: Any, t: float = 0.5, y: int | str | None = None) -> Maps:
    """Attention, aggregation and the inner path's share for one image with fixed noise, as the command `maps` records.
    The image is as for `train`; `y` is the name or number of its class, None: no class.

    >>> maps = dd.attention(dd.load("emoji"), np.zeros((32, 32, 3), np.uint8), t=0.3, y="heart")
    >>> maps.outer.entropy.shape  # images, times, blocks, heads, patches
    (1, 1, 4, 7, 16)
    """
    model = model if isinstance(model, Model) else load(model.folder if isinstance(model, Run) else model)
    named = [model.config.model.num_classes] if y is None else class_numbers(str(y), model.classes)
    if len(named) != 1 or not 0 <= t <= 1:
        raise UserError(f"attention takes one class y and a time t from 0 to 1: got {y!r}, {t!r}")
    x = as_image(image, model.config.model)[None]
    noise = generator(0, "held_out", 0).standard_normal(x.shape, np.float32)
    config = replace(model.config, sample=replace(model.config.sample, steps=2))  # its samples are not used
    return record_maps(model.net, config, Views("given", (0,), (named[0],), x, noise, (t,)), samples=1)
