"""Official DiT and SiT weights and `diffusers` folders: imported and exported bit for bit, with equal outputs.

The outputs of the official code are in `golden/official_outputs.npz` (made by the script beside this file). The outputs
of `diffusers` are computed here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import small_model, with_train
from dit_in_dit import train
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, ModelConfig, OuterConfig, SampleConfig
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.diffusion.path import alpha_bar
from dit_in_dit.diffusion.samplers import denoise, guided
from dit_in_dit.interop.diffusers_dit import SCHEDULERS
from dit_in_dit.interop.import_run import IMPORTED_POSITION, ORIGIN, export_diffusers, export_official, import_run
from dit_in_dit.interop.official import official_shapes
from dit_in_dit.model.layers import sincos
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.sampling.numbered import sample

GOLDEN = np.load(Path(__file__).parent / "golden" / "official_outputs.npz")
CPU = torch.device("cpu")
LARGE = "hundreds of megabytes there and back: with --full (make test-full)"


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def draw(key: int) -> np.random.Generator:
    """Random stream `key`, as in the script that made the record."""
    return np.random.Generator(np.random.Philox(key=[key, 0]))


def normal(stream: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(stream.standard_normal(shape, np.float32))


def official(size: str, dtype: torch.dtype = torch.float32, *, shift: float = 0.0) -> dict[str, Tensor]:
    """Weights of the record's tiny model or of an official size, with official names and shapes."""
    stream, found = draw(1), {}
    for name, shape in json.loads(str(GOLDEN[f"shapes/{size}"])).items():
        if name == "pos_embed":
            side = int(shape[1] ** 0.5)
            found[name] = sincos(shape[2], side, side)[None].to(dtype)
        else:
            found[name] = (0.2 * normal(stream, *shape) + shift).to(dtype)
    return found


@cache
def tiny() -> dict[str, Tensor]:
    return official("tiny")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Check that names, order, types, shapes and bits are equal."""
    assert list(a) == list(b)
    for name, value in a.items():
        assert (value.dtype, value.shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(value.view(torch.uint8), b[name].view(torch.uint8)), name
    return True


def imported(tmp_path: Path, weights: dict | None = None, /, name: str = "tiny.pt", **options) -> Path:
    """The run imported from a file of weights."""
    tmp_path.mkdir(exist_ok=True)
    torch.save(tiny() if weights is None else weights, tmp_path / name)
    import_run(tmp_path / name, tmp_path / "run", heads=4, **options)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    return imported(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A `DiTTransformer2DModel` with the record's tiny weights, saved by diffusers itself."""
    root = tmp_path_factory.mktemp("theirs")
    export_diffusers(imported(root), root / "export")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    model.load_state_dict(load_file(root / "export" / "diffusion_pytorch_model.safetensors"))
    model.save_pretrained(root / "folder")
    return root / "folder"


# ---------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ("tiny", torch.float32),
        ("tiny", torch.bfloat16),
        ("tiny", torch.float64),
        ("DiT-S/2", torch.float16),
        ("DiT-B/4", torch.float32),
    ],
)
def test_official_weights_come_back_bit_for_bit(tmp_path, size, dtype, full):
    if size == "DiT-B/4" and not full:
        pytest.skip(LARGE)
    weights = official(size, dtype)
    run = imported(tmp_path, weights) if size == "tiny" else tmp_path / "run"
    if size != "tiny":  # the number of heads follows from the size
        torch.save(weights, tmp_path / "theirs.pt")
        import_run(tmp_path / "theirs.pt", run)
        letter = size[4].lower()
        assert read_config(run).model.outer.num_heads == presets.SIZES[letter][2]
    assert not export_official(run, tmp_path / "back.pt")
    assert same(weights, torch.load(tmp_path / "back.pt", weights_only=True))


@pytest.mark.parametrize("size", ["tiny", "DiT-S/2", "DiT-B/4", "DiT-XL/2"])
def test_names_shapes_and_order_are_the_official_ones(size):
    letter, patch = size[4:].lower().split("/") if "/" in size else ("", "2")
    depth, width, heads = presets.SIZES.get(letter, (2, 32, 4))
    side, classes = (32, 1000) if letter else (8, 10)
    model = ModelConfig(
        image_size=(side, side), channels=4, patch_size=int(patch), num_classes=classes, stages=f"outer*{depth}",
        learn_variance=True, outer=OuterConfig(width=width, num_heads=heads),
    )  # fmt: skip
    theirs = {name: tuple(shape) for name, shape in json.loads(str(GOLDEN[f"shapes/{size}"])).items()}
    assert theirs["pos_embed"] == (1, model.patches, width)
    assert list(official_shapes("dit", model).items()) == list(theirs.items())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eleven times 1.4 GB through the disk
def test_weights_of_xl_come_back_bit_for_bit(tmp_path, full):
    """In bfloat16: 1.4 GB per file. All tensors differ."""
    if not full:
        pytest.skip(LARGE)
    shapes = json.loads(str(GOLDEN["shapes/DiT-XL/2"]))
    bits = torch.randint(2**15, (2**20 + 7,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    bits &= 0x3FFF  # finite
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        count = int(np.prod(shape))
        repeated = bits.roll(number).repeat(-(-count // len(bits)))[:count]
        weights[name] = repeated.view(torch.bfloat16).view(shape)
    weights["pos_embed"] = sincos(1152, 16, 16)[None].bfloat16()
    torch.save(weights, tmp_path / "DiT-XL-2-256x256.pt")
    config = import_run(tmp_path / "DiT-XL-2-256x256.pt", tmp_path / "run")
    wanted = replace(
        presets.get("dit-xl2").model, stages="outer*28", depth=None, learn_variance=True, inner=config.model.inner
    )
    assert replace(config.model, use_inner=False) == wanted
    export_official(tmp_path / "run", tmp_path / "back.pt")
    assert same(weights, torch.load(tmp_path / "back.pt", weights_only=True, mmap=True))
    (tmp_path / "back.pt").unlink()
    export_diffusers(tmp_path / "run", tmp_path / "theirs")
    shutil.rmtree(tmp_path / "run")
    import_run(tmp_path / "theirs", tmp_path / "run")
    export_official(tmp_path / "run", tmp_path / "back.pt")
    assert same(weights, torch.load(tmp_path / "back.pt", weights_only=True, mmap=True))


@pytest.mark.parametrize("size", ["tiny", "DiT-S/2", "DiT-B/4"])
def test_folders_of_diffusers_come_back_bit_for_bit(tmp_path, size, full):
    """The `diffusers` library writes the folder, from a model with random weights."""
    if size == "DiT-B/4" and not full:
        pytest.skip(LARGE)
    heads, width, depth, patch = {"tiny": (4, 32, 2, 2), "DiT-S/2": (6, 384, 12, 2), "DiT-B/4": (12, 768, 12, 4)}[size]
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=8, num_layers=depth,
        sample_size=32, patch_size=patch, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for block in model.transformer_blocks[1:]:  # as in converted weights: one embedding
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(tmp_path / "theirs")
    import_run(tmp_path / "theirs", tmp_path / "run")
    main(["export", str(tmp_path / "run"), "--format", "diffusers", "--out", str(tmp_path / "back")])
    name = "diffusion_pytorch_model.safetensors"
    before, after = (load_file(tmp_path / place / name) for place in ("theirs", "back"))
    assert same(dict(sorted(before.items())), dict(sorted(after.items())))
    theirs, back = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("theirs", "back"))
    assert theirs == back
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back")
    assert same(model.state_dict(), again.state_dict())


def test_the_average_and_the_step_of_a_training_checkpoint_are_imported(tmp_path):
    raw, averaged = official("tiny", shift=0.1), tiny()
    optimizer = {"state": {0: {"step": torch.tensor(4000.0)}}, "param_groups": []}
    args = argparse.Namespace(model="DiT-S/2", num_classes=10)
    run = imported(tmp_path, {"model": raw, "ema": averaged, "opt": optimizer, "args": args})
    assert checkpoint.newest(run).manifest["step"] == 4000
    export_official(run, tmp_path / "averaged.pt")
    export_official(run, tmp_path / "raw.pt", averaged=False)
    assert same(averaged, torch.load(tmp_path / "averaged.pt", weights_only=True))
    assert same(raw, torch.load(tmp_path / "raw.pt", weights_only=True))


def test_a_position_table_with_other_last_bits_comes_back_bit_for_bit(tmp_path):
    weights = dict(tiny())
    weights["pos_embed"] = weights["pos_embed"].clone()
    weights["pos_embed"][0, 3, 5] = torch.nextafter(weights["pos_embed"][0, 3, 5], torch.tensor(2.0))
    run = imported(tmp_path, weights)
    assert IMPORTED_POSITION in load_tensors(checkpoint.newest(run).folder / checkpoint.STATE)
    export_official(run, tmp_path / "back.pt")
    assert same(weights, torch.load(tmp_path / "back.pt", weights_only=True))


def test_our_plain_run_becomes_official_weights_and_is_imported_again_bit_for_bit(tmp_path, run_config):
    model = replace(small_model("outer*2", image_size=(8, 8), num_classes=3), learn_variance=True)
    how, path = SampleConfig(sampler="ddpm", steps=2), DiffusionConfig(path="ddpm", predict="noise")
    config = replace(with_train(run_config, steps=2), model=model, diffusion=path, sample=how)
    list(train(config, tmp_path / "ours"))
    main(["export", str(tmp_path / "ours"), "--format", "official", "--out", str(tmp_path / "DiT.pt")])
    import_run(tmp_path / "DiT.pt", tmp_path / "again", heads=4)
    one, two = (Checkpoint.open(tmp_path / name).model(CPU) for name in ("ours", "again"))
    assert same(one.state_dict(), two.state_dict())


# ---------------------------------------------------------------------------------- computed alike


def test_forward_equals_the_official_dit(dit):
    saved = Checkpoint.open(dit)
    model, config = saved.model(CPU), saved.config
    assert (config.model.learn_variance, config.diffusion.path, config.diffusion.predict) == (True, "ddpm", "noise")
    with torch.no_grad():
        out = model(golden("x"), golden("t") / 1000, golden("y"))
    torch.testing.assert_close(out, golden("out"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "channels"), [("guided_three", 3), ("guided_all", None)])
def test_guidance_equals_the_official_dit(dit, name, channels):
    saved = Checkpoint.open(dit)
    model = saved.model(CPU)
    predict = guided(model, 10, SampleConfig(guidance=4.0, guidance_channels=channels))
    with torch.no_grad():
        out = predict(golden("x")[:2], golden("t")[2:] / 1000, torch.tensor([3, 7]))
    torch.testing.assert_close(out, golden(name)[:2], rtol=0, atol=3e-5)  # of four times the difference


def test_the_loss_equals_the_official_dit(dit):
    saved = Checkpoint.open(dit)
    model, config = saved.model(CPU), saved.config
    with torch.no_grad():
        loss = Objective(config.diffusion).loss(
            model, golden("image"), golden("noise"), golden("steps") / 1000, golden("y")
        )
    # At step 0 DiT takes an approximation of the normal distribution, whose tails are off; ours is exact.
    torch.testing.assert_close(loss[1:], (golden("mse") + golden("vb"))[1:], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss[0], (golden("mse") + golden("vb"))[0], rtol=5e-2, atol=0)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samples_equal_the_official_dit(dit, name):
    saved = Checkpoint.open(dit)
    model, config = saved.model(CPU), saved.config
    official_way = {
        "ddpm": SampleConfig(sampler="ddpm", steps=10, guidance=4.0, guidance_channels=3),
        "ddim": SampleConfig(sampler="ddim", steps=10, spacing="leading"),
    }[name]
    numbers, y = draw(2), torch.tensor([3, 7])
    predict = guided(model, 10, official_way)
    with torch.no_grad():
        x = denoise(predict, config.diffusion, official_way, lambda: normal(numbers, 2, 4, 8, 8), y)
    scale = golden(name).abs().max()  # untrained weights: samples are large
    assert (x - golden(name)).abs().max() / scale < 1e-5


def test_forward_equals_the_official_sit(tmp_path):
    """SiT's time tau is our time 1 - tau. Our velocity points from image to noise, opposite to SiT's velocity."""
    run = imported(tmp_path, name="SiT-tiny.pt")
    saved = Checkpoint.open(run)
    model, config = saved.model(CPU), saved.config
    assert (config.diffusion.path, config.diffusion.predict) == ("flow", "velocity")
    tau, y = golden("tau"), golden("y")
    with torch.no_grad():
        out = model(golden("x"), 1 - tau, y)
    torch.testing.assert_close(-out[:, :4], golden("sit"), rtol=0, atol=1e-5)
    objective = Objective(config.diffusion)
    torch.testing.assert_close(objective.noisy(golden("image"), golden("noise"), 1 - tau), golden("path"))
    perfect = -golden("velocity")
    loss = objective.loss(lambda *_: perfect, golden("image"), golden("noise"), 1 - tau, y)
    assert loss.max() < 1e-10
    assert not export_official(run, tmp_path / "back.pt")
    assert same(tiny(), torch.load(tmp_path / "back.pt", weights_only=True))


@pytest.mark.parametrize("steps", [[0, 0, 0, 0], [1, 20, 537, 999]])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])  # the second would show anywhere
def test_forward_equals_diffusers(made, tmp_path, steps, eps):
    shutil.copytree(made, tmp_path / "theirs")
    config = json.loads((made / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"norm_eps": eps}))
    import_run(tmp_path / "theirs", tmp_path / "run")
    saved = Checkpoint.open(tmp_path / "run")
    ours, config = saved.model(CPU), saved.config
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "theirs").eval()
    t = torch.tensor(steps)
    with torch.no_grad():
        out = theirs(golden("x"), timestep=t, class_labels=golden("y")).sample
        torch.testing.assert_close(ours(golden("x"), t / 1000, golden("y")), out, rtol=0, atol=1e-5)
    assert (config.model.time_embed, config.model.mlp_norm_eps) == ("diffusers", eps)


def test_diffusers_and_the_official_dit_agree_only_at_time_zero(made):
    """The reason for `model.time_embed=diffusers`: frequencies differ, so outputs differ at every time except 0."""
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(made).eval()
    with torch.no_grad():
        out = theirs(golden("x"), timestep=golden("t"), class_labels=golden("y")).sample
    apart = (out - golden("out")).abs().amax(dim=(1, 2, 3))
    assert apart[0] < 1e-5
    assert apart[1:].min() > 0.01
    assert apart.max() > 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ddim_samples_equal_the_pipeline_of_diffusers(tmp_path, guidance):
    """A VAE of `diffusers` decodes at the end. Small weights keep samples in range. Class 1000 means no class."""
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    pipe = diffusers.DiTPipeline(theirs.eval(), vae.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipe")
    settings = ["sample.spacing=leading", "sample.sampler=ddim", "sample.steps=20"]
    import_run(tmp_path / "pipe", tmp_path / "run", settings=settings)
    images = pipe([3, 7], guidance, torch.Generator().manual_seed(1), num_inference_steps=20, output_type="np").images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    saved = Checkpoint.open(tmp_path / "run")
    model, config = saved.model(CPU), saved.config
    how = replace(config.sample, guidance=guidance)
    with torch.no_grad():
        latents = denoise(guided(model, 1000, how), config.diffusion, how, noise, torch.tensor([3, 7]))
        ours = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert images.std() > 0.01  # there is something to compare
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - images).max() < 1e-4


def test_an_imported_run_is_sampled_by_the_command(dit, tmp_path):
    main(["sample", str(dit), "--num", "3", "--steps", "2", "--classes", "3,7", "--out", str(tmp_path / "images")])
    assert np.load(tmp_path / "images" / "samples.npz")["images"].shape == (3, 4, 8, 8)
    saved = Checkpoint.open(dit)
    model, config = saved.model(CPU), saved.config
    drawn = sample(model, replace(config, sample=replace(config.sample, steps=2)), 3, classes=[3, 7])
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "images" / "samples.npz")["images"]), drawn)


# ------------------------------------------------------------------------- without a null class

TABLE = "y_embedder.embedding_table.weight"


def without_null(shift: float = 0.0) -> dict[str, Tensor]:
    """The official table with class_dropout_prob=0: a row for each of ten classes."""
    weights = official("tiny", shift=shift)
    return weights | {TABLE: weights[TABLE][:-1].clone()}


@pytest.mark.parametrize("said", [{"args": argparse.Namespace(num_classes=10)}, {}])
def test_a_table_without_a_null_row_keeps_its_last_class(tmp_path, said):
    weights = {"model": without_null(0.1), "ema": without_null(), **said}
    run = imported(tmp_path, weights, **({} if said else {"classes": 10}))
    saved = Checkpoint.open(run)
    model, config, manifest = saved.model(CPU), saved.config, saved.manifest
    assert config.model.num_classes == len(manifest["classes"]) == 10
    assert (config.sample.guidance, config.train.label_drop) == (1.0, 0.0)
    saved = Checkpoint.open(imported(tmp_path / "whole"))
    whole = saved.model(CPU)
    y = torch.arange(10)
    x, t = normal(draw(3), 10, 4, 8, 8), torch.full((10,), 0.3)
    with torch.no_grad():
        assert torch.equal(model(x, t, y), whole(x, t, y))  # every class, the last too
    how = replace(config, sample=replace(config.sample, steps=2))
    assert torch.equal(sample(model, how, 10), sample(whole, how, 10))
    for averaged, theirs in ((True, weights["ema"]), (False, weights["model"])):
        export_official(run, tmp_path / f"{averaged}.pt", averaged=averaged)
        assert same(theirs, torch.load(tmp_path / f"{averaged}.pt", weights_only=True))


def test_guidance_is_refused_without_a_null_class(tmp_path):
    for settings, says in (
        (["sample.guidance=4"], "needs a trained null class"),
        (["sample.guidance=4", "train.label_drop=0.1"], "have no null class"),
    ):
        with pytest.raises(UserError, match=says):
            imported(tmp_path, without_null(), classes=10, settings=settings)


def test_a_folder_of_diffusers_without_a_null_row_keeps_its_last_class(made, tmp_path):
    shutil.copytree(made, tmp_path / "theirs")
    path = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    save_file({n: t[:10].clone() if "embedding_table" in n else t for n, t in load_file(path).items()}, path)
    config = import_run(tmp_path / "theirs", tmp_path / "run")
    assert (config.model.num_classes, config.sample.guidance) == (10, 1.0)
    export_diffusers(tmp_path / "run", tmp_path / "back")  # which always has the row
    back = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(back[name][: len(tensor)], tensor) for name, tensor in load_file(path).items())


@pytest.mark.parametrize(
    ("weights", "options", "says"),
    [
        ({"ema": tiny(), "args": argparse.Namespace(num_classes=1000)}, {}, "has 1000 classes, and 11 rows for them"),
        (tiny(), {"classes": 9}, "has 9 classes, and 11 rows for them: give --num-classes"),
        ({"ema": tiny(), "model": without_null()}, {"classes": 10}, "has 10 classes, and 11 rows"),
        (tiny() | {TABLE: torch.zeros(1, 32)}, {}, "one row"),
    ],
)
def test_a_table_that_fits_no_number_of_classes_is_refused(tmp_path, weights, options, says):
    with pytest.raises(UserError, match=says):
        imported(tmp_path, weights, **options)


# ----------------------------------------------------------------------------- wrappers and files


def wrapped(*prefixes: str) -> dict[str, Tensor]:
    return {f"{''.join(prefixes)}{name}": tensor for name, tensor in tiny().items()}


def shifted() -> dict[str, Tensor]:
    return official("tiny", shift=0.1)


@pytest.mark.parametrize(
    "content",
    [
        lambda: wrapped("module."),
        lambda: {"ema": wrapped("_orig_mod."), "model": wrapped("module.", "_orig_mod.")},
        lambda: {"model": wrapped("_orig_mod.", "module.")},
        lambda: {"state_dict": wrapped("model.", "_orig_mod."), "epoch": 3},
        lambda: {"state_dict": wrapped("ema.") | {f"model.{n}": t for n, t in shifted().items()}},
        lambda: {"ema_state_dict": tiny(), "model_state_dict": shifted()},
        lambda: {"ema": wrapped("module.") | {"n_averaged": torch.tensor(3)}, "model": shifted()},
        lambda: {n.replace("blocks.1.", "blocks.1._orig_mod."): t for n, t in tiny().items()},
        lambda: {n.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for n, t in tiny().items()},
        lambda: wrapped("ema_model.", "model.", "module."),
    ],
)
def test_weights_of_a_wrapped_model_are_read(tmp_path, content):
    export_official(imported(tmp_path, content()), tmp_path / "back.pt")
    assert same(tiny(), torch.load(tmp_path / "back.pt", weights_only=True))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: tiny() | wrapped("module."), "two weights 'pos_embed', with and without a wrapper"),
        (lambda: {"ema": tiny(), "model_ema": shifted()}, "has weights as ema and model_ema"),
        (lambda: tiny() | {"model.pos_embed": tiny()["pos_embed"]}, "has no 'model.pos_embed'"),
    ],
)
def test_ambiguous_weights_are_refused(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        imported(tmp_path, content())


STEM = "diffusion_pytorch_model"


def sharded(folder: Path, weights: dict[str, Tensor], kind: str, dotted: str = "") -> None:
    names = sorted(weights)
    files = {n: f"{STEM}{dotted}-0000{1 + 2 * i // len(names)}-of-00002.{kind}" for i, n in enumerate(names)}
    for file in set(files.values()):
        part = {name: weights[name] for name in names if files[name] == file}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    (folder / f"{STEM}.{kind}.index{dotted}.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


WRITTEN = {
    "fp16": lambda folder, weights: save_file(weights, folder / f"{STEM}.fp16.safetensors"),
    "bin": lambda folder, weights: torch.save(weights, folder / f"{STEM}.bin"),
    "fp16 bin": lambda folder, weights: torch.save(weights, folder / f"{STEM}.fp16.bin"),
    "shards": lambda folder, weights: sharded(folder, weights, "safetensors"),
    "bin shards": lambda folder, weights: sharded(folder, weights, "bin"),
    "fp16 shards": lambda folder, weights: sharded(folder, weights, "safetensors", ".fp16"),
    "wrapped": lambda folder, weights: save_file(
        {f"module.{n}": t for n, t in weights.items()}, folder / f"{STEM}.safetensors"
    ),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_folders_are_read_from_any_layout_of_weight_files(made, tmp_path, kind):
    weights = load_file(made / f"{STEM}.safetensors")
    (tmp_path / "theirs").mkdir()
    shutil.copy(made / "config.json", tmp_path / "theirs")
    WRITTEN[kind](tmp_path / "theirs", weights)
    import_run(tmp_path / "theirs", tmp_path / "run")
    export_diffusers(tmp_path / "run", tmp_path / "back")
    back = load_file(tmp_path / "back" / f"{STEM}.safetensors")
    assert same(dict(sorted(back.items())), dict(sorted(weights.items())))
    shutil.copy(made / f"{STEM}.safetensors", tmp_path / "theirs" / f"{STEM}.bf16.safetensors")
    if kind.startswith("fp16"):
        with pytest.raises(UserError, match=r"several variants \(bf16, fp16\)"):
            import_run(tmp_path / "theirs", tmp_path / "again")


def test_loading_weight_shards_runs_no_code_from_the_files(made, tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (canary,)

    (tmp_path / "theirs").mkdir()
    shutil.copy(made / "config.json", tmp_path / "theirs")
    sharded(tmp_path / "theirs", {"a": torch.zeros(1), "b": Evil()}, "bin")
    with pytest.raises(UserError, match="could run code"):
        import_run(tmp_path / "theirs", tmp_path / "run")
    assert not canary.exists()


# -------------------------------------------------------------------------------------- schedules


def piped(made: Path, folder: Path, scheduler: Any) -> Path:
    """The model with a scheduler, as a pipeline's folder."""
    shutil.copytree(made, folder / "transformer")
    (folder / "model_index.json").write_text("{}")
    config = scheduler if isinstance(scheduler, dict) else dict(scheduler.config)
    (folder / "scheduler").mkdir()
    if not isinstance(scheduler, dict):
        scheduler.save_pretrained(folder / "scheduler")
    else:
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_the_same_schedule_are_accepted(made, tmp_path, name):
    scheduler = getattr(diffusers, name)
    for kind, predict in (("epsilon", "noise"), ("v_prediction", "velocity")):
        folder = piped(made, tmp_path / kind, scheduler(prediction_type=kind))
        for source in (folder, folder / "transformer"):  # the model of a pipeline predicts what the pipeline says
            assert import_run(source, tmp_path / f"{kind} {source.name}").diffusion.predict == predict
    betas = scheduler().betas.double()
    torch.testing.assert_close((1 - betas).cumprod(0), alpha_bar(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "is of 'FlowMatchEulerDiscreteScheduler'"),
        (diffusers.LCMScheduler(**LINEAR), "is of 'LCMScheduler'"),
        (diffusers.HeunDiscreteScheduler(), "is of 'HeunDiscreteScheduler'"),
        (LINEAR, "is of 'None'"),
        (
            diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            "DiT's schedule has rescale_betas_zero_snr=False: got True",
        ),
        (diffusers.DDIMScheduler(beta_schedule="scaled_linear"), "has beta_schedule=linear"),
        (diffusers.DDPMScheduler(beta_end=0.012), "has beta_end=0.02.*: got 0.012"),
        (diffusers.DDPMScheduler(num_train_timesteps=500), "has num_train_timesteps=1000"),
        (diffusers.DDPMScheduler(trained_betas=[0.1] * 1000), "has trained_betas=None"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "has timestep_type=discrete"),
        (diffusers.EulerDiscreteScheduler(use_karras_sigmas=True), "has use_karras_sigmas=False"),
        (
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
            "(flow_shift=1.0|use_flow_sigmas=False|prediction_type)",
        ),
        ({"_class_name": "DDIMScheduler", "snr_shift_scale": 3.0}, "snr_shift_scale=3.0 is not known"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "x"}, "prediction_type must be one of"),
    ],
)
def test_a_scheduler_of_another_schedule_is_refused_in_one_line(made, tmp_path, scheduler, says):
    folder = piped(made, tmp_path / "pipe", scheduler)
    for source in (folder, folder / "transformer"):
        with pytest.raises(UserError, match=says) as error:
            import_run(source, tmp_path / "run")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_without_a_scheduler_is_refused(made, tmp_path):
    shutil.rmtree(piped(made, tmp_path / "pipe", diffusers.DDIMScheduler()) / "scheduler")
    for source in (tmp_path / "pipe", tmp_path / "pipe" / "transformer"):
        with pytest.raises(UserError, match=r"scheduler_config\.json: No such file"):
            import_run(source, tmp_path / "run")


# --------------------------------------------------------------------------------------- refusals


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tiny().items() if key != name}


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        (lambda: without("blocks.1.attn.qkv.bias"), "there is no blocks.1.attn.qkv.bias"),
        (lambda: without("pos_embed"), "there is no pos_embed"),
        (lambda: tiny() | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, "has no 'blocks.0.attn.q_norm.weight'"),
        (lambda: tiny() | {"final_layer.linear.bias": torch.ones(7)}, "final_layer.linear.bias must be"),
        (lambda: tiny() | {"pos_embed": tiny()["pos_embed"] + 0.01}, "is not the fixed sin-cos table"),
        (lambda: tiny() | {"pos_embed": torch.full((1, 16, 32), float("nan"))}, "is not the fixed sin-cos table"),
        (lambda: tiny() | {"pos_embed": torch.zeros(1, 15, 32)}, "which is no square"),
        (lambda: tiny() | {"t_embedder.mlp.0.bias": torch.ones(32, dtype=torch.int32)}, "torch.int32"),
        (lambda: tiny() | {"x_embedder.proj.weight": torch.zeros(32, 4, 0, 2)}, "4 dimensions"),
        (lambda: {"ema": {"pos_embed": "text"}}, "is no tensor"),
        (lambda: {"step": 3}, "is no tensor"),
        (lambda: {"ema": {1: torch.ones(1)}}, "'1' is no tensor"),
    ],
)
def test_weights_that_are_not_a_dit_give_a_one_line_error(tmp_path, weights, part):
    with pytest.raises(UserError, match=part) as error:
        imported(tmp_path, weights())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
    assert not (tmp_path / "run").exists()


def test_an_unknown_number_of_heads_is_asked_for(tmp_path):
    torch.save(tiny(), tmp_path / "tiny.pt")
    with pytest.raises(UserError, match="give --num-heads"):
        import_run(tmp_path / "tiny.pt", tmp_path / "run")
    with pytest.raises(UserError, match="must divide width"):
        import_run(tmp_path / "tiny.pt", tmp_path / "run", heads=5)


def test_the_kind_is_read_from_args_or_else_the_name_and_unknown_outputs_are_refused(tmp_path):
    for name, args, kind in (
        ("0400000.pt", argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity"), "sit"),
        ("my-SiT-XL-2.pt", None, "sit"),
        ("transit.pt", None, "dit"),
        ("SiT.pt", argparse.Namespace(model="DiT-XL/2"), "dit"),
    ):
        run = imported(tmp_path, {"ema": tiny(), "args": args}, name=name)
        assert read_config(run).model.time_embed == kind
        shutil.rmtree(run)
    args = argparse.Namespace(model="SiT-XL/2", path_type="GVP", prediction="velocity")
    with pytest.raises(UserError, match="known are path Linear"):
        imported(tmp_path, {"ema": tiny(), "args": args})


def test_settings_may_not_override_the_weights(tmp_path):
    with pytest.raises(UserError, match="the weights determine this key"):
        imported(tmp_path, settings=["model.time_embed=sit"])
    run = imported(tmp_path, settings=["sample.guidance_channels=3", "data.source=latents.npz"])
    assert read_config(run).sample.guidance_channels == 3


def test_embeddings_that_differ_from_block_to_block_are_refused(made, tmp_path):
    shutil.copytree(made, tmp_path / "apart")
    model = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "apart")
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "apart")
    with pytest.raises(UserError, match="must be the same in every block"):
        import_run(tmp_path / "apart", tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"_class_name": "UNet2DModel"}, "known is DiTTransformer2DModel"),
        ({"norm_type": "layer_norm"}, "a DiT has norm_type=ada_norm_zero"),
        ({"num_layers": 3}, "there is no transformer_blocks.2"),
        ({"num_layers": 1}, "has no 'transformer_blocks.1"),
        ({"num_layers": 10**9}, "from 1 to 65536"),
        ({"sample_size": 9}, "does not fit its weights"),
        ({"sample_size": 65536}, "at most 256 patches a side"),
        ({"num_attention_heads": 5}, "does not fit its weights"),
        ({"patch_size": "2"}, "must be a whole number"),
    ],
)
def test_a_folder_with_a_wrong_config_is_refused(made, tmp_path, change, part):
    shutil.copytree(made, tmp_path / "lies")
    config = json.loads((made / "config.json").read_text())
    (tmp_path / "lies" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=part):
        import_run(tmp_path / "lies", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_exported_is_refused(tmp_path, run_config, dit):
    list(train(with_train(run_config, steps=1), tmp_path / "nested"))
    for name in ("official", "diffusers-dit"):
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(tmp_path / "nested"), "--format", name, "--out", str(tmp_path / name)])
        assert stopped.value.code == 2
        assert not (tmp_path / name).exists()
    with pytest.raises(UserError, match="exists already"):
        export_official(dit, dit / ORIGIN)


def test_an_imported_run_cannot_be_resumed(tmp_path):
    images = np.zeros((20, 4, 8, 8), np.float32)
    np.savez(tmp_path / "latents.npz", images=images, labels=np.arange(20) % 10)
    run = imported(tmp_path, settings=[f"data.source={tmp_path / 'latents.npz'}", "train.precision=float32"])
    with pytest.raises(UserError, match="imported weights have no optimizer state to resume"):
        list(train(read_config(run), run, resume=True))
