"""REPA's features with a DINOv2 of the `transformers` library: random weights in the files of a published model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="make test-eval")

from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.presets import get
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.training.alignment import Repa


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    folder = tmp_path_factory.mktemp("weights") / "dinov2"
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return folder


def config(folder: Path, *settings: str):
    return override(get("dit-s2"), ["train.terms.repa=0.5", f"train.terms.repa_encoder={folder}", *settings])


def test_features_are_the_encoders_patch_tokens_averaged_over_each_outer_token(dinov2: Path) -> None:
    pixels = ["model.channels=3", "data.vae=null"]
    fine, coarse = (
        Repa(config(dinov2, *pixels, f"model.image_size={side}")) for side in (32, 16)
    )  # 16x16 and 8x8 patches: the encoder sees 16x16 patches of both
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    image = torch.nn.functional.interpolate((x + 1) / 2, (224, 224), mode="bicubic")
    mean, deviation = (torch.tensor(c)[:, None, None] for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model = Dinov2Model.from_pretrained(dinov2, attn_implementation="eager").eval()
    with torch.no_grad():
        tokens = model((image - mean) / deviation).last_hidden_state[:, 1:]
    torch.testing.assert_close(fine.features(x), tokens, rtol=1e-4, atol=1e-4)
    blocks = tokens.unflatten(1, (8, 2, 8, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(coarse.features(x), blocks, rtol=1e-4, atol=1e-4)
    assert fine.macs(config(dinov2, *pixels, "model.image_size=32")) > 0


def test_a_folder_without_weights_gives_one_line(dinov2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((dinov2 / "config.json").read_text())
    with pytest.raises(UserError, match="cannot read DINOv2 from") as error:
        Repa(config(tmp_path, "model.channels=3", "data.vae=null"))
    assert "\n" not in str(error.value)


def test_stored_features_are_those_that_training_on_the_images_computes(dinov2: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = draw.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    AutoencoderKL(norm_num_groups=2, block_out_channels=(4,)).save_pretrained(tmp_path / "vae")
    given = {"--data": "images", "--vae": "vae", "--out": "out"}
    paths = [word for option, name in given.items() for word in (option, str(tmp_path / name))]
    main(["encode", *paths, "--size", "32", "--features", str(dinov2), "--device", "cpu"])
    stored = load_file(tmp_path / "out" / "features-000000.safetensors")
    data = DataConfig(source=str(tmp_path / "images"), held_out=0.0)
    repa = Repa(settings := config(dinov2, "model.channels=3", "data.vae=null", "model.num_classes=0"))
    source = open_source(data, settings.model)
    x = torch.from_numpy(np.stack([source.train(number)[0] for number in range(3)]))
    for name, images in (("features", x), ("flipped", x.flip(-1))):
        expected = repa.features(images)
        torch.testing.assert_close(stored[name].flatten(2).mT.float(), expected, rtol=2e-3, atol=2e-3)
