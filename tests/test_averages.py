"""Several averages of the weights: kept, resumed, chosen, and reconstructed at other lengths as in EDM2."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dit_in_dit as dd
from conftest import SHARDED, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, from_yaml, override, to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.inspection import launch_plan
from dit_in_dit.metrics.average_curve import average_length
from dit_in_dit.runs import averages, checkpoint, power_function
from dit_in_dit.runs.integrity import DamagedWarning
from dit_in_dit.runs.power_function import fit_profile, length_exponent, power_decay, relative_length
from dit_in_dit.runs.reconstruction import reconstruct
from dit_in_dit.study.worker import trial_bytes
from dit_in_dit.training.batches import Examples, load_batches
from dit_in_dit.training.ema import ema_decay
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer
from processes import run_together, trained

LENGTHS = (0.05, 0.1)


def several(config: RunConfig, **keys) -> RunConfig:
    """The config with two decays and two lengths, with snapshots every three steps."""
    return with_train(config, **{"ema": (0.9, 0.5), "ema_lengths": LENGTHS, "ema_snapshot_every": 3, **keys})


def run(config: RunConfig, out: Path, **keys) -> Path:
    for _ in train(config, out, device="cpu", **keys):
        pass
    return out


@pytest.fixture
def kept(run_config: RunConfig, tmp_path: Path) -> Path:
    """A run of six steps with every average."""
    return run(several(run_config), tmp_path / "run")


# ------------------------------------------------------------------------------------------ EDM2, derived again


def test_the_exponent_solves_the_cubic_of_edm2():
    for length in (0.005, 0.01, 0.05, 0.1, 0.15, 0.25, 0.28):
        power = length_exponent(length)
        roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
        assert power == pytest.approx(roots.real.max(), rel=1e-9)
        assert math.sqrt((power + 1) / ((power + 2) ** 2 * (power + 3))) == pytest.approx(length, rel=1e-12)
    assert length_exponent(0.05) == pytest.approx(16.97, abs=0.01)  # EDM2, section 3.1
    assert length_exponent(0.10) == pytest.approx(6.94, abs=0.01)


def profile(step: int, length: float, steps: int) -> np.ndarray:
    """Weight of each step in the average, from the integral of the power function over the step."""
    edges = np.minimum(np.arange(steps + 1) / step, 1) ** (length_exponent(length) + 1)
    return np.diff(edges)


def tracked(sequence: np.ndarray, length: float) -> np.ndarray:
    """The average after each step by EDM2's update, in float64; step 0 is a start that must be forgotten."""
    average, power, every = np.full(sequence.shape[1], 1e9), length_exponent(length), []
    for step, weights in enumerate(sequence, 1):
        beta = (1 - 1 / step) ** (power + 1)
        average = beta * average + (1 - beta) * weights
        every.append(average)
    return np.array(every)


def test_the_update_weighs_steps_by_the_power_function():
    steps, length = 300, 0.1
    sequence = np.eye(steps)  # so that the average holds the weight of each step
    assert tracked(sequence, length)[-1] == pytest.approx(profile(steps, length, steps), abs=1e-12)
    at = np.arange(1, steps + 1) - 0.5
    weights = profile(steps, length, steps)
    deviation = math.sqrt(weights @ at**2 - (weights @ at) ** 2)
    assert deviation / steps == pytest.approx(length, rel=2e-3)
    assert power_decay(1, length_exponent(length)) == 0


def test_inner_products_are_the_integrals():
    grid = (np.arange(400_000) + 0.5) / 400_000 * 80

    def density(t: float, power: float) -> np.ndarray:
        return np.where(grid <= t, (power + 1) * (grid / t) ** power / t, 0)

    for one, other in (((80.0, 16.9), (80.0, 6.9)), ((30.0, 16.9), (80.0, 6.9)), ((80.0, 2.0), (50.0, 6.9))):
        integral = (density(*one) * density(*other)).mean() * 80
        assert power_function._products([one], [other])[0, 0] == pytest.approx(integral, rel=1e-3)
        assert power_function._products([other], [one])[0, 0] == pytest.approx(integral, rel=1e-3)


@pytest.mark.parametrize("length", [0.06, 0.08, 0.12, 0.15, 0.2])
def test_a_reconstructed_average_is_near_the_one_tracked_directly(length):
    steps, every = 2000, 50
    draw = np.random.default_rng(0)
    walk = draw.standard_normal((steps, 64)).cumsum(0)  # weights wander, as they do at a constant rate
    stored = {one: tracked(walk, one) for one in LENGTHS}
    snapshots = [(step, one) for step in range(every, steps + 1, every) for one in LENGTHS]
    profiles = [(float(step), length_exponent(one)) for step, one in snapshots]
    weights, error = fit_profile(profiles, (float(steps), length_exponent(length)))
    rebuilt = sum(weight * stored[one][step - 1] for weight, (step, one) in zip(weights, snapshots, strict=True))
    direct = tracked(walk, length)[-1]
    apart = np.abs(direct - walk[-1]).mean()
    assert np.abs(rebuilt - direct).mean() < 0.01 * apart  # a hundredth of what the average changes
    assert weights.sum() == pytest.approx(1)
    # The error that is reported is that of the profile, computed here from the weights of all steps.
    mixed = sum(weight * profile(step, one, steps) for weight, (step, one) in zip(weights, snapshots, strict=True))
    wanted = profile(steps, length, steps)
    assert np.linalg.norm(mixed - wanted) / np.linalg.norm(wanted) == pytest.approx(error, rel=0.2, abs=2e-3)


def test_a_tracked_length_has_weight_one():
    profiles = [(float(step), length_exponent(one)) for step in (10, 20, 30) for one in LENGTHS]
    weights, error = fit_profile(profiles, (30.0, length_exponent(0.1)))
    assert (weights.tolist(), error) == ([0, 0, 0, 0, 0, 1], 0)


def test_few_snapshots_are_reported_as_a_large_error():
    errors = []
    for every in (500, 200, 50):
        profiles = [(float(step), length_exponent(one)) for step in range(every, 1001, every) for one in LENGTHS]
        errors.append(fit_profile(profiles, (1000.0, length_exponent(0.2)))[1])
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > 0.05 > errors[2], errors


# ------------------------------------------------------------------------------------------ keys


def test_one_decay_in_a_list_is_that_decay(run_config):
    usual = override(run_config, ["train.ema=0.9999"])
    assert override(run_config, ["train.ema=[0.9999]"]) == usual
    assert config_hash(override(run_config, ["train.ema=[0.9999]"])) == config_hash(usual)
    two = override(run_config, ["train.ema=[0.9999, 1e-1]"])
    assert (two.train.ema, two.train.further_averages) == ((0.9999, 0.1), ("0.1",))
    assert from_yaml(to_yaml(two)) == two
    assert config_hash(two) != config_hash(usual)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.ema=[]"], "train.ema must list one number or several different ones: got []"),
        (["train.ema=[0.9,0.90]"], "different ones: got [0.9, 0.9]"),
        (["train.ema=[0.9,1]"], "train.ema must be from 0 to 1: got 1"),
        (["train.ema=null"], "train.ema must be a finite number: got 'None'"),
        (["train.ema=[a]"], "train.ema must be a finite number: got 'a'"),
        (["train.ema_lengths=[]"], "train.ema_lengths must list one number"),
        (["train.ema_lengths=[0.3]"], "train.ema_lengths must be from 0.005 to 0.28: got 0.3"),
        (["train.ema_snapshot_every=3"], "train.ema_snapshot_every keeps train.ema_lengths: set them"),
        (["train.ema_lengths=[0.1]", "train.ema_snapshot_every=4"], "multiple of train.checkpoint_every: got 4, 3"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, message, run_config):
    with pytest.raises(UserError) as refused:
        override(run_config, keys)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------ training


def test_averages_follow_their_decays(run_config):
    """Against averages computed here from the weights after every step, in float64."""
    config = several(run_config)
    source = open_source(config.data, config.model)
    trainer = Trainer(config, source, torch.device("cpu"))
    batches = iter(load_batches(Examples(source, config), 0, 6, 0, pin=False))
    decays = {"0.5": lambda step: ema_decay(step, 0.5)}
    decays |= {f"length={each}": lambda step, each=each: power_decay(step, length_exponent(each)) for each in LENGTHS}
    name = "outer_embed.proj.weight"
    weight = trainer.model.get_parameter(name)
    wanted = dict.fromkeys(decays, weight.detach().double().clone())
    for step in range(1, 7):
        trainer.update([next(batches)])
        wanted = {each: torch.lerp(weight.detach().double(), wanted[each], decays[each](step)) for each in wanted}
    tensors = trainer.averages.tensors()
    assert len(tensors) == 3 * len(list(trainer.model.parameters()))
    for each, average in wanted.items():
        assert torch.allclose(tensors[f"average/{each}/{name}"].double(), average, atol=1e-7)
    assert not torch.equal(tensors[f"average/0.5/{name}"], tensors[f"average/length=0.1/{name}"])


def test_further_averages_leave_the_run_as_it_is(run_config, kept, tmp_path):
    alone = checkpoint.newest(run(run_config, tmp_path / "alone"))
    beside = checkpoint.newest(kept)
    assert (kept / "log.jsonl").read_bytes() == (tmp_path / "alone/log.jsonl").read_bytes()
    assert alone.sha256() == beside.sha256()
    own, more = alone.state(), beside.state()
    assert all(torch.equal(own[name], more[name]) for name in own)
    assert {name.split("/")[1] for name in more if name not in own} == {"0.5", "length=0.05", "length=0.1"}


def files(out: Path) -> dict[str, bytes]:
    """Everything that a run with several averages is: log, tensors of the newest checkpoint, and snapshots."""
    paths = [out / "log.jsonl", *checkpoint.newest(out).folder.glob("*.safetensors")]
    return {str(path.relative_to(out)): path.read_bytes() for path in (*paths, *out.glob("averages/*/*.safetensors"))}


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_stopped_and_resumed_run_has_the_same_averages(stop, run_config, kept, tmp_path):
    run(several(run_config), tmp_path / "parts", until=stop)
    run(several(run_config), tmp_path / "parts", resume=True)
    assert files(tmp_path / "parts") == files(kept)
    assert len(files(kept)) == 5


def test_a_run_killed_before_its_checkpoint_writes_its_snapshot_again(run_config, kept, tmp_path, monkeypatch):
    def killed(target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "move_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            run(several(run_config), tmp_path / "run2")
    assert (tmp_path / "run2/averages/0000003").is_dir()
    assert not checkpoint.has_any(tmp_path / "run2")
    run(several(run_config), tmp_path / "run2", resume=True)
    assert files(tmp_path / "run2") == files(kept)


def test_processes_share_the_averages(run_config, tmp_path):
    """1 -> 2 -> 1 processes, bit for bit with a fixed reduction."""
    config = several(run_config, steps=9, reduction="fixed", accumulate=2, batch_size=2)
    run(config, tmp_path / "one")
    run(config, tmp_path / "many", until=2)
    run_together(2, trained, config, tmp_path / "many", True, 5)
    run(config, tmp_path / "many", resume=True)
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("parallel", ["ddp", SHARDED])
@pytest.mark.full  # test_processes_share_the_averages covers the fixed reduction
def test_two_processes_keep_the_averages_of_one(parallel, run_config, tmp_path):
    config = several(run_config, parallel=parallel)
    run(config, tmp_path / "one")
    run(config, tmp_path / "many", until=2)
    run_together(2, trained, config, tmp_path / "many", True, 4)
    run_together(2, trained, config, tmp_path / "many", True)
    one, many = (files(tmp_path / name) for name in ("one", "many"))
    assert one.keys() == many.keys()
    states = [checkpoint.newest(tmp_path / name).state() for name in ("one", "many")]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])
    # A stop of two processes changes no bit.
    run_together(2, trained, config, tmp_path / "again", False)
    run_together(2, trained, config, tmp_path / "parts", False, 4)
    run_together(2, trained, config, tmp_path / "parts", True)
    assert files(tmp_path / "again") == files(tmp_path / "parts")


def test_snapshots_outlive_their_checkpoints_and_may_become_rarer(run_config, tmp_path):
    config = several(run_config, steps=12)
    run(config, tmp_path / "run", until=9)
    run(with_train(config, ema_snapshot_every=12), tmp_path / "run", resume=True)
    assert sorted(path.name for path in (tmp_path / "run/averages").iterdir()) == [
        "0000003",
        "0000006",
        "0000009",
        "0000012",
    ]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["0000009", "0000012"]


@pytest.mark.parametrize(
    "keys", [{"ema": (0.9,)}, {"ema": (0.5, 0.9)}, {"ema_lengths": (0.1,)}, {"ema": (0.9, 0.5, 0.3)}]
)
def test_a_run_keeps_its_averages(keys, run_config, kept):
    with pytest.raises(UserError, match=r"was started with another config: train.ema"):
        run(several(run_config, steps=7, **keys), kept, resume=True)


# ------------------------------------------------------------------------------------------ chosen


def test_commands_choose_an_average(kept, tmp_path, capsys):
    main(["average", str(kept), "--length", "0.08"])
    assert "length=0.08 at step 6 from 4 averages" in capsys.readouterr().out
    drawn = {}
    for each in ("", "0.9", "0.5", "length=0.10", "length=0.08"):
        out = tmp_path / f"drawn{each}"
        main(["sample", str(kept), "-n", "1", "--out", str(out), *(["--ema", each] if each else [])])
        drawn[each] = json.loads((out / "samples.json").read_text())
    assert drawn[""] == drawn["0.9"]
    assert "average" not in drawn[""]["samples"]
    assert [drawn[each]["samples"]["average"] for each in ("0.5", "length=0.10", "length=0.08")] == [
        *("0.5", "length=0.1", "length=0.08")
    ]
    assert len({each["checkpoint"] for each in drawn.values()}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ema", "0.7"], "has no average '0.7': it has 0.9, 0.5, length=0.05, length=0.1; "),
        (["--ema", "../x"], "has no average '../x': it has 0.9, 0.5"),
        (["--ema", "length=0.2"], "make it: dit-in-dit average"),
        (["--ema", "0.5", "--raw"], "--ema and --raw exclude each other"),
    ],
)
def test_an_unknown_average_is_refused_with_those_that_exist(options, message, kept, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", str(kept), "-n", "1", "--out", str(tmp_path / "drawn"), *options])
    error = capsys.readouterr().err.strip()
    assert message.rstrip("; ") in error
    assert error.count("\n") == 0


def test_a_run_with_one_average_names_it(run_config, tmp_path):
    saved = checkpoint.newest(run(run_config, tmp_path / "run"))
    with pytest.raises(UserError, match=r"has no average 'length=0.1': it has 0.9$"):
        saved.weights(averaged="length=0.1")
    with pytest.raises(UserError, match=r"keeps no averages to reconstruct from: train with train.ema_lengths"):
        reconstruct(tmp_path / "run", 0.1)


def test_python_loads_an_average_and_keeps_it(kept, tmp_path):
    usual, other = dd.load(kept, "cpu"), dd.load(kept, "cpu", average=0.5)
    assert (usual.average, other.average, dd.load(kept, "cpu", average="0.9").average) == (None, "0.5", None)
    state = checkpoint.newest(kept).state()
    for name, weight in other.net.named_parameters():
        assert torch.equal(weight, state[f"average/0.5/{name}"])
    other.save_pretrained(tmp_path / "pipeline")
    exported = dd.load(tmp_path / "pipeline", "cpu").net.state_dict()
    assert all(torch.equal(weight, exported[name]) for name, weight in other.net.state_dict().items())
    assert "average 0.5" in (tmp_path / "pipeline/README.md").read_text()


def test_an_export_holds_the_chosen_average(kept, tmp_path):
    main(
        [
            "export",
            str(kept),
            "--format",
            "run",
            "--precision",
            "float32",
            "--ema",
            "length=0.1",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    weights, state = checkpoint.newest(tmp_path / "out").weights(), checkpoint.newest(kept).state()
    stored = {name.split("/")[2]: state[name] for name in state if name.startswith("average/length=0.1/")}
    assert all(torch.equal(weights[name], weight) for name, weight in stored.items())


def test_evaluations_of_averages_are_not_mixed(kept, capsys):
    main(["evaluate", str(kept), "-n", "4", "--ema", "all"])
    assert "averages.json and averages.png" in capsys.readouterr().out
    place = kept / "evaluation/0000006"
    compared = json.loads((place / "averages.json").read_text())
    assert list(compared["averages"].values()) == sorted(compared["averages"].values())
    assert set(compared["averages"]) == {"0.9", "0.5", "length=0.05", "length=0.1"}
    own = json.loads((place / "average-0.5/metrics.json").read_text())
    assert own["protocol"]["samples"]["average"] == "0.5"
    position = list(compared["averages"]).index("0.5")
    assert compared["scores"]["swd.8"][position] == own["scores"]["swd.8"]
    assert (place / "averages.png").stat().st_size > 10_000
    before = (place / "samples").stat().st_mtime_ns
    main(["evaluate", str(kept), "-n", "4", "--ema", "0.9"])  # the run's first: nothing is drawn again
    assert (place / "samples").stat().st_mtime_ns == before
    assert dd.compare(kept).labels == ["run@6"]
    assert dd.compare(dd.load(kept, "cpu", average=0.5)).folders == [place / "average-0.5"]
    with pytest.raises(UserError, match=r"protocols differ in samples.average"):
        dd.compare(kept, place / "average-0.5")


def test_the_length_of_a_decay_is_that_of_its_weights():
    for name, step in (("0.9", 50), ("0.5", 300)):
        weights = np.zeros(step + 1)
        weights[0] = 1
        for t in range(1, step + 1):
            decay = ema_decay(t, float(name))
            weights *= decay
            weights[t] += 1 - decay
        steps = np.arange(step + 1)
        deviation = math.sqrt(weights @ steps**2 - (weights @ steps) ** 2)
        assert average_length(name, step) == pytest.approx(deviation / step, rel=1e-9)
    assert average_length("length=0.1", 10) == 0.1
    assert relative_length(8) == pytest.approx(average_length("0.9999", 4000), rel=0.01)  # all of it is the ramp


# ------------------------------------------------------------------------------------------ reconstructed


def test_a_reconstruction_is_the_sum_of_its_snapshots(kept):
    made = reconstruct(kept, 0.08)
    assert (made.step, made.averages, made.folder) == (6, 4, kept / "averages/0000006-length=0.08")
    profiles = [(float(step), length_exponent(one)) for step in (3, 6) for one in LENGTHS]
    weights, error = fit_profile(profiles, (6.0, length_exponent(0.08)))
    assert made.error == error
    stored = [averages.load_tensors(kept / f"averages/000000{step}/averages.safetensors") for step in (3, 6)]
    saved = checkpoint.newest(kept)
    for name, weight in saved.model(torch.device("cpu"), averaged="length=0.08").named_parameters():
        parts = [tensors[f"average/length={one}/{name}"].double() for tensors in stored for one in LENGTHS]
        wanted = sum(factor * part for factor, part in zip(weights.tolist(), parts, strict=True))
        assert torch.equal(weight, wanted.float())
    assert saved.sha256(averaged="length=0.08") == averages.integrity.file_sha256(made.folder / "averages.safetensors")


def test_a_tracked_length_is_not_reconstructed(kept):
    with pytest.raises(UserError, match=r"has tracked the average of length 0.1: choose it with --ema length=0.1"):
        reconstruct(kept, 0.1)


def test_damage_is_named(kept):
    made = reconstruct(kept, 0.08)
    path = made.folder / averages.FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"length=0.08/averages.safetensors is not what was written"):
        checkpoint.newest(kept).weights(averaged="length=0.08")
    snapshot = kept / "averages/0000003/averages.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:-5])
    with pytest.warns(DamagedWarning, match="is truncated"):
        assert reconstruct(kept, 0.08).averages == 2  # those of the checkpoint remain
    checkpoint.newest(kept).weights(averaged="length=0.08")


def test_a_snapshot_that_cannot_be_written_loses_nothing(run_config, kept, tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    config = several(run_config, checkpoint_every=1)
    run(config, tmp_path / "run2", until=2)
    with monkeypatch.context() as patched:
        patched.setattr(averages, "write_averages", full)
        with pytest.raises(checkpoint.SaveError, match=r"cannot save .*0000006: No space left on device"):
            run(config, tmp_path / "run2", resume=True)
    assert checkpoint.newest(tmp_path / "run2").step == 5  # step 3 was left out, 4 and 5 were saved
    assert not list(tmp_path.glob("run2/*/*.part"))
    run(config, tmp_path / "run2", resume=True)
    assert checkpoint.newest(tmp_path / "run2").sha256() == checkpoint.newest(kept).sha256()
    assert [path.name for path in (tmp_path / "run2/averages").iterdir()] == ["0000006"]


# ------------------------------------------------------------------------------------------ cost, doctor


def test_further_averages_are_counted(run_config, capsys):
    config = several(run_config)
    main(["inspect", "--preset", "emoji", "--set", "train.ema_lengths=[0.05,0.1]", "--json"])
    shown = json.loads(capsys.readouterr().out)
    size = 4 * shown["parameters"]["total"]
    assert shown["averages"] == {"averages": 2, "bytes in memory and in each checkpoint": 2 * size}
    main(["inspect", "--preset", "emoji", "--json"])
    assert "averages" not in json.loads(capsys.readouterr().out)
    assert trial_bytes(config) - trial_bytes(run_config) == 3 * 4 * dd.cost.parameters(config.model)["total"]
    preset = dd.preset("dit-s2")
    more = replace(preset, train=replace(preset.train, ema_lengths=LENGTHS))
    plans = [launch_plan.recipe("dit-s2", each, 8) for each in (preset, more)]
    assert plans[1].memory - plans[0].memory == 2 * 4 * dd.cost.parameters(preset.model)["total"]


def test_the_doctor_reports_averages_that_are_the_same(run_config):
    def seen(config: RunConfig) -> list[str]:
        return [found.seen for found in examine(config, torch.device("cpu")).findings if found.check == "averages"]

    assert seen(run_config) == []
    assert seen(with_train(run_config, ema=(0.9, 0.2))) == []  # 0.2 is reached at once
    (found,) = seen(with_train(run_config, ema=(0.9, 0.8)))
    assert found == "the averages 0.9, 0.8 are the same: in 6 steps no decay exceeds 0.43750"


def test_defaults_keep_one_average():
    train_keys = TrainConfig()
    assert (train_keys.decays, train_keys.further_averages, train_keys.ema_lengths) == ((0.9999,), (), None)
