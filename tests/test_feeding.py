"""Batches on their way to the device: few bytes, the same bits, and noise that depends on the example alone."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import small_model, with_train
from dit_in_dit.cli import main, verify_resume
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, from_yaml, to_yaml
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.data.coerce import as_source
from dit_in_dit.data.formats.images import ImageSource
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import open_source
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run
from dit_in_dit.runtime import philox
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.training import batches
from dit_in_dit.training.batches import Examples, Unpacker, load_batches
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer
from processes import run_together, trained

CPU = torch.device("cpu")


def hashes(out) -> dict[str, str]:
    found = checkpoint.newest(out)
    return {**checkpoint.verify(found.folder)["sha256"], "log": (out / "log.jsonl").read_text()}


def crossing_bytes(examples: Examples) -> int:
    """Bytes of a micro-batch that cross from a worker to the main process, and on to the device."""
    return sum(part.nbytes for part in examples.packed(0) if part is not None)


def arrays(tmp_path, images: np.ndarray, model, name: str = "set") -> Source:
    np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(len(images)) % 3)
    return open_source(DataConfig(source=str(tmp_path / f"{name}.npz"), held_out=0), model)


class Brighter(ImageSource):
    """A user's source with images other than the stored ones."""

    def train(self, index):
        image, label = super().train(index)
        return image / 2 + np.float32(0.5), label


class Shifted(ImageSource):
    """A user's source with a crop of its own."""

    def example(self, index, stream, *, flip):
        image, label = super().example(index, stream, flip=flip)
        return np.roll(image, int(stream().integers(8)), -1), label


def sources(tmp_path, config: RunConfig):
    """(Source, dtype in which its images cross)."""
    draw, model = np.random.default_rng(0), config.model
    pixels = draw.integers(0, 256, (12, 8, 8, 3), np.uint8)
    latents = draw.standard_normal((12, 3, 8, 8))
    dataset = [(Image.fromarray(image), 0) for image in pixels]
    mixed = [
        (image if n % 2 else image.astype(np.float32).transpose(2, 0, 1) / 256, 0) for n, image in enumerate(pixels)
    ]
    still = replace(config, data=replace(config.data, held_out=0))
    yield open_source(config.data, model), torch.uint8
    yield Brighter(config.data, model), torch.float32
    yield Shifted(config.data, model), torch.float32
    yield arrays(tmp_path, pixels, model, "pixels"), torch.uint8
    for kind, crossing in ((np.float16, torch.float16), (np.float32, torch.float32), (np.float64, torch.float32)):
        yield arrays(tmp_path, latents.astype(kind), model, kind.__name__), crossing
    yield as_source(dataset, still), torch.uint8
    yield as_source(mixed, still), torch.float32


@pytest.mark.parametrize("flip", [False, True])
def test_images_cross_as_they_are_stored_and_arrive_with_the_same_bits(run_config, tmp_path, flip):
    config = with_train(replace(run_config, data=replace(run_config.data, flip=flip)), batch_size=12)
    for source, crossing in sources(tmp_path, config):
        examples, expected = Examples(source, config), []
        for index in examples.indices(1):
            number = batches.shuffled_index(config.seed, index, source.train_size)
            mirrored = flip and generator(config.seed, "example", index).random(3)[0] < 0.5
            image, _ = source.example(
                number, lambda index=index: generator(config.seed, "source", index), flip=mirrored
            )
            assert image.dtype == np.float32
            expected.append(image)
        assert examples.packed(1).x.dtype == crossing, source
        assert torch.equal(examples[1].x, torch.from_numpy(np.stack(expected))), source
        assert examples.packed(1).x.is_contiguous(), source


def test_every_pixel_value_is_scaled_to_the_same_bits_as_on_the_host():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    part = torch.zeros(1)
    found = batches.Packed(pixels, pixels, part, part, part, part).unpack(0, CPU).x
    assert np.array_equal(found.numpy(), pixels.numpy().astype(np.float32) / np.float32(127.5) - 1)
    assert (found.min(), found.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("kind", "shape", "host", "device"),
    [
        ("latents", (4, 32, 32), 2 * 4 * 4096, 4 * 4096),
        ("half-precision latents", (4, 32, 32), 6 * 4096, 2 * 4096),
        ("pixels", (3, 64, 64), 5 * 12288, 12288),
    ],
)
def test_noise_of_the_device_and_float_pixels_cross_nowhere(tmp_path, kind, shape, host, device):
    """Bytes of an example; a float32 image of 64x64 and its noise had 98,304."""
    dtype = {"pixels": np.uint8, "latents": np.float32}.get(kind, np.float16)
    model = small_model(image_size=shape[1:], channels=shape[0], num_classes=3)
    source = arrays(tmp_path, np.ones((3, *shape) if kind != "pixels" else (3, *shape[1:], shape[0]), dtype), model)
    config = with_train(RunConfig(model=model), batch_size=5)
    small = 5 * (4 + 3 * 8)  # time, label, numbers of image and example
    assert crossing_bytes(Examples(source, config)) == 5 * host + small
    assert crossing_bytes(Examples(source, with_train(config, noise="device"))) == 5 * device + small


@pytest.mark.slow
def test_workers_send_pixels_and_numbers_but_no_noise(run_config):
    config = with_train(run_config, noise="device")
    examples = Examples(open_source(config.data, config.model), config)
    for number, packed in enumerate(load_batches(examples, 0, 2, 1, pin=False)):
        assert packed.x.dtype == torch.uint8
        assert packed.noise is None
        for one, other in zip(packed.unpack(config.seed, CPU), examples[number], strict=True):
            assert torch.equal(one, other)


def test_noise_depends_on_the_example_and_not_on_batches_or_processes(run_config):
    config = with_train(run_config, noise="device", accumulate=2, batch_size=4)
    source = open_source(config.data, config.model)
    whole = Examples(source, with_train(config, accumulate=1, batch_size=16))[1]  # examples 16 to 31
    assert torch.equal(whole.noise, philox.normal(config.seed, "noise", torch.arange(16, 32), (3, 8, 8)))
    for reduction in ("fast", "fixed"):
        for world in (1, 2):
            shares = [Examples(source, with_train(config, reduction=reduction), rank, world) for rank in range(world)]
            for share in shares:
                for number in range(2 * share.per_step, 4 * share.per_step):
                    rows = [index - 16 for index in share.indices(number)]
                    for one, other in zip(share[number], whole, strict=True):
                        assert torch.equal(one, other[rows])


def test_only_the_noise_differs_from_the_noise_of_the_host(run_config):
    source = open_source(run_config.data, run_config.model)
    host, device = (Examples(source, with_train(run_config, noise=noise))[3] for noise in ("host", "device"))
    for field in ("x", "t", "y", "image"):
        assert torch.equal(getattr(host, field), getattr(device, field))
    assert not torch.isclose(host.noise, device.noise, atol=1e-3).all()


def test_held_out_errors_use_the_same_noise_in_every_run(run_config):
    source = open_source(run_config.data, run_config.model)
    held = [Trainer(with_train(run_config, noise=noise), source, CPU).held_out for noise in ("host", "device")]
    assert all(torch.equal(one, other) for one, other in zip(*held, strict=True))


def test_the_kind_of_noise_belongs_to_the_identity_of_a_run(run_config, tmp_path):
    device = with_train(run_config, noise="device")
    assert config_hash(device) != config_hash(run_config)
    assert from_yaml(to_yaml(device)) == device
    written = to_yaml(run_config)
    old = "\n".join(line for line in written.splitlines() if not line.strip().startswith("noise:"))
    assert old != written.strip()
    assert from_yaml(old) == run_config  # a config without the key is of a run with noise of the host
    list(train(device, tmp_path / "run", device="cpu", until=3))
    with pytest.raises(UserError, match=r"train\.noise is device, not host"):
        list(train(run_config, tmp_path / "run", device="cpu", resume=True))


def test_a_stopped_run_with_noise_of_the_device_resumes_exactly(run_config, tmp_path, monkeypatch, capsys):
    create_run(tmp_path / "run", with_train(run_config, noise="device"))
    monkeypatch.setattr(verify_resume, "_train", lambda arguments: main(["train", *arguments]))
    main(["verify-resume", str(tmp_path / "run"), "--steps", "5", "--stop", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[:3]] == [
        ["same", "ema.safetensors"],
        ["same", "log.jsonl"],
        ["same", "state.safetensors"],
    ]


@pytest.mark.slow
def test_noise_of_the_device_has_the_same_bits_on_one_and_two_processes(run_config, tmp_path):
    config = with_train(run_config, noise="device", reduction="fixed", accumulate=2, evaluate_every=0)
    list(train(config, tmp_path / "alone", device="cpu"))
    for turn, (world, until) in enumerate(((1, 2), (2, 4), (1, 6))):
        run_together(world, trained, config, tmp_path / "many", turn > 0, until)
    assert hashes(tmp_path / "many") == hashes(tmp_path / "alone")


class Recorder:
    """CUDA's streams, as a list of what was asked of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, object]] = []
        self.within = "main"
        patch.setattr(torch.cuda, "stream", self.enter)
        patch.setattr(torch.cuda, "current_stream", lambda device: self)
        patch.setattr(torch.Tensor, "record_stream", lambda part, stream: self.calls.append(("keep", stream)))
        unpack = batches.Packed.unpack

        def recorded(packed, seed, device):
            self.calls.append(("unpack", self.within))
            return unpack(packed, seed, device)

        patch.setattr(batches.Packed, "unpack", recorded)

    @contextmanager
    def enter(self, stream):
        self.within = stream
        yield
        self.within = "main"

    def wait_stream(self, stream) -> None:
        self.calls.append(("wait", stream))


def test_on_cuda_batches_are_unpacked_on_a_side_stream_that_the_step_waits_for(run_config, monkeypatch):
    examples = Examples(open_source(run_config.data, run_config.model), run_config)
    unpacker, streams = Unpacker(run_config.seed, CPU), Recorder(monkeypatch)
    assert torch.equal(unpacker(examples.packed(0)).x, examples[0].x)
    assert {call for call in streams.calls if call[0] != "unpack"} == set()  # on a CPU there are no streams
    streams.calls.clear()
    unpacker.stream = "side"
    batch = unpacker(examples.packed(0))
    assert streams.calls == [("unpack", "side"), ("wait", "side"), *[("keep", streams)] * len(batch)]


@pytest.mark.parametrize("noise", ["host", "device"])
def test_a_batch_on_cuda_is_unpacked_there_without_reading_it_back(run_config, noise):
    """With fake tensors, which refuse operations on tensors of two devices, and reads by the CPU."""
    config = with_train(run_config, noise=noise)
    packed, device = Examples(open_source(config.data, config.model), config).packed(0), torch.device("cuda:0")
    with FakeTensorMode():
        parts = (None if part is None else torch.empty(part.shape, dtype=part.dtype, device=device) for part in packed)
        batch = batches.Packed(*parts).unpack(config.seed, device)
    assert {part.device for part in batch} == {device}
    assert [(part.dtype, part.shape) for part in batch[:2]] == [(torch.float32, (4, 3, 8, 8))] * 2
