"""The benchmark measures planted pauses, writes complete outputs, and gives one-line errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import small_model
from dit_in_dit import inspect
from dit_in_dit.benchmark.attention import attention_kernels, broadcast, matmul_attention
from dit_in_dit.benchmark.bench import Bench
from dit_in_dit.benchmark.experiments import run_experiments
from dit_in_dit.benchmark.parts import (
    INNER,
    operation_kind,
    part_macs,
    part_seconds,
    profile_by_part,
    subject_for_parts,
)
from dit_in_dit.benchmark.subjects import (
    BenchmarkSubject,
    diffusers_dit,
    first_written,
    measure_subjects,
    nested,
    official_dit,
)
from dit_in_dit.benchmark.suite import SUITES
from dit_in_dit.benchmark.sweep import Point, Sweep, exponent, sweep
from dit_in_dit.benchmark.timing import (
    Times,
    best_product,
    estimate_seconds,
    interleave,
    stopwatch,
    trainer_step,
)
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.inspection import cost
from dit_in_dit.runtime.threads import use_threads
from test_cli import lines_of

CPU = torch.device("cpu")
PAUSE = 0.02


def run_of(stages: str = "outer inner", **keys) -> RunConfig:
    return RunConfig(model=small_model(stages, **keys), train=TrainConfig(batch_size=2, precision="float32"))


PLAIN = run_of("outer*2", image_size=(8, 8))


@pytest.fixture
def one_thread():
    """Measure CPU time of the thread, which other processes do not affect."""
    with use_threads(1):
        yield


def pause() -> None:
    began = time.thread_time()
    while time.thread_time() < began + PAUSE:
        pass


class Pause(torch.autograd.Function):
    """An identity function that pauses in the forward pass and in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        pause()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        pause()
        return grad


def slow(run: RunConfig) -> nn.Module:
    """The model with a pause in its first block, forward and backward."""
    model = nested(run)
    model.outer_blocks[0].register_forward_hook(lambda module, given, output: Pause.apply(output))
    return model


# ------------------------------------------------------------------------------------------- turns


def test_turns_alternate_and_stop_at_the_time_limit():
    seen: list[str] = []
    found = interleave({name: lambda name=name: seen.append(name) or 1 for name in "ab"}, seconds=60, rounds=3)
    assert "".join(seen) == "abbaab"
    assert found == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert 3 <= len(interleave({"a": lambda: time.sleep(0.01)}, seconds=0.05)["a"]) <= 6
    assert len(interleave({"a": lambda: None}, seconds=0.0, least=2)["a"]) == 2


def test_short_work_is_repeated_within_a_turn():
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1

    with use_threads(2):  # the wall's clock
        timed = stopwatch(work, CPU)
        before = calls
        seconds = timed()
    assert calls - before > 100
    assert 0 < seconds < 1e-3


@pytest.mark.usefixtures("one_thread")
def test_a_planted_pause_is_measured_in_the_step():
    found = measure_subjects({"plain": BenchmarkSubject(PLAIN, CPU), "slow": BenchmarkSubject(PLAIN, CPU, slow)}, 0.5)
    extra = found["slow"].step.seconds - found["plain"].step.seconds
    assert 1.9 * PAUSE < extra < 3 * PAUSE
    assert found["slow"].step.over(found["plain"].step) > 2
    assert found["slow"].macs == found["plain"].macs == cost.macs(PLAIN.model)["total"]
    assert found["plain"].images_per_second == pytest.approx(2 / found["plain"].step.seconds)


def test_kept_bytes_agree_with_inspect():
    for recompute in ("none", "inner"):
        run = run_of("inner*2 outer*2")
        run = replace(run, train=replace(run.train, recompute=recompute))
        expected = inspect(run.model, 2, recompute)["activation_bytes"]["total"]
        assert BenchmarkSubject(run, CPU).kept_bytes() == pytest.approx(expected, rel=0.02)


def test_matrix_products_leave_the_global_generator_unchanged():
    before = torch.get_rng_state()
    assert best_product(CPU, torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------- token dropping


def dropping(**keys) -> RunConfig:
    """A run of 256 patches, of which 64 see the two middle blocks of four."""
    run = run_of(
        "outer*4", image_size=(16, 16), patch_size=1, outer={"width": 8, "num_heads": 2}, inner={"sub_patch": 1}
    )
    return replace(run, train=replace(run.train, token_drop=0.75, token_drop_blocks=(1, 2), **keys))


def counted(step: Callable[[], object]) -> int:
    """MACs of a step, counted by PyTorch."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("steps", [None, 1])
def test_a_timed_step_drops_the_tokens_that_training_drops(steps):
    run = dropping(token_drop_steps=steps)
    dense = replace(run, train=replace(run.train, token_drop=0.0, token_drop_blocks=None, token_drop_steps=None))
    for work in (lambda run: BenchmarkSubject(run, CPU).step, lambda run: trainer_step(run, CPU)):
        step, every = work(run), work(dense)
        first = counted(step)
        assert first < 0.7 * counted(every)
        assert counted(step) == first  # still the first phase
    subject = BenchmarkSubject(run, CPU)
    assert subject.step_macs * 2 == sum(part_macs(subject_for_parts(run, CPU)).values())
    stated = 2 * (3 * subject.macs - subject.step_macs)  # of two images, without what dropping does not change
    found = counted(BenchmarkSubject(dense, CPU).step) - counted(subject.step)
    assert stated == pytest.approx(found, rel=0.01)
    assert counted(subject.forward) == pytest.approx(2 * subject.macs, rel=0.02)  # samples have all patches


def test_kept_bytes_are_those_of_the_step_that_drops_tokens():
    run = dropping()
    expected = inspect(run.model, 2, token_drop=run.token_drop)["activation_bytes"]["total"]
    assert BenchmarkSubject(run, CPU).kept_bytes() == pytest.approx(expected, rel=0.02)


def test_a_model_that_cannot_drop_tokens_is_refused():
    with pytest.raises(UserError, match=r"train\.token_drop needs a NestedDiT .* got FirstWritten; set it to 0"):
        BenchmarkSubject(dropping(), CPU, first_written)


@pytest.mark.usefixtures("one_thread")
def test_the_estimate_of_a_timing_counts_the_dropped_tokens():
    run = dropping()
    dense = replace(run, train=replace(run.train, token_drop=0.0, token_drop_blocks=None))
    macs = [cost.training_macs(run.model, drop)["total"] for drop in (run.token_drop, None)]
    for _ in range(3):  # the speed of the machine is measured each time
        ratio = estimate_seconds({"a": run}, CPU, threads=1) / estimate_seconds({"a": dense}, CPU, threads=1)
        if ratio == pytest.approx(macs[0] / macs[1], rel=0.15):
            return
    pytest.fail(f"the ratio is {ratio}, not {macs[0] / macs[1]}")


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stages", ["outer*2 inner", "inner outer*2", "(inner outer)*2"])
def test_parts_sum_to_the_whole_step(stages):
    subject = subject_for_parts(run_of(stages), CPU)
    began = time.thread_time()
    parts = part_seconds(subject)
    taken = time.thread_time() - began
    assert 0.8 * taken < sum(parts.values()) <= taken
    macs = part_macs(subject)
    assert sum(macs.values()) == 3 * 2 * cost.macs(subject.run.model)["total"]
    assert {part for part, count in macs.items() if count} <= parts.keys()
    assert {"loss", "optimizer"} <= parts.keys()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("part", "place"),
    [
        ("inner_blocks", lambda model: model.inner_blocks[0]),
        ("outer_blocks", lambda model: model.outer_blocks[1]),
        ("aggregate", lambda model: model.aggregates[0]),
        ("spread", lambda model: model.spreads[0]),
        ("inner_embed", lambda model: model.inner_embed.embed),
        ("outer_head", lambda model: model.outer_head.final),
        ("inner_head", lambda model: model.inner_head.final),
    ],
)
def test_a_planted_pause_is_measured_in_its_part(part: str, place: Callable[[nn.Module], nn.Module]):
    subject = subject_for_parts(run_of("inner outer*2 inner"), CPU)
    before = part_seconds(subject)
    place(subject.model).register_forward_hook(lambda module, given, output: Pause.apply(output))
    after = part_seconds(subject)
    found = {name: after[name] - before[name] for name in after}
    assert max(found, key=lambda name: found[name]) == part
    assert 1.9 * PAUSE < found[part] < 3 * PAUSE


def test_the_profiler_sees_every_part_and_its_products():
    found = profile_by_part(subject_for_parts(run_of("inner outer inner", inner={"mixer": "conv"}), CPU))
    for part in ("outer_blocks", "inner_blocks", "spread", "outer_head", "inner_head"):
        assert found[part]["products"] > 0, part
    assert found["inner_blocks"]["convolutions"] > 0
    assert found["optimizer"]["optimizer"] > 0
    assert "attention" in found["outer_blocks"]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "copies"),
        ("aten::addcmul", "elementwise"),
        ("aten::convolution_backward", "convolutions"),
        ("triton_poi_fused_add_0", "compiled"),
        ("aten::view", "other"),
    ],
)
def test_operations_have_a_kind(operation, kind):
    assert operation_kind(operation) == kind


# ------------------------------------------------------------------------------------------ sweeps


def test_the_exponent_of_a_power_law_is_recovered():
    sizes = [16.0, 64.0, 256.0]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    points = [Point(int(s), s, int(s), int(s), int(s**2), (s, 2 * s**2), (s, s)) for s in sizes]
    found = Sweep("S", tuple(points))
    assert found.exponents("step") == pytest.approx((1, 2))
    assert found.exponents("kept") == pytest.approx((2,))
    assert found.to_dict()["exponents"]["step"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("axis", "values", "sizes"),
    [
        ("image", (8, 16), (64, 256)),
        ("p", (4, 8), (4, 8)),
        ("s", (1, 2), (1, 2)),
        ("S", (16, 4), (4, 16)),
        ("E", (16, 32), (16, 32)),
        ("batch", (1, 2), (1, 2)),
    ],
)
def test_every_axis_makes_models_of_the_wanted_size(axis, values, sizes):
    found = sweep(run_of("outer inner"), axis, values, CPU, 0.01)
    assert tuple(point.size for point in found.points) == sizes
    assert all(point.step[0] > point.inner[0] > 0 for point in found.points)
    assert found.to_dict()["exponents"].keys() == {"step", "inner", "macs", "inner_macs", "kept"}
    if axis == "batch":
        assert found.exponents("macs") == pytest.approx((1,))
    if axis == "p":
        assert {point.inner_macs > 0 for point in found.points} == {True}


# ---------------------------------------------------------------------------------- other people's


def test_dits_from_other_code_have_the_same_size():
    ours, theirs = BenchmarkSubject(PLAIN, CPU), BenchmarkSubject(PLAIN, CPU, diffusers_dit)
    assert theirs.forward().shape == ours.forward().shape
    blocks = [sum(p.numel() for p in part.parameters()) for part in (ours.model.outer_blocks[0],)]
    theirs_block = theirs.model.model.transformer_blocks[0]
    embeds = sum(p.numel() for p in theirs_block.norm1.emb.parameters())  # each of their blocks embeds t and y
    assert sum(p.numel() for p in theirs_block.parameters()) - embeds == blocks[0]


def test_the_official_code_is_loaded_from_a_checkout(tmp_path):
    (tmp_path / "models.py").write_text(
        "import torch\n"
        "class DiT(torch.nn.Module):\n"
        "    def __init__(self, *, hidden_size, learn_sigma, **sizes):\n"
        "        super().__init__()\n"
        "        self.scale, self.sizes = torch.nn.Parameter(torch.ones(())), sizes\n"
        "    def forward(self, x, t, y):\n"
        "        assert float(t.max()) > 1 and y.dtype == torch.int64\n"
        "        return self.scale * x\n"
    )
    subject = BenchmarkSubject(PLAIN, CPU, official_dit(tmp_path))
    subject.step()
    assert subject.model.model.sizes["depth"] == 2


def test_a_checkout_without_the_official_code_gives_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"no models\.py"):
        official_dit(tmp_path)
    (tmp_path / "models.py").write_text("import a_package_that_is_absent\n")
    with pytest.raises(UserError, match="cannot be imported: No module named 'a_package_that_is_absent'"):
        official_dit(tmp_path)
    (tmp_path / "models.py").write_text("")
    with pytest.raises(UserError, match="no class DiT"):
        official_dit(tmp_path)


@pytest.mark.parametrize("length", [4, 16])
def test_all_attention_implementations_agree(length):
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 5, 2, length, 8, generator=draw).unbind(0)
    expected = attention_kernels(length, CPU)["SDPA"](q, k, v)
    for formula in (broadcast, matmul_attention, *attention_kernels(length, CPU).values()):
        torch.testing.assert_close(formula(q, k, v), expected)


# ------------------------------------------------------------------------------------------- suite

ROWS = (
    "plain DiT / diffusers, eager",
    "inner / outer path, E=D=32",
    "inner / outer path, E=16",
    "inner last / plain twin, tiny",
    "reference / first written",
    "reference / first written, memory",
    "inner recomputed / first written, memory",
    "inner recomputed / reference",
    "trainer's step / bare step",
    "guided step / forward of twice the batch",
    "sampling loop / its guided steps",
    "inner path against sub-patches, patch",
    "inner path against sub-patches, conv",
    "inner path against image area, patch",
    "inner path against image area, conv",
    "SDPA / attention within S=4, the model's",
    "copy bound / attention within S=64, the model's",
)


@pytest.mark.slow
def test_the_suite_prints_and_writes_every_ratio(capsys, tmp_path):
    main(["bench", "--suite", "quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    ratios = {ratio["name"]: ratio for ratio in found["ratios"]}
    for name in ROWS:
        assert name in printed
        assert len(ratios[name]["rounds"]) >= 1
        assert ratios[name]["ratio"] == pytest.approx(Times(tuple(ratios[name]["rounds"])).seconds)
    for ratio in found["ratios"]:
        if ratio["goal"] is not None:
            good = ratio["ratio"] >= ratio["goal"] if ratio["at_least"] else ratio["ratio"] <= ratio["goal"]
            assert ratio["met"] == good
    assert any("too small" in note for note in found["notes"])
    assert {"device", "processor", "cores", "threads"} <= found["hardware"].keys()
    assert found["versions"]["torch"] == version("torch")
    assert found["command"] == "dit-in-dit bench --suite quick"
    assert found["product_macs_per_second"]["float32"] > 0
    assert {"reference as first written", "diffusers"} <= found["subjects"].keys()
    assert INNER[1] in found["parts"]["E=16"]["seconds"]
    for name in ("parts.png", "throughput.png", "sweeps.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_the_cpu_suite_has_an_experiment_for_every_goal():
    bench = Bench("", CPU, 1.0, lambda plain, like: plain)
    names = [name for name, _ in run_experiments(SUITES["cpu"], bench)]
    for part in (
        "plain DiT beside diffusers",
        "compiled",
        "E=D=384",
        "E=32",
        "E=64",
        "D=128, E=32",
        "D=384",
        "first written",
    ):
        assert any(part in name for name in names), part
    assert {"sampling", "growth, mixer patch", "growth, mixer conv"} <= set(names)
    cuda = [name for name, _ in run_experiments(SUITES["cuda"], bench)]
    assert {"rate, plain XL/2", "rate, nested XL/2", "attention within groups"} <= set(cuda)


@pytest.mark.slow
@pytest.mark.full
def test_any_preset_is_compared_with_other_models(capsys, tmp_path):
    tiny = ["model.image_size=16", "model.patch_size=4", "model.outer.width=32", "train.batch_size=2"]
    words = [word for key in tiny for word in ("--set", key)]
    (tmp_path / "mine.yaml").write_text(to_yaml(presets.get("emoji-reference")))
    mine = str(tmp_path / "mine.yaml")
    words += ["--beside", "first-written,diffusers", "--sweep", "E=16,32", "--device", "cpu", "--seconds", "0.01"]
    main(["bench", "--preset", "emoji-reference", mine, *words, "--threads", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"emoji-reference", mine, f"{mine}: as first written", "emoji-reference: diffusers, plain"} <= found[
        "subjects"
    ].keys()
    assert found["parts"].keys() == {"emoji-reference", mine}
    assert f"{mine} over E" in found["sweeps"]
    assert found["hardware"]["threads"] == 1
    assert "--seconds 0.01" in found["command"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_cuda_suite_without_a_cuda_device_gives_a_one_line_error(capsys):
    assert "device 'cuda' is not available" in lines_of(["bench", "--suite", "cuda"], capsys)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--suite", "gpu"], "--suite"),
        (["--preset", "emojy"], "did you mean 'emoji'"),
        (["--preset", "absent.yaml"], "cannot read --config absent.yaml"),
        (["--preset", "emoji", "--set", "model.innr=3"], "unknown key"),
        (["--set", "train.batch_size=3"], "give --preset"),
        (["--preset", "emoji", "--beside", "plain,theirs"], "must be some of plain, first-written"),
        (
            ["--preset", "emoji", "--beside", "first-written", "--set", "model.inner.mixer=conv"],
            "first-written model needs",
        ),
        (["--preset", "emoji", "--beside", "diffusers", "--set", "model.outer.mlp_ratio=3"], "an MLP ratio of 4"),
        (["--preset", "emoji", "--beside", "official"], "with --dit"),
        (["--sweep", "E=32,x"], "KEY=A,B"),
        (["--sweep", "F=32,64"], "unknown quantity 'F'"),
        (["--sweep", "E=32"], "two values"),
        (["--sweep", "S=4,5"], "square of a divisor"),
        (["--sweep", "E=32,33"], "must divide width"),
        (["--suite", "quick", "--seconds", "0"], "--seconds"),
        (["--suite", "quick", "--dit", "nowhere"], "no models.py in nowhere"),
        (["--suite", "cpu", "--device", "tpu"], "not available"),
    ],
)
def test_mistakes_give_a_one_line_error(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in lines_of(["bench", *words], capsys)
