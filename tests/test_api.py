"""The Python API: names and signatures that stay, examples that run, and equality with the commands."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import dit_in_dit as dd
from conftest import inputs, small_model
from dit_in_dit.api import model as api_model
from dit_in_dit.cli import main
from dit_in_dit.config.files import override
from dit_in_dit.curves import plots
from dit_in_dit.data.sources import open_source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.interop import resolve
from dit_in_dit.interop.export_pipeline import export
from dit_in_dit.interop.import_run import export_diffusers, export_official
from dit_in_dit.interop.release import export_release
from dit_in_dit.study import arms
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.session import Event
from test_pipeline import tiny_vae

SIGNATURES = """
Model(net: 'NestedDiT', config: 'RunConfig', classes: 'tuple[str, ...]', folder: 'Path', step: 'int', _kept: 'TemporaryDirectory[str] | None' = None, average: 'str | None' = None) -> None
Model.__call__(self, x: 'Tensor', t: 'Tensor | float', y: 'Tensor | None' = None) -> 'Tensor'
Model.from_pretrained(name: 'str | Path') -> 'Model'
Model.push_to_hub(self, repo_id: 'str', *, private: 'bool' = False) -> 'str'
Model.sample(self, classes: 'str | int | Iterable[str | int]' = (), num: 'int | None' = None, *, seed: 'int' = 0, guidance: 'float | None' = None, steps: 'int | None' = None, sampler: 'str | None' = None, guide: 'Model | str | Path | None' = None, guide_scale: 'float | None' = None, internal_guidance: 'float | None' = None) -> 'Pictures'
Model.save_pretrained(self, folder: 'str | Path') -> 'None'
NestedDiT(model: 'ModelConfig', *, recompute: 'str' = 'none', dropout: 'float' = 0.0) -> 'None'
NestedDiT.forward(self, x: 'Tensor', t: 'Tensor | float', y: 'Tensor | None' = None, *, weak: 'bool' = False, keys: 'Tensor | None' = None, route: 'Route | None' = None, augment: 'Tensor | None' = None) -> 'Tensor'
Pictures(pixels: 'Pixels', _steps: 'Callable[[], list[Pixels]]' = <class 'list'>) -> None
Pictures.grid(self, columns: 'int | None' = None) -> 'Image.Image'
Pictures.save(self, folder: 'str | Path') -> 'None'
Pictures.trajectory(self) -> 'list[Pictures]'
Run(config: 'RunConfig', out: 'str | Path', *, resume: 'bool' = False, device: 'str' = 'auto', stop: 'StopRequest | None' = None, until: 'int | None' = None, deterministic: 'bool' = False, data: 'Any' = None, model: 'NestedDiT | None' = None, optimizer: 'Callable[[Groups], Optimizer] | None' = None, loss: 'Callable[[DiffusionConfig], Objective] | None' = None, callbacks: 'Sequence[Callable[[Event], object]]' = ()) -> None
Run.load(self, device: 'str' = 'auto') -> 'Model'
Run.run(self) -> 'Run'
Run.send(self, value: 'None') -> 'Event'
Run.throw(self, *error: 'Any') -> 'Event'
RunConfig.from_dict(values: 'Mapping[str, Any]') -> 'T'
RunConfig.names() -> 'list[str]'
Scores(labels: 'list[str]', scores: 'dict[str, list[dict[str, Any] | None]]', folders: 'list[Path]') -> None
UserError
attention(model: 'Trained', image: 'Any', t: 'float' = 0.5, y: 'int | str | None' = None) -> 'Maps'
compare(*evaluated: 'Trained | Scores') -> 'Scores'
cost.macs(model: 'ModelConfig') -> 'dict[str, int]'
cost.parameters(model: 'ModelConfig') -> 'dict[str, int]'
evaluate(run: 'Trained', num: 'int' = 500, *, data: 'Any' = None, out: 'str | Path | None' = None, seed: 'int' = 0) -> 'Scores'
draw(config: 'Any', *, theme: 'str' = 'auto', title: 'str' = 'DiT-in-DiT') -> 'Diagram'
inspect(config: 'Any', batch: 'int' = 1, recompute: 'str' = 'none', *, token_drop: 'TokenDrop | None' = None) -> 'Inspection'
load(name: 'str | Path', device: 'str' = 'auto', average: 'str | float | None' = None) -> 'Model'
match(config: 'RunConfig | str', like: 'Trained | RunConfig', *, by: 'matching.By' = 'macs', tolerance: 'float' = 0.01, fixed: 'Collection[str]' = ()) -> 'RunConfig'
preset(name: 'str', *sets: 'str', **keys: 'Any') -> 'RunConfig'
presets.get(name: 'str') -> 'RunConfig'
register(kind: 'str', name: 'str', thing: 'Any', *, keys: 'Any' = None) -> 'None'
run_study(study: 'str | Path | Mapping[str, Any]', out: 'str | Path | None' = None) -> 'StudyReport'
sample(model: 'NestedDiT', config: 'RunConfig', num: 'int', *, seed: 'int' = 0, classes: 'Sequence[int]' = ()) -> 'Tensor'
train(config: 'RunConfig', out: 'str | Path', *, resume: 'bool' = False, device: 'str' = 'auto', stop: 'StopRequest | None' = None, until: 'int | None' = None, deterministic: 'bool' = False, data: 'Any' = None, model: 'NestedDiT | None' = None, optimizer: 'Callable[[Groups], Optimizer] | None' = None, loss: 'Callable[[DiffusionConfig], Objective] | None' = None, callbacks: 'Sequence[Callable[[Event], object]]' = ()) -> None
"""  # noqa: E501
OFFERED = {  # of what is larger than the API: the names that stay
    "NestedDiT": ("forward",),
    "RunConfig": ("from_dict", "names"),
    "UserError": (),
    "cost": ("macs", "parameters"),
    "presets": ("get",),
    "train": (),  # the class Run
}


def signatures() -> set[str]:
    """Every public name of the API with its signature."""
    lines = set()
    for name in dd.__all__:
        thing = getattr(dd, name)
        if name == "UserError":
            lines.add(name)
        elif not isinstance(thing, ModuleType) and name != "RunConfig":
            lines.add(f"{name}{inspect.signature(thing)}")
        public = [each for each in vars(thing) if not each.startswith("_") or each == "__call__"]
        for each in OFFERED.get(name, public if inspect.isclass(thing) else ()):
            if callable(method := getattr(thing, each)):
                lines.add(f"{name}.{each}{inspect.signature(method)}")
    return lines


def test_names_and_signatures_stay():
    frozen = set(SIGNATURES.strip().splitlines())
    gone, new = frozen - signatures(), signatures() - frozen
    assert not gone, f"deprecate with a warning first, and keep what callers use: {sorted(gone)}, now {sorted(new)}"
    assert not new, f"add what is new to SIGNATURES, from then on it stays: {sorted(new)}"


def test_all_names_are_listed_typed_and_loaded_on_first_use():
    assert set(dd.__all__) <= set(dir(dd))
    assert (Path(dd.__file__).parent / "py.typed").exists()
    code = "import dit_in_dit as dd, sys; dd.preset('emoji'); assert 'torch' not in sys.modules; dd.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "module 'dit_in_dit' has no attribute 'nothing'" in done.stderr


@pytest.fixture
def tiny(monkeypatch):
    """Names in examples: settings of a run of one step. Studies neither time their arms nor draw curves."""
    monkeypatch.setattr(arms, "quick_times", lambda *arguments: {})
    monkeypatch.setattr(plots, "draw_curves", lambda *arguments: [])  # tests/test_curves.py draws them
    keys = {"train": {"steps": 1, "batch_size": 2, "warmup": 0}, "model__outer": {"width": 32}, "stages": "outer inner"}
    settings = {"train.steps": 1, "train.batch_size": 2, "train.warmup": 0, "model.outer.width": 32}
    return {"tiny": keys, "settings": {**settings, "model.stages": "outer inner", "train.evaluate_every": 1}}


@pytest.mark.parametrize("name", dd.__all__)
def test_every_public_name_has_an_example_that_runs(name, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"dd": dd, "np": np, "torch": torch, **tiny}
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(dd, name), name, globs=names)
    assert example.examples
    from dit_in_dit.diffusion.objective import LOSS_WEIGHTS

    monkeypatch.setitem(LOSS_WEIGHTS, "late", None)
    del LOSS_WEIGHTS["late"]  # the example of `register` adds it; monkeypatch takes it away again
    said: list[str] = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert not result.failed, "".join(said)


# ------------------------------------------------------------------------------------------ load and sample


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """A trained run of a plain DiT on path ddpm, which every format can hold."""
    model = replace(small_model("outer*2", image_size=(8, 8), num_classes=3), time_embed="diffusers", mlp_norm_eps=1e-5)
    config = dd.RunConfig(seed=3, model=model)
    config = override(config, [f"data.source={folder}", "data.held_out=0.2", "train.steps=3", "train.batch_size=4"])
    words = ["diffusion.path=ddpm", "diffusion.predict=noise", "sample.sampler=ddim", "sample.steps=4"]
    config = override(config, [*words, "train.learning_rate=0.01", "train.precision=float32", "train.ema=0.1"])
    run = tmp_path_factory.mktemp("plain") / "run"
    list(dd.train(config, run, device="cpu"))
    return run


FORMATS = {
    "run": lambda run, out: export_release(run, out, precision="float32"),
    "pipeline": export,
    "diffusers-dit": export_diffusers,
    "official": lambda run, out: export_official(run, out.with_suffix(".pt")),
}


@pytest.mark.parametrize("kind", ["itself", "hub", *FORMATS])
def test_a_model_loads_from_every_format(kind, plain, tmp_path, monkeypatch):
    place = plain
    monkeypatch.setitem(dd.presets.SIZES, "tiny", (2, 32, 4))  # official files do not hold the number of heads
    if kind in FORMATS:
        FORMATS[kind](plain, tmp_path / "out")
        place = tmp_path / ("out.pt" if kind == "official" else "out")
    if kind == "hub":
        monkeypatch.setattr(resolve, "fetch_repo", {"me/mine@main": plain}.get)
        place = "me/mine@main"
    model, source = dd.load(place, device="cpu"), dd.load(plain, device="cpu")
    assert not model.net.training
    x, t, y = inputs(source.config.model)
    if kind != "official":  # official code has other time frequencies
        assert torch.equal(model(x, t, y), source(x, t, y))
    weights = zip(model.net.parameters(), source.net.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    if kind in ("itself", "hub", "run", "pipeline"):
        assert model.classes == source.classes
        pixels = [each.sample([1, "red"], num=3, seed=2).pixels for each in (model, source)]
        assert (pixels[0] == pixels[1]).all()


def test_samples_are_the_files_of_the_command(plain, tmp_path):
    words = ["--num", "5", "--classes", "red,0", "--seed", "7", "--guidance", "1.5", "--steps", "5", "--device", "cpu"]
    main(["sample", str(plain), *words, "--out", str(tmp_path / "command")])
    pictures = dd.load(plain, device="cpu").sample(["red", 0], num=5, seed=7, guidance=1.5, steps=5)
    pictures.save(tmp_path / "api")
    for name in (f"{i:06d}.png" for i in range(5)):
        assert (tmp_path / "api" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    assert pictures._repr_png_() == (tmp_path / "api" / "grid.png").read_bytes()
    assert len(pictures[1:3]) == 2
    assert pictures[-1].tobytes() == Image.open(tmp_path / "api" / "000004.png").tobytes()


def test_a_trajectory_leads_from_the_noise_to_the_samples(plain):
    model = dd.load(plain, device="cpu")
    pictures = model.sample(num=10, seed=1)  # of two micro-batches
    way = pictures.trajectory()
    assert [len(step) for step in way] == [10] * 5  # x_t of four steps, and the samples
    assert (way[-1].pixels == pictures.pixels).all()
    changes = [np.abs(step.pixels.astype(int) - pictures.pixels).mean() for step in way]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 20


class Long:
    """A dataset whose length is wrong."""

    def __len__(self):
        return 5

    def __getitem__(self, number):
        return [(Image.new("RGB", (32, 32)), 0)][number]


def test_classes_are_names_or_whole_numbers_of_any_kind(plain):
    model = dd.load(plain, device="cpu")
    for classes in (1, np.int64(1), torch.tensor(1), np.array([1]), torch.tensor([1])):
        assert (model.sample(classes, steps=1).pixels == model.sample([1], steps=1).pixels).all()
    assert (model.sample(None, num=2, steps=1).pixels == model.sample(num=2, steps=1).pixels).all()


def test_slices_of_pictures_keep_their_trajectory_and_may_be_empty(plain):
    pictures = dd.load(plain, device="cpu").sample(num=4, steps=2)
    way = pictures[1:3].trajectory()
    assert [len(step) for step in way] == [2] * 3
    assert (way[-1].pixels == pictures.pixels[1:3]).all()
    assert len(pictures[9:]) == 0
    assert pictures[9:].grid().size


def test_a_callback_cannot_end_a_run_without_a_word_and_an_ended_run_says_so(run_config, tmp_path):
    def stop(event):
        raise StopIteration

    with pytest.raises(RuntimeError, match="a callback raised StopIteration"):
        list(dd.train(run_config, tmp_path / "one", device="cpu", callbacks=[stop]))
    run = dd.train(run_config, tmp_path / "two", device="cpu")
    next(run)
    run.close()
    with pytest.raises(dd.UserError, match=r"this run has ended: train.*resume=True. continues it"):
        run.run()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dd.load("emojy"), "no run at emojy, .*; did you mean 'emoji'"),
        (lambda: dd.load("emoji").sample(["heartt"]), "unknown class 'heartt'; did you mean 'heart'"),
        (lambda: dd.load("emoji").sample(steps=0), "sample.steps must be from 1"),
        (lambda: dd.load("emoji").sample(sampler="fast"), "sample.sampler must be one of"),
        (lambda: dd.preset("emojy"), "unknown preset 'emojy'; did you mean 'emoji'"),
        (lambda: dd.preset("emoji", stagez="outer"), "unknown key 'stagez'; did you mean 'stages'"),
        (lambda: dd.preset("emoji", "model.stagez=outer"), "unknown key 'model.stagez'; did you mean"),
        (lambda: dd.preset("emoji", steps=3), "steps is a key of several groups: write train__steps or sample__steps"),
        (lambda: dd.preset("emoji", train={"stepz": 3}), "unknown key 'train.stepz'; did you mean 'train.steps'"),
        (lambda: dd.preset("emoji", mixer="far"), "model.inner.mixer must be one of"),
        (lambda: dd.preset("emoji", "stages"), "takes key=value"),
        (lambda: dd.match(dd.preset("emoji"), like="emojy"), "like: no preset, file or run 'emojy'"),
        (lambda: dd.compare("nowhere"), "no evaluation at nowhere"),
        (lambda: dd.run_study({"arms": {}}), "give one of arms, grid and search"),
        (lambda: dd.load("x" * 5000), "no run at xxx"),
        (lambda: dd.load("emoji", device=torch.device("meta")), "device 'meta' is not available"),
        (lambda: dd.load("emoji").sample(num=0), "num must be a whole number from 1 to 1000000: got 0"),
        (lambda: dd.load("emoji").sample(num=1.5), "num must be a whole number"),
        (lambda: dd.load("emoji").sample(seed=True), "seed must be a whole number"),
        (lambda: dd.load("emoji").sample([1.5]), "a class must be a whole number"),
        (lambda: dd.preset(None), "unknown preset None"),
        (lambda: dd.train("emoji", "run"), "train takes a config, such as preset"),
        (lambda: dd.train(dd.preset("emoji"), ""), "and a folder for the run"),
        (lambda: dd.train(dd.preset("emoji"), "run", callbacks=print), "callbacks must be a list of functions"),
        (lambda: dd.train(dd.preset("emoji"), "run", callbacks=[3]), "callbacks must be a list of functions"),
        (lambda: dd.train(dd.preset("emoji"), "run", until=0), "until must be a whole number from 1"),
        (lambda: dd.train(dd.preset("emoji"), "run", data=[{"image": 1}]), "item 0 of the dataset must be an image or"),
        (
            lambda: dd.train(dd.preset("emoji"), "run", data=[(Image.new("F", (9, 9)), 0)]),
            r"item 0 of the dataset: .*8 bits",
        ),
        (
            lambda: dd.train(dd.preset("emoji"), "run", data=Long()),
            "item 1 of the dataset is missing, although __len__",
        ),
        (lambda: dd.match("emojy", like="emoji"), "config: no preset, file or run 'emojy'"),
        (lambda: dd.match("emoji", like="emoji-dit", fixed="outter"), "fixed: unknown key 'outter'"),
        (lambda: dd.attention("emoji", np.zeros((32, 32, 3), np.uint8), t=2), "a time t from 0 to 1: got None, 2"),
        (lambda: dd.attention("emoji", np.zeros((32, 32, 3), np.uint8), y="0,1"), "takes one class y .*: got '0,1'"),
        (
            lambda: dd.attention(dd.load("emoji"), np.zeros((3, 3, 3), np.uint8)),
            "must be .3, 32, 32., the model's",
        ),
    ],
)
def test_a_mistake_is_one_line(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dd.UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_pipeline_with_a_vae_shows_the_images_of_its_run(run_config, tmp_path):
    tiny_vae(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    np.savez(tmp_path / "latents.npz", images=np.random.default_rng(0).standard_normal((40, 4, 8, 8), np.float32))
    words = ["model.channels=4", "model.num_classes=0", "train.evaluate_every=0", "sample.guidance=1"]
    words += [f"data.source={tmp_path / 'latents.npz'}", f"data.vae={tmp_path / 'vae'}", "train.ema=0.1"]
    run = dd.train(override(run_config, words), tmp_path / "run", device="cpu").run()
    run.load().save_pretrained(tmp_path / "pipeline")
    one, other = (dd.load(tmp_path / name, device="cpu").sample(num=3) for name in ("run", "pipeline"))
    assert (one.pixels == other.pixels).all()
    assert one.pixels.shape[0] == 3
    assert one.pixels.shape[1] > 8  # decoded


def test_a_model_is_pushed_as_the_pipeline_that_loads(plain, monkeypatch):
    pushed = []

    def push(folder, repo_id, *, private):
        pushed.append((sorted(path.name for path in folder.iterdir()), dd.load(folder).classes, repo_id, private))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(api_model, "push_folder", push)
    model = dd.load(plain, device="cpu")
    assert model.push_to_hub("me/mine", private=True) == "https://hub/me/mine"
    ((names, classes, *rest),) = pushed
    assert {"README.md", "model_index.json", "transformer", "scheduler"} <= set(names)
    assert (classes, rest) == (model.classes, ["me/mine", True])


def test_keys_are_set_by_name_and_by_text():
    config = dd.preset("emoji", "model.inner.mixer=window", stages="(inner outer*2)*3", train__steps=7, ema=0.5)
    words = ["model.inner.mixer=window", "model.stages=(inner outer*2)*3", "train.steps=7", "train.ema=0.5"]
    assert config == override(dd.presets.get("emoji"), words)
    assert dd.preset("emoji", model={"inner": {"width": 32}}, inner__num_heads=4).model.inner.num_heads == 4


# ------------------------------------------------------------------------------------------ train


class Dots:
    """Images of one value for each class, as a dataset of PIL images."""

    classes = ("dark", "bright")

    def __init__(self, make=Image.fromarray, count: int = 30) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int):
        pixels = np.full((8, 8, 3), 90 + 80 * (number % 2) + number, np.uint8)
        return self.make(pixels), number % 2


@pytest.fixture
def config(run_config):
    """A run of six steps on two classes of 8x8 images."""
    return override(run_config, ["model.num_classes=2", "train.steps=4", "train.checkpoint_every=2"])


def floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1


KINDS = {
    "PIL": Image.fromarray,
    "larger PIL": lambda pixels: Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)),
    "HWC": lambda pixels: pixels,
    "CHW": lambda pixels: pixels.transpose(2, 0, 1),
    "float": floats,
    "float64": lambda pixels: floats(pixels).astype(np.float64),
    "tensor": lambda pixels: torch.from_numpy(floats(pixels)),
    "uint8 tensor": torch.from_numpy,
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind_are_the_same_data(kind, config):
    wanted = dd.train(config, "unused", data=Dots()).data
    source = dd.train(config, "unused", data=Dots(KINDS[kind])).data
    assert source.digest == wanted.digest
    assert source.classes == ("dark", "bright")
    assert source.held_out_size > 0
    assert (source.labels == wanted.labels).all()
    for one, other in zip(Examples(source, config)[0], Examples(wanted, config)[0], strict=True):
        assert torch.equal(one, other)


def test_arrays_and_a_list_are_the_same_data_as_a_dataset(config):
    pairs = [Dots(np.asarray)[number] for number in range(30)]
    arrays = tuple(map(np.array, zip(*pairs, strict=True)))
    kinds = (pairs, arrays, tuple(map(torch.from_numpy, arrays)))
    digests = {dd.train(config, "unused", data=data).data.digest for data in kinds}
    assert digests == {dd.train(config, "unused", data=Dots()).data.digest}
    images = replace(config, model=replace(config.model, num_classes=0))
    assert dd.train(images, "unused", data=arrays[0]).data.train_size > 20  # without labels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data must be a folder, name, Source, arrays, or have __len__ and __getitem__: got int"),
        ({}, "got dict"),
        ([], "the dataset is empty"),
        ([np.zeros((8, 8, 3), np.uint8)], "item 0 of the dataset has no label"),
        ([(np.zeros((8, 8, 3), np.int32), 0)], "must be uint8, or floats .*: got int32"),
        ([(np.full((3, 8, 8), 1.5), 0)], r"scaled to \[-1, 1\] already: got values to 1.5"),
        ([(np.full((3, 8, 8), np.nan), 0)], "got values to nan"),
        ([(np.zeros((8, 8, 3)), 0)], r"must be \(3, 8, 8\), the model's shape, or a PIL image: got \(8, 8, 3\)"),
        ([("a.png", 0)], "must be an image or a pair .*: got a.png"),
        ([(np.zeros((8, 8, 3), np.uint8), 0.5)], "must be an image with a whole number"),
        ([(np.zeros((8, 8, 3), np.uint8), -1)] * 30, "labels of the dataset must be from 0"),
        ((np.zeros((9, 8, 8, 3), np.uint8), np.zeros(8, int)), "as many images as labels: got 9 and 8"),
    ],
)
def test_data_that_do_not_fit_are_one_line(data, message, config):
    with pytest.raises(dd.UserError, match=message):
        dd.train(config, "unused", data=data)


def test_other_numbers_of_classes_are_refused(config, tmp_path):
    three = replace(config, model=replace(config.model, num_classes=3))
    with pytest.raises(dd.UserError, match=r"model.num_classes must fit the data: got 3, but .* has 2"):
        next(dd.train(three, tmp_path / "run", data=Dots()))


def test_workers_need_a_dataset_that_can_be_pickled_and_give_the_same_run(config, tmp_path):
    logs = []
    for workers in (0, 1):
        out, ours = tmp_path / str(workers), replace(config, data=replace(config.data, workers=workers))
        list(dd.train(ours, out, data=Dots(), device="cpu"))
        logs.append((out / "log.jsonl").read_bytes())
    assert logs[0] == logs[1]
    with pytest.raises(dd.UserError, match=r"data.workers=1 needs a dataset that can be pickled .*: define its class"):
        dd.train(ours, "unused", data=Dots(lambda pixels: pixels))


def test_a_run_on_a_dataset_resumes_with_the_same_images_only(config, tmp_path):
    list(dd.train(config, tmp_path / "whole", data=Dots(), device="cpu"))
    list(dd.train(config, tmp_path / "run", data=Dots(), device="cpu", until=2))
    with pytest.raises(dd.UserError, match="changed since"):
        list(dd.train(config, tmp_path / "run", data=Dots(count=31), device="cpu", resume=True))
    list(dd.train(config, tmp_path / "run", data=Dots(), device="cpu", resume=True))
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


def test_a_folder_or_a_name_becomes_the_runs_source(config, folder, tmp_path):
    three = replace(config, model=replace(config.model, num_classes=3), data=replace(config.data, source="emoji"))
    run = dd.train(three, tmp_path / "run", data=folder, device="cpu").run()
    assert run.config.data.source == str(folder)
    assert open_source(run.load().config.data, three.model).digest == open_source(run.config.data, three.model).digest


def test_callbacks_come_before_the_caller_and_their_errors_are_their_own(config, tmp_path):
    seen: list[tuple[str, Event]] = []
    run = dd.train(
        config, tmp_path / "a", data=Dots(), device="cpu", callbacks=[lambda event: seen.append(("callback", event))]
    )
    for event in run:
        assert seen[-1] == ("callback", event)
    assert [event.kind for _, event in seen if event.kind == "step"] == ["step"] * 4

    class OwnError(Exception):
        pass

    def fail(event: Event) -> None:
        if event.kind == "step":
            raise OwnError

    with pytest.raises(OwnError):
        dd.train(config, tmp_path / "b", data=Dots(), device="cpu", callbacks=[fail]).run()
    list(dd.train(config, tmp_path / "b", data=Dots(), device="cpu", resume=True))  # nothing holds the run's lock


def test_a_run_is_the_generator_that_it_was(config, tmp_path):
    run = dd.train(config, tmp_path / "run", data=Dots(), device="cpu")
    assert next(run).kind == "start"
    run.close()
    assert next(run, None) is None
    next(dd.train(config, tmp_path / "run", data=Dots(), device="cpu", resume=True))  # dropped, and so it ends at once
    events = list(dd.train(config, tmp_path / "run", data=Dots(), device="cpu", resume=True))
    assert events[-1].kind == "checkpoint"
    assert dd.train is dd.Run


class Huber(Objective):
    """A loss of one's own."""

    def loss(self, predict, x, noise, t, y):
        return torch.nn.functional.smooth_l1_loss(predict(self.noisy(x, noise, t), t, y), x, reduction="none").mean(
            (1, 2, 3)
        )


def test_a_loss_of_ones_own_is_trained_and_recorded(config, tmp_path):
    config = override(config, ["diffusion.predict=image", "train.checkpoint_every=4"])
    run = dd.train(config, tmp_path / "run", data=Dots(), device="cpu", loss=Huber)
    first = next(event for event in run if event.kind == "step")
    run.close()
    source = dd.train(config, "unused", data=Dots()).data
    batch = Examples(source, config)[0]
    zero = Huber(config.diffusion).loss(lambda x, t, y: torch.zeros_like(x), *batch[:4])  # an untrained model gives 0
    assert first.values["loss"] == pytest.approx(zero.mean().item())
    list(dd.train(config, tmp_path / "run", data=Dots(), device="cpu", loss=Huber, resume=True))
    with pytest.raises(dd.UserError, match=r"was trained with loss .*Huber: got the config's"):
        list(dd.train(config, tmp_path / "run", data=Dots(), device="cpu", resume=True))


# ------------------------------------------------------------------------------------------ measure and show


@pytest.fixture(scope="module")
def twins(folder, tmp_path_factory):
    """Two runs of a few steps on a dataset of the user's."""
    root = tmp_path_factory.mktemp("twins")
    base = dd.RunConfig(model=small_model("outer*1 inner*1", image_size=(8, 8), num_classes=2))
    base = override(
        base, ["train.steps=3", "train.batch_size=4", "data.held_out=0.2", "sample.steps=2", "sample.sampler=euler"]
    )
    twin = dd.match(base, like=replace(base, model=replace(base.model, stages="outer*2")), tolerance=0.1)
    return [
        dd.train(each, root / name, data=Dots(), device="cpu").run() for name, each in (("one", base), ("two", twin))
    ]


def test_runs_on_a_dataset_are_evaluated_and_compared(twins):
    one, two = (dd.evaluate(run, num=6) for run in twins)
    assert one.labels == ["one@3"]
    both = dd.compare(*twins)
    assert both.scores == dd.compare(one, two).scores
    name, (left, right) = next(iter(both.scores.items()))
    assert left == one.scores[name][0]
    assert right == two.scores[name][0]
    assert left["low"] < left["value"] < left["high"]
    assert name in repr(both)
    assert "+-" in repr(both)
    given = dd.evaluate(twins[0].load(), num=6, data=Dots(), out=twins[0].folder.parent / "given")
    assert given.scores == one.scores  # the model alone does not hold its data: they were given


def test_a_matched_config_costs_what_the_other_costs():
    base = dd.preset("emoji", mixer="none")
    for like in ("emoji-dit", dd.presets.get("emoji-dit")):
        twin = dd.match(base, like=like)
        assert dd.cost.macs(twin.model)["total"] == pytest.approx(
            dd.cost.macs(dd.presets.get("emoji-dit").model)["total"], rel=0.01
        )
        assert twin.model.inner == base.model.inner


def test_attention_of_an_image_is_that_of_maps(twins):
    maps = dd.attention(twins[0], Dots()[0][0], t=0.25, y="bright")
    assert maps.views.times == (0.25,)
    assert maps.views.labels == (1,)
    assert maps.outer.entropy.shape[:2] == (1, 1)
    assert len(repr(maps)) < 200
    assert dd.attention(twins[0].load(), Dots()[0][0]).views.labels == (2,)  # no class


def test_notebooks_show_configs_models_runs_and_pictures(twins, tmp_path):
    config = override(twins[0].config, ["train.init='<b>&'"])
    table = config._repr_html_()
    assert "train.init" in table
    assert "&lt;b&gt;&amp;" in table
    assert "<b>" not in table
    assert "train.clip" not in table  # at its default
    model = twins[0].load()
    assert "outer*1 inner*1" in model._repr_html_()
    assert f"{dd.cost.macs(model.config.model)['inner_blocks']:,}" in model._repr_html_()
    assert repr(dd.inspect(model)) == repr(dd.inspect(model.config)) == repr(dd.inspect(model.config.model))
    for shown in (twins[0], model.sample(num=2)):
        assert shown._repr_png_().startswith(b"\x89PNG")
    assert dd.train(config, tmp_path / "not started")._repr_png_() is None
    assert repr(twins[0]) == f"run {twins[0].folder}, 3 steps"


# ------------------------------------------------------------------------------------------ the network


def test_one_time_serves_all_images():
    net = dd.NestedDiT(small_model()).eval()
    x, _, y = inputs(net.config)
    expected = net(x, torch.full((3,), 0.25), y)
    for t in (0.25, torch.tensor(0.25)):
        assert torch.equal(net(x, t, y), expected)
    assert torch.equal(net(x, 1), net(x, torch.ones(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 3, 8, 16)}, r"x must be \(N, 3, 16, 8\): got \(3, 3, 8, 16\)"),
        ({"x": torch.zeros(3, 16, 8)}, "x must be"),
        ({"t": torch.zeros(2)}, r"t must be one number per image, \(3,\): got \(2,\)"),
        ({"t": torch.zeros(3, 1)}, "t must be one number per image"),
        ({"t": 500}, "t must be from 0 to 1: got 500 to 500"),
        ({"t": torch.tensor([0.5, -0.1, 0.2])}, "t must be from 0 to 1: got -0.1"),
        ({"t": torch.tensor([0.5, torch.nan, 0.2])}, "t must be from 0 to 1: got nan"),
        ({"y": torch.tensor([0, 6, 1])}, "y must be from 0 to 5: got 0 to 6"),
        ({"y": torch.tensor([0, -1, 1])}, "y must be from 0 to 5: got -1 to 1"),
        ({"y": torch.tensor([0, 1])}, "y must be one number per image"),
    ],
)
def test_inputs_that_do_not_fit_are_one_error(change, message):
    net = dd.NestedDiT(small_model())
    x, t, y = inputs(net.config)
    with pytest.raises(ValueError, match=message):
        net(**{"x": x, "t": t, "y": y, **change})


def test_the_checks_read_no_values_of_traced_and_fake_tensors():
    net = dd.NestedDiT(small_model()).eval()
    x, t, y = inputs(net.config)
    each = torch.func.vmap(lambda image, time, label: net(image[None], time, label[None])[0])(x, t, y)
    torch.testing.assert_close(each, net(x, t, y), atol=1e-5, rtol=1e-4)
    exported = torch.export.export(net, (x, t, y)).module()
    torch.testing.assert_close(exported(x, t, y), net(x, t, y), atol=1e-5, rtol=1e-4)
    assert dd.inspect(net)["flow"][-1]["shape"] == [1, 3, 16, 8]  # on fake tensors
