"""Findings are conditional: advice changes the config, and warnings appear only where they apply."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import perturbed, small_model, with_train
from dit_in_dit.attention_maps.findings import missing_parts
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.training import LrScaleConfig
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.doctor import data_checks, model_checks, training_checks
from dit_in_dit.doctor.data_checks import CheckResult, DoctorSubject, check_initial_loss
from dit_in_dit.doctor.observe import Observation
from dit_in_dit.inspection.hooks import can_run_without_inner
from dit_in_dit.metrics.memorization import neighbours
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.training.batches import Batch
from test_doctor import set_already

CPU = torch.device("cpu")


def patient(config: RunConfig, **parts: object) -> DoctorSubject:
    """A subject of `doctor` with only the parts that a check reads."""
    trainer = SimpleNamespace(device=CPU, step=0, optimizer=SimpleNamespace(state={"weight": {}}), begun=None)
    given = {"trainer": trainer, "config": config, "trained": True, "log": [], **parts}
    return SimpleNamespace(**given)  # type: ignore[return-value]


def advice(section: CheckResult) -> str:
    """Advice of the only finding."""
    assert len(section.findings) == 1, section.findings
    return section.findings[0].advice


# ------------------------------------------------------------------------------------------ doctor


@pytest.mark.parametrize("clip", [0.0, 0.5, 1.0])
def test_clipping_is_advised_if_the_config_has_none(run_config, monkeypatch, clip):
    for judge in ("_judge_rate", "_judge_gradients"):
        monkeypatch.setattr(training_checks, judge, lambda *parts: None)
    norms = [100.0 if step % 20 == 0 else 1.0 for step in range(200)]
    log = [{"step": n, "loss": 1.0, "grad_norm": norm, "grad_norm.head": norm} for n, norm in enumerate(norms, 1)]
    text = advice(training_checks.check_training(patient(with_train(run_config, clip=clip), log=log)))
    assert ("train.clip" in text) == (clip == 0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_advice_is_to_add_or_to_raise_weight_decay(run_config, decay):
    tokens = torch.randn(4, 3, 8) * 1e5
    seen = {0.5: Observation({"outer_blocks.0": tokens}, {}, {}, {})}
    text = advice(model_checks.check_activations(patient(with_train(run_config, weight_decay=decay)), seen))
    assert f"{'raise' if decay else 'add'} train.weight_decay" in text


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_mixer_none_is_advised_only_for_inner_blocks(run_config, level):
    seen = {0.5: Observation({}, {f"{level}_blocks.0": torch.full((2, 1, 2, 4, 4), 0.25)}, {}, {})}
    text = advice(model_checks.check_attention(patient(run_config), seen))
    assert ("mixer=none" in text) == (level == "inner")


@pytest.mark.parametrize("embed", ["linear", "conv"])
@pytest.mark.parametrize("mixer", ["patch", "window", "image", "conv", "none"])
def test_a_seam_advises_only_changes_that_widen_the_receptive_field(mixer, embed):
    config = RunConfig(model=small_model(inner={"mixer": mixer, "embed": embed}))
    section = CheckResult("seams")
    model_checks._judge_seams(section, config.model, "patch", 2.0, 0.0, 100.0)
    text = advice(section)
    assert not set_already(text, config)
    assert ("inner.embed=conv" in text) == (embed == "linear")
    assert ("inner.mixer=window" in text) == (mixer in ("patch", "none"))


def test_a_seam_of_a_plain_model_gives_no_advice_on_inner_keys():
    section = CheckResult("seams")
    model_checks._judge_seams(section, small_model("outer*2"), "patch", 2.0, 0.0, 100.0)
    assert "inner" not in advice(section)


@pytest.mark.parametrize(("stages", "head"), [("inner outer", "outer"), ("outer inner", "inner")])
def test_a_pattern_of_sub_patches_names_the_responsible_head(stages, head):
    section = CheckResult("seams")
    model_checks._judge_seams(section, small_model(stages), "sub-patch", 0.0, 0.9, 1000.0)
    assert f"bias of the {head} head" in advice(section)


@pytest.mark.parametrize(("check", "other"), [("gate", True), ("inner path", False)])
def test_fuse_add_is_advised_only_for_a_dead_gate(run_config, check, other):
    section = CheckResult("inner path", rows={"aggregates.0: share": {"t=0.5": 1e-5}})
    model_checks._judge_share(section, patient(run_config), "aggregates.0", check, "here")
    assert ("inner.fuse=add" in advice(section)) == other


def test_a_frozen_level_is_not_reported_as_without_gradient(run_config):
    config = with_train(run_config, lr_scale=LrScaleConfig(outer=0))
    model = NestedDiT(config.model)
    state = {parameter: {"exp_avg_sq": torch.ones_like(parameter)} for parameter in model.parameters()}
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = SimpleNamespace(model=model, optimizer=SimpleNamespace(state=state))
    section = CheckResult("training")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if training_checks.is_inner(name):
                parameter.add_(1)
    training_checks._judge_gradients(section, patient(config, trainer=trainer, initial=initial))
    assert not section.findings
    training_checks._judge_gradients(section, patient(run_config, trainer=trainer, initial=initial))
    assert "never got a gradient" in section.findings[0].seen


def test_bright_images_scaled_by_a_reader_are_no_fault():
    bright = torch.randint(128, 256, (8, 3, 8, 8)) / 127.5 - 1
    section = CheckResult("data")
    data_checks._judge_range(section, bright.float())
    assert not section.findings
    for given, text in ((bright.clamp(0, 1) * 0.77 + 0.111, "[0, 1]"), (torch.rand(8, 3, 8, 8) * 255, "[0, 255]")):
        section = CheckResult("data")
        data_checks._judge_range(section, given)
        assert text in section.findings[0].seen


def test_a_warm_started_model_need_not_predict_zero(run_config):
    x = torch.randn(16, 3, 8, 8)
    y, numbers = torch.zeros(16, dtype=torch.int64), torch.arange(16)
    batch = Batch(x, torch.randn_like(x), torch.full((16,), 0.5), y, numbers, numbers)
    for begun, many in ((None, 1), (object(), 0)):
        trainer = SimpleNamespace(objective=Objective(run_config.diffusion), begun=begun)
        found = check_initial_loss(patient(run_config, trainer=trainer, examples=batch, start=torch.full((16,), 0.01)))
        assert len(found.findings) == many


# ------------------------------------------------------------------------------------------ evaluate, maps


def images(count: int, seed: int) -> torch.Tensor:
    """Flat squares at random places in random colours, on grey: sharp edges, unlike their mean image."""
    draw = np.random.default_rng(seed)
    found = torch.zeros(count, 3, 16, 16)
    for image in found:
        y, x = draw.integers(0, 10, 2)
        image[:, y : y + 6, x : x + 6] = torch.from_numpy(draw.uniform(-1, 1, (3, 1, 1)).astype(np.float32))
    return found


def test_copies_are_reported_and_blurred_samples_are_not():
    train, unseen = images(400, 0), images(100, 1)
    blurred = train.mean(0) + 0.01 * torch.randn(100, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = neighbours(blurred, train, unseen).warnings(guided=True)
    assert len(text) == 1
    assert "says nothing yet; train longer" in text[0]
    copies = neighbours(train[:100] + 0.001, train, unseen)
    assert copies.detail == pytest.approx(1, abs=0.2)
    assert any(line.startswith("MEMORISING") for line in copies.warnings(guided=False))
    assert neighbours(unseen, train, images(100, 2)).warnings(guided=True) == []


@pytest.mark.parametrize("guided", [False, True])
def test_less_guidance_is_advised_only_for_guided_samples(guided):
    train, unseen = images(400, 0), images(100, 1)
    text = neighbours(unseen[:10].repeat(10, 1, 1, 1), train, images(100, 2)).warnings(guided=guided)
    assert [line.split(":")[0] for line in text] == ["REPEATING"]
    assert ("less guidance" in text[0]) == guided


@pytest.mark.parametrize(("stages", "left"), [("outer*2 inner", True), ("inner outer*2", False)])
def test_fuse_replace_needs_the_inner_path_only_if_the_levels_join(stages, left):
    config = small_model(stages, inner={"fuse": "replace"})
    assert can_run_without_inner(perturbed(NestedDiT(config))) == left
    assert ("without" in missing_parts(config)) == (not left)
