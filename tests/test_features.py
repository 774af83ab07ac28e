"""Features beside latents, for REPA: what is stored, what training reads, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import SHARDED_FULL, only_full, small_model
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data import encode_features as encoding
from dit_in_dit.data.encode import Encoding, encode
from dit_in_dit.data.encode_features import encode_features
from dit_in_dit.data.features import features_sha256
from dit_in_dit.data.sources import fill_latent_keys, open_source
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.inspection.hooks import watch_blocks
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.training import alignment
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.loop import train
from dit_in_dit.training.terms import LossTerms, terms_cost
from processes import run_together, trained
from test_encode import pixels_of
from test_terms import PatchEncoder, check_gradients, log, passed, state, summed

CPU = torch.device("cpu")
SIDE, COUNT, GRID = 16, 22, 16


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root, draw = tmp_path_factory.mktemp("images") / "set", np.random.default_rng(0)
    for number in range(COUNT):
        place = root / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(place / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """An AutoencoderKL of random weights: 16x16 images become 4x8x8 latents."""
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    shape = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4, "layers_per_block": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(down_block_types=down, up_block_types=up, **shape)
    model.save_pretrained(folder := tmp_path_factory.mktemp("vae") / "tiny")
    return folder


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> None:
    for module in (alignment, encoding):
        monkeypatch.setattr(module, "read_dinov2", lambda folder, side: PatchEncoder())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The folder of the stand-in, whose weights are only hashed."""
    folder = tmp_path_factory.mktemp("encoder")
    about = {"model_type": "dinov2", "hidden_size": 6, "num_hidden_layers": 1, "patch_size": 2}
    (folder / "config.json").write_text(json.dumps(about))
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    return folder


def how(images: Path, vae: Path, **keys) -> Encoding:
    data = DataConfig(source=str(images))
    return Encoding(**{"data": data, "vae": str(vae), "size": (SIDE, SIDE), "batch": 4, "shard": 8, **keys})


def made(folder: Path, encoding: Encoding, encoder: Path, grid: int = GRID) -> Path:
    list(encode(encoding, folder, CPU))
    list(encode_features(encoding, encoder, grid, folder, CPU))
    return folder


@pytest.fixture(scope="module")
def whole(images, vae, encoder, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "read_dinov2", lambda folder, side: PatchEncoder())
        return made(tmp_path_factory.mktemp("latents") / "whole", how(images, vae), encoder)


@pytest.fixture
def latents(whole, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(whole, tmp_path / "latents"))


def configured(config, folder: Path, *settings: str):
    model = small_model("outer*2 inner*1 outer*1", image_size=(8, 8), channels=4, num_classes=2)
    data = fill_latent_keys(DataConfig(source=str(folder), held_out=0.2))
    base = ["data.flip=true", "train.terms.repa=0.5", "train.terms.repa_width=10"]
    return override(replace(config, model=model, data=data), [*base, *settings])


def expected_features(images: Path) -> dict[str, torch.Tensor]:
    """Features of every image and mirror image, in plain torch."""
    x = pixels_of(images)
    shift, scale = (torch.tensor(c)[:, None, None] for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    several = {"features": x, "flipped": x.flip(-1)}
    with torch.no_grad():
        large = {name: F.interpolate((x + 1) / 2, (2 * GRID, 2 * GRID), mode="bicubic") for name, x in several.items()}
        return {name: PatchEncoder().embed((x - shift) / scale) for name, x in large.items()}


def test_files_hold_the_encoders_features_of_images_and_mirror_images(images, encoder, whole):
    files = [load_file(path) for path in sorted(whole.glob("features-*.safetensors"))]
    for name, expected in expected_features(images).items():
        stored = torch.cat([file[name] for file in files])
        assert stored.dtype == torch.float16
        torch.testing.assert_close(stored.float(), expected, rtol=2e-3, atol=2e-3)
    assert [file.keys() for file in files] == [{"features", "flipped"}] * 3
    index = json.loads((whole / "features.json").read_text())
    assert index["made"]["shape"] == [6, GRID, GRID]
    assert index["made"]["encoder_sha256"] == hashlib.sha256((encoder / "model.safetensors").read_bytes()).hexdigest()
    assert not open_source(
        DataConfig(source=str(whole)), small_model(image_size=(8, 8), channels=4, num_classes=2)
    ).notes


def test_interrupted_and_shared_work_gives_the_same_bytes_and_latents_stay(
    images, vae, encoder, whole, tmp_path, monkeypatch
):
    folder, encoding_ = tmp_path / "pieces", how(images, vae)
    list(encode(encoding_, folder, CPU))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = encode_features(encoding_, encoder, GRID, folder, CPU)
    assert [next(first) for _ in range(2)] == [(0, COUNT), (8, COUNT)]
    first.close()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    second = encode_features(encoding_, encoder, GRID, folder, CPU)
    assert [next(second) for _ in range(2)] == [(8, COUNT), (16, COUNT)]
    second.close()
    with pytest.raises(UserError, match=r"the features in .* are not complete"):
        features_sha256(folder)
    monkeypatch.setenv("RANK", "0")
    list(encode_features(encoding_, encoder, GRID, folder, CPU))
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert content == {path.name: path.read_bytes() for path in whole.iterdir()}
    assert before.items() <= content.items()


def test_the_command_encodes_features_and_names_their_size(images, vae, encoder, whole, tmp_path, capsys):
    sizes = ["--size", str(SIDE), "--batch", "4", "--shard", "8", "--device", "cpu"]
    given = ["--data", str(images), "--vae", str(vae), "--out", str(tmp_path / "out"), "--features", str(encoder)]
    main(["encode", *given, *sizes])
    assert f"Features of 6x16x16, {2 * 2 * 6 * 16 * 16:,} bytes per image" in capsys.readouterr().out
    assert (tmp_path / "out" / "features.json").read_bytes() == (whole / "features.json").read_bytes()


def test_batches_carry_the_features_of_their_images_only_for_repa(run_config, images, whole):
    config = configured(run_config, whole)
    source = open_source(config.data, config.model)
    examples = Examples(source, config)
    latent = {
        name: torch.cat([load_file(whole / f"{n:06d}.safetensors")[name] for n in range(3)])
        for name in ("moments", "flipped")
    }
    expected = {name: features.half() for name, features in expected_features(images).items()}
    turned = set()
    plain = override(config, ["data.posterior=mean"])
    means = Examples(open_source(plain.data, plain.model), plain)
    again = pickle.loads(pickle.dumps(examples))
    assert len(pickle.dumps(examples)) < 100_000  # workers map the files themselves
    for number in range(3):
        batch, other = examples.packed(number), again.packed(number)
        assert batch.features.dtype == torch.float16
        assert torch.equal(batch.features, other.features)
        x = means.packed(number).x  # the image and its side, found by the latent itself
        for row, image in enumerate(batch.image.tolist()):
            position = int(source._train[image])
            which = [n for n in latent if np.allclose(x[row], source._mean_of(latent[n][position, :4].numpy()))]
            assert len(which) == 1
            turned.add(which[0])
            name = "features" if which[0] == "moments" else "flipped"
            torch.testing.assert_close(batch.features[row], expected[name][position], rtol=2e-3, atol=2e-3)
    assert turned == {"moments", "flipped"}
    off = Examples(source, override(config, ["train.terms.repa=0"]))
    assert off.packed(0).features is None
    assert off[0].features.shape == (config.train.batch_size, 0)


def test_repa_on_latents_equals_a_computation_in_plain_torch(run_config, whole):
    config = configured(run_config, whole, "train.terms.repa_block=1")
    model, terms, given = passed(config)
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(len(given.x), 6, GRID, GRID, generator=draw).half()
    given = replace(given, features=features)
    _, alone = summed(model, terms, given)
    pooled, rows = GRID // config.model.grid[0], config.model.grid[0]
    with torch.no_grad(), watch_blocks(model) as seen:
        model(given.objective.noisy(given.x, given.noise, given.t), given.t, given.y)
        tokens = terms["repa"].projector(seen["outer_blocks.1"])
        target = features.double().unflatten(3, (rows, pooled)).unflatten(2, (rows, pooled)).mean((3, 5)).flatten(2).mT
        cosine = (F.normalize(tokens, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean(1)
    torch.testing.assert_close(alone[1], -cosine, rtol=1e-5, atol=1e-6)  # means of features are in float32
    check_gradients(model, terms, given)


def test_a_resumed_run_on_features_equals_an_unbroken_one_and_they_may_move(run_config, latents, tmp_path):
    config = configured(run_config, latents, "train.steps=4", "train.accumulate=2")
    list(train(config, tmp_path / "whole", device="cpu"))
    list(train(override(config, ["data.workers=1"]), tmp_path / "halves", device="cpu", until=2))
    moved = latents.rename(tmp_path / "moved")
    list(train(config, tmp_path / "halves", device="cpu", resume=True, data=str(moved)))
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    one, other = state(tmp_path / "whole"), state(tmp_path / "halves")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert "loss.repa" in json.loads(log(tmp_path / "whole").splitlines()[0])


@pytest.mark.slow
def test_doctor_judges_a_run_on_features(run_config, whole):
    report = examine(configured(run_config, whole), CPU, None)
    assert "grad_norm.term" in {name for part in report.sections for name in part.rows}


def change(path: Path) -> None:
    index = json.loads(path.read_text())
    index["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(index))


def test_a_resume_with_other_features_is_refused_in_one_line(run_config, latents, tmp_path):
    config = configured(run_config, latents, "train.steps=4")
    list(train(config, tmp_path / "run", device="cpu", until=2))
    change(latents / "features.json")
    with pytest.raises(UserError, match=r"train\.terms\.repa: .* are not those of .*run .*: put them back") as error:
        list(train(config, tmp_path / "run", device="cpu", resume=True))
    assert "\n" not in str(error.value)


def test_a_resume_with_another_encoder_is_refused_in_one_line(run_config, encoder, images, tmp_path):
    own = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    model = small_model("outer*2 inner*1 outer*1", image_size=(8, 8), num_classes=0)
    settings = ["train.terms.repa=0.5", "train.terms.repa_width=10", f"train.terms.repa_encoder={own}", "train.steps=4"]
    config = override(replace(run_config, model=model, data=DataConfig(source=str(images))), settings)
    list(train(config, tmp_path / "run", device="cpu", until=2))
    save_file({"weight": torch.zeros(3)}, own / "model.safetensors")
    with pytest.raises(UserError, match=r"train\.terms\.repa: the encoder's files") as error:
        list(train(config, tmp_path / "run", device="cpu", resume=True))
    assert "\n" not in str(error.value)
    shutil.copy(encoder / "model.safetensors", own)
    list(train(config, tmp_path / "run", device="cpu", resume=True))


def test_inspect_names_the_size_of_features_and_counts_no_encoder(run_config, whole, capsys):
    config = configured(run_config, whole)
    repa = terms_cost(config)["repa"]
    width = config.model.outer.width
    assert repa["macs"] == 3 * config.model.patches * 10 * (width + 10 + 6)
    assert repa["feature_bytes"] == 2 * 6 * GRID**2
    settings = [f"data.source={whole}", "train.terms.repa=0.5"]
    main(["inspect", "--preset", "dit-s2", *(word for each in settings for word in ("--set", each))])
    assert f"repa reads {2 * 6 * GRID**2:,} bytes of features per image" in capsys.readouterr().out


def remove(folder: Path) -> None:
    (folder / "features-000001.safetensors").unlink()


def reshape(folder: Path) -> None:
    path = folder / "features-000001.safetensors"
    save_file({name: each[..., :-1].contiguous() for name, each in load_file(path).items()}, path)


def edited(**keys):
    def edit(folder: Path) -> None:
        index = json.loads((folder / "features.json").read_text())
        index["made"].update(keys)
        (folder / "features.json").write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (remove, [], r"features-000001\.safetensors is damaged .*No such"),
        (reshape, [], r"features-000001\.safetensors does not hold the 'features' that features\.json describes"),
        (edited(images="0" * 64), [], r"features\.json is of other images than the latents: remove it"),
        (edited(shape=[6, 0, 0]), [], r"features\.json is not of the format"),
        (edited(shape=6), [], r"features\.json is not of the format"),
        (edited(flips=False), [], r"has no features of mirror images; set data\.flip=false"),
        (lambda folder: (folder / "features.json").write_text("{"), [], r"features\.json"),
        (lambda folder: (folder / "features.json").write_text("[]"), [], r"features\.json"),
        (lambda folder: (folder / "features.json").unlink(), [], "run the same `dit-in-dit encode` with --features"),
        (lambda folder: None, ["train.terms.repa_encoder=somewhere"], "repa_encoder must be null"),
        (edited(shape=[6, 9, 9]), [], r"2x2 outer tokens must divide the features' grid, 9x9: .*--features-grid 16"),
    ],
)
def test_wrong_features_give_one_line(run_config, latents, tmp_path, damage, settings, message):
    damage(latents)
    with pytest.raises(UserError, match=message) as error:
        list(train(configured(run_config, latents, "train.steps=1", *settings), tmp_path / "run", device="cpu"))
    assert "\n" not in str(error.value)
    list(train(configured(run_config, latents, "train.steps=1", "train.terms.repa=0"), tmp_path / "off", device="cpu"))


def test_wrong_encodings_give_one_line(images, vae, encoder, latents, tmp_path):
    def refused(message, encoding, *, folder=latents, by=encoder, grid=GRID):
        with pytest.raises(UserError, match=message) as error:
            list(encode_features(encoding, by, grid, folder, CPU))
        assert "\n" not in str(error.value)

    refused("--features needs images as high as wide: --size is 16x32", how(images, vae, size=(16, 32)))
    refused(r"features\.json is of other features \(shape.*16.*8.*\)", how(images, vae), grid=8)
    refused("config.json", how(images, vae), by=tmp_path / "nowhere")
    path = latents / "features-000000.safetensors"
    save_file({name: each + 1 for name, each in load_file(path).items()}, path)
    refused(
        r"features-000000\.safetensors is not the file of features\.json: remove it and run again", how(images, vae)
    )


def test_terms_of_a_config_alone_read_the_place_of_its_data(run_config, whole):
    config = configured(run_config, whole)
    assert LossTerms(config, NestedDiT(config.model)).references() == {"repa": features_sha256(whole)}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fixed", only_full("ddp"), SHARDED_FULL])
def test_two_processes_train_on_features_like_one(run_config, whole, tmp_path, parallel):
    setting = "train.reduction=fixed" if parallel == "fixed" else f"train.parallel={parallel}"
    config = configured(run_config, whole, "train.accumulate=2", "train.steps=3", setting)
    for world, name in ((1, "alone"), (2, "many")):
        run_together(world, trained, config, tmp_path / name, False)
    alone, many = (log(tmp_path / name) for name in ("alone", "many"))
    assert "loss.repa" in many
    if parallel == "fixed":
        assert many == alone
    for one, two in zip(*([json.loads(line) for line in text.splitlines()] for text in (alone, many)), strict=True):
        if "loss" in one:
            assert two == pytest.approx(one, rel=1e-4)
