"""Studies: their files, the queue of trials that workers share, and errors."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import to_dict
from dit_in_dit.metrics.metric import METRICS, Metric
from dit_in_dit.runs.folder import read_config
from dit_in_dit.study import arms
from dit_in_dit.study import plan as plans
from dit_in_dit.study.exports import take_trials
from dit_in_dit.study.plan import Plan, StudyConfig, read_plan
from dit_in_dit.study.planning import open_plan, plan_study
from dit_in_dit.study.queue import MOST_LOSSES, LeaseLostError, Queue
from dit_in_dit.study.result import Result
from dit_in_dit.study.worker import run_trials
from dit_in_dit.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no step times, because these studies do not need step times."""
    monkeypatch.setattr("dit_in_dit.study.arms._times", lambda *_: {})


@pytest.fixture
def base(run_config: RunConfig, tmp_path: Path) -> str:
    """The file of a config that trains a few steps on the small image folder."""
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(with_train(run_config, steps=8)))
    return str(path)


def small(base: str, **keys) -> StudyConfig:
    """A study of two arms with one seed that measures only held-out errors."""
    arms = {} if {"grid", "search"} & keys.keys() else {"one": {}, "two": {"train.learning_rate": 1e-4}}
    defaults = {"arms": arms, "seeds": [0], "metrics": ["held_out"], "match": "none", "samples": 4}
    return StudyConfig.from_dict({"question": "Which?", "base": base, **defaults, **keys})


def planned(study: StudyConfig, out: Path) -> Plan:
    out.mkdir(parents=True, exist_ok=True)
    return open_plan(out, lambda: plan_study("small", study, CPU), study)


def finish(study: StudyConfig, out: Path, **options) -> Plan:
    """Run a study in this process."""
    plan = planned(study, out)
    list(run_trials(plan, out, Queue(plan, out, **options), CPU))
    return plan


def results(out: Path) -> dict[str, Result]:
    return {path.parent.name: Result.from_json(path.read_text()) for path in sorted(out.glob("runs/*/result.json"))}


# -------------------------------------------------------------------------------------------- writing one


@pytest.mark.parametrize("name", plans.shipped_studies())
def test_every_shipped_study_can_be_planned(name):
    study = plans.read_study_config(name)
    assert study.question.endswith("?")
    for changes, _ in arms.arm_changes(study).values():
        assert arms.budgeted_config(study, arms.configure(study, changes), changes).train.steps >= 1000


def test_every_choice_of_the_tuning_search_can_be_matched():
    study = plans.read_study_config("tuning")
    like = arms.configure(study, {})
    for values in product(*study.search.values()):
        _, twin = arms.matched_config(study, dict(zip(study.search, values, strict=True)), like, CPU)
        assert abs(twin.gap) <= study.tolerance


def test_a_grid_gives_every_combination():
    study = StudyConfig(grid={"model.inner.width": [16, 32], "model.inner.mixer": ["patch", "conv"]})
    assert list(arms.arm_changes(study)) == [
        "width=16, mixer=patch", "width=16, mixer=conv", "width=32, mixer=patch", "width=32, mixer=conv",
    ]  # fmt: skip


def test_assignments_set_keys_within_groups_of_a_study():
    study = plans.read_study_config(
        "ablation", ["budget.steps=7", "set.train.batch_size=16", "seeds=[4, 5]", "samples=9"]
    )
    assert (study.budget, study.seeds, study.samples) == ({"steps": 7}, (4, 5), 9)
    assert study.set["train.batch_size"] == 16


@pytest.mark.parametrize(
    ("budget", "steps"),
    [({"steps": 50}, 50), ({"images": 320}, 10), ({}, 4800), ({"macs": 3 * 32 * 1e9}, 48)],
)
def test_a_budget_becomes_steps_of_this_batch_and_model(budget, steps):
    from dit_in_dit.config import presets
    from dit_in_dit.inspection import cost

    study = StudyConfig(base="emoji", arms={"one": {}}, budget=budget)
    found = arms.budgeted_config(study, arms.configure(study, {}), {}).train.steps
    if "macs" in budget:
        steps = round(1e9 / cost.macs(presets.get("emoji").model)["total"])
    assert found == steps


def test_keys_that_a_study_sets_are_not_adapted_to_the_number_of_steps():
    study = StudyConfig(base="emoji", arms={"one": {}}, budget={"steps": 100}, set={"train.warmup": 60})
    changes = {"train.evaluate_every": 3}
    train = arms.budgeted_config(study, arms.configure(study, changes), changes).train
    assert (train.warmup, train.evaluate_every, train.checkpoint_every) == (60, 3, 12)


def test_a_plan_is_equal_after_writing_and_reading(base, tmp_path):
    plan = planned(small(base, arms={"one": {}, "two": {"model.use_inner": False}}), tmp_path / "s")
    assert Plan.from_json(plan.to_json()) == plan == read_plan(tmp_path / "s")
    assert [trial.key for trial in plan.trials] == ["one-s0", "two-s0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arm: {a: {}}", "unknown key 'study.arm'; did you mean 'study.arms'?"),
        ("arms: {a: {model.depht: 3}}", "unknown key 'model.depht'; did you mean 'model.depth'?"),
        ("grid: {model.inner.width: []}", "study.grid.model.inner.width must be a list of values, not an empty one"),
        ("grid: {}", "give one of arms, grid and search"),
        ("arms: {a: {}}\ngrid: {seed: [1]}", "give one of arms, grid and search"),
        ("arms: {a: {}}\ncontrol: b", "no arm 'b'"),
        ("arms: {a: {}, b: {against: c}}", "no arm 'c'"),
        ("arms: {a b: {}, a-b: {}}", "share the folder name a-b"),
        ("arms: {a: {}}\nbudget: {days: 3}", "study.budget must be one of steps, images, macs, seconds"),
        ("arms: {a: {}}\nbudget: {steps: -1}", "study.budget.steps must be a number above 0"),
        ("arms: {a: {}}\nseeds: [1, 1]", "study.seeds must be different numbers"),
        ("arms: {a: {}}\nmetrics: [fid]", "unknown metrics 'fid'"),
        ("arms: {a: {}}\nprimary: held_out.0.3.high", "'held_out.0.3.high' is not measured"),
        ("arms: {a: {}}\nmetrics: [held_out]\nprimary: swd.32", "'swd.32' is not measured"),
        ("arms: {a: {}}\nbase: emojy", "unknown preset 'emojy'; did you mean 'emoji'?"),
        ("arms: {a: {}}\nbase: none.yaml", "cannot read study.base none.yaml"),
        ("arms: {a: {}}\nset: {data.source: /nowhere}", "/nowhere"),
        ("search: {model.inner.width: {low: 4, high: 2}}", "must have low < high"),
        ("arms: {a: {}}\nmetrics: [held_out, dinov2]", "no DINOv2 weights"),
        ("arms: {a: {}, b: {model.outer.width: 256, model.depth: null}}\nset: {train.steps: oops}", "train.steps"),
        ("arms: {a: {}, b: {data.held_out: 0.2}}", "data.held_out is 0.1 for 'a' and 0.2 for 'b'"),
        ("arms: {a: {}}\nmetrics: [held_out]\nprimary: FID", "FID needs study.samples=2048 at least"),
        ("- a", "must hold keys such as"),
        ("arms: {a: {}}\narms: {b: {}}", "given twice"),
    ],
)
def test_an_invalid_study_gives_a_one_line_error_before_the_first_trial(text, words, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["study", "run", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_an_arm_that_cannot_be_matched_gives_an_error_before_the_first_trial(base, tmp_path, capsys):
    deep = "{model.depth: 9, model.stages: first, model.outer.width: 64, model.outer.mlp_ratio: 4}"
    (tmp_path / "bad.yaml").write_text(f"base: {base}\nmetrics: [held_out]\narms:\n  a: {{}}\n  b: {deep}\n")
    with pytest.raises(SystemExit) as ended:
        main(["study", "run", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "'b'" in said
    assert "tolerance" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_of_one_study_refuses_another_study(base, tmp_path):
    planned(small(base), tmp_path)
    with pytest.raises(UserError, match=r"another study, samples: 4 / 5"):
        planned(small(base, samples=5), tmp_path)


def test_shipped_studies_are_listed_and_shown_unchanged(capsys):
    main(["study", "list"])
    said = capsys.readouterr().out
    assert all(name in said for name in plans.shipped_studies())
    main(["study", "show", "order"])
    assert capsys.readouterr().out == plans.shipped_studies()["order"].read_text()


def test_a_plan_shows_the_cost_of_every_arm(base, tmp_path, capsys):
    arms = "{nested: {}, plain: {model.use_inner: false}}"
    (tmp_path / "mine.yaml").write_text(f"base: {base}\nmatch: none\nmetrics: [held_out]\narms: {arms}\n")
    main(["study", "plan", str(tmp_path / "mine.yaml"), "--set", "budget.steps=7"])
    said = capsys.readouterr().out
    assert "7 steps" in said
    for name, stages in (("nested", "outer*1 inner*1"), ("plain", "outer*1")):
        assert any(line.split()[:1] == [name] and stages in line for line in said.splitlines())
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "base.yaml"}


# ------------------------------------------------------------------------------------------- running one


def test_every_arm_is_trained_with_every_seed_and_measured(base, tmp_path):
    plan = finish(small(base, seeds=[0, 1], metrics=["held_out", "pixels"]), tmp_path)
    found = results(tmp_path)
    assert found.keys() == {"one-s0", "two-s0", "one-s1", "two-s1"}
    for key, result in found.items():
        run = tmp_path / "runs" / key
        last = json.loads(run.joinpath("log.jsonl").read_text().splitlines()[-1])["held_out"]
        assert result.state == "done"
        assert result.metrics["held_out.0.2.high"] == last["0.2"]["high"]
        assert result.metrics["spectrum"] > 0
        assert result.floors["spectrum"] > 0
        assert result.protocol["images"] == plan.study.samples
        with np.load(run / "drawn.npz") as drawn:
            assert drawn["images"].shape == drawn["real"].shape == (24, 8, 8, 3)
    assert found["one-s0"].metrics != found["one-s1"].metrics != found["two-s1"].metrics


def test_a_custom_metric_can_be_primary(base, tmp_path, monkeypatch):
    contrast = Metric("contrast", "Mine", "zero", lambda samples, real: float(samples.std() - real.std()))
    monkeypatch.setitem(METRICS, "contrast", contrast)
    finish(small(base, metrics=["Mine"], primary="contrast"), tmp_path)
    for result in results(tmp_path).values():
        assert result.state == "done"
        assert result.metrics["contrast"] != 0
        assert result.floors["contrast"] >= 0


def test_a_finished_study_is_not_run_again(base, tmp_path):
    plan = finish(small(base), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
    assert list(run_trials(plan, tmp_path, Queue(plan, tmp_path), CPU)) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")} == before


def test_a_stopped_worker_gives_its_trial_back_and_the_next_worker_resumes_it(base, tmp_path):
    study = small(base, set={"train.checkpoint_every": 2})
    plan = planned(study, tmp_path / "stopped")
    events = run_trials(plan, tmp_path / "stopped", Queue(plan, tmp_path / "stopped"), CPU)
    next(event for event in events if event.step >= 4)
    events.close()  # as Ctrl-C does
    queue = Queue(plan, tmp_path / "stopped")
    assert queue.counts()["running"] == 0
    later = list(run_trials(plan, tmp_path / "stopped", queue, CPU))
    assert [event.key for event in later if event.text == "continued" and event.step >= 2] == ["one-s0"]
    finish(study, tmp_path / "whole")
    whole, stopped = (results(tmp_path / name) for name in ("whole", "stopped"))
    assert whole == stopped


def test_a_study_is_not_resumed_on_changed_data(base, folder, tmp_path):
    shutil.copytree(folder, images := tmp_path / "set")
    study = small(base, set={"data.source": str(images), "train.checkpoint_every": 2})
    plan = planned(study, out := tmp_path / "study")
    with closing(run_trials(plan, out, Queue(plan, out), CPU)) as events:
        next(event for event in events if event.step >= 4)
    path = sorted(images.rglob("*.*"))[0]
    shutil.move(path, tmp_path / path.name)
    Image.open(tmp_path / path.name).transpose(Image.Transpose.ROTATE_90).save(path)
    queue = Queue(plan, out)
    with pytest.raises(
        UserError, match=r"set is not what the study was planned on .* begin the study in another --out"
    ):
        list(run_trials(plan, out, queue, CPU))
    assert results(out) == {}  # no trial has failed of it
    earlier = replace(plan, made={name: value for name, value in plan.made.items() if name != "data"})
    (tmp_path / "earlier").mkdir()
    begun = list(run_trials(earlier, tmp_path / "earlier", Queue(earlier, tmp_path / "earlier"), CPU))
    assert "done" in {event.kind for event in begun}  # earlier versions did not note the data
    shutil.move(tmp_path / path.name, path)
    list(run_trials(plan, out, queue, CPU))
    assert {found.state for found in results(out).values()} == {"done"}
    shutil.rmtree(images)  # a finished one needs none
    assert list(run_trials(plan, out, queue, CPU)) == []


def test_a_trial_that_cannot_be_trained_fails_and_the_others_continue(base, tmp_path, monkeypatch):
    def diverges(config, run, **keys):
        yield from train(config, run, **keys)
        if config.train.learning_rate == 0.5:
            raise UserError("step 8: training diverged")

    monkeypatch.setattr("dit_in_dit.study.worker.train", diverges)
    plan = finish(small(base, arms={"wild": {"train.learning_rate": 0.5}, "good": {}}), tmp_path)
    found = results(tmp_path)
    assert found["good-s0"].state == "done"
    assert (found["wild-s0"].state, found["wild-s0"].reason) == ("failed", "step 8: training diverged")
    queue = Queue(plan, tmp_path)
    assert queue.finished()
    assert +queue.counts() == {"done": 1, "failed": 1}


def test_a_search_trains_the_choices_of_its_sampler(base, tmp_path):
    space = {"train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "model.inner.mixer": ["patch", "none"]}
    finish(small(base, search=space, trials=5), tmp_path)
    found = results(tmp_path)
    assert list(found) == ["t0000", "t0001", "t0002", "t0003", "t0004"]
    for key, result in found.items():
        changes = json.loads((tmp_path / "runs" / key / "changes.json").read_text())["changes"]
        assert 1e-4 <= changes["train.learning_rate"] <= 1e-2
        assert result.arm == arms.describe_changes(changes)
        stored = (tmp_path / "runs" / key / "config.yaml").read_text()
        assert f"mixer: {changes['model.inner.mixer']}" in stored


def test_pruning_stops_trials_that_are_worse_than_the_median(base, tmp_path, monkeypatch):
    def errors(run, primary):
        rate = read_config(run).train.learning_rate
        return [(step, 1 / rate) for step in range(2, 9, 2)]

    monkeypatch.setattr("dit_in_dit.study.worker._errors", errors)
    rates = [5e-3, 4e-3, 3e-3, 2e-3, 1e-3, 1e-4, 6e-3]  # the median is known after five
    study = small(base, grid={"train.learning_rate": rates}, prune=True, set={"train.evaluate_every": 2})
    finish(study, tmp_path)
    states = {key: (found.state, found.step) for key, found in results(tmp_path).items()}
    assert states.pop("learning-rate-0-0001-s0") == ("pruned", 2)
    assert set(states.values()) == {("done", 8)}


# ---------------------------------------------------------------------------------------- sharing trials


def test_a_trial_without_a_beat_goes_to_another_worker_after_its_lease(base, tmp_path, monkeypatch):
    plan = planned(small(base, arms={"one": {}}), tmp_path)
    clock = [0.0]
    monkeypatch.setattr("dit_in_dit.study.queue.time.monotonic", lambda: clock[0])
    dead, other = (Queue(plan, tmp_path, lease=10) for _ in range(2))
    lost = dead.claim()
    assert lost is not None
    assert other.claim() is None
    clock[0] = 9.0
    assert other.claim() is None
    clock[0] = 11.0
    taken = other.claim()
    assert taken is not None
    assert taken.key == lost.key
    assert taken.losses == 0  # it had saved nothing
    with pytest.raises(LeaseLostError):
        dead.done(lost, "done", 1.0)
    other.done(taken, "done", 2.0)
    assert [trial.value for trial in other.keys().values()] == [2.0]


def test_a_beat_renews_the_lease(base, tmp_path, monkeypatch):
    plan = planned(small(base, arms={"one": {}}), tmp_path)
    clock = [0.0]
    monkeypatch.setattr("dit_in_dit.study.queue.time.monotonic", lambda: clock[0])
    busy, other = (Queue(plan, tmp_path, lease=10) for _ in range(2))
    claim = busy.claim()
    for number in range(5):
        claim.trial.set_user_attr("beat", [number, 0, 0])
        clock[0] += 9.0
        assert other.claim() is None


def test_a_trial_enqueued_twice_is_done_once(base, tmp_path):
    plan = planned(small(base), tmp_path)
    first, second = Queue(plan, tmp_path), Queue(plan, tmp_path)
    for queue in (first, second):  # as two workers that start at the same moment
        for trial in plan.trials:
            queue.study.enqueue_trial({"arm": trial.arm, "seed": trial.seed}, user_attrs={"key": trial.key})
    claims = [queue.claim() for queue in (first, second, first, second)]
    assert [claim and claim.key for claim in claims] == ["one-s0", "two-s0", None, None]


def test_a_trial_that_kills_every_worker_is_given_up(base, tmp_path, monkeypatch):
    plan = planned(small(base, arms={"one": {}}), tmp_path)
    clock = [0.0]
    monkeypatch.setattr("dit_in_dit.study.queue.time.monotonic", lambda: clock[0])
    for _ in range(MOST_LOSSES):
        queue = Queue(plan, tmp_path, lease=10)
        while (claim := queue.claim()) is None:
            clock[0] += 11.0
        claim.trial.set_user_attr("beat", [0, 3, 2])
    queue = Queue(plan, tmp_path, lease=10)
    assert queue.claim() is None
    clock[0] += 11.0
    monkeypatch.undo()
    queue._seen = {number: (beat, since - 1e9) for number, (beat, since) in queue._seen.items()}
    assert [event.kind for event in run_trials(plan, tmp_path, queue, CPU)] == ["failed"]
    assert "5 workers were lost" in results(tmp_path)["one-s0"].reason


def test_the_next_worker_records_the_result_of_a_lost_worker(base, tmp_path):
    study = small(base, arms={"one": {}})
    finish(study, tmp_path / "a")
    plan = planned(study, tmp_path / "b")
    shutil.copytree(tmp_path / "a" / "runs", tmp_path / "b" / "runs")
    queue = Queue(plan, tmp_path / "b")
    assert [event.kind for event in run_trials(plan, tmp_path / "b", queue, CPU)] == ["done"]
    assert queue.keys()["one-s0"].value == results(tmp_path / "a")["one-s0"].metrics["held_out.0.2.high"]


def test_several_workers_start_no_more_search_trials_than_planned(base, tmp_path):
    plan = planned(small(base, search={"train.learning_rate": [1e-3, 1e-4]}, trials=3), tmp_path)
    queues = [Queue(plan, tmp_path) for _ in range(5)]
    claims = [queue.claim() for queue in queues]
    assert [claim and claim.key for claim in claims] == ["t0000", "t0001", "t0002", None, None]


def test_a_lost_trial_of_a_search_keeps_its_choice(base, tmp_path, monkeypatch):
    plan = planned(small(base, search={"train.learning_rate": {"low": 1e-5, "high": 1e-3}}, trials=2), tmp_path)
    clock = [0.0]
    monkeypatch.setattr("dit_in_dit.study.queue.time.monotonic", lambda: clock[0])
    dead, other = (Queue(plan, tmp_path, lease=10) for _ in range(2))
    lost, own = dead.claim(), other.claim()
    other.done(own, "done", 1.0)
    assert other.claim() is None
    clock[0] = 11.0
    taken = other.claim()
    assert (taken.key, taken.trial.params) == (lost.key, lost.trial.params)


def test_search_workers_make_different_choices_even_after_a_restart(base, tmp_path):
    plan = planned(small(base, search={"train.learning_rate": {"low": 1e-5, "high": 1e-3}}, trials=6), tmp_path)
    chosen = [Queue(plan, tmp_path).claim().trial.params["train.learning_rate"] for _ in range(6)]
    assert len(set(chosen)) == 6


def test_an_incomplete_line_in_the_journal_is_removed(base, tmp_path):
    plan = planned(small(base), tmp_path)
    Queue(plan, tmp_path).claim()
    with (tmp_path / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code": 6, "wor')  # its writer's machine went down
    assert Queue(plan, tmp_path).claim().key == "two-s0"


def test_a_different_order_of_arms_makes_a_different_study(base, tmp_path):
    first = planned(small(base), tmp_path / "a")
    second = replace(first, made={**first.made, "id": "another"})
    url = f"sqlite:///{tmp_path}/trials.db"
    assert Queue(first, tmp_path, url).claim().key == Queue(second, tmp_path, url).claim().key == "one-s0"


def test_an_unusable_storage_gives_a_one_line_error(base, tmp_path):
    plan = planned(small(base), tmp_path)
    with pytest.raises(UserError, match="cannot open --storage"):
        Queue(plan, tmp_path, "postgresql+nodriver://me:secret@nowhere/db")


# ------------------------------------------------------------------------------------- trials of an earlier copy


def kept(out: Path, to: Path, without: str = "") -> Path:
    """The two files of a study that are kept, without the rows of an arm."""
    main(["study", "report", str(out)])
    to.mkdir()
    shutil.copy(out / "plan.json", to)
    lines = (out / "results.csv").read_text().splitlines(keepends=True)
    (to / "results.csv").write_text("".join(line for line in lines if not without or not line.startswith(without)))
    return to


def test_a_study_takes_finished_trials_from_kept_rows_and_trains_the_others(base, tmp_path, capsys):
    study = small(base, metrics=["held_out", "pixels"])  # the latter have a protocol, which kept rows lack
    path = tmp_path / "which.yaml"
    path.write_text(yaml.safe_dump(to_dict(study)))
    finish(study, tmp_path / "first")
    rows = kept(tmp_path / "first", tmp_path / "kept", without="two,")
    again = tmp_path / "again"
    main(["study", "run", str(path), "--from", str(rows), "--out", str(again)])
    assert f"trials taken from {rows}: 1" in capsys.readouterr().out
    assert take_trials(rows, again) == 0
    first, second = results(tmp_path / "first"), results(again)
    assert {key: result.metrics for key, result in first.items()} == {key: r.metrics for key, r in second.items()}
    assert not (again / "runs/one-s0/log.jsonl").exists()
    assert (again / "runs/two-s0/log.jsonl").exists()
    assert (again / "results.csv").read_text() == (tmp_path / "first/results.csv").read_text()
    assert "1 were taken from kept rows" in (again / "report.md").read_text()


STUDIES = Path(__file__).parents[1] / "results" / "studies"
UNREADABLE = (
    ("results.csv", "arm,seed\nplain,0\n", "is not the table of a study"),
    ("results.csv", "arm,seed,state,step,metric,value,floor\nplain,0,done,8,swd.8,much,\n", "not the table"),
    ("plan.json", "{}", "no plan of a study"),
)


def test_rows_that_are_unreadable_or_of_another_study_are_refused_in_one_line(base, tmp_path):
    rows = tmp_path / "kept"
    shutil.copytree(STUDIES / "nesting", rows)
    planned(small(base), tmp_path / "other")
    with pytest.raises(UserError, match="another plan"):
        take_trials(rows, tmp_path / "other")
    (tmp_path / "again").mkdir()
    for name, content, said in UNREADABLE:
        before = (rows / name).read_text()
        (rows / name).write_text(content)
        with pytest.raises(UserError, match=said):
            take_trials(rows, tmp_path / "again")
        (rows / name).write_text(before)


@pytest.mark.parametrize("name", [name for name in plans.shipped_studies() if (STUDIES / name / "plan.json").exists()])
def test_shipped_studies_make_the_models_whose_results_are_kept(name, monkeypatch):
    monkeypatch.setattr(arms, "_times", lambda *_: {})  # measuring steps takes seconds
    study = plans.read_study_config(name)
    if study.match != "none":  # and so does matching of many arms
        study = replace(study, arms=dict(list(study.arms.items())[:4]))
    kept = {arm.name: arm.config.model for arm in read_plan(STUDIES / name).arms}
    for arm in arms.match_arms(study, torch.device("cpu")):
        assert arm.config.model == kept[arm.name]
