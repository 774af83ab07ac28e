"""The work behind the page of `dit-in-dit app`: drawing, maps, designs, runs, data. The page itself: test_app_page."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_in_dit as dd
from conftest import smallest_and_largest
from dit_in_dit.app import data, design, drawing, inside, runs
from dit_in_dit.app.drawing import ALL, Settings, Way, draw_way
from dit_in_dit.app.events import guarded
from dit_in_dit.app.library import MOST_MODELS, Library
from dit_in_dit.app.token_gate import TokenGate, needs_token
from dit_in_dit.attention_maps.samples import draw_on_and_off
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override, replace_keys
from dit_in_dit.data.run_data import open_source_of
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import to_floats, to_pixels
from dit_in_dit.runs.pretrained import pretrained_models
from dit_in_dit.study.match import forward_macs


@pytest.fixture(scope="module")
def emoji():
    return dd.load("emoji", "cpu")


def way_of(model: Any, settings: Settings, **how: Any) -> Way:
    *steps, way = draw_way(model, settings, **how)
    assert [t for t, _ in steps] == list(way.times[:-1])
    return way


# ------------------------------------------------------------------------------ draw


def test_the_page_draws_the_samples_of_the_same_seed(emoji):
    settings = Settings("heart", seed=3, guidance=2, steps=3, sampler="heun", num=2)
    way = way_of(emoji, settings)
    pictures = emoji.sample("heart", 2, seed=3, guidance=2, steps=3, sampler="heun")
    assert np.array_equal(way.estimate[-1], pictures.pixels)
    assert way.labels == ("heart", "heart")
    trajectory = [step.pixels for step in pictures.trajectory()]
    assert np.array_equal(way.noisy, np.stack(trajectory))
    assert way.times[-1] == 0


def test_all_classes_are_drawn_in_turn(emoji):
    way = way_of(emoji, Settings(ALL, steps=2, num=4))
    assert np.array_equal(way.estimate[-1], emoji.sample(num=4, guidance=1, steps=2, sampler="unipc").pixels)
    assert way.labels == emoji.classes[:4]


def test_without_the_inner_path_the_samples_are_those_of_maps(emoji):
    settings = Settings(steps=2, guidance=1, num=2)
    with torch.inference_mode():
        config = replace_keys(emoji.config, {"sample.steps": 2, "sample.guidance": 1, "sample.sampler": "unipc"})
        off = draw_on_and_off(emoji.net, config, emoji.config.sample.micro_batch).off
    assert np.array_equal(way_of(emoji, settings, inner=False).estimate[-1], to_pixels(torch.from_numpy(off[:2])))
    on = way_of(emoji, settings).estimate[-1]
    assert np.array_equal(on, emoji.sample(num=2, steps=2, guidance=1, sampler="unipc").pixels)  # the hooks are gone


def test_a_value_out_of_range_is_refused_by_name(emoji):
    for changes, rule in (
        ({"steps": 0}, "steps must be a whole number from 1 to 1000: got 0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"guidance": -1.0}, "sample.guidance must be from 0 to 100: got -1"),
        ({"sampler": "none"}, "sample.sampler must be one of"),
        ({"num": 9}, "images must be a whole number from 1 to 8: got 9"),
        ({"classes": "flagz"}, "unknown class 'flagz'"),
    ):
        with pytest.raises(UserError, match=rule):
            list(draw_way(emoji, Settings(**changes)))


def test_the_difference_of_images_is_scaled_to_its_largest_value():
    one = np.full((1, 8, 8, 3), 128, np.uint8)
    other = one.copy()
    one[0, 2, 3] = 178
    apart, factor = drawing.difference(one, other)
    assert apart[0, 2, 3].tolist() == [255] * 3
    assert set(np.delete(apart[0, :, :, 0].ravel(), 19)) == {128}
    assert factor == pytest.approx(127.5 / 50)
    smooth = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8)[:, None, None], (1, 16, 16, 3))
    striped = smooth.copy()
    striped[:, ::2] //= 2
    fine = drawing.difference(striped, smooth, fine=True)
    assert np.abs(to_floats(fine[0])).mean() > 0.1
    assert drawing.difference(smooth, smooth) == (pytest.approx(np.full((1, 16, 16, 3), 128)), 1.0)


# ------------------------------------------------------------------------------ library


def test_the_library_lists_given_runs_first_then_nested_shipped_models(tmp_path):
    library = Library(folder=tmp_path / "runs")
    names = list(library.runs())
    assert names.index("emoji") < names.index("emoji-dit")
    given = Library([pretrained_models()["emoji-dit"]], tmp_path)
    assert next(iter(given.runs())) == "emoji-dit"
    assert len(given.runs()) == len(names)
    assert library.beside("emoji")[0] == "emoji-dit"
    with pytest.raises(UserError, match="no run is named emojis; did you mean 'emoji'"):
        library.model("emojis")


def test_a_model_is_loaded_once_and_few_stay_in_memory(tmp_path):
    library = Library(folder=tmp_path)
    assert library.model("emoji") is library.model("emoji")
    for number in range(MOST_MODELS):
        library._models[Path(str(number)), "1"] = library.model("emoji-dit")
    library.model("emoji")
    assert len(library._models) == MOST_MODELS


def damaged_runs(folder: Path) -> None:
    """A good run, one without a readable config and one without a readable log."""
    for name in ("good", "config", "log"):
        shutil.copytree("models/emoji-dit", folder / name)
        (folder / name / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n' if name == "good" else "none\n\n")
    (folder / "config" / "config.yaml").write_text("model: [")


def test_a_run_that_cannot_be_read_is_left_out_and_its_row_says_why(tmp_path):
    damaged_runs(tmp_path)
    library = Library(folder=tmp_path)
    assert set(library.runs()) >= {"good", "log", "emoji"}
    assert "config" not in library.runs()
    assert "good" in library.beside("emoji")
    states = runs.training_runs(tmp_path)
    assert states["good"].step == 1
    assert "config.yaml is not valid YAML" in states["config"].text
    assert "log.jsonl" in states["log"].text
    with (tmp_path / "good" / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "loss": 1.0}\n')
    assert runs.training_runs(tmp_path)["good"].step == 2


# ------------------------------------------------------------------------------ inside


def test_own_held_out_and_drawn_images_give_a_page_of_maps():
    emoji = dd.load("emoji", "cpu")
    object.__setattr__(emoji, "config", replace_keys(emoji.config, {"sample.steps": 2}))
    picture = np.zeros((80, 50, 3), np.uint8)
    picture[:, :25] = 255
    own = inside.own_view(emoji, picture, "heart")
    assert own.images.shape == (1, 3, 32, 32)
    assert own.labels == (emoji.classes.index("heart"),)
    assert own.images[0, :, 16, 2].min() == 1
    assert own.images[0, :, 16, 30].max() == -1
    drawn = inside.drawn_view(emoji, 5, "heart")
    wanted = emoji.sample("heart", 1, seed=5)
    assert np.array_equal(to_pixels(torch.from_numpy(drawn.images)), wanted.pixels)
    *passes, html = inside.inside_page(emoji, inside.held_out_view(emoji, 1, "animal-mammal"))
    assert passes[-1] == (13, 13)
    assert "<html" in html
    early = inside.inside_page(emoji, inside.held_out_view(emoji, 1, "animal-mammal"))
    next(early)
    early.close()
    assert not any(module._forward_hooks for module in emoji.net.modules())
    with pytest.raises(UserError, match="image must be below"):
        inside.held_out_view(emoji, 5000, "animal-mammal")


# ------------------------------------------------------------------------------ design


@pytest.mark.parametrize("name", smallest_and_largest(presets.NAMES))
def test_a_preset_comes_back_from_its_fields(name):
    config = presets.get(name)
    values = {field.key: design.field_value(config, field) for field in design.fields()}
    assert design.designed(name, config.model.program, values) == config
    assert dict(design.cost_rows(config))["parameters"]


def shown_command(name: str, config: Any) -> Any:
    """The config that the shown command trains."""
    words = shlex.split(design.command(name, config))
    return override(presets.get(name), [word for at, word in enumerate(words) if words[at - 1] == "--set"])


@pytest.mark.filterwarnings("ignore::dit_in_dit.config.errors.LeftOutWarning")
def test_every_choice_of_every_menu_gives_a_config_or_one_line_and_a_command():
    start = presets.get("emoji")
    values = {field.key: design.field_value(start, field) for field in design.fields()}
    menus = [(field.key, choice) for field in design.fields() for choice in field.choices]
    assert len(menus) > 60
    taken, lines = 0, []
    for key, choice in menus:
        try:
            config = design.designed("emoji", start.model.program, {**values, key: choice})
        except UserError as error:
            lines.append(str(error))
            continue
        taken += 1
        assert shown_command("emoji", config) == config
    assert taken > 45
    assert not any("\n" in line for line in lines)


def test_stages_are_changed_by_blocks_and_checked():
    values = {field.key: design.field_value(presets.get("dit-s2"), field) for field in design.fields()}
    config = design.designed("dit-s2", [("outer", 2), ("inner", 1), ("outer", 1)], values)
    assert config.model.stages == "outer*2 inner*1 outer*1"
    assert config.model.depth is None
    assert shown_command("dit-s2", config) == config
    with pytest.raises(UserError, match="add an outer or an inner one"):
        design.designed("dit-s2", [], values)
    with pytest.raises(UserError, match=r"model\.outer\.width is empty"):
        design.designed("dit-s2", [("outer", 1)], {**values, "model.outer.width": None})


def test_the_shown_costs_are_those_of_the_built_model():
    config = presets.get("emoji")
    with torch.device("meta"):
        parameters = sum(each.numel() for each in NestedDiT(config.model).parameters())
    shown = dict(design.cost_rows(config))
    assert shown["parameters"] == f"{parameters / 1e6:,.2f} M"
    assert shown["inner tokens"] == "16 x 64 of width 16"


def test_the_plain_twin_of_a_design_costs_the_same():
    config = presets.get("emoji")
    rows = dict(design.plain_twin(config))
    assert "model.use_inner false" in rows["plain twin of equal MACs"]
    assert float(rows["its MACs per image"].split()[0]) == pytest.approx(forward_macs(config.model) / 1e6, rel=0.02)
    assert design.plain_twin(presets.get("dit-s2")) == [("plain twin", "this model has no inner blocks")]


# ------------------------------------------------------------------------------ runs and data


@pytest.mark.slow
def test_a_run_is_started_stopped_resumed_and_drawn(tmp_path):
    trainings = runs.Trainings(tmp_path)
    sets = "train.steps=400 train.batch_size=2 train.checkpoint_every=1000 train.evaluate_every=0 train.sample_every=0"
    trainings.start("one", "small", f"{sets} model.num_classes=9")
    with pytest.raises(UserError, match="is being trained"):  # a second click, before there is a folder
        trainings.start("one", "small", sets)

    def wait(until: Any) -> runs.RunState:
        for _ in range(600):
            state = runs.training_runs(tmp_path).get("one")
            if state and until(state):
                return state
            time.sleep(0.1)
        raise AssertionError(trainings.output("one"))

    wait(lambda state: state.running and state.step > 2)
    with pytest.raises(UserError, match="is being trained"):
        trainings.resume("one")
    with pytest.raises(UserError, match="exists: choose another name, or resume it"):
        trainings.start("one", "small", sets)
    trainings.stop("one")
    stopped = wait(lambda state: not state.running)
    assert 2 < stopped.step < 400
    assert stopped.text == "stopped"
    assert "stopped; continue it with --resume" in trainings.output("one")
    trainings.resume("one")
    wait(lambda state: state.step > stopped.step)
    trainings.stop("one")
    wait(lambda state: not state.running)
    figures, _ = runs.curve_figures(list(runs.training_runs(tmp_path).values()))
    assert [title for title, png in figures if png.startswith(b"\x89PNG")] == ["training loss"]
    with pytest.raises(UserError, match="this page does not train"):
        runs.Trainings(tmp_path).stop("one")


def test_a_users_plug_in_reaches_the_shown_command_and_the_started_process(tmp_path, monkeypatch):
    plug_in, started = Path(__file__).parent / "plugin" / "my_idea.py", []
    for module in (runs, design):
        monkeypatch.setattr(module, "plugin_arguments", lambda: ["--plugin", str(plug_in)])
    monkeypatch.setattr(runs.subprocess, "Popen", lambda command, **how: started.append(command))
    runs.Trainings(tmp_path).start("one", "small", "train.steps=3")
    shown = shlex.split(design.command("emoji", presets.get("emoji")))
    for words in (started[0], shown):
        assert words[words.index("--plugin") + 1] == str(plug_in)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "..", "a\0", "a\nb"])
def test_a_runs_name_is_not_a_path(name, tmp_path):
    with pytest.raises(UserError, match="a run's name must be a folder's name without a path"):
        runs.Trainings(tmp_path / "runs").start(name, "small", "")
    assert not list(tmp_path.iterdir())


def test_a_wrong_config_is_refused_before_a_process_starts(tmp_path):
    with pytest.raises(UserError, match=r"unknown key 'train\.step'"):
        runs.Trainings(tmp_path).start("one", "small", "train.step=3")
    with pytest.raises(UserError, match="config keys: No closing quotation"):
        runs.Trainings(tmp_path).start("one", "small", "data.source='my images")
    with pytest.raises(UserError, match="choose the runs"):
        runs.curve_figures([])
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_training_image_is_found_mirrored_or_not():
    emoji = dd.load("emoji", "cpu")
    object.__setattr__(emoji, "config", replace_keys(emoji.config, {"data.flip": True}))
    source = open_source_of(emoji.folder, emoji.config)
    pixels = to_pixels(torch.from_numpy(np.stack([source.train(70)[0], source.train(71)[0][:, :, ::-1]])))
    *steps, pairs = data.nearest_training(emoji, pixels)
    assert steps[0] == (0, source.train_size)
    for number, (images, titles) in enumerate(pairs):
        assert titles[0] == f"{source.title(70 + number)}: 0.000"
        assert np.array_equal(images[0], pixels[number] if number == 0 else pixels[number][:, ::-1])


def test_the_data_screen_refuses_an_empty_source():
    with pytest.raises(UserError, match="source is empty"):
        data.summary_of(" ", "")
    assert dict(data.class_counts(data.summary_of("emoji", "")))["food"] == 116


# ------------------------------------------------------------------------------ events and the token


def test_a_refusal_becomes_an_escaped_message_and_a_fault_does_not_end_the_page(caplog):
    def events(fault: Exception) -> list[Any]:
        def handler() -> Any:
            yield {"picture": 1}
            raise fault

        return list(guarded("message", handler)())

    *_, last = events(UserError("<b> must be a number"))
    assert "&lt;b&gt; must be a number" in last["message"]
    *_, last = events(ZeroDivisionError("x"))
    assert "unexpected ZeroDivisionError" in last["message"]
    assert "ZeroDivisionError" in caplog.text
    assert list(guarded("message", lambda: iter(()), clear=False)()) == []  # a timer leaves the message as it is


def test_only_requests_with_the_token_pass():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(query: bytes = b"", cookie: bytes = b"", kind: str = "http", path: str = "/") -> tuple[int, list[Any]]:
        sent: list[Any] = []

        async def send(event: Any) -> None:
            sent.append(event)

        scope = {"type": kind, "path": path, "query_string": query, "headers": [(b"cookie", cookie)]}
        asyncio.run(TokenGate(app, "secret")(scope, None, send))
        return sent[0]["status"], sent[0]["headers"]

    assert status()[0] == status(b"token=wrong")[0] == status(cookie=b"dit-in-dit=wrong")[0] == 401
    code, headers = status(b"token=secret")
    assert code == 200
    assert status(path="/gradio_api/startup-events")[0] == 200  # gradio cannot start without it
    kept, *attributes = dict(headers)[b"set-cookie"].split(b"; ")
    assert b"HttpOnly" in attributes
    assert status(cookie=kept) == status(cookie=b"odd[1]={x; " + kept) == (200, [])
    assert kept.split(b"=")[0] != TokenGate(app, "other").cookie.encode()  # pages on two ports share cookies
    with pytest.raises(KeyError):  # a closed websocket has no status
        status(kind="websocket")
    hosts = {"127.0.0.1": False, "localhost": False, "::1": False, "0.0.0.0": True, "10.1.2.3": True, "box": True}
    assert {host: needs_token(host) for host in hosts} == hosts
