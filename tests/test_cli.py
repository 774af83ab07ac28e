"""The command line as users call it; a mistake prints one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_in_dit.cli import main
from dit_in_dit.config.field import FAMILIES
from dit_in_dit.config.files import from_yaml, to_yaml
from dit_in_dit.config.presets import NAMES, get
from dit_in_dit.data import labels
from dit_in_dit.data.groups import is_held_out


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """A run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "a run"
    main(["train", *TINY, "--set", f"data.source={folder}", "--out", str(out), "--device", "cpu"])
    return out


TINY = [
    "--preset", "emoji",
    *(
        word
        for assignment in (
            "model.image_size=16", "model.outer.width=32", "model.outer.num_heads=2", "model.inner.width=16",
            "model.inner.num_heads=2", "model.num_classes=3", "train.steps=4", "train.batch_size=4",
            "train.checkpoint_every=2", "train.sample_every=4", "train.evaluate_every=2", "sample.steps=2",
            "data.held_out=0.2", "train.warmup=0", "train.learning_rate=0.01",
        )
        for word in ("--set", assignment)
    ),
]  # fmt: skip


def test_a_run_folder_holds_the_documented_files(trained):
    assert {path.name for path in trained.iterdir()} == {
        "config.yaml", "log.jsonl", "timing.jsonl", "checkpoints", "samples", "lock",
    }  # fmt: skip
    assert [p.name for p in (trained / "samples").iterdir()] == ["0000004.png"]
    assert {p.name for p in (trained / "checkpoints/0000004").iterdir()} == {
        "state.safetensors", "ema.safetensors", "manifest.json",
    }  # fmt: skip


def test_sampling_writes_numbered_images_and_a_grid(trained, tmp_path):
    drawn = {}
    for batch in (1, 3):
        out = tmp_path / str(batch)
        main(["sample", str(trained), "--num", "5", "--batch", str(batch), "--classes", "red,0", "--out", str(out)])
        names = [*(f"{i:06d}.png" for i in range(5)), "grid.png", "samples.json"]
        assert sorted(p.name for p in out.iterdir()) == names
        drawn[batch] = np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) for i in range(5)])
    assert drawn[1].shape == (5, 16, 16, 3)
    assert np.array_equal(drawn[1], drawn[3])


def test_sampling_options_change_the_samples(trained, tmp_path):
    words = ["sample", str(trained), "--num", "1", "--out"]
    main([*words, str(tmp_path / "a")])
    for number, option in enumerate((["--seed", "1"], ["--steps", "4"], ["--sampler", "heun"], ["--raw"])):
        main([*words, str(tmp_path / str(number)), *option])
        a, b = (np.asarray(Image.open(tmp_path / n / "000000.png")).astype(int) for n in ("a", str(number)))
        assert np.abs(a - b).max() > 0, option


def test_demo_names_its_pictures_at_the_end_and_can_run_twice(folder, tmp_path, capsys):
    words = ["demo", *TINY, "--set", f"data.source={folder}", "--device", "cpu", "--out", str(tmp_path / "demo")]
    main(words)
    first = capsys.readouterr().out
    assert "samples-beside-real.png" in first
    picture = Image.open(tmp_path / "demo/samples-beside-real.png")
    assert picture.width > picture.height
    main(["demo", "--out", str(tmp_path / "demo")])
    assert capsys.readouterr().out == first


def test_demo_draws_the_subgroups_of_emoji_unless_a_config_is_named(folder, tmp_path):
    tiny = [*TINY[2:], "--set", "model.num_classes=auto", "--device", "cpu"]
    main(["demo", *tiny, "--out", str(tmp_path / "subgroups")])
    config = from_yaml((tmp_path / "subgroups/config.yaml").read_text())
    assert (config.data.source, config.model.num_classes, config.sample.guidance) == ("emoji:noto", 99, 2)
    assert config.train.steps == 4  # --set comes after the demo's own choices
    main(["demo", *tiny, "--set", f"data.source={folder}", "--out", str(tmp_path / "own")])
    assert from_yaml((tmp_path / "own/config.yaml").read_text()).model.num_classes == 3
    named = ["demo", *TINY, "--set", "data.source=emoji", "--set", "model.num_classes=9"]
    main([*named, "--out", str(tmp_path / "named")])
    assert from_yaml((tmp_path / "named/config.yaml").read_text()).sample.guidance == get("emoji").sample.guidance


def test_resume_needs_no_other_option(trained, capsys):
    main(["train", "--resume", "--out", str(trained)])
    assert "4/4" in capsys.readouterr().err


def test_config_prints_yaml_that_reads_back(capsys):
    main(["config", "--preset", "dit-in-dit-b4", "--set", "model.inner.aggregate=attention"])
    config = from_yaml(capsys.readouterr().out)
    assert config.model.inner.aggregate == "attention"
    assert config.model.depth == get("dit-in-dit-b4").model.depth


def test_train_starts_from_a_config_file(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(get("emoji-dit")))
    main(["config", "--config", str(path), "--set", "seed=9"])
    assert from_yaml(capsys.readouterr().out).seed == 9


def test_presets_are_listed(capsys):
    main(["presets"])
    listed, _ = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in listed.splitlines() if line[0] != "#"] == list(NAMES)


def test_presets_name_who_made_a_published_model_and_what_it_costs(capsys):
    main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(next(line for line in lines if line.startswith("# DDT (Wang et al. 2025)")))
    assert "official code MCG-NJU/DDT: src/models/denoiser/decoupled_improved_dit.py" in lines[at]
    assert re.fullmatch(r"ddt-xl2 +32x32x4 +p=2 +D=1152 +131\.481 GMAC +outer\*22 inner\*6", lines[at + 3])
    headings = [line for line in lines if line.startswith("# ")]
    assert len(headings) == len(set(headings)) == 4 + len(FAMILIES)  # every group is in one piece
    main(["presets", "--family", "ddt"])
    (heading, small, _, large) = capsys.readouterr().out.splitlines()
    assert heading == lines[at]
    assert "130.3M" in small
    assert "674.6M  131.481 GMAC" in large
    main(["presets", "--family", "DDT"])  # as the list writes it
    assert capsys.readouterr().out.splitlines()[0] == heading


def test_an_unknown_family_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["presets", "--family", "dtd"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "dit-in-dit: --family: unknown 'dtd'; did you mean 'ddt'?\n"


def test_inspect_prints_json_that_includes_the_plain_twin(capsys):
    main(["inspect", "--preset", "dit-in-dit-xl2", "--batch", "8", "--json"])
    found = json.loads(capsys.readouterr().out)
    keys = {"batch", "flow", "tokens", "token_layers", "parameters", "macs", "activation_bytes"}
    assert found.keys() == keys | {"plain"}
    assert found["plain"].keys() == keys
    assert found["macs"]["total"] / found["plain"]["macs"]["total"] == pytest.approx(1.963, abs=0.001)


def test_the_total_is_the_last_row_if_only_the_plain_twin_has_a_part(capsys):
    main(["inspect", "--preset", "mpdit-b"])  # without an outer head
    for table in capsys.readouterr().out.split("\n\n")[1:]:
        assert table.splitlines()[-1].split()[0] == "total"


def test_inspect_prints_a_table(capsys):
    main(["inspect", "--preset", "emoji"])
    out = capsys.readouterr().out
    assert "inner head" in out
    assert "ratio" in out


def lines_of(words: list[str], capsys) -> str:
    """The line on stderr of a refused call; checks that stdout is empty and the exit code is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert len(printed.err) <= 220
    return printed.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["inspect"], "--preset NAME"),
        (["inspect", "--preset", "emojy"], "did you mean 'emoji'"),
        (["inspect", "--preset", "emoji", "--batch", "0"], "from 1 to"),
        (["inspect", "--preset", "emoji", "--config", "x.yaml"], "give one of them"),
        (["inspect", "--config", "absent.yaml"], "cannot read --config"),
        (["inspect", "--preset", "emoji", "--set", "model.patch_size=7"], "must divide image_size"),
        (["inspect", "--preset", "emoji", "--set", "model.inner.widht=7"], "did you mean 'model.inner.width'"),
        (["train", "--preset", "emoji"], "--out"),
        (["train", "--preset", "emoji", "--out", "run", "--set", "data.source=absent"], "no such file"),
        (["train", "--preset", "emoji", "--out", "run", "--set", "model.num_classes=3"], "has 9"),
        (["train", "--preset", "emoji", "--out", "run", "--device", "tpu"], "not available"),
        (["train", "--resume", "--out", "absent"], "no run at absent"),
        (["sample", "absent", "--out", "drawn"], "no run at absent"),
        (["paint"], "paint"),
        (["sample", "absent", "--num", "many", "--out", "drawn"], "whole number"),
        (["sample", "absent", "--seed", str(2**64), "--out", "drawn"], "2^63"),
        (["inspect", "--preset", "emoji", "--batch", "9" * 20], "from 1 to"),
        (["inspect", "--preset", "emoji", "--set", "data.source=2020-13-45"], "not valid YAML"),
        (["inspect", "--preset", "emoji", "--set", "seed=" + "9" * 400], "whole number"),
        (["train", "--preset", "emoji", "--out", "run", "--set", "data.source="], "data.source is empty"),
        (["train", "--preset", "emoji", "--out", "run", "--device", "cpu:1"], "not available"),
    ],
)
def test_a_mistake_prints_one_line_and_leaves_no_files(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in lines_of(words, capsys)
    assert not list(tmp_path.iterdir())


def test_mistakes_about_a_run_print_one_line(trained, capsys, tmp_path):
    for words, part in (
        (["--classes", "rad"], "did you mean 'red'"),
        (["--classes", "3"], "unknown class '3'"),
        (["--sampler", "plms"], "one of euler"),
        (["--sampler", "ddpm"], "needs diffusion.path=ddpm"),
        (["--guidance", "-1"], "from 0"),
        (["--steps", "5000"], "from 1 to 1000"),
    ):
        assert part in lines_of(["sample", str(trained), *words, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_class_names_with_commas_need_few_lookups(monkeypatch):
    known, tried = ["a", "b, c, d", "b"], []
    plain = labels._plain
    monkeypatch.setattr(labels, "_plain", lambda name: tried.append(name) or plain(name))
    assert labels.class_numbers(",".join(["a", "b", "b, c", " d", "0"] * 200), known) == [0, 2, 1, 0] * 200
    assert len(tried) < 5 * 1200


def test_a_broken_image_prints_one_line(capsys, tmp_path):
    (tmp_path / "data/a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data/a/whole.png")
    (tmp_path / "data/a/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    words = ["train", *TINY, "--set", f"data.source={tmp_path / 'data'}", "--out", str(tmp_path / "run")]
    assert "torn.png" in lines_of(words, capsys)
    assert not (tmp_path / "run").exists()


def test_a_broken_image_in_a_loader_worker_prints_one_line(capsys, tmp_path, folder, monkeypatch):
    monkeypatch.setattr("dit_in_dit.data.formats.images.IN_MEMORY", 0)  # read as large sources are: when needed
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    config = ["data.workers=1", "data.held_out=0", f"data.source={copy}"]
    words = ["train", *TINY, *(word for value in config for word in ("--set", value)), "--out", str(tmp_path / "run")]
    for path in copy.rglob("*.png"):
        path.write_bytes(b"torn")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("dit-in-dit: cannot read")
    assert "Traceback" not in printed


def test_classes_of_an_unlabelled_run_are_refused(capsys, tmp_path, folder):
    words = ["train", *TINY, "--set", f"data.source={folder}", "--set", "model.num_classes=0"]
    main([*words, "--out", str(tmp_path / "[run]")])  # brackets: a path is not markup
    asked = ["sample", str(tmp_path / "[run]"), "--classes", "red", "--out", str(tmp_path / "drawn")]
    assert "without labels" in lines_of(asked, capsys)


def test_demo_works_if_a_class_has_no_training_image(tmp_path, folder):
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    held = next(name for name in map(str, range(100)) if is_held_out(name, 0.2))
    (copy / "rare").mkdir()
    Image.new("RGB", (8, 8)).save(copy / "rare" / f"{held}.png")
    words = ["demo", *TINY, "--set", f"data.source={copy}", "--set", "model.num_classes=4"]
    main([*words, "--device", "cpu", "--out", str(tmp_path / "demo")])
    assert (tmp_path / "demo/samples-beside-real.png").exists()


def test_an_output_folder_that_cannot_be_written_prints_one_line(capsys, tmp_path, folder, trained):
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file/inside")
    assert "cannot write" in lines_of(["train", *TINY, "--set", f"data.source={folder}", "--out", inside], capsys)
    assert "cannot write" in lines_of(["sample", str(trained), "--out", inside], capsys)


@pytest.mark.slow
def test_the_module_runs_as_a_command(tmp_path):
    words = [sys.executable, "-m", "dit_in_dit", "config", "--preset", "emojis"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("dit-in-dit: unknown preset 'emojis'")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    def presets(options):
        raise error

    monkeypatch.setattr("dit_in_dit.cli.inspect._presets", presets)
    with pytest.raises(SystemExit) as ended:
        main(["presets"])
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(r"dit-in-dit: not enough memory: .*make the model, the batch or the images smaller\n", line)
