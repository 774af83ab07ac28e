"""Folders of diffusers' `DiTTransformer2DModel`, read as official weights and written from them, bit for bit.

It is the official DiT under other names, with queries, keys and values apart and the embeddings of time and class once
in every block. Two of its numbers differ, and neither can be moved into the weights: its sinusoids of time fall to
1/10000 at the last frequency instead of one beyond it (`model.time_embed=diffusers`), and the norm before the MLP adds
1e-5 where DiT adds 1e-6 (`model.mlp_norm_eps`; `norm_eps` of config.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dit_in_dit.config import ModelConfig
from dit_in_dit.interop.foreign import read_pt, read_safetensors
from dit_in_dit.interop.official import PATCHES, POSITION, Found, Predicted, Weights
from dit_in_dit.mistakes import UserError
from dit_in_dit.model.layers import sincos
from dit_in_dit.stages import MOST_BLOCKS

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
MOST_PATCHES = 256
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second until diffusers 0.29
FIXED = {  # what a DiT has; a config without the key has it too
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
PREDICTIONS: dict[str, Predicted] = {"epsilon": "noise", "sample": "image", "v_prediction": "velocity"}
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}

OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
EMBEDDINGS = {  # the same in every block
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
HEADS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # official: one matrix


# -------------------------------------------------------------------------------------------- read


def read_folder(folder: Path) -> tuple[Found, dict[str, Any]]:
    """A folder with config.json and weights, or one of a whole `DiTPipeline`, as official weights; and its config.

    Raises:
        UserError: a file is missing or cannot be read, or it is another model than a DiT.
    """
    inside = folder / "transformer"
    model = inside if inside.is_dir() else folder
    config = _json(model / CONFIG)
    what = str(model.name)
    if config.get("_class_name") not in CLASSES:
        raise UserError(f"{model / CONFIG} is of {str(config.get('_class_name'))[:40]!r}: known is {CLASSES[0]}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{model / CONFIG}: a DiT has {name}={value}: got {str(config[name])[:40]!r}")
    heads, depth, size, patch = (
        _whole(config, name, default, model)
        for name, default in (("num_attention_heads", 16), ("num_layers", 28), ("sample_size", 32), ("patch_size", 2))
    )
    if depth > MOST_BLOCKS:
        raise UserError(f"{model / CONFIG}: at most {MOST_BLOCKS} blocks are known: got {depth}")
    if size > MOST_PATCHES * patch:  # the table of positions is not in the file, whose size would tell
        raise UserError(f"{model / CONFIG}: at most {MOST_PATCHES} patches a side are known: got {size // patch}")
    weights = dict(_official(_read_weights(model), depth, what))
    width = next(iter(weights[PATCHES].shape), 0)
    if width != heads * _whole(config, "attention_head_dim", 72, model) or size % patch or width % 4:
        raise UserError(f"{model / CONFIG} does not fit its weights of width {width}: get the folder again")
    fixed = sincos(width, size // patch, size // patch)[None]
    weights[POSITION] = fixed.to(weights[PATCHES].dtype)
    predict = _predicts(folder / "scheduler" / "scheduler_config.json")
    eps = config.get("norm_eps", 1e-5)
    if not isinstance(eps, float) or not 0 < eps <= 1:
        raise UserError(f"{model / CONFIG}: norm_eps must be a number from 0 to 1: got {str(eps)[:40]!r}")
    return Found(weights, weights, heads=heads, clock="diffusers", predict=predict, eps=eps), config


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise UserError(f"cannot read {path}: {reason}; give a folder of diffusers' {CLASSES[0]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold names and values: give a folder of diffusers' {CLASSES[0]}")
    return found


def _whole(config: dict[str, Any], name: str, default: int, model: Path) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or not 1 <= value <= 65536:
        raise UserError(f"{model / CONFIG}: {name} must be a whole number from 1 to 65536: got {str(value)[:40]!r}")
    return value


def _predicts(scheduler: Path) -> Predicted:
    """What a pipeline's scheduler takes the output for; without one, noise."""
    if not scheduler.exists():
        return "noise"
    config = _json(scheduler)
    for name, value in SCHEDULE.items():
        if config.get(name, value) != value:
            raise UserError(f"{scheduler}: DiT's schedule has {name}={value}: got {str(config[name])[:40]!r}")
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise UserError(f"{scheduler}: prediction_type must be one of {', '.join(PREDICTIONS)}: got {str(kind)[:40]!r}")
    return PREDICTIONS[kind]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors, of one file or of several with an index."""
    whole, pickled = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.exists():
        files = _json(index).get("weight_map")
        listed = {str(name) for name in files.values()} if isinstance(files, dict) else set()
        if not listed or any(Path(name).name != name or not name.endswith(".safetensors") for name in listed):
            raise UserError(f"{index} must name .safetensors files beside it: get the folder again")
        return {name: value for file in sorted(listed) for name, value in read_safetensors(folder / file).items()}
    if not whole.exists() and pickled.exists():
        found = read_pt(pickled)
        if wrong := [name for name, value in found.items() if not isinstance(value, Tensor)]:
            raise UserError(f"{pickled} holds no weights of a DiT: {wrong[0][:40]!r} is no tensor")
        return found
    return read_safetensors(whole)


def _official(weights: Weights, depth: int, what: str) -> Iterator[tuple[str, Tensor]]:
    """Weights of diffusers under official names, in no order; UserError where one is missing or has no place."""
    left = dict(weights)

    def take(name: str) -> Tensor:
        if name not in left:
            raise UserError(f"{what} holds no weights of a DiT: there is no {name}")
        return left.pop(name)

    for ours, theirs in OUTSIDE.items():
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", take(f"{theirs}.{part}")
    for ours, theirs in EMBEDDINGS.items():
        copies = [take(f"transformer_blocks.{i}.norm1.emb.{theirs}") for i in range(depth)]
        if not all(_equal(copies[0], copy) for copy in copies[1:]):
            raise UserError(f"{what}: {theirs} is not the same in every block: it was trained apart, and is no DiT")
        yield ours, copies[0]
    for i in range(depth):
        for part in ("weight", "bias"):
            apart = [take(f"transformer_blocks.{i}.{name}.{part}") for name in HEADS]
            if len({(tensor.shape, tensor.dtype) for tensor in apart}) > 1 or not apart[0].ndim:
                raise UserError(f"{what}: queries, keys and values of block {i} differ in shape: get the folder again")
            yield f"blocks.{i}.attn.qkv.{part}", torch.cat(apart)
            for ours, theirs in BLOCK.items():
                yield f"blocks.{i}.{ours}.{part}", take(f"transformer_blocks.{i}.{theirs}.{part}")
    if left:
        raise UserError(f"{what}: {CLASSES[0]} of {depth} blocks has no {min(left)[:60]!r}; get the folder again")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# ------------------------------------------------------------------------------------------- write


def to_diffusers(weights: Weights, depth: int) -> dict[str, Tensor]:
    """Official weights under the names of diffusers; the position is left out, as diffusers makes its own."""
    found = {f"{b}.{part}": weights[f"{a}.{part}"] for a, b in OUTSIDE.items() for part in ("weight", "bias")}
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        # Copies: a file of safetensors holds every tensor for itself.
        found |= {f"{block}norm1.emb.{b}": weights[a].clone() for a, b in EMBEDDINGS.items()}
        for part in ("weight", "bias"):
            apart = weights[f"blocks.{i}.attn.qkv.{part}"].chunk(3)
            found |= {f"{block}{name}.{part}": tensor.clone() for name, tensor in zip(HEADS, apart, strict=True)}
            found |= {f"{block}{b}.{part}": weights[f"blocks.{i}.{a}.{part}"] for a, b in BLOCK.items()}
    return found


def config_of(model: ModelConfig) -> dict[str, Any]:
    """config.json of a `DiTTransformer2DModel` of the model's size."""
    return {
        "_class_name": CLASSES[0],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": model.outer.width // model.outer.num_heads,
        "dropout": 0.0,
        "in_channels": model.channels,
        "norm_elementwise_affine": False,
        "norm_eps": model.mlp_norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": model.outer.num_heads,
        "num_embeds_ada_norm": model.num_classes,
        "num_layers": model.blocks("outer"),
        "out_channels": model.out_channels,
        "patch_size": model.patch_size,
        "sample_size": model.image_size[0],
        "upcast_attention": False,
    }


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """config.json and the weights, into an empty folder."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
