"""VAEs of the `diffusers` library: each known class encodes, decodes and is exported; other classes are refused."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, VQModel
from safetensors.torch import load_file

from conftest import perturbed, small_model
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, RunConfig, SampleConfig
from dit_in_dit.data.encode import Encoding, LatentDecoder, encode
from dit_in_dit.data.formats.latents import read_latents_index
from dit_in_dit.data.sources import fill_latent_keys, open_source
from dit_in_dit.data.vae import downsampling_factor, latent_constants, load_vae, posterior_moments
from dit_in_dit.interop.export_pipeline import _open_vae, pipeline_of
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.model.nested import NestedDiT
from test_cli import lines_of

CPU = torch.device("cpu")
DOWN = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def kl(**keys: Any) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8, 8), **DOWN, norm_num_groups=4, latent_channels=4, **keys)


def tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3, latent_channels=4,
    )  # fmt: skip


def dc() -> AutoencoderDC:
    blocks, widths = ("ResBlock", "EfficientViTBlock"), (8, 8)
    return AutoencoderDC(
        latent_channels=8, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.4,
    )  # fmt: skip


def rae() -> Any:
    """Its images are in [0, 1], and it has one size: 32x32 pixels, 16x16 for the encoder, 4x4 latents."""
    pytest.importorskip("transformers")
    return pytest.importorskip("diffusers", "0.38").AutoencoderRAE(
        encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=4, encoder_num_hidden_layers=1,
        encoder_input_size=16, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, patch_size=8, latents_mean=torch.full((64, 4, 4), 0.1),
        latents_std=torch.full((64, 4, 4), 2.0),
    )  # fmt: skip


def vq() -> VQModel:
    return VQModel(block_out_channels=(8, 8), **DOWN, norm_num_groups=4, latent_channels=4, num_vq_embeddings=16)


KINDS = {"kl": (kl, 4, 2), "tiny": (tiny, 4, 4), "dc": (dc, 8, 2), "vq": (vq, 4, 2)}  # channels, factor


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "set.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(6) % 2)
    return path


def pixels_of(images: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(images)["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1


def encoded(images: Path, vae: Path, out: Path, **keys: Any) -> Path:
    how = Encoding(data=DataConfig(source=str(images)), vae=str(vae), size=(16, 16), batch=2, shard=2, **keys)
    list(encode(how, out, CPU))
    return out


# ------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("name", KINDS)
def test_each_class_encodes_trains_and_decodes(name, images, tmp_path):
    make, channels, smaller = KINDS[name]
    theirs, x = seeded(make), pixels_of(images)
    theirs.save_pretrained(tmp_path / "vae")
    folder = encoded(images, tmp_path / "vae", tmp_path / "latents", dtype="float32")
    side = 16 // smaller
    assert read_latents_index(folder)["made"]["shape"] == [channels, side, side]
    with torch.inference_mode():
        first = theirs.encode(x)[0]
        mean = first if isinstance(first, torch.Tensor) else first.mean
        back = theirs.decode(mean).sample
    stored = torch.cat([load_file(path)["moments"] for path in sorted(folder.glob("*.safetensors"))])
    torch.testing.assert_close(stored[:, :channels], mean, rtol=1e-4, atol=1e-4)
    if name != "kl":  # the encoder gives no distribution
        assert (stored[:, channels:] == -30).all()
    data = fill_latent_keys(DataConfig(source=str(folder), held_out=0.0))
    source = open_source(data, small_model(image_size=(side, side), channels=channels, num_classes=2))
    assert source.train(0)[0].shape == (channels, side, side)
    draw = LatentDecoder(data, CPU)
    assert draw.factor == smaller
    scale = torch.tensor(draw.constants["scale"])
    torch.testing.assert_close(draw(mean * scale), back, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_each_class_is_exported_with_a_pipeline(name, tmp_path):
    make, channels, smaller = KINDS[name]
    seeded(make).save_pretrained(tmp_path / "vae")
    model = small_model("outer*1 inner*1", channels=channels, num_classes=2, image_size=(8, 8))
    data = DataConfig(vae=str(tmp_path / "vae"), latent_mean=(0.5,) * channels, latent_scale=(2.0,) * channels)
    config = RunConfig(model=model, data=data, sample=SampleConfig(sampler="dpm++", steps=2))
    torch.manual_seed(0)
    network = perturbed(NestedDiT(model)).eval()
    vae = _open_vae(None, config)
    pipeline_of(network, config, ["a", "b"], vae=vae).save_pretrained(tmp_path / "pipe")
    pipe = DiTInDiTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(8, *model_shape(model), generator=torch.Generator().manual_seed(0))
    latents = pipe([0, 1] * 4, latents=noise, output_type="latent").images
    drawn = pipe([0, 1] * 4, latents=noise, output_type="pt").images
    assert drawn.shape == (8, 3, 8 * smaller, 8 * smaller)
    torch.testing.assert_close(drawn, (LatentDecoder(data, CPU)(latents) / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)
    own = load_vae(str(tmp_path / "pipe"), CPU)  # a pipeline's folder, whose VAE says the run's constants
    assert latent_constants(own) == ([0.5] * channels, [2.0] * channels)


def model_shape(model: Any) -> tuple[int, ...]:
    return model.channels, *model.image_size


def test_an_autoencoder_rae_encodes_trains_and_decodes(tmp_path, capsys):
    theirs = seeded(rae)
    theirs.save_pretrained(tmp_path / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(6) % 2)
    for size in ("16", "32"):
        np.savez(tmp_path / f"{size}.npz", images=pixels[:, : int(size), : int(size)], labels=np.arange(6) % 2)
    words = ["encode", "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "latents"), "--dtype", "float32"]
    small = ["--data", str(tmp_path / "16.npz"), "--size", "16"]
    assert "--size must be 32 for this VAE: got 16x16" in lines_of([*words, *small], capsys)
    main([*words, "--data", str(tmp_path / "32.npz"), "--size", "32"])
    data = fill_latent_keys(DataConfig(source=str(tmp_path / "latents"), held_out=0.0))
    assert (data.latent_mean, data.latent_scale) == ((0.0,), (1.0,))
    model = small_model(image_size=(4, 4), channels=64, num_classes=2)
    latents = torch.from_numpy(np.stack([open_source(data, model).train(index)[0] for index in range(6)]))
    with torch.no_grad():
        wanted = theirs.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)[0]
        back = theirs.decode(wanted).sample
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(LatentDecoder(data, CPU)(latents), 2 * back - 1, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="AutoencoderRAE, which a pipeline does not take"):
        _open_vae(None, RunConfig(model=model, data=data))


def test_a_missing_package_of_a_vae_is_named(tmp_path, monkeypatch):
    class Lacking:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise NameError("name 'ViTMAEConfig' is not defined")

    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE"}))
    monkeypatch.setattr(diffusers, "AutoencoderRAE", Lacking, raising=False)
    with pytest.raises(UserError, match="it needs the package transformers: pip install transformers"):
        load_vae(str(tmp_path), CPU)


def test_an_unknown_class_is_refused_in_one_line(tmp_path, images, capsys):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    for place in (tmp_path / "vae", tmp_path):  # itself, and a pipeline that has it
        words = ["encode", "--data", str(images), "--vae", str(place), "--out", str(tmp_path / "out")]
        assert "it is a AutoencoderKLWan, known are AutoencoderKL, AutoencoderTiny" in lines_of(words, capsys)


def test_means_and_deviations_of_a_vae_become_its_latent_constants(images, tmp_path):
    numbers = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 2.0, 4.0]}
    seeded(lambda: kl(scaling_factor=0.5, **numbers)).save_pretrained(tmp_path / "vae")
    vae = load_vae(str(tmp_path / "vae"), CPU)
    assert latent_constants(vae) == ([0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 0.25, 0.125])
    folder = encoded(images, tmp_path / "vae", tmp_path / "latents", dtype="float32", flips=False)
    data = fill_latent_keys(DataConfig(source=str(folder), held_out=0.0, posterior="mean"))
    assert (data.latent_mean, data.latent_scale) == ((0.1, 0.2, 0.3, 0.4), (1.0, 0.5, 0.25, 0.125))
    source = open_source(data, small_model(image_size=(8, 8), channels=4, num_classes=2))
    latent = posterior_moments(vae, pixels_of(images)[:1])[0, :4]
    wanted = (latent - torch.tensor(numbers["latents_mean"])[:, None, None]) * torch.tensor([1.0, 0.5, 0.25, 0.125])[
        :, None, None
    ]
    gaps = [
        np.abs(source.example(number, np.random.default_rng, flip=False)[0] - wanted.numpy()).max()
        for number in range(6)
    ]
    assert min(gaps) < 1e-5


def test_a_vae_config_without_a_class_name_is_read_as_autoencoderkl(tmp_path):
    seeded(kl).save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["_class_name"]
    path.write_text(json.dumps(config))
    assert type(load_vae(str(tmp_path / "vae"), CPU)) is AutoencoderKL


# ------------------------------------------------------------------------------------------- places


class Piped(DiffusionPipeline):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae)


def test_a_vae_is_loaded_from_the_folder_of_a_pipeline(images, tmp_path):
    vae = seeded(kl)
    Piped(vae).save_pretrained(tmp_path / "pipe")
    vae.save_pretrained(tmp_path / "vae")
    one, other = (encoded(images, tmp_path / name, tmp_path / f"{name} latents") for name in ("pipe", "vae"))
    assert (one / "000000.safetensors").read_bytes() == (other / "000000.safetensors").read_bytes()


@pytest.mark.parametrize(("inside", "variant"), [("", None), ("vae", None), ("", "fp16"), ("vae", "fp16")])
def test_a_vae_is_loaded_from_the_top_or_the_subfolder_of_a_repository(tmp_path, monkeypatch, inside, variant):
    """The Hub's cache with some/model; SD3 and Flux have the VAE in vae/, and some only in float16."""
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    seeded(tiny).save_pretrained(snapshot / inside, variant=variant)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    for name in ("configuration_utils", "models.modeling_utils", "utils.hub_utils"):
        monkeypatch.setattr(f"diffusers.{name}.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vae = load_vae("some/model", CPU)
    assert (type(vae), downsampling_factor(vae)) == (AutoencoderTiny, 4)


def test_a_vae_with_only_float16_weights_is_read_and_computed_in_float32(tmp_path):
    vae = seeded(kl)
    vae.half().save_pretrained(tmp_path / "vae", variant="fp16")
    loaded = load_vae(str(tmp_path / "vae"), CPU)
    assert loaded.dtype == torch.float32
    assert all(torch.equal(a, b.float()) for a, b in zip(loaded.parameters(), vae.parameters(), strict=True))
    shutil.copy(
        tmp_path / "vae/diffusion_pytorch_model.fp16.safetensors",
        tmp_path / "vae/diffusion_pytorch_model.bf16.safetensors",
    )
    with pytest.raises(UserError, match=r"several variants \(bf16, fp16\)"):
        load_vae(str(tmp_path / "vae"), CPU)


def test_pickled_weights_of_a_vae_are_not_read(tmp_path):
    seeded(kl).save_pretrained(tmp_path / "vae", safe_serialization=False)
    with pytest.raises(UserError, match="no AutoencoderKL"):
        load_vae(str(tmp_path / "vae"), CPU)


def test_loading_a_vae_folder_runs_no_code_from_the_folder(tmp_path):
    seeded(kl).save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    (tmp_path / "vae" / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n\nclass AutoencoderKL: ...\n")
    for config in ({"auto_map": {"AutoModel": "evil.AutoencoderKL"}}, {"_class_name": ["evil", "AutoencoderKL"]}):
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        with suppress(UserError):
            load_vae(str(tmp_path / "vae"), CPU)
    assert not (tmp_path / "canary").exists()


# -------------------------------------------------------------------------------------------- NaN


def test_a_vae_that_gives_nan_is_named_with_the_images(images, tmp_path, monkeypatch):
    seeded(kl).save_pretrained(tmp_path / "vae")
    real, x = AutoencoderKL.encode, pixels_of(images)

    def broken(self: Any, given: torch.Tensor) -> Any:
        """NaN for images 3 and 5."""
        mean, log_variance = (
            t.clone() for t in (real(self, given).latent_dist.mean, real(self, given).latent_dist.logvar)
        )
        for row, image in enumerate(given):
            if any(torch.allclose(image, x[n], atol=1e-3) for n in (3, 5)):
                mean[row] = float("nan")
        return (SimpleNamespace(mean=mean, logvar=log_variance),)

    monkeypatch.setattr(AutoencoderKL, "encode", broken)
    for dtype in ("float32", "float16"):
        with pytest.raises(UserError, match=r"the VAE gives no finite latents for image 3 \(counted from 0\)") as error:
            encoded(images, tmp_path / "vae", tmp_path / dtype, dtype=dtype)
        assert "--dtype" not in str(error.value)


def test_latents_too_large_for_their_dtype_are_refused(images, tmp_path):
    vae = seeded(kl)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e6)
        vae.quant_conv.bias.mul_(1e6)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"latents of image 0, 1 .* do not fit float16: use --dtype float32"):
        encoded(images, tmp_path / "vae", tmp_path / "latents")
