"""A run is a function of its config: the same seed, or a stop and a resume, give the same result."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import small_model, with_train
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import DataConfig, DiffusionConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.lock import BusyError
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.training.batches import Examples, load_batches, shuffled_index
from dit_in_dit.training.ema import Ema, ema_decay
from dit_in_dit.training.loop import train
from dit_in_dit.training.optimizer import learning_rate
from dit_in_dit.training.trainer import Trainer


def run(config, out: Path, **keys) -> list:
    return list(train(config, out, device="cpu", **keys))


def hashes(out: Path) -> dict[str, str]:
    return checkpoint.verify(checkpoint.newest(out).folder)["sha256"]


def examples(config) -> Examples:
    return Examples(open_source(config.data, config.model), config)


def test_the_same_seed_gives_the_same_log(run_config, tmp_path):
    for name in ("a", "b"):
        run(run_config, tmp_path / name)
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "b/log.jsonl").read_bytes()
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    run(replace(run_config, seed=4), tmp_path / "c")
    assert (tmp_path / "a/log.jsonl").read_bytes() != (tmp_path / "c/log.jsonl").read_bytes()


def test_training_leaves_the_global_random_generators_unchanged(run_config, tmp_path):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    run(run_config, tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_resumed_run_equals_unbroken_run(run_config, tmp_path):
    run(run_config, tmp_path / "unbroken")
    stopping = train(run_config, tmp_path / "broken", device="cpu")
    for fact in stopping:
        if fact.kind == "checkpoint":
            break
    stopping.close()
    facts = run(run_config, tmp_path / "broken", resume=True)
    assert facts[0].step == 3
    assert (tmp_path / "broken/log.jsonl").read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes()
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "unbroken")


def test_a_resumed_log_repeats_no_line_and_repairs_a_cut_line(run_config, tmp_path):
    run(run_config, tmp_path / "unbroken")
    stopped = train(run_config, tmp_path / "killed", device="cpu")
    list(islice(stopped, 9))  # three lines after the checkpoint from which the run resumes
    stopped.close()
    log = tmp_path / "killed/log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 6, "lo')
    run(run_config, tmp_path / "killed", resume=True)
    assert log.read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes()


def test_resuming_a_finished_run_does_nothing(run_config, tmp_path):
    run(run_config, tmp_path / "run")
    assert [fact.kind for fact in run(run_config, tmp_path / "run", resume=True)] == ["start"]


def test_a_run_is_neither_overwritten_nor_resumed_with_another_config(run_config, tmp_path):
    run(run_config, tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        run(run_config, tmp_path / "run")
    with pytest.raises(UserError, match=r"train\.learning_rate is 0\.001, not 0\.5"):
        run(with_train(run_config, learning_rate=0.5), tmp_path / "run", resume=True)


def test_a_run_is_not_resumed_with_an_edited_config_or_other_classes(run_config, tmp_path):
    out = tmp_path / "run"
    run(run_config, out)
    edited = with_train(run_config, learning_rate=0.5)
    (out / "config.yaml").write_text(to_yaml(edited))
    with pytest.raises(UserError, match="was changed since"):
        run(edited, out, resume=True)
    (out / "config.yaml").write_text(to_yaml(run_config))
    saved = checkpoint.newest(out)
    folder, manifest = saved.folder, saved.manifest
    state, ema = (load_tensors(folder / f"{name}.safetensors") for name in ("state", "ema"))
    checkpoint.save(out, run_config, manifest["step"], state, ema, ("a", "b", "c"))
    with pytest.raises(UserError, match="other classes"):
        run(run_config, out, resume=True)


def test_a_cut_timing_file_is_repaired_and_foreign_logs_are_refused(run_config, tmp_path):
    run(run_config, tmp_path / "run")
    timing = tmp_path / "run/timing.jsonl"
    before = timing.read_bytes()
    timing.write_bytes(before + b'{"step": 7, "sec')
    run(run_config, tmp_path / "run", resume=True)
    assert timing.read_bytes() == before
    (tmp_path / "run/log.jsonl").write_text("not JSON\n")
    with pytest.raises(UserError, match="not a JSON object"):
        run(run_config, tmp_path / "run", resume=True)


def test_accumulation_changes_neither_examples_nor_gradients(run_config, tmp_path):
    whole = with_train(run_config, batch_size=8, accumulate=1)
    parts = with_train(run_config, batch_size=2, accumulate=4)
    a, b = examples(whole), examples(parts)
    for step in range(5):
        for field, joined in zip(a[step]._fields, a[step], strict=True):
            pieces = torch.cat([getattr(b[step * 4 + k], field) for k in range(4)])
            assert torch.equal(joined, pieces), field
    losses = [
        [f.values["loss"] for f in run(c, tmp_path / str(n)) if f.kind == "step"] for n, c in enumerate((whole, parts))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_the_number_of_loader_workers_changes_no_example(run_config):
    reader = examples(run_config)
    for a, b in zip(load_batches(reader, 2, 6, 0, pin=False), load_batches(reader, 2, 6, 2, pin=False), strict=True):
        parts = [(x, y) for x, y in zip(a, b, strict=True) if x is not None or y is not None]
        assert len(parts) >= 6
        assert all(torch.equal(x, y) for x, y in parts)


@given(seed=st.integers(0, 2**63 - 1), size=st.integers(1, 50), epoch=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_image_is_shown_once_per_epoch(seed, size, epoch):
    shown = [shuffled_index(seed, index, size) for index in range(epoch * size, (epoch + 1) * size)]
    assert sorted(shown) == list(range(size))


def test_example_streams_do_not_depend_on_each_other():
    first = generator(1, "noise", 5).standard_normal(4)
    assert np.array_equal(first, generator(1, "noise", 5).standard_normal(4))
    for other in ((2, "noise", 5), (1, "example", 5), (1, "noise", 6)):
        assert not np.array_equal(first, generator(*other).standard_normal(4))


def test_labels_are_dropped_and_images_flipped_at_their_rates(run_config):
    config = with_train(run_config, batch_size=400, label_drop=0.25)
    plain, flipped = examples(config)[0], examples(replace(config, data=replace(config.data, flip=True)))[0]
    assert (plain.y == 3).float().mean().item() == pytest.approx(0.25, abs=0.07)
    mirrored = (plain.x != flipped.x).flatten(1).any(1)
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(plain.x[mirrored].flip(-1), flipped.x[mirrored])
    assert torch.equal(plain.noise, flipped.noise)
    assert plain.noise.std().item() == pytest.approx(1, abs=0.02)


def test_beta2_sets_the_decay_of_the_second_moment(run_config):
    config = with_train(run_config, beta2=0.5)
    optimizer = Trainer(config, open_source(config.data, config.model), torch.device("cpu")).optimizer
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.5)}


def test_a_model_trains_on_unlabelled_data(run_config, tmp_path):
    config = replace(run_config, model=small_model("outer inner", image_size=(8, 8), num_classes=0))
    assert run(config, tmp_path / "run")[-1].kind == "checkpoint"


def test_the_learning_rate_is_a_function_of_the_step(run_config):
    how = with_train(run_config, steps=100, warmup=10, schedule="cosine", learning_rate=1.0).train
    rates = [learning_rate(how, step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3


def test_averaged_weights_follow_the_closed_form():
    model = NestedDiT(small_model())
    ema = Ema(model, decay=0.5)
    weight = model.outer_embed.proj.bias
    expected = torch.zeros_like(weight)
    for step in range(1, 6):
        with torch.no_grad():
            weight.fill_(float(step))
        ema.update(model, step)
        decay = ema_decay(step, 0.5)
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.model.outer_embed.proj.bias, expected)


def test_training_lowers_the_held_out_error(run_config, tmp_path):
    config = with_train(run_config, steps=120, evaluate_every=10, learning_rate=3e-3, batch_size=16)
    config = replace(config, data=DataConfig(source="mosaic"), diffusion=DiffusionConfig(predict="image"))
    config = replace(config, model=small_model("outer*2 inner*1", image_size=(8, 8), num_classes=9))
    errors = [fact.values for fact in run(config, tmp_path / "run") if fact.kind == "held_out"]
    assert len(errors) == 12
    for t in ("0.2", "0.5", "0.8"):
        assert errors[-1][t]["whole"] < 0.97 * errors[0][t]["whole"]
        assert 0 < errors[-1][t]["high"] < errors[-1][t]["whole"]


def test_bfloat16_trains_close_to_float32(run_config, tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        facts = run(with_train(run_config, precision=precision), tmp_path / precision)
        losses[precision] = [fact.values["loss"] for fact in facts if fact.kind == "step"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"]


@pytest.mark.slow
def test_compiled_training_runs(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_in_dit.model.compiled.BACKEND", "aot_eager")
    facts = run(with_train(run_config, compile=True), tmp_path / "compiled")
    plain = run(run_config, tmp_path / "plain")
    a, b = ([f.values["loss"] for f in facts if f.kind == "step"] for facts in (facts, plain))
    assert a == pytest.approx(b, rel=1e-4)


def test_log_and_timing_are_json_lines(run_config, tmp_path):
    run(run_config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "held_out" in line] == [3, 6]
    timing = [json.loads(line) for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 for line in timing)


def test_resume_skips_a_damaged_checkpoint(run_config, tmp_path):
    run(run_config, tmp_path / "run")
    saved = checkpoint.newest(tmp_path / "run")
    folder, manifest = saved.folder, saved.manifest
    assert manifest["step"] == 6
    content = bytearray((folder / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"ema\.safetensors is not what was written"):
        checkpoint.verify(folder)
    assert checkpoint.newest(tmp_path / "run").step == 3


def test_only_the_newest_checkpoints_are_kept(run_config, tmp_path):
    run(with_train(run_config, checkpoint_every=1), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["0000005", "0000006"]


def test_squared_gradient_norms_of_the_parts_add_up_to_the_total(run_config, tmp_path):
    run(run_config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert len(steps) == run_config.train.steps
    for line in steps:
        parts = {name: value for name, value in line.items() if name.startswith("grad_norm.")}
        assert {"grad_norm.outer_blocks", "grad_norm.inner_blocks", "grad_norm.inner_head"} <= parts.keys()
        assert sum(value**2 for value in parts.values()) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-5)


def test_a_run_is_locked_until_its_process_ends(run_config, tmp_path):
    list(train(with_train(run_config, steps=3), tmp_path / "run"))
    hold = (
        "import sys, time; from pathlib import Path; from dit_in_dit.runs.folder import lock_run\n"
        "with lock_run(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"is being trained by process {owner.pid} on "):
            list(train(with_train(run_config, steps=3), tmp_path / "run", resume=True))
    finally:
        owner.kill()  # as a system out of memory does
        owner.wait()
    assert [fact.kind for fact in train(with_train(run_config, steps=3), tmp_path / "run", resume=True)] == ["start"]


# ------------------------------------------------------------------------------------------ the data of a resumed run


@pytest.fixture
def half_run(run_config, folder, tmp_path):
    """The first half of a run on a copy of the small folder: config, run and copy."""
    images = tmp_path / "set"
    shutil.copytree(folder, images)
    config = replace(run_config, data=replace(run_config.data, source=str(images)))
    run(config, tmp_path / "run", until=3)
    return config, tmp_path / "run", images


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "renamed"])
def test_resume_refuses_data_that_changed(half_run, change):
    config, out, images = half_run
    some = sorted(images.glob("*/*.png"))[0]
    match change:
        case "added":
            shutil.copy(some, some.with_name("another.png"))
        case "removed":
            some.unlink()
        case "replaced":
            shutil.copy(sorted(images.glob("*/*.png"))[1], some)
        case "renamed":
            some.rename(some.with_name("another.png"))
    with pytest.raises(UserError, match=r"changed since .* was trained on it"):
        run(config, out, resume=True)


def test_a_run_resumes_with_its_data_at_another_place(half_run, run_config, tmp_path, monkeypatch):
    config, out, images = half_run
    run(config, tmp_path / "unbroken")
    images.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such file or folder"):
        run(config, out, resume=True)
    run(config, out, resume=True, data=str(tmp_path / "moved"))
    assert (out / "log.jsonl").read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes()
    assert hashes(out) == hashes(tmp_path / "unbroken")


def test_evaluate_and_verify_resume_accept_the_new_place_of_the_data(half_run, tmp_path, monkeypatch, capsys):
    from dit_in_dit.cli import main

    config, out, images = half_run
    images.rename(tmp_path / "moved")
    run(config, out, resume=True, data=str(tmp_path / "moved"))
    monkeypatch.chdir(tmp_path)
    main(["evaluate", str(out), "-n", "4", "--device", "cpu"])
    main(["maps", str(out), "--num", "1", "--times", "0.5", "--device", "cpu"])
    main(["verify-resume", str(out), "--steps", "2", "--device", "cpu"])
    with contextlib.suppress(SystemExit):  # the doctor may complain about a run of six steps
        main(["doctor", str(out), "--device", "cpu"])
    assert "no such file" not in capsys.readouterr().err


def test_new_files_beside_the_data_do_not_stop_a_resume(run_config, folder, tmp_path):
    shards = tmp_path / "set"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as archive:
        archive.add(folder, arcname=".")
    config = replace(run_config, data=replace(run_config.data, source=str(shards)))
    for fact in train(config, tmp_path / "run", device="cpu"):
        if fact.step == 1:
            with zipfile.ZipFile(shards / "more.zip", "w") as archive:
                archive.writestr("more.txt", "")
    assert fact.step == config.train.steps


def test_relative_paths_of_shards_work_from_another_working_folder(run_config, folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / f"here/part-{number}.tar", "w") as archive:
            archive.add(folder, arcname="." if number else "more")
    monkeypatch.chdir(tmp_path / "here")
    for name, source in (("one", "part-1.tar"), ("all", "part-{0..1}.tar")):
        how = replace(run_config.data, source=source)
        config = replace(run_config, model=replace(run_config.model, num_classes=0), data=how)
        monkeypatch.chdir(tmp_path / "here")
        run(config, tmp_path / name, until=3)
        monkeypatch.chdir(tmp_path)
        assert run(config, tmp_path / name, resume=True)[-1].step == 6


def test_a_relative_data_path_works_from_another_working_folder(run_config, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "here/set")
    config = replace(run_config, data=replace(run_config.data, source="set"))
    monkeypatch.chdir(tmp_path / "here")
    run(config, tmp_path / "run", until=3)
    monkeypatch.chdir(tmp_path)
    assert run(config, tmp_path / "run", resume=True)[-1].step == 6
    shutil.copytree(folder, tmp_path / "set")
    (next((tmp_path / "set").glob("*/*.png"))).unlink()  # other data under the same relative name
    with pytest.raises(UserError, match="changed since"):
        run(with_train(config), tmp_path / "run", resume=True)


def test_a_checkpoint_without_a_data_record_resumes_with_a_notice(half_run):
    config, out, _ = half_run
    newest = checkpoint.newest(out)
    state, ema = (load_tensors(newest.folder / f"{name}.safetensors") for name in ("state", "ema"))
    checkpoint.save(out, config, 3, state, ema, tuple(newest.manifest["classes"]))
    facts = run(config, out, resume=True)
    assert facts[0].values["unrecorded"]
    assert facts[-1].step == 6


def test_a_warm_start_from_a_run_on_other_data_is_reported(half_run, run_config, tmp_path):
    config, out, images = half_run
    for name in ("same", "other"):
        init = with_train(config, init=str(out), steps=1)
        facts = run(init, tmp_path / name)
        assert facts[0].values["begun"].other_data == (name == "other")
        next(images.glob("*/*.png")).unlink()
