"""`doctor` finds faults planted in a small trained run, and nothing in the healthy run."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import small_model, with_train
from dit_in_dit.cli import doctor as command
from dit_in_dit.cli.options import Commands, Parser
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override, to_yaml
from dit_in_dit.config.run import DataConfig, DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.config.schema import keys
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.doctor.data_checks import expected_loss, forward_budget
from dit_in_dit.doctor.doctor import DoctorReport, examine
from dit_in_dit.doctor.observe import periodic_share, seam_peaks
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run, read_config
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.batches import held_out_batch
from dit_in_dit.training.loop import train

CPU = torch.device("cpu")
PLANTED = {"null class", "data range", "learning rate", "gate", "non-finite", "seams", "sampling start"}
Edit = Callable[[dict[str, Tensor]], object]


def waves_of_classes(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, 8, 8, 3): a wave whose direction and phase are the class's, on a random colour."""
    draw, labels = np.random.default_rng(0), np.arange(count) % 4
    y, x = np.mgrid[:8, :8] * np.pi / 4
    waves = np.stack([np.sin(x), np.sin(y), np.cos(x), np.cos(y)])
    images = 0.6 * waves[labels][:, None] + draw.uniform(-0.3, 0.3, (count, 3, 1, 1))
    images += draw.normal(0, 0.05, (count, 3, 8, 8))
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1), labels


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A gated nested model of three outer blocks on the waves."""
    path = tmp_path_factory.mktemp("data") / "waves_of_classes.npz"
    images, labels = waves_of_classes()
    np.savez(path, images=images, labels=labels)
    return RunConfig(
        model=small_model("inner*1 outer*3", image_size=(8, 8), num_classes=4, inner={"fuse": "gate"}),
        diffusion=DiffusionConfig(predict="image"),
        data=DataConfig(source=str(path), held_out=0.25),
        train=TrainConfig(
            steps=200, batch_size=32, learning_rate=4e-3, warmup=20, ema=0.98, precision="float32", sample_every=0
        ),
    )


def trained(config: RunConfig, folder: Path) -> Path:
    """Train `config`; returns the run folder."""
    for _ in train(config, folder, device="cpu"):
        pass
    return folder


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy run."""
    return trained(config, tmp_path_factory.mktemp("runs") / "healthy")


def planted(run: Path, folder: Path, edit: Edit, **keys: object) -> Path:
    """A copy of the run whose weights and averaged weights are edited in place, and whose config has other keys."""
    shutil.copytree(run, folder)
    config = replace(read_config(run), **keys)
    saved = checkpoint.newest(folder)
    newest, manifest = saved.folder, saved.manifest
    (folder / "config.yaml").write_text(to_yaml(config))
    state, ema = load_tensors(newest / checkpoint.STATE), load_tensors(newest / "ema.safetensors")
    edit({name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")})
    edit(ema)
    checkpoint.save(folder, config, manifest["step"], state, ema, tuple(manifest["classes"]))
    return folder


def set_already(advice: str, config: RunConfig) -> list[str]:
    """Each `key=value` that an advice sets but the config already has. "lower KEY=VALUE" is exempt: it sets nothing."""
    values = {name: str(value) for name, _, value in keys(config)}
    pairs = re.findall(r"(?<!lower )\b([a-z_.]+)=([\w.]+)", advice)
    held = ((values.get(name, values.get(f"model.{name}", "")), value) for name, value in pairs)
    return [f"{own}={value}" for own, value in held if own.removesuffix(".0") == value]


def look(run: Path) -> DoctorReport:
    """Report on a run. Also checks that every advice changes the config."""
    config = read_config(run)
    report = examine(config, CPU, run)
    assert not [advice for finding in report.findings for advice in set_already(finding.advice, config)]
    return report


def raised(report: DoctorReport) -> set[str]:
    """Names of the checks with a warning or fault."""
    return {finding.check for finding in report.findings if finding.severity != "note"}


def only(report: DoctorReport, check: str) -> str:
    """Observation of the only finding, which must be a fault of this check."""
    assert raised(report) == {check}, report.findings
    assert report.findings[0].severity == "fault"
    assert report.findings[0].advice
    return report.findings[0].seen


def rows(report: DoctorReport, title: str) -> dict[str, dict[str, float]]:
    """Table of the section with this title."""
    return next(section.rows for section in report.sections if section.title.startswith(title))


# ------------------------------------------------------------------------------------------ healthy


def test_a_healthy_run_has_no_findings(run):
    report = look(run)
    assert not report.findings
    assert report.step == 200


def test_a_healthy_config_has_no_findings_before_training(config):
    report = examine(config, CPU)
    assert not raised(report)
    assert rows(report, "training")["steps"]["looked at"] == 40  # a probe in memory


# ------------------------------------------------------------------------------------------ the six faults


def swap_with_class(number: int) -> Edit:
    def edit(weights: dict[str, Tensor]) -> None:
        table = weights["label_embed.table.weight"]
        table[[number, 4]] = table[[4, number]]

    return edit


@pytest.mark.parametrize("number", range(4))
def test_a_null_class_swapped_with_another_is_found(run, tmp_path, number):
    assert repr(str(number)) in only(look(planted(run, tmp_path / "run", swap_with_class(number))), "null class")


def test_a_label_table_shifted_by_one_is_found(run, tmp_path):
    def shift(weights: dict[str, Tensor]) -> None:
        table = weights["label_embed.table.weight"]
        table.copy_(table.roll(1, 0))

    report = look(planted(run, tmp_path / "run", shift))
    assert raised(report) == {"null class", "labels"}  # both findings are right: rows of classes are wrong too


def test_finds_a_null_class_that_is_a_copy_or_untrained(run, config, tmp_path):
    def copy(weights: dict[str, Tensor]) -> None:
        weights["label_embed.table.weight"][4] = weights["label_embed.table.weight"][2]

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        from dit_in_dit.model.nested import NestedDiT

        initial = NestedDiT(config.model).label_embed.table.weight.detach()

    def reset(weights: dict[str, Tensor]) -> None:
        weights["label_embed.table.weight"][4] = initial[4]

    assert "class 2" in only(look(planted(run, tmp_path / "copy", copy)), "null class")
    assert "never moved" in only(look(planted(run, tmp_path / "reset", reset)), "null class")


@pytest.mark.parametrize(("scale", "shift", "what"), [(127.5, 127.5, "[0, 255]"), (0.5, 0.5, "[0, 1]")])
def test_pixels_outside_minus_one_to_one_are_found(run, config, tmp_path, scale, shift, what):
    images, labels = waves_of_classes()
    floats = (images.transpose(0, 3, 1, 2) / 127.5 - 1) * scale + shift
    np.savez(tmp_path / "floats.npz", images=floats.astype(np.float32), labels=labels)
    data = replace(config.data, source=str(tmp_path / "floats.npz"))
    assert what in only(examine(replace(config, data=data), CPU), "data range")
    assert what in only(look(planted(run, tmp_path / "run", lambda weights: None, data=data)), "data range")


def test_a_learning_rate_a_hundred_times_too_high_is_found_before_and_after_training(config, tmp_path):
    config = with_train(config, learning_rate=100 * config.train.learning_rate, steps=100)
    assert "step at the peak rate" in only(examine(config, CPU), "learning rate")
    report = look(trained(config, tmp_path / "run"))
    assert raised(report) & PLANTED == {"learning rate"}


@pytest.mark.parametrize("value", [0.0, 1e-5])
def test_a_dead_gate_is_found(run, tmp_path, value):
    report = look(planted(run, tmp_path / "run", lambda weights: weights["fuses.0.gate"].fill_(value)))
    assert "fuses.0" in only(report, "gate")


def test_a_nan_is_reported_with_its_layer_and_first_example(run, tmp_path):
    name = "outer_blocks.2.branches.mlp.0"

    def plant(weights: dict[str, Tensor]) -> None:
        weights[f"{name}.weight"][3, 4] = math.nan

    seen = only(look(planted(run, tmp_path / "run", plant)), "non-finite")
    assert f"{name}.weight (trained): 1;" in seen
    assert f"{name} (trained) is the first layer" in seen
    assert f"example {200 * 32}" in seen  # the first example that training would take next


def test_an_overflow_with_finite_parameters_is_reported_with_its_layer(run, tmp_path):
    def plant(weights: dict[str, Tensor]) -> None:
        weights["outer_blocks.1.branches.mlp.2.weight"].fill_(3e38)

    seen = only(look(planted(run, tmp_path / "run", plant)), "non-finite")
    assert "outer_blocks.1.branches.mlp.2 (averaged) is the first layer" in seen


@pytest.mark.parametrize("kind", ["checkerboard", "line"])
def test_a_pattern_that_repeats_with_every_patch_is_found(run, tmp_path, kind):
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    drawn = {"checkerboard": (-1.0) ** (x + y), "line": (x == 0).float()}[kind]
    bias = 0.15 * drawn[..., None].expand(4, 4, 3).flatten()  # patches are (p, p, C)

    report = look(planted(run, tmp_path / "run", lambda weights: weights["outer_head.final.linear.bias"].add_(bias)))
    assert "patch" in only(report, "seams")


@pytest.mark.parametrize(
    ("clock", "time", "advice"),
    [
        ("dit", "logit_normal", "model.time_embed=ddt"),
        ("ddt", "logit_normal", "raise diffusion.time_mean"),
        ("dit", "uniform", "train longer"),
    ],
)
def test_estimates_that_are_too_dark_where_sampling_starts_are_found(run, tmp_path, clock, time, advice):
    def plant(weights: dict[str, Tensor]) -> None:
        weights["outer_head.final.linear.bias"].sub_(0.2)  # of images of deviation 0.5

    folder = planted(run, tmp_path / "run", plant)
    config = override(read_config(folder), [f"model.time_embed={clock}", f"diffusion.time={time}"])
    report = examine(config, CPU, folder)
    finding = next(finding for finding in report.findings if finding.check == "sampling start")
    assert finding.severity == "warning"
    assert advice in finding.advice
    measured = rows(report, "start of sampling")["mean less that of the images / deviation"]
    assert max(measured.values()) < -0.2


def test_the_mean_of_estimates_where_sampling_starts_is_measured(run, config):
    report = look(run)
    measured = rows(report, "start of sampling")["mean less that of the images / deviation"]
    saved, source = checkpoint.Checkpoint.open(run), open_source(config.data, config.model)
    held = held_out_batch(source, config.model, source.held_out_size)
    with torch.no_grad():
        predicted = saved.model(CPU)(held.noise, torch.ones(len(held.x)), held.y)  # at t = 1, x_t is the noise
    expected = ((predicted - held.x).mean((0, 2, 3)) / held.x.std((0, 2, 3))).tolist()
    assert list(measured.values()) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------ more findings


def test_data_that_changed_since_the_first_step_is_found(run, config, tmp_path):
    images, labels = waves_of_classes()
    np.savez(tmp_path / "other.npz", images=images[:, ::-1] // 2, labels=labels)
    data = replace(config.data, source=str(tmp_path / "other.npz"))
    assert "loss at start" in raised(look(planted(run, tmp_path / "run", lambda weights: None, data=data)))


def test_finds_duplicate_images_and_classes_without_images(config, tmp_path):
    images, labels = waves_of_classes(80)
    np.savez(tmp_path / "few.npz", images=np.concatenate([images[:40]] * 2), labels=labels % 2)
    few = replace(config, data=replace(config.data, source=str(tmp_path / "few.npz")))
    seen = " ".join(finding.seen for finding in examine(few, CPU).findings)
    assert "no training image of 2 classes: 2, 3" in seen
    assert "copies of another" in seen


def test_a_run_without_a_checkpoint_is_examined_by_its_log(config, tmp_path):
    stopped = with_train(config, learning_rate=100 * config.train.learning_rate)
    create_run(tmp_path / "run", stopped)
    first = examine(stopped, CPU).sections[1].rows["loss"]["measured"]
    lines = [{"step": n, "loss": first * n, "grad_norm": 1.0, "learning_rate": 0.4} for n in range(1, 31)]
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 31, "lo')
    assert "learning rate" in raised(look(tmp_path / "run"))


# ------------------------------------------------------------------------------------------ the numbers


def test_expected_loss_of_a_zero_prediction_matches_the_closed_form():
    velocity = expected_loss(RunConfig(), 0.3)
    assert velocity == pytest.approx(1 + 0.3, rel=1e-3)  # E (e - x)^2
    noise = RunConfig(diffusion=DiffusionConfig(path="ddpm", predict="noise"), sample=SampleConfig(sampler="ddim"))
    assert expected_loss(noise, 0.3) == pytest.approx(1, rel=1e-3)
    image = RunConfig(diffusion=DiffusionConfig(predict="image", weight="velocity"))
    # The error over max(t, .05)^2, t uniform: 400 * .05 + (1 / .05 - 1).
    assert expected_loss(image, 0.3) == pytest.approx(0.3 * (20 + 19), rel=1e-2)


def test_the_untrained_loss_is_that_of_a_zero_prediction(config, run):
    loss = rows(look(run), "loss at start")["loss"]
    assert loss["measured"] == pytest.approx(loss["these examples"], rel=1e-5)  # the target is the image, without noise
    assert loss["again"] == pytest.approx(loss["logged"], rel=1e-5)


def test_a_jump_in_value_at_every_cell_border_gives_a_seam_peak_at_the_last_position():
    ramp = torch.arange(32).float().expand(2, 3, 32, 32)
    stairs = ramp + 3 * (ramp // 8)  # grows by one per pixel, by four across a border
    down, across = seam_peaks(stairs, 8) - seam_peaks(ramp + 1e-6, 8)
    assert across.exp().tolist() == pytest.approx([1] * 7 + [4], rel=1e-3)
    assert not down.any()


def test_periodic_share_is_the_repeating_part_of_the_errors():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 3, 32, 32, generator=draw)
    tile = torch.randn(3, 8, 8, generator=draw)
    tile = (tile - tile.mean((1, 2), keepdim=True)) / tile.std((1, 2), keepdim=True)
    tiled = tile.repeat(1, 4, 4).expand(64, -1, -1, -1)
    assert periodic_share(noise + 5.0, 8) < 0.05  # neither noise nor a shift of all pixels repeats
    assert periodic_share(tiled, 8) == pytest.approx(1, rel=1e-3)
    assert periodic_share(noise + tiled, 8) == pytest.approx(2**-0.5, rel=0.03)


def test_shares_and_entropies_lie_between_zero_and_one(run):
    report = look(run)
    for row in rows(report, "attention").values():
        assert 0 < row["lowest head"] <= row["mean"] <= row["highest head"] <= 1
    inner = rows(report, "inner path")
    assert 0 < inner["aggregates.0: share"]["t=0.5"] < 1
    assert inner["aggregates.0: weight x S"] == {"least": 1.0, "most": 1.0}  # the mean


def test_large_models_get_fewer_images_and_no_probe():
    from dit_in_dit.config import presets

    large, small = presets.get("dit-in-dit-xl2"), presets.get("emoji")
    assert forward_budget(large, CPU) == 2
    assert forward_budget(small, CPU) > 500


# ------------------------------------------------------------------------------------------ the command


def call(*arguments: str) -> int:
    """The command's exit code."""
    parser = Parser(prog="dit-in-dit")
    command.add(Commands(parser))
    options: argparse.Namespace = parser.parse_args(["doctor", *arguments, "--device", "cpu"])
    try:
        options.run(options)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_prints_a_report_and_writes_json_and_a_picture(run, tmp_path, capsys):
    assert call(str(run), "--out", str(tmp_path)) == 0
    assert "no findings" in capsys.readouterr().out
    stored = json.loads((tmp_path / "doctor.json").read_text())
    assert stored["findings"] == []
    assert (tmp_path / "doctor.png").read_bytes().startswith(b"\x89PNG")


def test_the_exit_code_is_one_after_a_fault(run, tmp_path, capsys):
    dead = planted(run, tmp_path / "run", lambda weights: weights["fuses.0.gate"].zero_())
    assert call(str(dead), "--json", "--out", str(tmp_path / "out")) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["check"] == "gate"


def test_the_picture_is_drawn_without_activations(run, tmp_path):
    nan = planted(
        run, tmp_path / "run", lambda weights: weights["outer_blocks.0.modulation.linear.bias"].fill_(math.nan)
    )
    assert call(str(nan), "--out", str(tmp_path / "out")) == 1
    assert (tmp_path / "out" / "doctor.png").exists()


def test_a_run_and_a_config_together_are_refused(run):
    with pytest.raises(UserError, match="RUN has its own config"):
        call(str(run), "--preset", "emoji")
    with pytest.raises(UserError, match="name what to start from"):
        call()
