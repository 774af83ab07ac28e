"""
Make `field/losses.npz`: what the official AsymFlow and DeCo code computes for known tensors.

AsymFlow is LakonLab's `AsymJiT` (its forward pass around the network) with `GaussianFlow.loss` and `DiffusionMSELoss`;
DeCo is `REPATrainer` of `training_repa_DeCo.py` without an encoder's features (their loss is multiplied by 0). The code
is imported from checkouts, none of it is kept here:

    git clone https://github.com/Lakonik/LakonLab && git -C LakonLab checkout 84566d5fc477cdeb569d07f6cff155a59be3d705
    git clone https://github.com/Zehong-Ma/DeCo && git -C DeCo checkout 9e0a349ae4a552c4670edf2c9e779fb8aa864834
    python tests/golden/make_field_losses.py --checkouts .

Everything is stored, inputs too. Images are (4, 3, 16, 16) in [-1, 1], patches 4x4.

AsymFlow (t: noise at 1; velocity: noise - image; 48 numbers of a patch in the order (p q c), rows first, then columns,
then channels; rank 8):

- `asym/basis` (48, 8): orthonormal columns, the largest eight principal directions of the patches of `asym/image`, not
  centred, as `asymflow_subspace_pca_dit.py` computes them (in ascending order of eigenvalues).
- `asym/image`, `asym/noise`, `asym/x` (4, 3, 16, 16), `asym/t` (4,): x = (1 - t) image + t noise. t has values below
  both clamps.
- `asym/network` (4, 16, 48): output of the network, packed: patches in row-major order.
- For s in 1.0 and 0.8 (the buffer `scale_buffer`; 1.0 in the class-conditional configurations), under `asym/s1.0/` and
  `asym/s0.8/`: `input` (4, 3, 16, 16) and `time` (4,), what the network is called with; `train` and `eval`
  (4, 3, 16, 16), the velocity in both modes (sigma clamped at 1e-6 in training, at 0.04, the configuration's
  `sigma_min`, in sampling); `loss`, the scalar training loss from `train`; `losses` (4,), its terms by image. The loss
  multiplies predicted and true velocity by t / max(t, 0.05).

DeCo (t: noise at 0; velocity: image - noise):

- `deco/image`, `deco/noise`, `deco/x`, `deco/predicted` (4, 3, 16, 16), `deco/t` (4,): x = t image + (1 - t) noise.
- `deco/fm_loss`, `deco/fm_loss_freq`, `deco/loss`: mean squared error of the velocity, the frequency loss, and their
  sum with weight 1.
- `deco/weights` (3, 8, 8): weights of the coefficients of Y, Cb, Cr. `deco/dct` (4, 3, 2, 2, 8, 8): coefficients of
  the true velocity in YCbCr; blocks (row, column), then frequencies (vertical, horizontal).
- The same with the prefix `deco/odd/` for images of 12x20, which the official code reflects to multiples of 8 (`dct` is
  then (4, 3, 2, 3, 8, 8)).

`commit`: JSON, the commits.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from official_code import Stub, commit, module, package
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from field import FOLDER, draw, normal

TIMES = (0.01, 0.045, 0.4, 0.93)


class Network(nn.Module):
    """Stand-in of the official network: keeps what it is called with and returns a given output."""

    def __init__(self, patch_size: int, in_channels: int) -> None:
        super().__init__()
        self.patch_size, self.in_channels = patch_size, in_channels
        self.called: tuple[Tensor, Tensor] | None = None
        self.answer = torch.empty(0)

    def init_weights(self) -> None:
        pass

    def forward(self, x: Tensor, time: Tensor, class_labels=None, unpatchify_output: bool = True) -> Tensor:
        self.called = (x, time)
        return self.answer


def images(stream: np.random.Generator, *size: int) -> tuple[Tensor, Tensor]:
    """Unequal images in [-1, 1] and noise."""
    scale = torch.tensor([0.3, 0.5, 0.7, 0.9])[:, None, None, None]
    return (normal(stream, 4, 3, *size) * scale).clamp(-1, 1), normal(stream, 4, 3, *size)


def asymflow(root: Path) -> dict[str, Tensor]:
    """The official AsymFlow's velocity and loss."""
    top, stubs = "lakonlab", ("mmcv", "mmcv.runner", "mmcv.runner.fp16_utils", "lakonlab.runner", "lakonlab.utils")
    stubs += ("lakonlab.runner.checkpoint", "lakonlab.runner.timer", f"{top}.models.diffusions.schedulers")
    stubs += (f"{top}.models.builder", f"{top}.models.architectures.utils", "diffusers")
    folders = ("", ".models", ".models.architectures", ".models.architectures.asymflow", ".models.diffusions")
    folders += (".models.losses",)
    parts = [package(top + name, root.joinpath(top, *name.split(".")[1:])) for name in folders]
    parts += [Stub(f"{top}.models.architectures.lightningdit")]
    parts += [Stub(f"{top}.models.architectures.lightningdit.jit", _JiT=Network)]
    models = module(root, f"{top}.models.architectures.asymflow.asymjit", stubs, parts)
    flow = module(root, f"{top}.models.diffusions.gaussian_flow", stubs, parts).GaussianFlow(
        num_timesteps=1, sigma_min=0.05
    )
    losses = module(root, f"{top}.models.losses.diffusion_loss", stubs, parts)
    model = models.AsymJiT(patch_size=4, in_channels=3, base_rank=8, sigma_min=0.04)

    stream = draw(11)
    image, noise = images(stream, 16, 16)
    patches = model.pack(model.patchify(image, 4)).reshape(-1, 48).double()
    basis = torch.linalg.eigh(patches.T @ patches)[1][:, -8:].float()
    t = torch.tensor(TIMES)
    x = flow.sample_forward_diffusion(image, t, noise)[0]
    model.answer = normal(stream, 4, 16, 48)
    model.proj_buffer.copy_(basis)
    found = {"basis": basis, "image": image, "noise": noise, "x": x, "t": t, "network": model.answer}
    for s in (1.0, 0.8):
        model.scale_buffer.fill_(s)
        made = {mode: model.train(mode == "train")(x, t) for mode in ("eval", "train")}
        made["input"], made["time"] = model.called
        for name, reduction in (("loss", "mean"), ("losses", "none")):
            flow.flow_loss = losses.DiffusionMSELoss(
                rescale_cfg={"scale": 2.0}, reduction=reduction, data_info={"pred": "u_t_pred", "target": "u_t"}
            )
            made[name] = flow.loss(made["train"], image, noise, x, t)
        found |= {f"s{s}/{name}": value for name, value in made.items()}
    return {f"asym/{name}": value for name, value in found.items()}


class Predictor(nn.Module):
    """Stand-in of DeCo's network: returns a given velocity."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.blocks, self.answer = nn.ModuleList([nn.Identity()]), answer

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.blocks[0](torch.zeros(4, 1, 2))
        self.x, self.t = x, t
        return self.answer


def deco(root: Path) -> dict[str, Tensor]:
    """The official DeCo's losses."""
    stubs = ("timm", "timm.data", "torchvision", "torchvision.transforms", "torchvision.utils")
    trainers = module(root, "src.diffusion.flow_matching.training_repa_DeCo", stubs)
    schedule = module(root, "src.diffusion.flow_matching.scheduling", stubs).LinearScheduler()
    trainer = trainers.REPATrainer(
        schedule, feat_loss_weight=0.0, encoder=nn.Identity(), align_layer=1, proj_denoiser_dim=2, proj_encoder_dim=2
    )
    found = {"weights": trainer.freq_w.squeeze()}
    for prefix, key, size in (("", 12, (16, 16)), ("odd/", 13, (12, 20))):
        stream = draw(key)
        image, noise = images(stream, *size)
        network = Predictor(normal(stream, 4, 3, *size))
        time = torch.tensor([0.03, 0.35, 0.6, 0.98])
        drawn = SimpleNamespace(rand=lambda *_, time=time, **__: time, randn_like=lambda _, noise=noise: noise)
        trainers.torch = SimpleNamespace(**{**vars(torch), **vars(drawn)})  # its draws are ours
        metadata = {"raw_image": torch.ones(4, 1, 2)}
        made = trainer._impl_trainstep(network, None, None, image, torch.zeros(4, dtype=torch.long), metadata)
        made = {name: made[name] for name in ("fm_loss", "fm_loss_freq", "loss")}
        made |= {"image": image, "noise": noise, "x": network.x, "t": network.t, "predicted": network.answer}
        made["dct"] = trainer._dct(trainer._rgb2ycbcr(image - noise))
        found |= {prefix + name: value for name, value in made.items()}
    return {f"deco/{name}": value for name, value in found.items()}


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description="Make field/losses.npz from the official AsymFlow and DeCo code.")
    parser.add_argument("--checkouts", type=Path, required=True, help="folder with the checkouts LakonLab and DeCo")
    root = parser.parse_args().checkouts.resolve()
    torch.set_grad_enabled(False)
    found = asymflow(root / "LakonLab") | deco(root / "DeCo")
    record = {name: value.numpy() for name, value in found.items()}
    record["commit"] = np.asarray(json.dumps({name: commit(root / name) for name in ("LakonLab", "DeCo")}))
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "losses.npz", **record)
    print(f"losses.npz: {len(record)} arrays, {(FOLDER / 'losses.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
