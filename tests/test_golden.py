"""The results of a seed do not change by accident: twenty recorded losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import small_model
from dit_in_dit.config.run import DataConfig, DiffusionConfig, RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.training.loop import train

STORED = Path(__file__).parent / "golden" / "losses.json"
# Another processor's or library's sums differ in the last bits, which twenty steps enlarge a little. Another order of
# the examples, another noise, rate, weight or average differs in the first digits.
TOLERANCE = 2e-5


def config() -> RunConfig:
    return RunConfig(
        seed=20,
        model=small_model("inner outer inner", image_size=(16, 16), num_classes=9, inner={"fuse": "gate"}),
        diffusion=DiffusionConfig(predict="image", weight="velocity", time="logit_normal", time_mean=0.4),
        data=DataConfig(source="mosaic", flip=True),
        train=TrainConfig(
            steps=20,
            batch_size=4,
            accumulate=2,
            learning_rate=3e-3,
            warmup=5,
            schedule="cosine",
            weight_decay=0.01,
            precision="float32",
            ema=0.9,
            evaluate_every=0,
            sample_every=0,
        ),
    )


def losses(out: Path) -> list[float]:
    return [fact.values["loss"] for fact in train(config(), out, device="cpu") if fact.kind == "step"]


def test_twenty_losses_equal_the_recorded_ones(tmp_path):
    written = [float.fromhex(number) for number in json.loads(STORED.read_text())]
    assert len(written) == 20
    assert losses(tmp_path / "run") == pytest.approx(written, rel=TOLERANCE)


if __name__ == "__main__":  # to write them anew, where a change of what a seed means is meant
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        STORED.write_text(json.dumps([number.hex() for number in losses(Path(folder) / "run")], indent=1) + "\n")
