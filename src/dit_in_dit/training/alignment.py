"""Loss terms that align tokens of the trained model with a representation: SRA and REPA."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.dinov2 import about_dinov2, dinov2_sha256, patch_features, read_dinov2
from dit_in_dit.data.features import features_sha256, has_features, read_features_index
from dit_in_dit.inspection.cost import FORWARDS_PER_STEP, macs_through
from dit_in_dit.runtime.philox import uniform
from dit_in_dit.training.term import Pass, Term, at_least_float32, module_output

LEAST_GRID = 16  # patches on a side of the encoder's image: DINOv2's 224 pixels, as in the official code of REPA
SMOOTH_L1 = 0.05  # beta of the smooth L1 distance in the official code of SRA


class Sra(Term):
    """Self-alignment: tokens of an outer block of the trained model, through an MLP, take after those of a deeper outer
    block of the averaged model at less noise (Jiang et al. 2025, arXiv 2505.02831, section 3).

    The averaged model sees the same image, noise and class at the time t - k, with k uniform in [0, sra_gap]. It sees
    all patches; those that the block of the trained model sees are compared.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config, self.gap, self.patches = config, config.train.terms.sra_gap, config.model.patches
        self.distance = config.train.terms.sra_distance
        self.block, last = sra_blocks(config)
        self.student, self.teacher = f"outer_blocks.{self.block}", f"outer_blocks.{last}"
        width = config.model.outer.width
        self.projector = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def reads(self) -> tuple[str, ...]:
        return self.student, self.teacher

    def forward(self, given: Pass) -> Tensor:
        with torch.no_grad():
            drawn = uniform(self.config.seed, "terms", given.example).to(given.t.dtype)
            t = given.objective.path.snap((given.t - self.gap * drawn).clamp(0, 1))
            x_t = given.objective.noisy(given.x, given.noise, t)
            # A sharded model must not be left in the middle of its forward pass.
            told = {} if given.labels is None else {"augment": given.labels}
            target = module_output(given.averaged, self.teacher, x_t, t, given.y, stop=not given.sharded, **told)
        target = given.seen(self.block, target[:, -self.patches :])  # without tokens of time and class
        tokens = self.projector(given.outputs[self.student][:, -target.shape[1] :])
        return distance(self.distance, tokens, target)

    @classmethod
    def macs(cls, config: RunConfig) -> int:
        model, (first, last) = config.model, sra_blocks(config)
        return FORWARDS_PER_STEP * 4 * _patches(config, first) * model.outer.width**2 + macs_through(model, last)


class Repa(Term):
    """Alignment with DINOv2: tokens of an outer block, through an MLP, take after the features that the frozen encoder
    has of the clean image at the same place (Yu et al. 2025, arXiv 2410.06940, equation 8). For latents,
    `encode --features` has stored these features."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model, terms = config.model, config.train.terms
        self.folder, self.stored = _place_of_features(config), has_features(config)
        self.block = repa_block(config)
        self.student = f"outer_blocks.{self.block}"
        hidden, (width, grid) = terms.repa_width, _features_shape(config)
        self.pooled = grid // model.grid[0]  # patches of the encoder on a side of an outer token
        widths = (model.outer.width, hidden, hidden, width)
        first, second, last = (nn.Linear(a, b) for a, b in pairwise(widths))
        self.projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        if self.stored:
            return
        self.side = grid * about_dinov2(self.folder)["patch_size"]  # pixels
        with torch.random.fork_rng(devices=[]):
            encoder = read_dinov2(self.folder, self.side).eval().requires_grad_(False)
        self.frozen = (encoder,)  # a tuple: its weights are neither trained nor saved

    def reads(self) -> tuple[str, ...]:
        return (self.student,)

    def reference_sha256(self) -> str:
        return features_sha256(self.folder) if self.stored else dinov2_sha256(self.folder)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features of clean images (N, C, H, W) in [-1, 1], one for each outer token (N, T, F)."""
        (encoder,) = self.frozen
        if next(encoder.parameters()).device != x.device:
            encoder.to(x.device)
        return self._pool(patch_features(encoder, x, self.side))

    def _pool(self, grid: Tensor) -> Tensor:
        return F.avg_pool2d(grid, self.pooled).flatten(2).mT  # N F g g -> N T F

    def forward(self, given: Pass) -> Tensor:
        if self.stored:
            assert given.features is not None
            target = self._pool(at_least_float32(given.features))
        else:
            target = self.features(given.x)
        target = given.seen(self.block, target)
        tokens = self.projector(given.outputs[self.student][:, -target.shape[1] :])  # without tokens of time and class
        return distance("cosine", tokens, target) - 1  # the official code's -cosine

    @classmethod
    def macs(cls, config: RunConfig) -> int:
        model, hidden, (width, grid) = config.model, config.train.terms.repa_width, _features_shape(config)
        patches = _patches(config, repa_block(config))
        projector = FORWARDS_PER_STEP * patches * hidden * (model.outer.width + hidden + width)
        if has_features(config):
            return projector
        about = about_dinov2(_place_of_features(config))
        layers, tokens = about["num_hidden_layers"], 1 + grid**2
        encoder = layers * tokens * width * ((4 + 2 * about.get("mlp_ratio", 4)) * width + 2 * tokens)
        encoder += (tokens - 1) * width * 3 * about["patch_size"] ** 2
        return projector + int(encoder)


def _place_of_features(config: RunConfig) -> Path:
    """Folder of the encoder's files, or of the latents with features; UserError if there is neither, or they do not fit
    the run."""
    model, name = config.model, config.train.terms.repa_encoder
    if model.grid[0] != model.grid[1]:
        raise UserError(f"train.terms.repa needs as many rows as columns of patches: got {list(model.grid)}; use sra")
    if has_features(config):
        if name is not None:
            raise UserError("train.terms.repa_encoder must be null: the features beside the latents are used")
        return Path(config.data.source)
    if config.data.vae is not None or model.channels not in (1, 3):
        raise UserError(
            "train.terms.repa needs features beside the latents: run the same `dit-in-dit encode` with --features"
        )
    if name is None:
        raise UserError("train.terms.repa needs train.terms.repa_encoder, a folder with the files of a DINOv2: set it")
    return Path(name)


def _features_shape(config: RunConfig) -> tuple[int, int]:
    """Width of the features, and the patches of the encoder on a side of the image."""
    folder, rows = _place_of_features(config), config.model.grid[0]
    if not has_features(config):
        return about_dinov2(folder)["hidden_size"], rows * -(-LEAST_GRID // rows)
    width, grid, _ = read_features_index(folder)["made"]["shape"]
    if grid % rows:
        fitting = rows * -(-LEAST_GRID // rows)
        raise UserError(
            f"train.terms.repa: {rows}x{rows} outer tokens must divide the features' grid, {grid}x{grid}: encode with "
            f"--features-grid {fitting}"
        )
    return width, grid


def feature_bytes(config: RunConfig) -> int:
    """Bytes of an image's stored features; 0 if the encoder computes them."""
    if not has_features(config):
        return 0
    width, grid = _features_shape(config)
    return 2 * width * grid**2


def sra_blocks(config: RunConfig) -> tuple[int, int]:
    """Numbers of the outer blocks of the trained and of the averaged model that are compared; by default at 2/7 and 5/7
    of the depth, blocks 8 and 20 of 28 in the official code. UserError if a block does not exist."""
    first, second = config.train.terms.sra_blocks or (None, None)
    return _block(config, "sra_blocks", first, 2), _block(config, "sra_blocks", second, 5)


def repa_block(config: RunConfig) -> int:
    """Number of the outer block that REPA aligns; by default at 2/7 of the depth. UserError if it does not exist."""
    return _block(config, "repa_block", config.train.terms.repa_block, 2)


def _patches(config: RunConfig, block: int) -> int:
    """Patches that an outer block sees in training."""
    drop = config.token_drop
    return drop.kept if drop is not None and block in drop else config.model.patches


def _block(config: RunConfig, key: str, number: int | None, sevenths: int) -> int:
    """The outer block `number`, or the one at so many sevenths of the depth; UserError if there is none."""
    depth = config.model.blocks("outer")
    if number is not None and number >= depth:
        raise UserError(f"train.terms.{key} must be at most {depth - 1}, the last outer block: got {number}")
    return -(-sevenths * depth // 7) - 1 if number is None else number


def distance(kind: str, tokens: Tensor, target: Tensor) -> Tensor:
    """Distance of tokens (N, T, D) per example (N,): `smooth_l1`, mean over all numbers, or `cosine`, 1 - cosine of
    two tokens."""
    tokens, target = at_least_float32(tokens), at_least_float32(target)
    if kind == "cosine":
        return 1 - F.cosine_similarity(tokens, target, dim=-1).mean(1)
    return F.smooth_l1_loss(tokens, target, beta=SMOOTH_L1, reduction="none").flatten(1).mean(1)
