"""data.augment: transforms and labels are functions of seed and example, and a network without labels has none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dit_in_dit as dd
from conftest import SHARDED
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import from_yaml, override, to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import to_hash
from dit_in_dit.data import augment as module
from dit_in_dit.data.augment import augment, augmentation_labels, check_augmentation, draw_augmentation
from dit_in_dit.data.formats.latents import LatentSource
from dit_in_dit.data.sources import open_source
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.interop.transformer import DiTInDiTTransformer2DModel
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.batches import Examples, held_out_batch, load_batches
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer
from processes import run_together

CPU = torch.device("cpu")
KEYS = (
    *("model.image_size=8", "model.patch_size=4", "model.num_classes=2", "model.stages=inner outer*2 inner"),
    *("model.outer.width=16", "model.outer.num_heads=2", "model.inner.width=16", "model.inner.num_heads=2"),
    *("model.inner.sub_patch=2", "data.augment=0.6", "train.batch_size=4", "train.accumulate=2", "train.steps=4"),
    *("train.checkpoint_every=2", "train.evaluate_every=0", "train.learning_rate=0.01", "train.precision=float32"),
    *("train.compile=false", "train.sample_every=4", "sample.steps=2", "sample.sampler=euler", "data.held_out=0.2"),
)
KINDS = ("edm", "exact")


@pytest.fixture
def config(tmp_path):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return override(RunConfig(), [*KEYS, f"data.source={tmp_path / 'data.npz'}"])


def trained(config, out, **options):
    for _ in train(config, out, device="cpu", **options):
        pass
    return (out / "log.jsonl").read_text()


def tensors(run):
    newest = checkpoint.newest(run).folder
    return load_tensors(newest / checkpoint.STATE) | load_tensors(newest / "ema.safetensors")


def same(one, other):
    first, second = tensors(one), tensors(other)
    return all(torch.equal(first[name], second[name]) for name in first | second)


def drawn(config, count=20_000):
    return draw_augmentation(config, torch.arange(count)).double()


def pixels(shape=(3, 9, 7), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# --- the transforms


def test_exact_transforms_move_whole_pixels():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    first = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    wanted = {
        (0, 0, 0, 0, 0): first,
        (1, 0, 0, 0, 0): [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8], [15, 14, 13, 12]],
        (0, 1, 0, 0, 0): first[::-1],
        (0, 0, 1, 0, 0): [[3, 7, 11, 15], [2, 6, 10, 14], [1, 5, 9, 13], [0, 4, 8, 12]],
        (0, 0, 2, 0, 0): [row[::-1] for row in first[::-1]],
        (0, 0, 3, 0, 0): [[12, 8, 4, 0], [13, 9, 5, 1], [14, 10, 6, 2], [15, 11, 7, 3]],
        (0, 0, 0, 1, 0): [[row[1], *row[:3]] for row in first],  # right by a pixel; the border is not repeated
        (0, 0, 0, 0, 1): [first[1], *first[:3]],
        (0, 0, 0, 0, -1): [*first[1:], first[2]],
        (1, 0, 1, 0, 0): [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],  # a flip, then a turn
    }
    for parameters, rows in wanted.items():
        out = augment(image, "exact", parameters)
        assert out.dtype == np.uint8
        assert out[0].tolist() == rows, parameters


@pytest.mark.parametrize(
    "parameters",
    [
        (0.8, 0, 0, 0, 0, 0),
        (0, 0.6, 0, 0, 0, 0),
        (0, 0, 1.2, 0.5, 0, 0),
        (0, 0, 0, 0, 0.7, -1.3),
        (-1, 2, 1, -2, 1, 0.5),
    ],
)
def test_interpolation_is_exact_for_quadratics_and_follows_the_affine_map(parameters):
    scale, angle, stretch, axis, right, down = parameters
    height, width = 40, 32

    def quadratic(x, y):
        return 40 + 2 * x - 3 * y + 0.1 * x * y + 0.05 * x * x - 0.07 * y * y

    rows, columns = np.mgrid[:height, :width].astype(float)
    x, y = columns - (width - 1) / 2, rows - (height - 1) / 2
    image = quadratic(x, y)[None].astype(np.float32)
    out = augment(image, "edm", (0, 0, *parameters))[0]
    # Where the pixel of the new image comes from, derived as complex numbers, transform by transform.
    z = (x - right * width / 8) + 1j * (y - down * height / 8)
    turned = z * np.exp(1j * axis)  # stretch by s along the axis
    s = 2 ** (0.2 * stretch)
    z = (turned.real / s + 1j * turned.imag * s) * np.exp(-1j * axis)
    z = z * np.exp(1j * angle) / 2 ** (0.2 * scale)
    inside = (abs(z.real) < width / 2 - 2.5) & (abs(z.imag) < height / 2 - 2.5)
    assert inside.sum() > 200
    np.testing.assert_allclose(out[inside], quadratic(z.real, z.imag)[inside], atol=2e-3)


@pytest.mark.parametrize("parameters", [(0.9, 0.7, 0.6, 0.3, 1.1, -0.6), (-2.0, 2.5, -1.0, 0, -2.0, 1.5)])
def test_interpolation_agrees_with_scipy_to_the_border_and_beyond(parameters):
    image = np.random.default_rng(2).random((2, 24, 32))
    for axis in (1, 2, 1, 2):  # smooth: cubic splines and cubic convolution agree
        image = sum(np.roll(image, shift, axis) for shift in range(-3, 4)) / 7
    matrix, shift = module._inverse(parameters, 32, 24)
    centre, swapped = np.array([11.5, 15.5]), matrix[::-1, ::-1]  # scipy's places are (row, column)
    wanted = [
        affine_transform(channel, swapped, centre - swapped @ centre + shift[::-1], order=3, mode="mirror")
        for channel in image
    ]
    out = augment(image.astype(np.float32), "edm", (0, 0, *parameters))
    assert np.abs(out - wanted).max() < 0.04 * np.ptp(image)
    assert np.abs(out - wanted).mean() < 0.003 * np.ptp(image)


def test_pixels_are_rounded_and_stay_in_range():
    image = np.where(np.arange(16) % 4 < 2, 255, 0).astype(np.uint8) * np.ones((3, 16, 1), np.uint8)
    out = augment(image, "edm", (0, 0, 0, 0.3, 0, 0, 0, 0))
    raw = augment(image.astype(np.float32), "edm", (0, 0, 0, 0.3, 0, 0, 0, 0))
    assert out.dtype == np.uint8
    assert raw.min() < 0
    assert raw.max() > 255
    np.testing.assert_array_equal(out, np.rint(raw).clip(0, 255))


def test_none_is_the_image_itself_and_full_turns_come_close():
    image = pixels()
    assert augment(image, "edm", [0.0] * 8) is image
    np.testing.assert_array_equal(augment(image, "edm", [0, 0, 0, 2 * math.pi, 0, 0, 0, 0]), image)
    flipped = augment(image, "edm", [1, 1, 0, math.pi, 0, 0, 0, 0])
    np.testing.assert_array_equal(flipped, image)  # two flips and half a turn
    assert augment(image[:, :1, :1], "exact", [0, 0, 0, 1, 1]).shape == (3, 1, 1)


# --- parameters and labels


def test_shares_and_distributions_are_those_of_edm():
    numbers = drawn(override(RunConfig(), ["data.augment=0.3"]))
    error = 4 * (0.25 / len(numbers)) ** 0.5
    shares = (numbers != 0).double().mean(0).tolist()
    for share, wanted in zip(shares, (0.5, 0.15, 0.3, 0.3, 0.3, 0.15, 0.3, 0.3), strict=True):
        assert abs(share - wanted) < error
    assert torch.equal(numbers[:, 6] != 0, numbers[:, 7] != 0), "both directions together"
    for column in (2, 4, 6, 7):
        values = numbers[numbers[:, column] != 0, column]
        assert abs(values.mean()) < 4 / len(values) ** 0.5
        assert abs(values.std() - 1) < 4 / len(values) ** 0.5
    for column in (3, 5):
        values = numbers[numbers[:, column] != 0, column]
        assert abs(values.mean()) < 4 * math.pi / (3 * len(values)) ** 0.5
        assert math.pi * 0.99 < values.abs().max() <= math.pi
    correlations = torch.corrcoef((numbers != 0).double()[:, :5].T)[~torch.eye(5, dtype=torch.bool)]
    assert correlations.abs().max() < 0.04


def test_exact_shares():
    config = override(RunConfig(), ["data.augment=0.4", "data.augment_kind=exact", "model.image_size=32"])
    numbers = drawn(config)
    assert {round(value, 3) for value in numbers[:, 3].unique().tolist()} == {n / 4 for n in range(-4, 5)}
    assert numbers[:, 2].unique().tolist() == [0, 1, 2, 3]
    for turn in (1, 2, 3):
        assert abs((numbers[:, 2] == turn).double().mean() - 0.1) < 0.01
    assert abs((numbers[:, 1] != 0).double().mean() - 0.2) < 0.015


def test_labels_are_edms():
    config = override(RunConfig(), ["data.augment=0.5"])
    labels, rows = augmentation_labels(config, torch.arange(64)).double(), drawn(config, 64)
    for label, (x, y, scale, angle, stretch, axis, right, down) in zip(labels.tolist(), rows.tolist(), strict=True):
        turn = [math.cos(angle) - 1, math.sin(angle)]
        wanted = [x, y, scale, *turn, stretch * math.cos(axis), stretch * math.sin(axis), right, down]
        assert label == pytest.approx(wanted, abs=1e-6)
    exact = override(RunConfig(), ["data.augment=0.5", "data.augment_kind=exact"])
    labels, rows = augmentation_labels(exact, torch.arange(64)), drawn(exact, 64)
    turns = {0: [0, 0], 1: [1, 0], 2: [1, 1], 3: [0, 1]}
    for label, (x, y, turn, right, down) in zip(labels.tolist(), rows.tolist(), strict=True):
        assert label == pytest.approx([x, y, *turns[int(turn)], right, down])


def test_parameters_depend_on_seed_and_example_only():
    config = override(RunConfig(), ["data.augment=0.5", "seed=7"])
    some = draw_augmentation(config, torch.tensor([5, 2**40 + 1, 3]))
    assert torch.equal(some[1:2], draw_augmentation(config, torch.tensor([2**40 + 1])))
    assert not torch.equal(drawn(config, 9), drawn(override(config, ["seed=8"]), 9))
    assert torch.equal(some, draw_augmentation(override(config, ["data.workers=2"]), torch.tensor([5, 2**40 + 1, 3])))


# --- batches


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_transformed_images_and_nothing_else_changes(config, kind):
    config = override(config, [f"data.augment_kind={kind}", "model.augment_labels=0"])
    source = open_source(config.data, config.model)
    plain = Examples(source, override(config, ["data.augment=0"]))
    ours = Examples(source, config)
    shares = [Examples(source, config, rank, 2) for rank in range(2)]
    loaded = list(load_batches(ours, 0, 4, 2, pin=False))
    changed = 0
    for number in range(4):
        batch, before = ours.packed(number), plain.packed(number)
        parameters = draw_augmentation(config, batch.example).tolist()
        for row, (image, old) in enumerate(zip(batch.x.numpy(), before.x.numpy(), strict=True)):
            np.testing.assert_array_equal(image, augment(old, kind, parameters[row]))
            changed += not np.array_equal(image, old)
        for name in ("noise", "t", "y", "image", "example"):
            assert torch.equal(getattr(batch, name), getattr(before, name))
        assert batch.x.dtype == torch.uint8
        assert torch.equal(loaded[number].x, batch.x)
        assert torch.equal(torch.cat([share.packed(number).x for share in shares]), batch.x)
    assert changed > 8
    assert torch.equal(held_out_batch(source, config.model, 8).x[0], torch.from_numpy(source.held_out(0)[0]))


# --- the network


def net_and_inputs(**changes):
    config = override(RunConfig(), [*KEYS[:9], "data.augment=0.5"])
    torch.manual_seed(0)
    net = NestedDiT(replace(config.model, **changes))
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    draw = torch.Generator().manual_seed(1)
    return net, torch.randn(3, 3, 8, 8, generator=draw), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 1, 2])


def test_zero_labels_and_none_have_the_bits_of_a_network_without_them():
    net, x, t, y = net_and_inputs()
    plain = NestedDiT(replace(net.config, augment_labels=0))
    unexpected = plain.load_state_dict(net.state_dict(), strict=False).unexpected_keys
    assert unexpected == ["augment_embed.weight"]
    wanted = plain(x, t, y)
    assert torch.equal(net(x, t, y), wanted)
    assert torch.equal(net(x, t, y, augment=torch.zeros(3, 9)), wanted)
    labels = torch.zeros(3, 9)
    labels[1, 0] = 1
    told = net(x, t, y, augment=labels)
    assert torch.equal(told[[0, 2]], wanted[[0, 2]])
    assert not torch.allclose(told[1], wanted[1])
    with pytest.raises(ValueError, match=r"reads no augmentation labels: set model.augment_labels"):
        plain(x, t, y, augment=labels)


def test_initial_weights_are_those_of_a_network_without_labels():
    config = override(RunConfig(), KEYS)
    states = []
    for model in (config.model, replace(config.model, augment_labels=0)):
        torch.manual_seed(0)
        states.append(NestedDiT(model).state_dict())
    assert not states[0].pop("augment_embed.weight").any()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])


@pytest.mark.parametrize(
    "model",
    [
        {"stages": "outer*2"},
        {"num_classes": 0},
        {"tokens": {"label": 1, "adaln": False}},
        {"tokens": {"label": 1, "time": 1, "adaln": False}, "outer": {"modulation": "none", "head_condition": "none"}},
        {"inner": {"condition": "outer"}},
    ],
)
def test_labels_reach_the_output_of_every_arrangement(model):
    config = override(RunConfig(), [*KEYS[:9], "data.augment=0.5"])
    assignments = [
        f"model.{group}.{name}={value}" if isinstance(values, dict) else f"model.{group}={values}"
        for group, values in model.items()
        for name, value in (values.items() if isinstance(values, dict) else [("", None)])
    ]
    net = NestedDiT(override(config, assignments).model)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    out = net(torch.randn(2, 3, 8, 8), 0.5, augment=torch.ones(2, 9))
    (gradient,) = torch.autograd.grad(out.square().sum(), net.augment_embed.weight)
    assert gradient.abs().min() > 0


def test_cost_counts_the_layer():
    net, x, t, y = net_and_inputs()
    cost, without = dd.inspect(net.config), dd.inspect(replace(net.config, augment_labels=0))
    assert cost["parameters"]["augment_embed"] == cost["macs"]["augment_embed"] == 9 * 16
    assert cost["macs"]["total"] - without["macs"]["total"] == 9 * 16
    counts = []
    for labels in (torch.zeros(3, 9), None):
        with FlopCounterMode(display=False) as counter:
            net(x, t, y, augment=labels)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * 3 * 9 * 16


# --- runs


@pytest.mark.parametrize(("kind", "workers"), [("edm", 0), ("exact", 2)])
def test_a_run_that_is_stopped_and_resumed_has_the_bits_of_the_whole(config, tmp_path, kind, workers):
    config = override(config, [f"data.augment_kind={kind}", "model.augment_labels=0"])
    whole = trained(config, tmp_path / "whole")
    config = override(config, [f"data.workers={workers}"])
    trained(config, tmp_path / "run", until=2)
    assert trained(config, tmp_path / "run", resume=True) == whole
    assert same(tmp_path / "whole", tmp_path / "run")
    assert tensors(tmp_path / "run")["augment_embed.weight"].any()


def test_two_processes_train_as_one(config, tmp_path):
    config = override(config, ["train.reduction=fixed"])
    whole = trained(config, tmp_path / "whole")
    run_together(2, trained, config, tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_text() == whole
    assert same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("parallel", ["ddp", SHARDED])
def test_several_processes_see_the_same_labels(config, tmp_path, parallel, full):
    if parallel == "ddp" and not full:
        pytest.skip("sharding has the harder case: --full")
    config = override(config, ["train.terms.sra=0.1", "train.dropout=0.2", "train.recompute=both"])
    trained(config, tmp_path / "whole")
    run_together(2, trained, override(config, [f"train.parallel={parallel}"]), tmp_path / "run")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    for name in one:
        if one[name].is_floating_point():
            torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)


def test_training_gives_labels_that_the_images_have(config):
    trainer = Trainer(config, open_source(config.data, config.model), CPU)
    seen = []
    trainer.net.augment_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = Examples(trainer.source, config).packed(1)
    trainer.update([batch])
    assert torch.equal(seen[0], augmentation_labels(config, batch.example))
    assert seen[0].any()


def test_sra_tells_the_averaged_model_too(config):
    config = override(config, ["train.terms.sra=0.1"])
    trainer = Trainer(config, open_source(config.data, config.model), CPU)
    seen = []
    trainer.ema.model.augment_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = Examples(trainer.source, config).packed(0)
    trainer.update([batch])
    assert [torch.equal(each, augmentation_labels(config, batch.example)) for each in seen] == [True]


def test_autocast_takes_labels(config):
    config = override(config, ["train.precision=bfloat16"])
    trainer = Trainer(config, open_source(config.data, config.model), CPU)
    told = trainer.update([Examples(trainer.source, config).packed(0)])
    assert torch.as_tensor(told["loss"]).isfinite()


def test_training_goes_on_without_augmentation_and_a_plain_run_starts_one_with_it(config, tmp_path):
    plain = override(config, ["data.augment=0", "model.augment_labels=0"])
    trained(plain, tmp_path / "plain")
    begun = override(config, [f"train.init={tmp_path / 'plain'}"])
    trained(begun, tmp_path / "begun")
    assert "augment_embed.weight" in tensors(tmp_path / "begun")
    later = override(config, ["data.augment=0", f"train.init={tmp_path / 'begun'}"])
    assert later.model.augment_labels == 9
    trained(later, tmp_path / "later")
    one, other = (tensors(tmp_path / run)["augment_embed.weight"] for run in ("begun", "later"))
    torch.testing.assert_close(one, other)


def test_exports_doctor_and_maps_need_no_labels(config, tmp_path, capsys, full):
    run = tmp_path / "run"
    trained(config, run)
    samples = np.stack([np.asarray(image) for image in dd.load(run).sample([0, 1], seed=3)])
    main(["export", str(run), "--format", "run", "--out", str(tmp_path / "released")])
    assert checkpoint.newest(tmp_path / "released").config.model == config.model
    again = np.stack([np.asarray(image) for image in dd.load(tmp_path / "released").sample([0, 1], seed=3)])
    np.testing.assert_array_equal(again, samples)
    main(["export", str(run), "--format", "pipeline", "--out", str(tmp_path / "pipe")])
    net, draw = checkpoint.newest(run).model(CPU), torch.Generator().manual_seed(0)
    x, t, y = torch.randn(2, 3, 8, 8, generator=draw), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    transformer = DiTInDiTTransformer2DModel.from_pretrained(tmp_path / "pipe" / "transformer")
    assert torch.equal(transformer(x, t, y).sample, net(x, t, y))
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", "official", "--out", str(tmp_path / "official")])
    assert len(capsys.readouterr().err.splitlines()) == 1
    if not full:
        return
    report = examine(config, CPU, run=run)
    assert {finding.severity for finding in report.findings} <= {"note"}
    main(["maps", str(run), "--out", str(tmp_path / "maps")])
    assert (tmp_path / "maps" / "maps.html").exists()


# --- what does not combine


def test_defaults_are_as_before():
    assert "augment" not in to_yaml(RunConfig()).split("data:")[0]
    assert not {"augment", "augment_kind"} & {*to_hash(RunConfig())["data"]}
    assert "augment_labels" not in to_hash(RunConfig())["model"]
    config = override(RunConfig(), ["data.augment=0.12"])
    assert from_yaml(to_yaml(config)) == config
    assert config.model.augment_labels == 9


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["data.flip=true"],
            r"^data.augment=0.5 flips images itself, with labels for the network: set data.flip=false$",
        ),
        (["model.augment_labels=6"], r"^data.augment_kind=edm has 9 labels: got model.augment_labels=6; set 0$"),
        (
            ["data.augment_kind=exact", "model.image_size=[16,32]"],
            r"^data.augment_kind=exact turns images, which must be square: got \[16, 32\]; set it to edm$",
        ),
        (["data.augment=1.5"], "data.augment must be"),
    ],
)
def test_what_does_not_combine_is_said_in_one_line(keys, message):
    with pytest.raises(UserError, match=message):
        override(RunConfig(), ["data.augment=0.5", "model.image_size=32", "model.patch_size=8", *keys])


def test_latents_and_models_without_labels_are_refused(config):
    latents = LatentSource.__new__(LatentSource)
    with pytest.raises(UserError, match=r"^data.augment=0.6 needs images, and .* has latents: set 0$"):
        check_augmentation(config, latents)
    plain = NestedDiT(replace(config.model, augment_labels=0))
    with pytest.raises(UserError, match=r"^data.augment=0.6 needs a model with augment_labels=9: got 0; set"):
        Trainer(config, open_source(config.data, config.model), CPU, model=plain)
