"""A user's classes, in a file outside the package, work in every command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import dit_in_dit
from conftest import inputs, perturbed, small_model
from dit_in_dit.cli import main
from dit_in_dit.config import choices, facts, plugins, presets, schema
from dit_in_dit.config.errors import PluginWarning, UserError
from dit_in_dit.config.files import changed_keys, config_hash, from_yaml, override, to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import Section, key, to_dict
from dit_in_dit.inspection.cost import macs
from dit_in_dit.inspection.plugin_parts import check_plugin_parts
from dit_in_dit.metrics.metric import METRICS
from dit_in_dit.model import compiled
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, Mean
from dit_in_dit.model.condition import CONDITIONS
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.nested import NestedDiT

IDEA = Path(__file__).parent / "plugin" / "my_idea.py"
PARTS = {"embed": "flat", "aggregate": "softmax", "mixer": "shift", "condition": "halved", "fuse": "doubled"}
PARTS |= {"spread": "same", "norm": "peak", "mlp": "cubic", "rope": "rows", "modulation": "gate_only"}


def own(kind: str) -> dict[str, object]:
    """Keyword arguments of `small_model` that choose the user's class of a kind."""
    return {kind: "polynomial"} if kind == "time_embed" else {"inner": {kind: PARTS[kind]}}


KINDS = [*sorted(PARTS), "time_embed"]
SMALL = [
    "model.image_size=8",
    "model.patch_size=4",
    "model.num_classes=3",
    "model.outer.width=16",
    "model.outer.num_heads=2",
    "model.inner.width=8",
    "model.inner.num_heads=2",
    "model.inner.sub_patch=2",
    "data.held_out=0.2",
    "train.steps=6",
    "train.batch_size=4",
    "train.warmup=1",
    "train.precision=float32",
    "train.checkpoint_every=3",
    "train.evaluate_every=3",
    "train.sample_every=0",
    "sample.steps=2",
    "sample.sampler=even",
]


def command(*words: object, code: int = 0, launcher: tuple[str, ...] = (), plugin: bool = True) -> str:
    """Output of a command in a separate process, so that tests do not share registered classes."""
    with_plugin = ["--plugin", str(IDEA)] if plugin else []
    line = [sys.executable, *launcher, "-m", "dit_in_dit", *map(str, words), *with_plugin]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=env, check=False, timeout=300)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def settings() -> list[str]:
    """`--set` options of a small run with all of the user's parts."""
    values = [
        *SMALL,
        "data.source=dots",
        "train.optimizer=momentum",
        "plugins.softmax.temperature=0.5",
        "model.time_embed=polynomial",
        "model.outer.modulation=gate_only",
        "model.outer.rope=rows",
        "model.stages=(inner outer)*2",
        "model.depth=null",
    ]
    values += [f"model.inner.{key}={value}" for key, value in PARTS.items()]
    return ["--preset", "emoji", *(word for value in values for word in ("--set", value))]


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all of the user's parts."""
    out = tmp_path_factory.mktemp("plugins") / "run"
    command("train", *settings, "--out", out, "--device", "cpu")
    return out


def test_the_figure_names_the_users_parts(settings, tmp_path):
    command("draw", *settings, "--out", tmp_path / "figure.svg")
    svg = (tmp_path / "figure.svg").read_text()
    assert [name for name in (*PARTS.values(), "polynomial") if name not in svg] == []


@contextmanager
def forgotten() -> Iterator[None]:
    """Forget afterwards which classes were registered within the block."""
    before = {kind: dict(choices.table(kind)) for kind in choices.KINDS}
    known, keys = dict(plugins._loaded), dict(choices.PLUGIN_KEYS)
    try:
        yield
    finally:
        sys.modules.pop(IDEA.stem, None)  # run anew in each test
        for kind, entries in before.items():
            choices.table(kind).clear()
            choices.table(kind).update(entries)
        for current, past in ((plugins._loaded, known), (choices.PLUGIN_KEYS, keys)):
            current.clear()
            current.update(past)


@pytest.fixture
def loaded() -> Iterator[None]:
    """Register the user's classes in this process for one test."""
    with forgotten():
        plugins.load_plugin(str(IDEA))
        yield


def here(*words: object) -> str | int | None:
    """Exit code of a command in this process, which loads the plug-in itself and forgets it afterwards."""
    assert str(IDEA) not in plugins._loaded
    with forgotten():
        try:
            main([*map(str, words), "--plugin", str(IDEA)])
        except SystemExit as ended:
            return ended.code
    return 0


def test_a_run_with_a_users_parts_resumes_bit_for_bit_with_loader_workers(run, settings, tmp_path):
    how = [*settings, "--set", "data.workers=2", "--out", tmp_path / "run", "--device", "cpu"]
    assert here("train", *how, "--until", "3") == 0
    command("train", "--resume", "--out", tmp_path / "run", "--device", "cpu")
    assert (tmp_path / "run/log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()


def test_two_processes_train_a_run_with_a_users_parts(settings, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command("train", *settings, "--out", tmp_path / "run", "--device", "cpu", launcher=launcher)
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) >= 6


def test_every_command_takes_a_run_with_a_users_parts(run, settings, tmp_path, capsys):
    assert here("inspect", *settings) == 0
    assert "inner blocks" in capsys.readouterr().out
    device = ("--device", "cpu")
    assert here("verify-resume", run, "--steps", "2", *device) == 0
    assert here("sample", run, "-n", "4", "--out", tmp_path / "samples", *device) == 0
    assert here("evaluate", run, "-n", "4", "--out", tmp_path / "evaluation", *device) == 0
    assert "contrast" in json.loads((tmp_path / "evaluation/metrics.json").read_text())["scores"]
    assert here("maps", run, "--num", "1", "--times", "0.5", "--out", tmp_path / "maps", *device) == 0
    assert here("match", *settings, "--like", run, "--json", *device) == 0
    assert here("export", run, "--format", "run", "--out", tmp_path / "given") == 0
    assert here("sample", tmp_path / "given", "-n", "2", "--out", tmp_path / "again", *device) == 0
    assert here("doctor", run, *device) in (0, 1)  # of six steps it may complain


@pytest.mark.slow
@pytest.mark.full
def test_a_study_on_two_workers_takes_a_users_parts(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dit_in_dit.study.match.SECONDS_EACH", 0.1)  # step times, which this study does not need
    assert here("config", *settings) == 0
    base = tmp_path / "base.yaml"
    base.write_text(capsys.readouterr().out)
    arms = {"mine": {}, "hot": {"plugins.softmax.temperature": 2}, "mean": {"model.inner.aggregate": "mean"}}
    study = {"base": str(base), "arms": arms, "seeds": [0]}
    study |= {"budget": {"steps": 4}, "match": "none", "samples": 4, "primary": "held_out.0.2.whole"}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    out = tmp_path / "out"  # the workers are processes of their own
    assert here("study", "run", tmp_path / "study.yaml", "--workers", "2", "--out", out, "--device", "cpu") == 0
    assert len(list((tmp_path / "out/runs").glob("*/result.json"))) == 3


@pytest.mark.parametrize("key", ["mlp", "rope", "modulation", "norm", "head_norm"])
def test_a_users_part_of_both_levels_replaces_the_choice_of_the_outer_one(key, loaded):
    name = PARTS[key.removeprefix("head_")]
    model = small_model("outer*2", outer={key: name})
    net = perturbed(NestedDiT(model))
    x, t, y = inputs(model)
    net(x, t, y).sum().backward()
    check_plugin_parts(model)
    assert any(type(part) is choices.table(choices.KEYS[f"model.outer.{key}"])[name] for part in net.modules())


@pytest.mark.parametrize("key", ["model.inner.mlp", "model.outer.rope", "model.outer.modulation", "model.time_embed"])
def test_a_class_of_each_new_kind_is_refused_in_a_pipeline(key, loaded):
    name = "polynomial" if key == "model.time_embed" else PARTS[key.split(".")[-1]]
    config = small_run(f"{key}={name}")
    values = {name: value for name, _, value in schema.keys(config)}
    with pytest.raises(UserError, match=f"got {key}={name}; use export --format run"):
        choices.check_travels(values)


def test_a_pipeline_export_of_a_users_class_is_refused(run, tmp_path, capsys):
    assert here("export", run, "--format", "pipeline", "--out", tmp_path / "pipeline") == 2
    assert "use export --format run" in capsys.readouterr().err
    assert not (tmp_path / "pipeline").exists()


def test_a_missing_plug_in_gives_an_error_that_names_the_option(run):
    said = command("sample", run, "-n", "2", "--device", "cpu", code=2, plugin=False)
    assert "was made with a plug-in: pass --plugin my_idea.py" in said
    assert said.count("\n") == 1
    manifest = json.loads(next((run / "checkpoints").glob("*/manifest.json")).read_text())
    assert [entry["name"] for entry in manifest["plugins"]] == ["my_idea.py"]


def test_a_changed_plug_in_source_gives_a_warning(run, loaded, monkeypatch):
    from dit_in_dit.runs import checkpoint

    changed = {"name": "my_idea.py", "sha256": "0" * 64}
    monkeypatch.setitem(plugins._loaded, str(IDEA), changed)
    with pytest.warns(PluginWarning, match=r"my_idea\.py has changed since"):
        checkpoint.newest(run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_part_can_replace_each_choice(kind, loaded):
    model = small_model("(inner outer)*2", **own(kind))
    made = perturbed(NestedDiT(model))
    x, t, y = inputs(model)
    out = made(x, t, y)
    assert out.shape == x.shape
    out.sum().backward()
    assert macs(model)["total"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_users_part_runs_in_half_precision(kind, dtype, loaded):
    model = small_model("(inner outer)*2 inner", **own(kind))
    x, t, y = inputs(model)
    assert NestedDiT(model).to(dtype)(x.to(dtype), t, y).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        out = NestedDiT(model)(x, t, y)
    out.float().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_users_part_compiles_without_graph_breaks(kind, loaded):
    torch._dynamo.reset()
    model = perturbed(NestedDiT(small_model("inner outer inner", **own(kind))))
    whole = torch.compile(model, backend="eager", fullgraph=True)
    x, t, y = inputs(model.config)
    torch.testing.assert_close(whole(x, t, y), model(x, t, y))


@pytest.mark.slow
def test_blocks_with_a_users_parts_compile_by_kind(loaded, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    parts = {kind: PARTS[kind] for kind in ("mixer", "condition", "norm", "mlp", "modulation")}
    model = perturbed(NestedDiT(small_model("inner*2 outer*2 inner", inner=parts)))
    x, t, y = inputs(model.config)
    expected = model(x, t, y)
    compiled.compile_blocks(model)
    torch.testing.assert_close(model(x, t, y), expected)
    model(x, t, y).sum().backward()


def test_a_run_in_bfloat16_resumes_and_is_sampled_from_another_working_folder(settings, tmp_path, monkeypatch):
    half = ("--set", "train.precision=bfloat16")
    assert here("train", *settings, *half, "--out", tmp_path / "run", "--until", "3") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    command("train", "--resume", "--out", "../run")
    assert here("sample", "../run", "-n", "2", "--out", "drawn") == 0


def test_register_errors_name_the_rule(loaded):
    class Empty(dit_in_dit.model.aggregate.Aggregator):
        pass

    class Forwardless(dit_in_dit.model.aggregate.Fusion):
        pass

    for arguments, said in (
        (("agregate", "max", Mean), "unknown kind 'agregate'; did you mean 'aggregate'"),
        (("aggregate", "a b", Mean), "a name must be a letter"),
        (("aggregate", "mean", AGGREGATORS["softmax"]), "'mean' exists already"),
        (("aggregate", "max", torch.nn.Linear), "must be a class with the base dit_in_dit.model.aggregate.Aggregator"),
        (("aggregate", "max", lambda: 0), "must be a class with the base"),
        (("aggregate", "max", Empty), "Empty lacks forward, macs, weights of Aggregator"),
        (("fuse", "max", Forwardless), "Forwardless lacks forward of Fusion"),
        (("optimizer", None, Mean), "a name must be a letter"),
        (("sampler", "other", Mean), "the sampler 'other' must be a Sampler with that name"),
        (("metric", "other", METRICS["contrast"]), "the metric 'other' must be a Metric with that name"),
    ):
        with pytest.raises(UserError, match=said):
            dit_in_dit.register(*arguments)


def small_run(*assignments):
    return override(presets.get("emoji"), [*SMALL, "sample.sampler=heun", *assignments])


def test_keys_of_a_users_class_are_passed_to_it_and_hashed(loaded):
    plain, mine = small_run(), small_run("model.inner.aggregate=softmax")
    assert "plugins" not in to_yaml(plain)
    assert mine.plugins["softmax"].temperature == 1
    hot = override(mine, ["plugins.softmax.temperature=2"])
    assert AGGREGATORS["softmax"](hot.model).temperature == 2
    assert config_hash(hot) != config_hash(mine) != config_hash(plain)
    assert changed_keys(mine, hot) == {"plugins.softmax.temperature": (1.0, 2.0)}
    text = to_yaml(hot, meanings=True)
    assert re.search(r"temperature: 2.0 +# divides the scores", text)
    assert from_yaml(text) == hot == RunConfig.from_dict(to_dict(hot))
    assert override(plain, ["model.inner.aggregate=softmax", "plugins.softmax.temperature=2"]) == hot


def test_keys_of_a_plug_in_that_is_not_loaded_give_an_error():
    text = to_yaml(small_run()) + "plugins: {softmax: {temperature: 2}}"
    with pytest.raises(UserError, match=r"unknown key 'plugins\.softmax': name its plug-in with --plugin"):
        from_yaml(text)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("plugins.softmax.temperature=0", r"plugins\.softmax\.temperature must be from 0\.01 to 100: got 0"),
        ("plugins.softmax.temperature=hot", r"plugins\.softmax\.temperature must be a finite number: got 'hot'"),
        (
            "plugins.softmax.temprature=1",
            r"'plugins\.softmax\.temprature'; did you mean 'plugins\.softmax\.temperature'",
        ),
        ("plugins.sofmax.temperature=1", r"'plugins\.sofmax\.temperature'; did you mean"),
        ("plugins.softmax=1", r"plugins\.softmax must be a group of keys: got '1'"),
        ("plugins=1", "plugins must be a group of keys: got '1'"),
    ],
)
def test_a_wrong_key_of_a_users_class_gives_a_one_line_error(assignment, said, loaded):
    with pytest.raises(UserError, match=said):
        small_run("model.inner.aggregate=softmax", assignment)


def test_register_errors_about_keys_name_the_rule(loaded):
    @dataclass(frozen=True)
    class Other(Section):
        other: int = key(1, "a number")

    @dataclass(frozen=True)
    class Needed(Section):
        needed: int

    @dataclass(frozen=True)
    class Loose(Section):
        loose: dict[str, float] = key(dict, "unhashable")

    @dataclass(frozen=True)
    class Taken(Section):
        items: int = key(1, "a method of Section")

    @dataclass(frozen=True)
    class Broken(Section):
        broken: int = key(1, "two\nlines")

    class Undecorated(Section):
        number: int = key(1, "a number")

    for kind, name, keys, said in (
        ("metric", "contrast", Other, "a metric cannot have config keys"),
        ("aggregate", "softmax", dict, r"must be a class with the base dit_in_dit\.config\.schema\.Section"),
        ("aggregate", "softmax", Other, r"plugins\.softmax exists already"),
        ("mixer", "shift", Needed, r"plugins\.shift\.needed must be `key\(DEFAULT, MEANING\)`"),
        ("mixer", "shift", Loose, r"each key of plugins\.shift must have a default of numbers, text or tuples"),
        ("mixer", "shift", Taken, r"plugins\.shift\.items must be .* of a name that is free"),
        ("mixer", "shift", Broken, r"the meaning of plugins\.shift\.broken must be one line"),
        ("mixer", "shift", Undecorated, r"Undecorated of plugins\.shift must be a dataclass"),
    ):
        with pytest.raises(UserError, match=said):
            dit_in_dit.register(kind, name, choices.table(kind)[name], keys=keys)


def test_a_later_key_of_a_users_class_keeps_the_hash_at_its_default(loaded):
    @dataclass(frozen=True)
    class Later(Section):
        strength: float = key(1.0, "came later", added=2)

    before = config_hash(small_run("model.inner.mixer=shift"))
    dit_in_dit.register("mixer", "shift", MIXERS["shift"], keys=Later)
    after = small_run("model.inner.mixer=shift")
    assert after.plugins["shift"].strength == 1
    assert config_hash(after) == before != config_hash(override(after, ["plugins.shift.strength=2"]))


def test_keys_that_no_class_has_are_an_error_that_names_register(loaded):
    with pytest.raises(UserError, match="shift has no config keys: register it with keys="):
        small_run("model.inner.mixer=shift").plugins["shift"]


def test_an_unknown_choice_names_the_plugin_option():
    with pytest.raises(UserError, match=r"must be one of mean, .*--plugin\): got 'softmax'"):
        small_model(inner={"aggregate": "softmax"})


def test_a_broken_plug_in_gives_a_one_line_error(tmp_path):
    broken = tmp_path / "broken_idea.py"
    broken.write_text("1 / 0")
    (tmp_path / "random.py").write_text("")
    (tmp_path / "leaving_idea.py").write_text("raise SystemExit(0)")
    (tmp_path / "my-idea.py").write_text("")
    for text, said in (
        (tmp_path / "absent.py", "no such file"),
        (broken, "failed: ZeroDivisionError"),
        (tmp_path / "leaving_idea.py", "failed: SystemExit"),
        (tmp_path / "random.py", r"Python has a module 'random' already \(.*random\.py\): rename random\.py"),
        (tmp_path / "my-idea.py", "must be letters, digits and '_'"),
        ("nobody", "no installed package has an entry point 'nobody'"),
    ):
        with pytest.raises(UserError, match=said):
            plugins.load_plugin(str(text))


def test_facts_of_choices_in_the_config_equal_those_of_the_classes():
    crosses = {name: mixer is not None and mixer.crosses_patches for name, mixer in MIXERS.items()}
    assert crosses == facts.CROSSES_PATCHES
    assert {name: fuse.keeps_outer for name, fuse in FUSIONS.items()} == facts.KEEPS_OUTER
    assert {name: condition.reads_outer for name, condition in CONDITIONS.items()} == facts.READS_OUTER
