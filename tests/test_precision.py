"""Every choice in every precision: autocast of CPUs and of GPUs, weights in half precision, full float32."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from autocast import CudaAutocast
from conftest import inputs, only_full, perturbed, small_model, with_train
from dit_in_dit import cli, sample
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, ModelConfig, RunConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.interop.export_pipeline import export, pipeline_of
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.metrics.report import compare_evaluations
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.pretrained import pretrained_models
from dit_in_dit.runtime.device import pick_device
from dit_in_dit.runtime.precision import FULL, use_full_float32
from dit_in_dit.study.plan import Plan, StudyConfig
from dit_in_dit.study.result import Result
from dit_in_dit.study.results import _check_alike
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.loop import train
from dit_in_dit.training.optimizer import OPTIMIZERS
from dit_in_dit.training.trainer import Trainer
from options import FIRST
from test_model import PAIRS

HALVES = {torch.bfloat16: 0.1, torch.float16: 0.02}  # with the largest relative error of an output, in norm
POLICIES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "cpu": lambda: torch.autocast("cpu", torch.bfloat16),
    "cuda": CudaAutocast,
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # its name before 0.36
policies = pytest.mark.parametrize("policy", POLICIES)
halves = pytest.mark.parametrize("half", HALVES, ids=str)


def assert_near(rounded: Tensor, whole: Tensor, most: float) -> None:
    distance = (rounded.float() - whole).norm() / whole.norm()
    assert distance < most, float(distance)


def test_the_emulated_autocast_policy_is_that_of_a_gpu():
    half, single = torch.randn(4, 4, dtype=torch.bfloat16), torch.randn(4, 4)
    with CudaAutocast():
        assert (single @ single).dtype == torch.nn.functional.linear(single, half).dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(half, (4,)).dtype == half.exp().dtype == torch.float32
        assert torch.addcmul(half, single, half).dtype == torch.float32
        assert torch.nn.functional.gelu(half).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):
            torch.lerp(single, half, half)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
            torch.lerp(single, half, half)


@policies
@pytest.mark.parametrize(("stages", "choice"), PAIRS, ids=str)
def test_every_choice_runs_forward_and_backward_under_autocast(stages, choice, policy):
    model = perturbed(NestedDiT(small_model(stages, **choice)))
    x, t, y = inputs(model.config)
    whole = model(x, t, y).detach()
    with POLICIES[policy]():
        out = model(x, t, y)
    out.float().square().sum().backward()
    assert_near(out, whole, 0.1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # random frequencies of time
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("recompute", ["inner", "outer", "both"])
def test_recomputed_blocks_run_under_autocast(recompute):
    model = perturbed(NestedDiT(small_model("outer inner outer", inner={"spread": "interpolate"}), recompute=recompute))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs(model.config))
    out.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@halves
@pytest.mark.parametrize(("stages", "choice"), PAIRS, ids=str)
def test_every_choice_runs_with_weights_in_half_precision(stages, choice, half):
    model = perturbed(NestedDiT(small_model(stages, **choice)))
    x, t, y = inputs(model.config)
    with torch.no_grad():
        whole, rounded = model(x, t, y), model.to(half)(x.to(half), t, y)
    assert rounded.dtype == half
    assert_near(rounded, whole, HALVES[half])


def test_queries_keys_and_values_have_one_dtype():
    """Attention kernels need inputs of one dtype, and autocast does not cast the inputs of every kernel."""
    model = perturbed(NestedDiT(small_model("inner outer", qk_norm=True)))
    attention = model.inner_blocks[0].branches["mix"]
    with CudaAutocast():
        assert {part.dtype for part in attention.heads(torch.randn(2, 8, 4, 16))} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------ training


def shrunk_model(model: ModelConfig) -> ModelConfig:
    """A preset's model with its choices at small sizes, which runs in a fraction of a second."""
    patch = model.patch_size
    outer = replace(model.outer, width=32, num_heads=4)
    inner = replace(model.inner, width=32 if model.inner.width == model.outer.width else 16, num_heads=2)
    return replace(
        model,
        image_size=(2 * patch, 2 * patch),
        num_classes=3,
        depth=model.depth and 4,
        stages=re.sub(r"\*\d+", "*2", model.stages),
        outer=outer,
        inner=inner,
        tokens=replace(model.tokens, start=min(model.tokens.start, 1)),
    )


def shrunk(config: RunConfig, data: Path) -> RunConfig:
    """A preset's run with its model of `shrunk_model`, a few images and one step."""
    model = shrunk_model(config.model)
    path = data / f"{model.channels}-{model.patch_size}.npz"
    if not path.exists():
        draw = np.random.default_rng(0)
        images = draw.standard_normal((12, *model.image_shape), np.float32)
        np.savez(path, images=images, labels=np.arange(12) % 3)
    tried = replace(config.train, steps=1, batch_size=2, evaluate_every=1, sample_every=0, checkpoint_every=1)
    return replace(config, model=model, data=DataConfig(source=str(path), held_out=0.2), train=tried)


def alike(name: str) -> str:
    """What is tested of a preset: sizes of one family shrink to the same run."""
    config = presets.get(name)
    return repr(replace(config, model=shrunk_model(config.model)))


# Every preset, once where several are alike.
DISTINCT = list({alike(name): name for name in reversed([*presets.PRESETS, *FIRST])}.values())[::-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrays")


@policies
@pytest.mark.parametrize("name", DISTINCT)
def test_every_preset_takes_its_first_step_in_bfloat16(name, policy, data, tmp_path, monkeypatch):
    config = shrunk(presets.get(name), data)
    config = replace(config, train=replace(config.train, precision="bfloat16"))
    if policy == "cuda":
        monkeypatch.setattr(Trainer, "autocast", lambda self: CudaAutocast())
    facts = {fact.kind: fact.values for fact in train(config, tmp_path / "run", device="cpu")}
    assert np.isfinite(facts["step"]["loss"])
    assert "skipped" not in facts
    assert "held_out" in facts


# ------------------------------------------------------------------------------------------ sampling


def loaded(folder: Path, half: torch.dtype) -> DiTInDiTPipeline:
    pipe = DiTInDiTPipeline.from_pretrained(folder, torch_dtype=half)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {half}
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cuda_autocast(kind: str, dtype: torch.dtype | None = None, enabled: bool = True) -> AbstractContextManager[object]:
    """A replacement for torch.autocast with CUDA's policy."""
    return CudaAutocast(dtype) if dtype and enabled else nullcontext()


def check_draws(whole: DiTInDiTPipeline, pipes: list[DiTInDiTPipeline], half: torch.dtype) -> None:
    """Check that each pipeline gives float32 images close to the images of `whole`, the float32 pipeline."""
    whole.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *whole._shape(), generator=torch.Generator().manual_seed(0))
    arguments = {"class_labels": [0, 1], "latents": noise, "num_inference_steps": 3, "output_type": "latent"}
    drawn = whole(**arguments).images
    for pipe in pipes:
        rounded = pipe(**arguments).images
        assert rounded.dtype == torch.float32
        assert_near(rounded, drawn, HALVES[half])


@halves
@policies
@pytest.mark.parametrize("name", DISTINCT)
def test_every_preset_exports_a_pipeline_in_half_precision(name, half, policy, data, tmp_path, monkeypatch):
    config = shrunk(presets.get(name), data)
    pipe = pipeline_of(perturbed(NestedDiT(config.model)).eval(), config, ["a", "b", "c"])
    pipe.save_pretrained(tmp_path)
    if policy == "cuda":
        monkeypatch.setattr(torch, "autocast", cuda_autocast)
    check_draws(pipe, [loaded(tmp_path, half), copy.deepcopy(pipe).to(half)], half)


@halves
@pytest.mark.parametrize("name", pretrained_models())
def test_every_pretrained_model_exports_a_pipeline_in_half_precision(name, half, tmp_path):
    export(pretrained_models()[name], tmp_path / "pipeline")
    whole = DiTInDiTPipeline.from_pretrained(tmp_path / "pipeline")
    check_draws(whole, [loaded(tmp_path / "pipeline", half)], half)


@halves
def test_samples_in_half_precision_are_close_to_those_in_float32(half):
    config = RunConfig(model=small_model("outer inner"))
    config = replace(config, sample=replace(config.sample, sampler="euler", steps=4, guidance=2.0))
    model = perturbed(NestedDiT(config.model)).eval()
    whole, rounded = sample(model, config, 8), sample(model.to(half), config, 8)
    assert rounded.dtype == torch.float32
    assert_near(rounded, whole, HALVES[half])


@policies
@pytest.mark.parametrize("name", [only_full("dit-in-dit-s16"), "emoji"])
def test_doctor_examines_a_model_that_trains_in_bfloat16(name, policy, data, monkeypatch):
    config = shrunk(presets.get(name), data)
    config = replace(config, train=replace(config.train, precision="bfloat16"))
    if policy == "cuda":
        monkeypatch.setattr(Trainer, "autocast", lambda self: CudaAutocast())
    report = examine(config, torch.device("cpu"))
    assert not [finding for section in report.sections for finding in section.findings if finding.severity == "fault"]


# ------------------------------------------------------------------------------------------ one float32


@pytest.fixture
def tf32():
    """Turn on TF32, as other code in the process may do; restore float32 afterwards."""

    def switch(on: bool) -> None:
        torch.set_float32_matmul_precision("high" if on else "highest")
        torch.backends.cudnn.allow_tf32 = True

    switch(True)
    yield
    use_full_float32()  # the newer switches, if a test set them
    switch(False)


def is_full() -> bool:
    """Whether products and convolutions are computed in float32, and PyTorch can read its own switches."""
    return (
        torch.get_float32_matmul_precision() == "highest"
        and not torch.backends.cuda.matmul.allow_tf32
        and not torch.backends.cudnn.allow_tf32
    )


def test_full_float32_holds_for_products_and_convolutions(tf32):
    assert not is_full()
    use_full_float32()
    assert is_full()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # as other code may do
        assert not is_full()
    assert is_full()


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="since PyTorch 2.9")
@pytest.mark.parametrize(
    "where", ["backends", "backends.cudnn", "backends.cudnn.conv", "backends.cuda.matmul", "backends.mkldnn"]
)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_full_float32_overrides_the_newer_switches_of_pytorch(tf32, where, precision):
    attrgetter(where)(torch).fp32_precision = precision
    use_full_float32()
    assert is_full()


def test_every_entry_point_computes_in_full_float32(tf32, data, tmp_path):
    config = shrunk(presets.get("dit-in-dit-s16"), data)
    run = tmp_path / "run"
    work = {
        "device": lambda: pick_device("cpu"),
        "train": lambda: next(train(config, run, device="cpu")),
        "sample": lambda: sample(NestedDiT(config.model), config, 1),
    }
    for name, begin in work.items():
        torch.backends.cudnn.allow_tf32 = True
        begin()
        assert is_full(), name


def test_every_command_with_a_device_option_uses_pick_device():
    """`pick_device` turns on full float32."""
    room, texts = Path(cli.__file__).parent, dict[str, str]()
    for path in room.rglob("*.py"):  # a command is a file or a folder
        name = path.relative_to(room).parts[0].removesuffix(".py")
        texts[name] = texts.get(name, "") + path.read_text()
    taking = {name: text for name, text in texts.items() if "add_device(" in text or "add_sampling(" in text}
    assert taking.keys() >= {"train", "sample", "evaluate", "doctor", "encode", "maps", "bench", "study"}
    for name, text in taking.items():
        assert "pick_device(" in text or name in ("options", "verify_resume"), name  # `verify` runs `train`


def test_evaluations_record_the_precision_and_older_cpu_evaluations_count_as_float32(tmp_path):
    paths = []
    for name, torch_version, named in (
        ("new", "2.13.0+cu130", {"precision": FULL}),
        ("old", "2.13.0+cpu", {}),
        ("of a mac", "2.6.0", {}),
        ("of a gpu", "2.13.0+cu130", {}),
    ):
        result = {"subject": {"name": name}, "protocol": {"images": 4, **named}, "scores": {}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({**result, "made with": {"torch": torch_version}}))
        paths.append(tmp_path / name)
    compare_evaluations(paths[:3])
    with pytest.raises(UserError, match=r"differ in precision: .*no TF32.* / .*convolutions in TF32"):
        compare_evaluations(paths)


def test_trials_without_a_recorded_precision_are_compared_with_later_ones():
    ended = {
        Path(str(seed)): Result("a", seed, "done", 1, {}, {}, protocol)
        for seed, protocol in enumerate([{"images": 4}, {"images": 4, "precision": FULL}])
    }
    _check_alike(
        Plan("planned", StudyConfig(arms={"a": {}}), (), {"device": "cpu", "versions": {"torch": "2.13.0+cu130"}}),
        ended,
    )
    with pytest.raises(UserError, match="convolutions in TF32"):
        _check_alike(
            Plan(
                "planned", StudyConfig(arms={"a": {}}), (), {"device": "NVIDIA", "versions": {"torch": "2.13.0+cu130"}}
            ),
            ended,
        )


def flattened(trainer: Trainer) -> Tensor:
    """All weights, in one row."""
    return torch.cat([weight.detach().flatten() for weight in trainer.weights.values()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_in_bfloat16_nearly_as_in_float32(run_config, name):
    changes, runs = [], {}
    for precision in ("float32", "bfloat16"):
        config = with_train(run_config, optimizer=name, precision=precision, warmup=0, evaluate_every=0)
        trainer = Trainer(config, source := open_source(config.data, config.model), torch.device("cpu"))
        examples, before = Examples(source, config), flattened(trainer)
        runs[precision] = [float(trainer.update([examples[step]])["loss"]) for step in range(4)]
        changes.append(flattened(trainer) - before)
        state = [value for one in trainer.optimizer.state.values() for value in one.values() if torch.is_tensor(value)]
        assert {each.dtype for each in (*trainer.weights.values(), *state)} == {torch.float32}
    whole, half = runs.values()
    assert half == pytest.approx(whole, rel=0.02)
    assert half != whole
    assert torch.cosine_similarity(*changes, dim=0) > 0.9
