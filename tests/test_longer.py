"""A resumed run may change its number of steps and keys on which no weight depends; a run may count in epochs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, from_yaml, override, to_yaml
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import read_config, read_history
from dit_in_dit.runtime.device import resolve_auto
from dit_in_dit.study import arms, plan
from dit_in_dit.training.loop import train
from dit_in_dit.training.optimizer import learning_rate


def run(config, out: Path, **keys) -> list:
    return list(train(config, out, device="cpu", **keys))


def bits(out: Path) -> tuple[dict[str, str], bytes]:
    return checkpoint.newest(out).manifest["sha256"], (out / "log.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------ longer


def test_an_extended_run_equals_a_run_of_that_many_steps(run_config, tmp_path):
    longer = with_train(run_config, steps=9)
    run(longer, tmp_path / "asked")
    run(run_config, tmp_path / "extended")
    events = run(longer, tmp_path / "extended", resume=True)
    assert "from step 6: train.steps 6 -> 9, as if" in events[0].values["changed"]
    assert bits(tmp_path / "extended") == bits(tmp_path / "asked")
    assert (tmp_path / "extended/config.yaml").read_bytes() == (tmp_path / "asked/config.yaml").read_bytes()
    recorded = checkpoint.newest(tmp_path / "extended").manifest["changes"]
    assert recorded == read_history(tmp_path / "extended", longer)
    assert [(change["step"], change["keys"]) for change in recorded] == [(6, {"train.steps": [6, 9]})]
    assert "changes" not in checkpoint.newest(tmp_path / "asked").manifest


def test_a_stopped_run_is_shortened_and_extended_again(run_config, tmp_path):
    run(run_config, tmp_path / "asked")
    run(with_train(run_config, steps=40), tmp_path / "run", until=3)
    run(with_train(run_config, steps=6), tmp_path / "run", resume=True, until=5)
    run(with_train(run_config, steps=30), tmp_path / "run", resume=True, until=5)
    run(with_train(run_config, steps=6), tmp_path / "run", resume=True)
    assert bits(tmp_path / "run") == bits(tmp_path / "asked")
    steps = [(change["step"], change["keys"]["train.steps"]) for change in read_history(tmp_path / "run", run_config)]
    assert steps == [(3, [40, 6]), (5, [6, 30]), (5, [30, 6])]


def test_a_run_does_not_end_before_the_step_it_reached(run_config, tmp_path):
    run(run_config, tmp_path / "run", until=4)
    before = (tmp_path / "run/config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"at least 4, which .* has reached: got 3"):
        run(with_train(run_config, steps=3), tmp_path / "run", resume=True)
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    ended = run(with_train(run_config, steps=4), tmp_path / "run", resume=True)
    assert ended[-1].kind == "held_out"  # due at the last step


def test_a_run_without_a_checkpoint_is_extended(run_config, tmp_path):
    stopped = train(run_config, tmp_path / "run", device="cpu")
    next(stopped)
    stopped.close()
    longer = with_train(run_config, steps=7)
    assert run(longer, tmp_path / "run", resume=True)[-1].step == 7
    assert read_history(tmp_path / "run", longer)[0]["step"] == 0


def test_a_cosine_schedule_continues_on_the_longer_cosine_and_says_so(run_config, tmp_path):
    cosine = with_train(run_config, schedule="cosine", warmup=2)
    run(cosine, tmp_path / "run")
    longer = with_train(cosine, steps=12)
    events = run(longer, tmp_path / "run", resume=True)
    before, after = learning_rate(cosine.train, 5), learning_rate(longer.train, 6)
    assert f"{before:.3g} before, is now {after:.3g}" in events[0].values["changed"]
    rates = [event.values["learning_rate"] for event in events if event.kind == "step"]
    assert rates == [learning_rate(longer.train, step) for step in range(6, 12)]
    run(cosine, tmp_path / "early", until=2)  # in the warm-up, which does not depend on the number of steps
    assert ", as if" in run(longer, tmp_path / "early", resume=True)[0].values["changed"]
    run(longer, tmp_path / "asked")
    assert bits(tmp_path / "early") == bits(tmp_path / "asked")


@pytest.mark.parametrize(
    "settings",
    [
        ["train.checkpoint_every=2", "train.keep_every=2"],
        ["train.sample_every=2", "sample.steps=2", "sample.guidance=3"],
        ["train.evaluate_every=0"],
        ["train.recompute=both"],
        ["train.timeout=9", "train.skip_most=3", "train.on_divergence=roll_back"],
        ["data.workers=1"],
    ],
)
def test_a_key_on_which_no_weight_depends_may_change(run_config, tmp_path, settings):
    run(run_config, tmp_path / "asked")
    run(run_config, tmp_path / "run", until=3)
    changed = override(run_config, settings)
    run(changed, tmp_path / "run", resume=True)
    changed = resolve_auto(changed, torch.device("cpu"))  # as a run stores it
    assert bits(tmp_path / "run")[0] == bits(tmp_path / "asked")[0]
    assert read_config(tmp_path / "run") == changed
    keys = {setting.partition("=")[0] for setting in settings}
    assert read_history(tmp_path / "run", changed)[0]["keys"].keys() == keys


@pytest.mark.parametrize(
    "setting",
    [
        *("train.learning_rate=0.5", "train.precision=bfloat16", "train.compile=true", "train.ema=0.5", "seed=5"),
        *("train.parallel=fsdp", "train.warmup=3", "data.held_out=0.3", "model.outer.width=64", "train.batch_size=2"),
    ],
)
def test_another_change_on_resume_is_refused_with_the_way_out(run_config, tmp_path, setting):
    run(with_train(run_config, steps=1), tmp_path / "run")
    wanted = rf"{setting.partition('=')[0]} is .*, not .*--init"
    with pytest.raises(UserError, match=wanted):
        run(override(with_train(run_config, steps=1), [setting]), tmp_path / "run", resume=True)
    assert not (tmp_path / "run/history.json").exists()


def test_a_process_killed_between_history_and_config_leaves_a_run_that_resumes(run_config, tmp_path):
    run(run_config, tmp_path / "run")
    before = (tmp_path / "run/config.yaml").read_bytes()
    run(with_train(run_config, steps=8), tmp_path / "run", resume=True, until=6)
    (tmp_path / "run/config.yaml").write_bytes(before)  # as if the process had been killed before this write
    assert checkpoint.newest(tmp_path / "run").step == 6
    assert read_history(tmp_path / "run", run_config) == []
    longer = with_train(run_config, steps=7)
    run(longer, tmp_path / "run", resume=True)
    assert [change["keys"] for change in read_history(tmp_path / "run", longer)] == [{"train.steps": [6, 7]}]


def test_an_edited_config_or_history_of_an_extended_run_is_refused(run_config, tmp_path):
    run(run_config, tmp_path / "run")
    longer = with_train(run_config, steps=8)
    run(longer, tmp_path / "run", resume=True, until=6)
    (tmp_path / "run/config.yaml").write_text(to_yaml(with_train(longer, ema=0.5)))
    with pytest.raises(UserError, match="was changed since"):
        checkpoint.newest(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(to_yaml(longer))
    assert checkpoint.newest(tmp_path / "run").step == 6
    for text in ("[]", '{"changes": 3}', '{"changes": [{"step": 6}]}', '{"changes": [{}', '{"changes": null}'):
        (tmp_path / "run/history.json").write_text(text)
        with pytest.raises(UserError, match=r"history\.json"):
            checkpoint.newest(tmp_path / "run")


def test_the_command_extends_a_run_and_verify_resume_accepts_it(run_config, tmp_path, capsys, monkeypatch):
    from dit_in_dit.cli import verify_resume

    monkeypatch.setattr(verify_resume, "_train", lambda arguments: main(["train", *arguments]))
    out = str(tmp_path / "run")
    run(run_config, tmp_path / "run")
    main(["train", "--resume", "--set", "train.steps=7", "--out", out, "--device", "cpu"])
    assert "train.steps 6 -> 7" in capsys.readouterr().err
    main(["verify-resume", out, "--steps", "7", "--stop", "3", "--device", "cpu"])
    assert "DIFFERENT" not in capsys.readouterr().out
    main(["sample", out, "-n", "1", "--out", str(tmp_path / "samples"), "--device", "cpu"])


# ------------------------------------------------------------------------------------------ epochs


def test_epochs_become_steps_of_the_data_before_the_run_is_written(run_config, tmp_path):
    config = override(run_config, ["train.epochs=1.5", "train.accumulate=2"])
    images = open_source(config.data, config.model).train_size  # in steps of 8
    run(config, tmp_path / "run", until=1)
    stored = read_config(tmp_path / "run")
    assert (stored.train.steps, stored.train.epochs) == (round(1.5 * images / 8), None)
    assert "\n  epochs:" not in (tmp_path / "run/config.yaml").read_text()
    run(override(stored, ["train.epochs=2"]), tmp_path / "run", resume=True)
    assert checkpoint.newest(tmp_path / "run").step == round(2 * images / 8)


def test_steps_and_epochs_replace_each_other_but_are_not_given_together(run_config):
    counted = override(run_config, ["train.epochs=2"])
    assert from_yaml(to_yaml(counted)) == counted
    assert "\n  steps:" not in to_yaml(counted).partition("sample:")[0]
    assert override(counted, ["train.steps=6"]) == run_config
    for wrong in (["train.steps=4", "train.epochs=2"], ["train={steps: 3, epochs: 2}"]):
        with pytest.raises(UserError, match=r"train\.steps and train\.epochs exclude each other"):
            override(run_config, wrong)
    text = to_yaml(counted).replace("  epochs: 2.0", "  epochs: 2.0\n  steps: 3")
    with pytest.raises(UserError, match="exclude each other"):
        from_yaml(text)


def test_a_config_without_epochs_is_written_and_hashed_as_before(run_config):
    assert "epochs:" not in to_yaml(run_config)
    assert config_hash(override(run_config, ["train.epochs=2"])) != config_hash(run_config)
    with pytest.raises(UserError, match="exclude each other"):
        replace(run_config.train, epochs=2.0)


def test_epochs_of_endless_data_are_refused(run_config, tmp_path):
    config = override(replace(run_config, data=DataConfig(source="mosaic")), ["train.epochs=2", "model.num_classes=9"])
    with pytest.raises(UserError, match=r"train\.epochs needs data with an end, and mosaic has none"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recipe_does_not_count_epochs(capsys):
    with pytest.raises(SystemExit):
        main(["recipe", "emoji", "--set", "train.epochs=2"])
    assert "set train.steps instead of train.epochs" in capsys.readouterr().err


def test_a_study_counts_its_budget_in_epochs(run_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arms, "quick_times", lambda *_: {})  # no step is measured
    (tmp_path / "base.yaml").write_text(to_yaml(run_config))
    (tmp_path / "study.yaml").write_text(
        json.dumps({"base": str(tmp_path / "base.yaml"), "arms": {"one": {}, "big": {"train.batch_size": 8}}})
    )
    words = ["study", "plan", str(tmp_path / "study.yaml"), "--device", "cpu", "--set"]
    study = plan.read_study_config(str(tmp_path / "study.yaml"), ["budget.epochs=5"])
    images = open_source(run_config.data, run_config.model).train_size
    for changes, batch in (({}, 4), ({"train.batch_size": 8}, 8), ({"train.epochs": 1}, 4)):
        train = arms.budgeted_config(study, arms.configure(study, changes), changes).train
        assert (train.steps, train.epochs) == (round(5 * images / batch), None)
    study = plan.read_study_config(str(tmp_path / "study.yaml"), ["set.train.epochs=2"])
    assert arms.budgeted_config(study, arms.configure(study, {}), {}).train.steps == images // 2
    study = plan.read_study_config(str(tmp_path / "study.yaml"), ["set.train.epochs=2", "budget.steps=9"])
    assert arms.budgeted_config(study, arms.configure(study, {}), {}).train.steps == 9
    main([*words, "budget.epochs=5"])
    said = capsys.readouterr().out
    assert f"{round(5 * images / 8)} to {round(5 * images / 4)} steps" in said
