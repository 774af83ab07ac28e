"""The standard metrics with their networks against torch-fidelity's and transformers' own numbers. `make test-eval`.

The published weights are too large to come along; random ones of the same shapes in the same files go the same way.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

pytest.importorskip("torch_fidelity", reason="make test-eval", exc_type=(ModuleNotFoundError, RuntimeError))

from torch_fidelity import FeatureExtractorInceptionV3, calculate_metrics
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from transformers import Dinov2Config, Dinov2Model

from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.metrics import feature_distances
from dit_in_dit.metrics.feature_networks import open_network
from dit_in_dit.metrics.score import DRAWS
from dit_in_dit.runtime.seeding import generator

COUNT = 21  # images on each side; a network takes a fifth of a second for one
BATCH = 7
CPU = torch.device("cpu")
PUBLISHED = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


def pictures(count: int, seed: int, side: int) -> np.ndarray:
    """Smooth colours (N, 32, 32, 3), uint8, from a grid of side x side random ones."""
    grid = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(colours).resize((32, 32), Image.Resampling.BICUBIC)) for colours in grid]
    )


def write_pictures(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def made() -> np.ndarray:
    """A third as the real ones are, the rest finer: neither precision nor recall is at an end."""
    return np.concatenate([pictures(COUNT // 3, 1, 6), pictures(COUNT - COUNT // 3, 2, 9)])


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return pictures(COUNT, 3, 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, made: np.ndarray, real: np.ndarray) -> tuple[Path, Path]:
    """Made and real images as files."""
    root = tmp_path_factory.mktemp("images")
    return write_pictures(root / "made", made), write_pictures(root / "real", real)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, real: np.ndarray) -> Path:
    """A file of Inception weights: He's deviation, and statistics of batch norm as real images have them."""
    with pytest.MonkeyPatch.context() as patch:  # its constructor wants the file that is made here
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        network = FeatureExtractorInceptionV3("inception", ["logits"], "nothing")
    draw = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=draw)
        if isinstance(module, nn.BatchNorm2d):
            module.bias.normal_(0, 0.3, generator=draw)
            module.momentum = 1.0
    network.train()(torch.from_numpy(real[:12]).permute(0, 3, 1, 2))
    network.fc.weight *= 5  # predictions that differ
    network.fc.bias.normal_(0, 1, generator=draw)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = network.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, path)  # as published
    return path


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it: ViT-L/14's 37 x 37 positions, three narrow layers."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=518,
        patch_size=14,
        initializer_range=0.2,
        layerscale_value=0.5,
    )
    model = Dinov2Model(config)
    model.embeddings.position_embeddings.data.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("weights") / "dinov2"
    model.save_pretrained(folder)
    return folder


def arguments(folders: tuple[Path, Path], weights: Path, dinov2: Path, out: Path, *more: object) -> list[str]:
    """`evaluate` with everything."""
    made, real = folders
    given: list[object] = ["evaluate", made, "--against", real, "--metrics", "inception,dinov2", "--weights", weights]
    given += ["--dinov2", dinov2, "--out", out, "--batch", BATCH, "--device", "cpu", *more]
    return list(map(str, given))


@pytest.fixture(scope="module")
def evaluated(
    folders: tuple[Path, Path], weights: Path, dinov2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The whole command's folder."""
    out = tmp_path_factory.mktemp("evaluated") / "a"
    main(arguments(folders, weights, dinov2, out))
    return out


def scores(out: Path) -> dict[str, float]:
    return {name: score["value"] for name, score in json.loads((out / "metrics.json").read_text())["scores"].items()}


def stored(out: Path, network: str, side: str, kind: str) -> np.ndarray:
    """Features that an evaluation kept, of its samples or of the real images."""
    parts = sorted((out / "features").glob(f"{network}-*"))
    folder = next(path for path in parts if path.name.endswith("-samples") == (side == "samples"))
    return np.concatenate([np.load(path)[kind] for path in sorted(folder.iterdir())])


class Pictures(torch.utils.data.Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.images[number]


def fidelity(made: np.ndarray, real: np.ndarray, weights: Path, **metrics: bool) -> dict[str, float]:
    """torch-fidelity's own numbers; subsets of KID are whole sets, and the Inception Score keeps the order."""
    return calculate_metrics(
        input1=Pictures(made),
        input2=Pictures(real),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no worker processes
        batch_size=BATCH,
        samples_shuffle=False,
        kid_subsets=1,
        kid_subset_size=COUNT,
        **metrics,
    )


def exact(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance from the singular values of the images' own features: exact for fewer images than numbers."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    apart = a.mean(0) - b.mean(0)
    rows = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    shared = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    return float(apart @ apart + sum(np.square(x).sum() for x in rows) - 2 * shared)


# ------------------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def theirs(made: np.ndarray, real: np.ndarray, weights: Path) -> dict[str, float]:
    """torch-fidelity's numbers of the images that `evaluated` saw, the samples in the Inception Score's order."""
    order = generator(0, "evaluation", DRAWS["order"]).permutation(COUNT)
    return fidelity(made[order], real, weights, isc=True, fid=True, kid=True, prc=True)


def test_the_random_network_tells_images_apart(evaluated: Path) -> None:
    """Or every comparison below would hold for nothing."""
    for network, kinds in (("inception", ("pool", "spatial", "logits")), ("dinov2", ("pool",))):
        for kind in kinds:
            features = stored(evaluated, network, "samples", kind)
            assert features.std(0).mean() > 0.05
    found = scores(evaluated)
    assert 0 < found["precision"] < 1
    assert 0 < found["recall"] < 1
    assert found["IS"] > 1.05


def test_inception_scores_equal_torch_fidelitys(evaluated: Path, theirs: dict[str, float]) -> None:
    found = scores(evaluated)
    assert found["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert found["IS deviation"] == pytest.approx(theirs["inception_score_std"], rel=1e-5)
    assert found["precision"] == pytest.approx(theirs["precision"], abs=1e-6)  # a share, in float32
    assert found["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    kid = found[f"KID (subsets of {COUNT})"]
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)  # a difference of float32 kernels


def test_the_frechet_distance_is_exact_where_torch_fidelitys_is_rounded(
    evaluated: Path, theirs: dict[str, float]
) -> None:
    """2,048 numbers of 21 images: two thousand roots of what rounding leaves of an eigenvalue zero."""
    found = scores(evaluated)[f"Frechet distance (N={COUNT})"]
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert found == pytest.approx(
        exact(*(stored(evaluated, "inception", s, "pool") for s in ("samples", "real"))), rel=1e-11
    )


def test_the_frechet_distance_of_as_many_images_as_numbers_equals_torch_fidelitys(
    weights: Path, made: np.ndarray, real: np.ndarray, tmp_path: Path
) -> None:
    """With all but 18 of the 2,048 pooled channels silent the covariance is full, and both are accurate."""
    state = torch.load(weights, weights_only=True)
    place = 0
    for branch in ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool"):
        scale, shift = (state[f"Mixed_7c.{branch}.bn.{name}"] for name in ("weight", "bias"))
        heard = (torch.arange(place, place + len(scale)) % 114 == 0).float()
        scale *= heard
        shift *= heard
        place += len(scale)
    path = tmp_path / "narrow.pth"
    torch.save(state, path)
    network = open_network("inception", path, CPU)
    chunks = [[network(part)["pool"] for part in np.split(images, COUNT // BATCH)] for images in (made, real)]
    assert (np.concatenate(chunks[0]).std(0) > 0).sum() == 18
    found = feature_distances.frechet(*map(feature_distances.feature_moments, chunks))
    expected = fidelity(made, real, path, fid=True)["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_spatial_features_are_the_first_seven_channels_of_mixed_6_conv(
    weights: Path, made: np.ndarray, evaluated: Path
) -> None:
    """Block by block to `mixed_6/conv` of the original graph, which torch-fidelity names Mixed_6d.branch1x1; rows,
    columns, channels."""
    network = FeatureExtractorInceptionV3("inception", ["2048"], str(weights))
    x = torch.from_numpy(made[:4]).permute(0, 3, 1, 2).float()
    x = (interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False) - 128) / 128
    for name, block in network.named_children():
        if name == "Mixed_6d":
            break
        x = block(x)
    branch = network.Mixed_6d.branch1x1
    x = F.conv2d(x, branch.conv.weight[:7])
    scale = branch.bn.weight / (branch.bn.running_var + 1e-3).sqrt()
    x = F.relu((x - branch.bn.running_mean[:7, None, None]) * scale[:7, None, None] + branch.bn.bias[:7, None, None])
    found = stored(evaluated, "inception", "samples", "spatial")
    assert found.shape == (COUNT, 17 * 17 * 7)
    expected = [[x[n, c, i, j] for i in range(17) for j in range(17) for c in range(7)] for n in range(4)]
    np.testing.assert_allclose(found[:4], expected, rtol=1e-4, atol=1e-4)
    spatial = exact(*(stored(evaluated, "inception", side, "spatial") for side in ("samples", "real")))
    assert scores(evaluated)[f"Frechet distance (spatial, N={COUNT})"] == pytest.approx(spatial, rel=1e-11)


def test_logits_for_the_inception_score_are_without_bias(evaluated: Path, weights: Path) -> None:
    pool, logits = (stored(evaluated, "inception", "samples", kind) for kind in ("pool", "logits"))
    matrix = torch.load(weights, weights_only=True)["fc.weight"].numpy()
    np.testing.assert_allclose(logits, pool @ matrix.T, rtol=1e-3, atol=1e-3)


def test_grey_images_count_as_colour(weights: Path, made: np.ndarray) -> None:
    network = open_network("inception", weights, CPU)
    grey = made[:2, ..., :1]
    np.testing.assert_array_equal(network(grey)["pool"], network(np.repeat(grey, 3, axis=3))["pool"])


# ---------------------------------------------------------------------------------------------- DINOv2


def bicubic_matrix(large: int, small: int, scale: float) -> np.ndarray:
    """Keys' cubic (1981) with a = -3/4 at pixel centres, borders repeated: (small, large)."""
    matrix = np.zeros((small, large))
    for i in range(small):
        place = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            d = abs(place - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), large - 1)] += near if d <= 1 else far
    return matrix


def test_dinov2_features_are_transformers_own_with_positions_as_dinov2_shrinks_them(
    evaluated: Path, dinov2: Path, made: np.ndarray
) -> None:
    """DINOv2's own code gives `interpolate` the scale (16 + 0.1) / 37, not the sizes."""
    model = Dinov2Model.from_pretrained(dinov2, attn_implementation="eager").eval()
    table = model.embeddings.position_embeddings.detach().double().numpy()
    shrink = bicubic_matrix(37, 16, 16.1 / 37)
    patches = np.einsum("ia,abd,jb->ijd", shrink, table[0, 1:].reshape(37, 37, -1), shrink)
    small = np.concatenate([table[0, :1], patches.reshape(256, -1)])[None]
    model.embeddings.position_embeddings = nn.Parameter(torch.from_numpy(small).float())
    resized = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in made]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model((x - mean[:, None, None]) / deviation[:, None, None]).last_hidden_state[:, 0].numpy()
    found = stored(evaluated, "dinov2", "samples", "pool")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    distance = exact(found, stored(evaluated, "dinov2", "real", "pool"))
    assert scores(evaluated)[f"Frechet distance (DINOv2, N={COUNT})"] == pytest.approx(distance, rel=1e-10)


def test_a_config_that_names_kernels_elsewhere_changes_nothing(dinov2: Path, made: np.ndarray, tmp_path: Path) -> None:
    folder = changed(dinov2, tmp_path, _attn_implementation="someone/kernels", attn_implementation="someone/kernels")
    plain, named = (open_network("dinov2", path, CPU)(made[:2])["pool"] for path in (dinov2, folder))
    np.testing.assert_array_equal(plain, named)


# -------------------------------------------------------------------------------------------- mistakes


class Canary:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def changed(folder: Path, root: Path, **keys: Any) -> Path:
    """A copy of a DINOv2 folder with other values in its config."""
    copy = Path(shutil.copytree(folder, root / "changed"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **keys}))
    return copy


def refusal(name: str, weights: Path | None) -> str:
    with warnings.catch_warnings(action="error"), pytest.raises(UserError) as error:  # a warning is a line more
        open_network(name, weights, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_download_would_be_seen(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match=r"urllib\.Request"):
        torch.hub.load_state_dict_from_url(PUBLISHED, str(tmp_path))


def test_absent_weights_are_named_with_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub/checkpoints" / PUBLISHED.rpartition("/")[2]
    assert refusal("inception", None) == (
        f"no Inception weights at {cache}: get {PUBLISHED} and put it at {cache}, or give --weights FILE"
    )
    assert f"no Inception weights at {tmp_path / 'absent.pth'}" in refusal("inception", tmp_path / "absent.pth")
    assert "give --dinov2 FOLDER" in refusal("dinov2", None)
    assert "no config.json in" in refusal("dinov2", tmp_path)


def test_weights_where_torch_fidelity_keeps_them_are_found(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub/checkpoints" / PUBLISHED.rpartition("/")[2]
    cache.parent.mkdir(parents=True)
    cache.hardlink_to(weights)
    assert open_network("inception", None, CPU).identity == open_network("inception", weights, CPU).identity


@pytest.mark.parametrize("write", [torch.save, pickle.dump], ids=["torch", "pickle"])
def test_code_in_a_file_of_weights_never_runs(tmp_path: Path, weights: Path, write: Callable[..., None]) -> None:
    canary, path = tmp_path / "canary", tmp_path / "inception.pth"
    state = torch.load(weights, weights_only=True)
    for held in (Canary(canary), {**state, "fc.bias": Canary(canary)}, {**state, Canary(canary): state["fc.bias"]}):
        with path.open("wb") as file:
            write(held, file)
        assert "damaged, or holds more than tensors" in refusal("inception", path)
        shutil.copy(path, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
        assert "cannot read DINOv2" in refusal("dinov2", tmp_path)
        assert not canary.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert canary.exists()  # it does sing


def test_no_damage_to_a_file_of_weights_is_more_than_one_line(tmp_path: Path) -> None:
    path, draw = tmp_path / "small.pth", np.random.default_rng(0)
    for zipped in (True, False):
        torch.save({"a": torch.ones(3, 4), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for number in range(90):
            damaged = bytearray(whole if number % 3 else whole[: draw.integers(len(whole))] + b" ")
            for place in draw.integers(len(damaged), size=3):
                damaged[place] = draw.integers(256)
            path.write_bytes(damaged)
            refusal("inception", path)  # what is still readable is another network's


def test_weights_of_another_network_are_refused(weights: Path, dinov2: Path, tmp_path: Path) -> None:
    state, path = torch.load(weights, weights_only=True), tmp_path / "other.pth"
    others = [load_file(dinov2 / "model.safetensors"), {**state, "more": torch.ones(1)}, {1: torch.ones(1)}, {}]
    others += [{**state, "fc.weight": torch.ones(1000, 2048)}, {n: x for n, x in state.items() if n != "fc.bias"}]
    for other in others:
        torch.save(other, path)
        assert "does not hold the weights of torch-fidelity's Inception" in refusal("inception", path)
    for other in (state["fc.bias"], list(state.values()), {"state_dict": state}, None):
        torch.save(other, path)
        assert "holds more than tensors by name" in refusal("inception", path)


def test_weights_that_give_no_number_are_damaged(weights: Path, made: np.ndarray, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["Mixed_5b.branch1x1.conv.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="inception features are not finite"):
        open_network("inception", tmp_path / "nan.pth", CPU)(made[:1])


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "vit"},
        {"model_type": None},
        {"patch_size": 0},
        {"patch_size": 16},
        {"patch_size": [14, 14]},
        {"hidden_size": "wide"},
        {"hidden_size": 96},
        {"num_hidden_layers": 2, "out_features": ["stage2"], "out_indices": [2], "stage_names": ["stem"]},
        {"num_hidden_layers": 4},
        {"num_attention_heads": 0},
        {"image_size": [224, 448]},
        {"hidden_act": "nonsense"},
        {"dtype": "nonsense"},
    ],
    ids=str,
)
def test_a_dinov2_config_that_does_not_fit_its_weights_is_one_line(
    dinov2: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    assert "changed" in refusal("dinov2", changed(dinov2, tmp_path, **keys))


def test_dinov2_weights_that_do_not_fit_are_one_line(dinov2: Path, tmp_path: Path) -> None:
    state, whole = load_file(dinov2 / "model.safetensors"), (dinov2 / "model.safetensors").read_bytes()
    folder = changed(dinov2, tmp_path)
    path = folder / "model.safetensors"
    for damaged in (b"", b"hello", whole[:300], whole[:-9], b"{}" + whole):
        path.write_bytes(damaged)
        assert f"cannot read DINOv2 from {folder}" in refusal("dinov2", folder)
    lacking = {name: x for name, x in state.items() if name != "layernorm.weight"}
    registers = {**state, "embeddings.register_tokens": torch.ones(1, 4, 48)}
    for other, name in ((lacking, "layernorm.weight"), (registers, "embeddings.register_tokens")):
        save_file(other, path, metadata={"format": "pt"})
        assert f"differ in 1 weights, {name} first" in refusal("dinov2", folder)
    path.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert "no model.safetensors in" in refusal("dinov2", folder)
    for text in ("", "[]", "null", "{", "\0"):
        shutil.copy(dinov2 / "model.safetensors", path)
        (folder / "config.json").write_text(text)
        assert f"cannot read DINOv2 from {folder}" in refusal("dinov2", folder)


# ----------------------------------------------------------------------------------- the whole command

COMMAND = "import sys, conftest; from dit_in_dit.cli import main; main(sys.argv[1:])"


def start(given: list[str], code: str = COMMAND, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own, which could go out: nothing tells it to stay offline."""
    around = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    around |= {"PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.Popen([sys.executable, "-c", code, *given], env=around, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=200)
    return process.returncode, errors


def test_a_killed_evaluation_goes_on_in_two_processes_and_ends_with_the_same_json(
    folders: tuple[Path, Path], weights: Path, dinov2: Path, evaluated: Path, tmp_path: Path
) -> None:
    given = arguments(folders, weights, dinov2, tmp_path / "a")
    process = start(given)
    while not (made := list((tmp_path / "a/features").glob("inception-*-samples/*.npz"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert len(list((tmp_path / "a/features").glob("*/*.npz"))) < 4 * COUNT // BATCH
    times = {path: path.stat().st_mtime_ns for path in made}
    for process in [start(given, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]:
        code, errors = ended(process)
        assert code == 0, errors
    assert scores(tmp_path / "a") == pytest.approx(scores(evaluated), rel=1e-9, abs=1e-12)
    assert (tmp_path / "a/metrics.json").read_bytes() == (evaluated / "metrics.json").read_bytes()
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())  # not made again


def test_statistics_of_adms_layout_stand_in_for_the_real_images_and_samples_go_to_adms_evaluator(
    folders: tuple[Path, Path], weights: Path, dinov2: Path, evaluated: Path, made: np.ndarray, tmp_path: Path
) -> None:
    before = scores(evaluated)
    out = Path(shutil.copytree(evaluated, tmp_path / "a"))
    shifted = stored(evaluated, "inception", "real", "pool").astype(np.float64) + 0.5
    spatial = stored(evaluated, "inception", "real", "spatial").astype(np.float64)
    moments = {"mu": shifted.mean(0), "sigma": np.cov(shifted, rowvar=False)}
    moments |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(tmp_path / "reference.npz", **moments)
    main(arguments(folders, weights, dinov2, out, "--statistics", tmp_path / "reference.npz", "--npz"))
    found = scores(out)
    expected = exact(stored(evaluated, "inception", "samples", "pool"), shifted)
    assert found[f"Frechet distance (N={COUNT})"] == pytest.approx(expected, rel=1e-8)
    assert expected != pytest.approx(before[f"Frechet distance (N={COUNT})"], rel=0.1)
    rest = {name: value for name, value in before.items() if name != f"Frechet distance (N={COUNT})"}
    assert {name: found[name] for name in rest} == pytest.approx(rest, rel=1e-8)
    with np.load(out / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], made)


def test_a_mistake_is_one_line_and_exit_code_2(
    folders: tuple[Path, Path], weights: Path, dinov2: Path, tmp_path: Path
) -> None:
    """transformers would print a table of weights, torch-fidelity a traceback."""
    absent = "import sys; sys.modules[{!r}] = None; " + COMMAND
    torch.save(load_file(dinov2 / "model.safetensors"), tmp_path / "other.pth")
    wrong = changed(dinov2, tmp_path, num_hidden_layers=4)
    cases = [
        (tmp_path / "other.pth", dinov2, COMMAND, "does not hold the weights of torch-fidelity's Inception"),
        (weights, wrong, COMMAND, "differ in 18 weights"),
        (weights, dinov2, absent.format("torch_fidelity"), "torch-fidelity is missing: pip install 'dit-in-dit[eval]'"),
        (weights, dinov2, absent.format("transformers"), "transformers is missing: pip install 'dit-in-dit[eval]'"),
    ]
    processes = [start(arguments(folders, w, d, tmp_path / "a"), code) for w, d, code, _ in cases]
    for process, (*_, words) in zip(processes, cases, strict=True):
        code, errors = ended(process)
        assert code == 2, errors
        assert words in errors
        assert len(errors.strip().splitlines()) == 1, errors
    assert not (tmp_path / "a").exists()


def torchvision_fits() -> bool:
    command = [sys.executable, "-c", "import torchvision"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(torchvision_fits(), reason="this torchvision was made for this torch")
@pytest.mark.parametrize("network", ["inception", "dinov2"])
def test_a_torchvision_made_for_another_torch_is_one_line(
    network: str, folders: tuple[Path, Path], weights: Path, dinov2: Path, tmp_path: Path
) -> None:
    code = COMMAND.replace("conftest", "dit_in_dit")
    given = arguments(folders, weights, dinov2, tmp_path / "a")
    given[given.index("inception,dinov2")] = network
    status, errors = ended(start(given, code))
    assert status == 2, errors
    assert "install a torchvision that was made for this torch" in errors
    assert len(errors.strip().splitlines()) == 1, errors
