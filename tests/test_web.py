"""Export of a page that samples in the browser: its tables and noise equal Python's, and so do its images."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image

from browser import CHROMIUM, visit_folder
from conftest import small_model
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.config.samplers import SAMPLERS, Sampler
from dit_in_dit.diffusion.sampler_table import sampler_table
from dit_in_dit.diffusion.samplers import denoise
from dit_in_dit.interop import export_web
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run
from dit_in_dit.runtime.seeding import generator
from test_model import perturbed

ROOT = Path(__file__).parents[1]
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "node_modules/onnxruntime-web"))
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
needs_runtime = pytest.mark.skipif(
    not (RUNTIME / "dist").is_dir(), reason="npm install onnxruntime-web, or set ONNXRUNTIME_WEB to its folder"
)
DETERMINISTIC = [(path, name) for name, s in SAMPLERS.items() if not s.stochastic for path in s.schedulers]


# ------------------------------------------------------------------------------------------ sampler


@pytest.mark.parametrize("predict", ["image", "velocity", "noise"])
@pytest.mark.parametrize(("path", "name"), DETERMINISTIC)
def test_a_table_gives_the_samples_of_its_sampler(path, name, predict):
    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tanh(1.3 * x + 0.2 * t.view(-1, 1, 1, 1))

    diffusion, how = DiffusionConfig(path=path, predict=predict), SampleConfig(sampler=name, steps=10)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = denoise(model, diffusion, how, noise, None)
    table, terms = sampler_table(diffusion, how, 10), [noise]
    for t, row in zip(table.times, table.rows, strict=False):
        x = sum(weight * term for weight, term in zip(row, terms, strict=True))
        terms.append(model(x, torch.full((2,), t)))
    found = sum(weight * term for weight, term in zip(table.rows[-1], terms, strict=True))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.stochastic])
def test_a_sampler_with_noise_at_its_steps_has_no_table(name):
    (path,) = SAMPLERS[name].schedulers
    with pytest.raises(UserError, match=f"sampler={name} adds noise at every step.*set sample.sampler to ddim"):
        sampler_table(DiffusionConfig(path=path), SampleConfig(sampler=name), 10)


class Clipped:
    """A user's scheduler that clips its prediction."""

    prediction = "image"

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.linspace(1000, 100, steps)

    def step(self, prediction: torch.Tensor, timestep: torch.Tensor, x: torch.Tensor) -> Clipped:
        self.prev_sample = 0.5 * x + 0.5 * prediction.clamp(-1, 1)
        return self


def test_a_sampler_that_is_not_linear_is_refused(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "clipped", Sampler({"flow": Clipped}))
    with pytest.raises(UserError, match="sampler=clipped is no linear combination"):
        sampler_table(DiffusionConfig(), SampleConfig(sampler="clipped"), 4)


# -------------------------------------------------------------------------------------------- noise


@needs_chromium
def test_the_noise_of_the_browser_is_numpy_s():
    streams, count = [(0, 0), (7, 3), (2**53 - 1, 70)], 20_000  # of so many, some lie above the ziggurat's end
    script = f"""
        import {{ normals }} from "/noise.js";
        const drawn = {json.dumps(streams)}.map(([seed, i]) => normals(seed, 3, i, {count}));
        report(drawn.map(x => [...new Uint32Array(x.buffer)]));
    """
    visit = visit_folder(Path(export_web.__file__).parent / "web", script)
    for (seed, index), bits in zip(streams, visit.value, strict=True):
        expected = generator(seed, "sample", index).standard_normal((count,), np.float32)
        off = np.abs(np.array(bits, np.int64) - expected.view(np.uint32))  # in last bits
        assert off.max() <= 1
        assert (off[np.abs(expected) < 3.65] == 0).all()  # above, the logarithms of libraries differ


# --------------------------------------------------------------------------------------------- page


def saved_run(folder: Path, config: RunConfig, classes: tuple[str, ...] = tuple("abcde")) -> Path:
    create_run(folder, config)
    torch.manual_seed(0)
    weights = perturbed(NestedDiT(config.model)).state_dict()
    for name, _ in NestedDiT(config.model).named_parameters():
        weights[name] = weights[name].half().float()  # so that float16 holds them exactly
    checkpoint.save(folder, config, 10, {f"model.{k}": v for k, v in weights.items()}, weights, classes)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A nested flow model, guided in an interval, and a plain one of path ddpm with a learned variance."""
    place = tmp_path_factory.mktemp("runs")
    nested = RunConfig(
        model=small_model("outer*1 inner*1"), sample=SampleConfig(steps=10, interval=(0.2, 0.8), micro_batch=2)
    )
    plain = RunConfig(
        model=small_model("outer*1", learn_variance=True),
        diffusion=DiffusionConfig(path="ddpm", predict="noise", time="uniform"),
        sample=SampleConfig(sampler="ddim", steps=10, micro_batch=2),
    )
    return saved_run(place / "nested", nested), saved_run(place / "plain", plain)


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder of both runs; without the npm package, its files hold their names only."""
    pytest.importorskip("onnxscript")
    if Version(torch.__version__) < Version("2.7"):
        pytest.skip("PyTorch 2.6 fails at addcmul of any size")
    place = tmp_path_factory.mktemp("web")
    words = ["--runtime", str(RUNTIME if (RUNTIME / "dist").is_dir() else package(place)), "--beside", str(runs[1])]
    main(["export", str(runs[0]), "--format", "web", *words, "--out", str(place / "page")])
    return place / "page"


@needs_chromium
@needs_runtime
@pytest.mark.parametrize(
    ("given", "words"), [("class=3&", ["--classes", "d"]), ("", [])], ids=["a class", "all in turn"]
)
def test_the_page_draws_the_images_of_sample_and_asks_no_other_server(runs, page, tmp_path, given, words):
    script = """
        const frame = document.body.appendChild(document.createElement("iframe"));
        frame.src = "/index.html#GIVENseed=7&count=2&guidance=2&steps=10";
        const state = () => frame.contentDocument?.body?.dataset.state;
        while (!["done", "error"].includes(state())) await new Promise(done => setTimeout(done, 50));
        const pixels = canvas => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
        report({ message: frame.contentDocument.getElementById("message").textContent,
                 images: [...frame.contentDocument.querySelectorAll("canvas")].map(pixels) });
    """.replace("GIVEN", given)
    visit = visit_folder(page, script)
    assert visit.value["message"] == ""
    found = np.array(visit.value["images"]).reshape(2, 2, 16, 8, 4)[..., :3]
    for run, images in zip(runs, found, strict=True):
        how = [*words, "--seed", "7", "--num", "2", "--guidance", "2", "--device", "cpu"]
        main(["sample", str(run), *how, "--out", str(tmp_path / run.name)])
        drawn = np.stack([np.asarray(Image.open(tmp_path / run.name / f"00000{n}.png"), int) for n in range(2)])
        assert drawn.std() > 20  # not one colour
        assert np.abs(images - drawn).max() <= 2
    names = {f"/{path.name}" for path in page.iterdir()}
    assert {asked.split("#")[0] for asked in visit.asked} <= names | {"/favicon.ico"}  # the probe's own icon


def package(place: Path) -> Path:
    """A folder with the names of the npm package's files that an export takes."""
    (place / "npm/dist").mkdir(parents=True)
    for name in export_web.RUNTIME:
        (place / "npm/dist" / name).write_bytes(name.encode())
    (place / "npm/package.json").write_text(json.dumps({"license": "MIT", "version": "1.2.3"}))
    return place / "npm"


def test_the_folder_holds_page_networks_runtime_and_its_licence(runs, page):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    own = {"models.json", "model-0.onnx", "model-1.onnx", "README.md", export_web.NOTICE}
    assert {path.name for path in page.iterdir()} == {*export_web.PAGE, *export_web.RUNTIME, *own}
    notice = (page / export_web.NOTICE).read_text()
    assert re.search(r"onnxruntime-web \d+\.\d+\.\d+\n", notice)
    assert "Copyright (c) Microsoft Corporation" in notice
    assert "sdk: static" in (page / "README.md").read_text()
    models = json.loads((page / "models.json").read_text())["models"]
    for run, model in zip(runs, models, strict=True):
        assert model["classes"] == list("abcde")
        assert set(model["tables"]) == {"5", "10", "20", "25", "50"}
        weights = onnx.load(page / model["file"]).graph.initializer
        net = checkpoint.Checkpoint.open(run).model(torch.device("cpu"))
        halves = sum(np.prod(tensor.dims) for tensor in weights if tensor.data_type == onnx.TensorProto.FLOAT16)
        assert halves > 0.9 * sum(parameter.numel() for parameter in net.parameters())
        x, t, y = torch.randn(2, 3, 16, 8), torch.full((2,), 0.5), torch.tensor([1, 4])
        session = onnxruntime.InferenceSession(page / model["file"], providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()})
        np.testing.assert_allclose(found, net(x, t, y).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_what_a_page_cannot_hold_is_refused_in_one_line(runs, tmp_path, capsys):
    config = checkpoint.Checkpoint.open(runs[0]).config
    latents = saved_run(tmp_path / "latents", replace(config, model=small_model("outer*1", channels=4)))
    others = saved_run(tmp_path / "others", config, tuple("vwxyz"))
    runtime = ["--runtime", str(package(tmp_path))]
    for run, words, message in (
        (runs[0], [], "needs the npm package onnxruntime-web: run `npm install onnxruntime-web`"),
        (runs[0], ["--runtime", str(tmp_path)], "has no dist/ort.wasm.bundle.min.mjs: run `npm install"),
        (runs[0], [*runtime, "--precision", "bfloat16"], "float16 or float32"),
        (runs[0], [*runtime, "--push", "me/page"], "upload the folder as a static Space"),
        (runs[0], [*runtime, "--beside", str(others)], "must have the image size, channels and classes of"),
        (latents, runtime, "has 4 channels of latents"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", str(run), "--format", "web", *words, "--out", str(tmp_path / "page")])
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "page").exists()
    with pytest.raises(SystemExit):
        main(["export", str(runs[0]), "--format", "onnx", *runtime, "--out", str(tmp_path / "model.onnx")])
    assert "leave them out with --format onnx" in capsys.readouterr().err
