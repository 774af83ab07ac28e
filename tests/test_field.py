"""Models of the field: official weights are imported, compute the official outputs, and come back bit for bit.

`field.record` has what the official code computes. `field_table.py` prints the table of docs/field.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import field
import field_table
from dit_in_dit import train
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.inspection.cost import macs, parameters
from dit_in_dit.interop.import_run import export_official, import_run
from dit_in_dit.interop.official import kind_of
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import create_run, read_config
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.sampling.numbered import sample
from field_table import difference, options, outputs
from test_official import same

CPU = torch.device("cpu")
NAMES = field.names()
# Kinds of records whose names are others.
OFFICIAL = {"lightningdit_qk": "lightningdit", "pixeldit_pre": "pixeldit", "raev2_ig": "raev2"}
# Preset: record and size of the official class.
SIZES = {
    **{f"jit-{n}16": ("jit", f"JiT-{n.upper()}/16") for n in "blhg"},
    **{f"ddt-{n}2": ("ddt", f"DDT-{n.upper()}/2") for n in ("b", "l", "xl")},
    **{f"deco-{n}16": ("deco", f"DeCo-{n.upper()}/16") for n in ("l", "xl")},
    **{f"pixnerd-{n}16": ("pixnerd", f"PixNerd-{n.upper()}/16") for n in ("l", "xl")},
    **{f"pixeldit-{n}16": ("pixeldit_pre", f"PixelDiT-{n.upper()}/16") for n in ("b", "l", "xl")},
    **{f"pixeldit-post-{n}16": ("pixeldit_post", f"PixelDiT-{n.upper()}/16") for n in ("b", "l", "xl")},
    **{f"rae-{n}": ("rae", f"DiTDH-{n.upper()}") for n in ("s", "b", "l", "xl")},
    **{f"mpdit-{n}": ("mpdit", f"MPDiT-{n.upper()}/4x") for n in ("b", "l", "xl")},
    "repa-xl2": ("repa", "SiT-XL/2 trunk"),
    "lightningdit-xl1": ("lightningdit", "LightningDiT-XL/1"),
    "lightningdit-xl1 with QK-norm": ("lightningdit_qk", "LightningDiT-XL/1"),
    "raev2": ("raev2", "DiTDH"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The imported run of a record's weights."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        torch.save(field.record(name).weights(), folder / "weights.pt")
        import_run(folder / "weights.pt", folder / "run", **options(name))
        return folder / "run"

    return run


@pytest.mark.parametrize("name", NAMES)
def test_forward_equals_the_official_code(runs, name):
    record, saved = field.record(name), Checkpoint.open(runs(name))
    model = saved.model(CPU)
    assert kind_of(saved.config.model) == OFFICIAL.get(name, name)
    assert saved.config.diffusion.predict == ("image" if record.predicts == "image" else "velocity")
    assert difference(outputs(record, model, record.x), record.out) < 1e-5
    if "wide/x" in record.more:
        x = record.more["wide/x"]
        wide = NestedDiT(replace(saved.config.model, image_size=tuple(x.shape[2:])))
        wide.load_state_dict(model.state_dict())
        assert difference(outputs(record, wide, x), record.more["wide/out"]) < 1e-5


# ------------------------------------------------------------------------------------- controls

# Other values of each option, in the order of preference.
LEVEL = {
    "norm": ("rms", "layer"),
    "mlp": ("swiglu", "silu", "gelu"),
    "bias": ("none", "all"),
    "rope": ("grid", "extent"),
    "modulation": ("none", "block"),
    "position": ("none", "sincos"),
    "head_condition": ("none", "image"),
    "head_norm": ("layer", "rms"),
}
INNER = {
    "embed": ("linear", "dct", "conv"),
    "embed_layers": (1, 2),
    "mixer": ("patch", "image"),
    "condition": ("image", "outer"),
    "spread": ("add", "none"),
    "fuse": ("add",),
}
MODEL = {
    "time_embed": ("repa", "sit", "ddt", "dit"),
    "bottleneck": (0, 8),
    "silu_twice": (True, False),
    "qk_norm": (True, False),
    "mlp_norm_eps": (1e-2,),
}
TOKENS = {"label": (4,), "time": (1,), "start": (1,), "rows": ("own", "offset"), "adaln": (False, True)}
# Options that say nothing in a model: its class does not reach c, or its conditioning rows are the image's vectors.
IDLE = {
    ("raev2", "silu_twice"),
    ("raev2", "tokens.adaln"),
    ("mpdit", "inner.condition"),
    ("mpdit", "inner.head_condition"),
}


def changed(model: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Each option of a model alone at another value that the rules allow: its name and the model."""
    for prefix, keys in (("outer.", LEVEL), ("inner.", LEVEL | INNER), ("tokens.", TOKENS), ("", MODEL)):
        level = getattr(model, prefix.rstrip(".")) if prefix else model
        for key, values in keys.items():
            now = level.norm if key == "head_norm" and level.head_norm is None else getattr(level, key)
            for value in values:
                try:
                    new = replace(level, **{key: value})
                    other = replace(model, **{prefix.rstrip("."): new}) if prefix else new
                except UserError:
                    continue
                if value != now:
                    yield prefix + key, other
                    break


def says_something(model: ModelConfig, option: str) -> bool:
    """Whether an option belongs to a part that the model has."""
    nested, level = bool(model.blocks("inner")), option.partition(".")[0]
    if level == "inner":
        return nested and not (model.inner.mixer == "none" and option == "inner.rope")
    if "head" in option and level == "outer":
        return not nested
    return bool(model.tokens.label) or option not in ("tokens.start", "tokens.rows")


def load_what_fits(model: NestedDiT, weights: dict[str, Tensor]) -> None:
    """Load the weights of equal names and shapes, and draw the others."""
    drawn, own = field.draw(9), model.state_dict()
    fits = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fits, strict=False)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name not in fits:
                value.add_(field.normal(drawn, *value.shape), alpha=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_set_otherwise_breaks_equality(runs, name):
    record, saved = field.record(name), Checkpoint.open(runs(name))
    weights, found = saved.weights(averaged=True), {}
    for option, model in changed(saved.config.model):
        if not says_something(saved.config.model, option) or (kind_of(saved.config.model), option) in IDLE:
            continue
        other = NestedDiT(model).eval()
        load_what_fits(other, weights)
        found[option] = difference(outputs(record, other, record.x), record.out)
    assert {option: size for option, size in found.items() if not size > 1e-3} == {}
    assert len(found) > 14


def test_the_controls_include_every_option(runs):
    wanted = {f"{level}.{key}" for level in ("outer", "inner") for key in LEVEL}
    wanted |= {f"inner.{key}" for key in INNER} | {f"tokens.{key}" for key in TOKENS} | set(MODEL)
    models = [read_config(runs(name)).model for name in NAMES]
    assert {option for model in models for option, _ in changed(model) if says_something(model, option)} == wanted


def test_two_matrices_of_the_patch_embedding_fold_into_one(runs):
    record, saved = field.record("jit"), Checkpoint.open(runs("jit"))
    weights = saved.weights(averaged=True)
    weights["outer_embed.proj.weight"] = weights["outer_embed.proj.weight"] @ weights.pop(
        "outer_embed.bottleneck.weight"
    )
    model = NestedDiT(replace(saved.config.model, bottleneck=0))
    model.load_state_dict(weights)
    assert difference(outputs(record, model, record.x), record.out) < 1e-5


# -------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_come_back_bit_for_bit(runs, tmp_path, name, dtype):
    weights = {key: value.to(dtype) for key, value in field.record(name).weights().items()}
    run = runs(name)
    if dtype != torch.float32:
        torch.save(weights, tmp_path / "weights.pt")
        import_run(tmp_path / "weights.pt", run := tmp_path / "run", **options(name))
    export_official(run, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    beside = [key for key in weights if key.startswith(("projectors.", "base_final_layer."))]
    if not name.startswith("raev2"):  # whose queries, keys and values are apart
        assert [key for key in back if key not in beside] == [key for key in weights if key not in beside]
    assert same(dict(sorted(weights.items())), dict(sorted(back.items())))


@pytest.mark.parametrize("name", NAMES)
def test_a_training_checkpoint_gives_average_and_trained_weights(tmp_path, name):
    record = field.record(name)
    torch.save(record.checkpoint(), tmp_path / "last.ckpt")
    import_run(tmp_path / "last.ckpt", tmp_path / "run", **options(name))
    for averaged, wanted in ((True, record.averaged(0.5)), (False, record.weights())):
        export_official(tmp_path / "run", tmp_path / f"{averaged}.pt", averaged=averaged)
        back = torch.load(tmp_path / f"{averaged}.pt", weights_only=True)
        assert same(dict(sorted(wanted.items())), dict(sorted(back.items())))


def test_another_average_of_jit_is_imported_by_its_key(tmp_path, capsys):
    record = field.record("jit")
    torch.save(record.checkpoint(), tmp_path / "last.pth")
    words = ["import", str(tmp_path / "last.pth"), "--set", "model.tokens.start=2", "--average", "model_ema2"]
    main([*words, "--out", str(tmp_path / "run")])
    assert "JiT of 16x16x3, p=4, D=32, 4 heads, outer*4, 10 classes" in capsys.readouterr().out
    export_official(tmp_path / "run", tmp_path / "back.pt")
    assert same(record.averaged(0.25), torch.load(tmp_path / "back.pt", weights_only=True))
    with pytest.raises(UserError, match=r"--average ema: last\.pth has model_ema1, model_ema2"):
        import_run(tmp_path / "last.pth", tmp_path / "again", average="ema", **options("jit"))


def test_compiled_weights_are_imported(tmp_path):
    """DDT's checkpoints have `_orig_mod.` after the prefix if the model was compiled."""
    weights = field.record("ddt").weights()
    torch.save(
        {"state_dict": {f"denoiser._orig_mod.{key}": value for key, value in weights.items()}}, tmp_path / "a.ckpt"
    )
    import_run(tmp_path / "a.ckpt", tmp_path / "run", **options("ddt"))
    export_official(tmp_path / "run", tmp_path / "back.pt")
    assert same(weights, torch.load(tmp_path / "back.pt", weights_only=True))


@pytest.mark.parametrize("name", ["jit", "pixeldit_pre", "rae", "ddt", "mpdit"])
def test_an_official_checkpoint_is_imported_sampled_and_exported_by_commands(tmp_path, name):
    record = field.record(name)
    torch.save(record.checkpoint(), tmp_path / "last.ckpt")
    chosen = options(name)
    words = [word for setting in chosen.get("settings", []) for word in ("--set", setting)]
    words += ["--num-heads", str(chosen["heads"])] if "heads" in chosen else []
    words += ["--image-size", *map(str, chosen["size"])] if "size" in chosen else []
    run = str(tmp_path / "run")
    main(["import", str(tmp_path / "last.ckpt"), "--out", run, *words])
    main(["sample", run, "--num", "2", "--steps", "2", "--out", str(tmp_path / "images")])
    if record.x.shape[1] == 3:
        assert len(list((tmp_path / "images").glob("*.png"))) >= 2
    else:
        assert np.load(tmp_path / "images" / "samples.npz")["images"].shape == (2, *record.x.shape[1:])
    main(["export", run, "--format", "official", "--out", str(tmp_path / "back.pt")])
    assert same(record.averaged(0.5), torch.load(tmp_path / "back.pt", weights_only=True))


@pytest.mark.parametrize("name", ["jit", "pixeldit_post", "raev2"])
def test_the_pipeline_of_imported_weights_generates_the_images_of_sample(runs, tmp_path, name):
    main(["export", str(runs(name)), "--format", "pipeline", "--out", str(tmp_path / "pipe")])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    config = read_config(runs(name))
    shape = config.model.image_shape
    drawn = np.stack([generator(0, "sample", i).standard_normal(shape, np.float32) for i in range(8)])
    labels = [i % 10 for i in range(8)]
    how = replace(config, sample=replace(config.sample, steps=2))
    ours = sample(Checkpoint.open(runs(name)).model(CPU), how, 8, classes=labels)
    output = pipe(labels, num_inference_steps=2, latents=torch.from_numpy(drawn), output_type="latent").images
    assert torch.equal(output, ours)


def test_training_starts_from_imported_weights(runs, tmp_path):
    images = np.zeros((8, 3, 16, 16), np.float32)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(8) % 10)
    words = ["data.source=" + str(tmp_path / "data.npz"), f"train.init={runs('jit')}", "train.steps=1"]
    words += [
        "train.batch_size=2",
        "train.precision=float32",
        "train.evaluate_every=0",
        "data.held_out=0",
        "data.workers=0",
        "train.warmup=0",
    ]
    config = override(read_config(runs("jit")), words)
    assert np.isfinite([event.loss for event in train(config, tmp_path / "run") if hasattr(event, "loss")]).all()
    assert kind_of(read_config(tmp_path / "run").model) == "jit"
    assert not export_official(tmp_path / "run", tmp_path / "jit.pt")


@pytest.mark.parametrize(("name", "patch"), [("ddt", 4), ("ddt", 1), ("rae", 4), ("raev2", 2)])
def test_a_model_with_another_patch_size_is_exported_and_imported_again(runs, tmp_path, name, patch):
    config = read_config(runs(name))
    inner = replace(config.model.inner, sub_patch=patch)
    model = replace(config.model, image_size=(8, 8), patch_size=patch, channels=3, inner=inner)
    run = created(replace(config, model=model), tmp_path / "run")
    export_official(run, tmp_path / "weights.pt")
    chosen = {"settings": [f"model.patch_size={patch}", "model.stages=outer*2 inner*2"], "size": (8, 8)}
    again = import_run(tmp_path / "weights.pt", tmp_path / "again", **(chosen if name == "ddt" else {}))
    assert again.model == model
    assert kind_of(model) == name


def test_mpdit_has_sub_patches_of_two_pixels(runs):
    model = read_config(runs("mpdit")).model
    assert kind_of(replace(model, patch_size=8)) == "mpdit"
    assert kind_of(replace(model, patch_size=8, inner=replace(model.inner, sub_patch=4))) is None


@pytest.mark.parametrize("name", ["jit", "mpdit"])
def test_a_model_without_labels_is_exported_and_imported_again(runs, tmp_path, name):
    config = read_config(runs(name))
    config = replace(config, model=replace(config.model, num_classes=0), sample=replace(config.sample, guidance=1.0))
    export_official(created(config, tmp_path / "run"), tmp_path / "weights.pt")
    words = ["--num-heads", "4"] if name == "mpdit" else ["--set", "model.tokens.start=2"]
    main(["import", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "again"), "--num-classes", "0", *words])
    assert read_config(tmp_path / "again").model == config.model
    export_official(tmp_path / "again", tmp_path / "back.pt")
    weights, back = (torch.load(tmp_path / f"{file}.pt", weights_only=True) for file in ("weights", "back"))
    assert same(weights, back)


# -------------------------------------------------------------------------------------- refusals


def created(config: RunConfig, run: Path) -> Path:
    """A run with random weights."""
    weights = NestedDiT(config.model).state_dict()
    create_run(run, config)
    names = tuple(map(str, range(config.model.num_classes)))
    checkpoint.save(run, config, 0, {f"model.{name}": value for name, value in weights.items()}, weights, names)
    return run


def without(name: str, *ends: str) -> dict[str, Tensor]:
    return {key: value for key, value in field.record(name).weights().items() if not key.endswith(ends)}


WRONG: dict[str, tuple[Callable[[], dict], dict, str]] = {
    "a missing weight": (lambda: without("jit", "blocks.2.norm2.weight"), options("jit"), "no blocks.2.norm2.weight"),
    "a missing embedding": (lambda: without("ddt", "s_embedder.proj.bias"), options("ddt"), "no s_embedder.proj.bias"),
    "a missing table": (lambda: without("rae", "pos_embed"), {}, "there is no pos_embed"),
    "a weight too many": (
        lambda: field.record("deco").weights() | {"dec_net.extra": torch.ones(1)},
        options("deco"),
        "a DeCo has no 'dec_net.extra'",
    ),
    "another shape": (
        lambda: field.record("pixnerd").weights() | {"blocks.3.norm.weight": torch.ones(9)},
        options("pixnerd"),
        r"blocks.3.norm.weight must be \(8,\): got \(9,\)",
    ),
    "another rotary table": (
        lambda: field.record("raev2").weights() | {"dec_rope.freqs_sin": torch.ones(16, 12)},
        {},
        "dec_rope.freqs_sin is not the fixed sin-cos table",
    ),
    "an unseen start": (lambda: field.record("jit").weights(), {}, "give --set model.tokens.start="),
    "an unseen split": (lambda: field.record("ddt").weights(), {"size": (8, 8)}, "give --set model.stages="),
    "stages of another order": (
        lambda: field.record("ddt").weights(),
        {"settings": ["model.stages=inner*2 outer*2"]},
        "has outer, then inner blocks",
    ),
    "a start of no block": (
        lambda: field.record("jit").weights(),
        {"settings": ["model.tokens.start=9"]},
        "must be below the 4 outer blocks",
    ),
    "a start that is no number": (
        lambda: field.record("jit").weights(),
        {"settings": ["model.tokens.start=x"]},
        "model.tokens.start",
    ),
    "a start that is seen": (
        lambda: field.record("rae").weights(),
        {"settings": ["model.tokens.start=2"]},
        "the weights determine this key",
    ),
    "unseen heads": (lambda: field.record("mpdit").weights(), {}, "give --num-heads"),
    "the size of a square": (lambda: field.record("rae").weights(), {"size": (8, 8)}, "is for images of 4x4"),
    "a size of no patch": (lambda: field.record("deco").weights(), {"size": (16, 18)}, "must divide image_size"),
    "heads that are seen": (lambda: field.record("rae").weights(), {"heads": 3}, "is for 4 heads: leave out"),
    "an unseen patch": (
        lambda: {
            key: value.repeat(1, 3) if key.endswith("_embedder.proj.weight") else value
            for key, value in field.record("ddt").weights().items()
        },
        {"settings": ["model.stages=outer*2 inner*2"]},
        "give --set model.patch_size=",
    ),
    "a patch of no size": (
        lambda: field.record("ddt").weights() | {"s_embedder.proj.weight": torch.ones(32, 48)},
        {"settings": ["model.stages=outer*2 inner*2", "model.patch_size=x"]},
        "model.patch_size must be a whole number",
    ),
    "classes of a table of one row": (
        lambda: field.record("rae").weights() | {"y_embedder.embedding_table.weight": torch.ones(1, 32)},
        {},
        "give --num-classes 1, or 0",
    ),
    "another kind": (lambda: field.record("deco").weights(), {"kind": "sit"}, "has weights of a DeCo"),
    "another path": (
        lambda: {"ema": field.record("repa").weights(), "args": {"path_type": "cosine"}},
        {"heads": 4},
        "known is path linear",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_line(tmp_path, case):
    content, chosen, says = WRONG[case]
    torch.save(content(), tmp_path / "file.pt")
    with pytest.raises(UserError, match=says) as error:
        import_run(tmp_path / "file.pt", tmp_path / "run", **chosen)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
    assert not (tmp_path / "run").exists()


def test_a_wrong_file_ends_the_command_with_exit_code_2(tmp_path, capsys):
    torch.save(without("jit", "blocks.2.norm2.weight"), tmp_path / "file.pt")
    for words in (["--set", "model.tokens.start=2"], ["--image-size", "4"], ["--image-size", "0", "4"]):
        with pytest.raises(SystemExit) as stopped:
            main(["import", str(tmp_path / "file.pt"), "--out", str(tmp_path / "run"), *words])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_model_that_differs_in_one_option_has_no_official_kind(runs):
    model = read_config(runs("pixeldit_pre")).model
    assert kind_of(model) == "pixeldit"
    others = {option: kind_of(other) for option, other in changed(model) if says_something(model, option)}
    assert {option: kind for option, kind in others.items() if kind} == {}
    assert kind_of(replace(model, inner=replace(model.inner, modulation="post"))) == "pixeldit_post"


# ---------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_cost_what_the_official_code_costs(name):
    record, size = SIZES[name]
    model = presets.get(name.removesuffix(" with QK-norm")).model
    model = replace(model, qk_norm=True) if name.endswith("QK-norm") else model
    assert [parameters(model)["total"], macs(model)["total"]] == field.record(record).counts[size]
    assert kind_of(model) == OFFICIAL.get(record, record)


def test_the_table_of_the_docs_is_that_of_the_records():
    page = (Path(__file__).parents[1] / "docs" / "field.md").read_text()
    lines = page.partition(field_table.HEAD)[2].partition("\n\n")[0].splitlines()[2:]
    table = {cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in lines)}
    for cells in field_table.rows():
        shown = table.pop(cells[0])
        assert shown[:3] + shown[4:] == cells[:3] + cells[4:]
        assert float(shown[3]) < 1e-5
        assert float(cells[3]) < 10 * float(shown[3])  # processors differ in the last bits
    assert table == {}
