"""Folders of diffusers' `DiTTransformer2DModel`: read as official weights and written from official weights, bit for
bit.

The model is the official DiT under other names, with separate queries, keys and values, and with a copy of the time and
class embeddings in every block. Two constants differ and cannot be moved into the weights. The last time frequency of
`diffusers` is 1/10000, which the official DiT would reach one frequency later (`model.time_embed=diffusers`). The norm
before the MLP adds 1e-5, whereas DiT adds 1e-6 (`model.mlp_norm_eps`; `norm_eps` in config.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.program import MOST_BLOCKS
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.data.vae import WEIGHTS
from dit_in_dit.interop.diffusers_files import PIPELINE_INDEX, read_diffusers_json, read_weights
from dit_in_dit.interop.field_names import POSITION, Weights
from dit_in_dit.interop.official import PATCHES, OfficialWeights, Predicted
from dit_in_dit.model.layers import sincos
from dit_in_dit.runs.safe_load import strip_wrappers

CONFIG = "config.json"
MOST_PATCHES = 256
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second until diffusers 0.29
FIXED = {  # values of a DiT, and the defaults of missing keys
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
PREDICTIONS: dict[str, Predicted] = {"epsilon": "noise", "sample": "image", "v_prediction": "velocity"}
SCHEDULERS = (  # with the defaults of their configs they have DiT's schedule
    *("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
    *("UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"),
)
SCHEDULE = {
    **{"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    **{"trained_betas": None, "rescale_betas_zero_snr": False, "timestep_type": "discrete"},
    **{"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False},
    **{"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None},
    **{"sigma_min": None, "sigma_max": None},
}
SAMPLING = (  # keys that only affect the choice of steps
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "final_sigmas_type"),
    *("lambda_min_clipped", "clip_sample", "clip_sample_range", "sample_max_value", "thresholding"),
    *("dynamic_thresholding_ratio", "algorithm_type", "solver_order", "solver_type", "solver_p", "lower_order_final"),
    *("euler_at_final", "predict_x0", "disable_corrector", "interpolation_type", "time_shift_type", "variance_type"),
)
UNSET = (None, False)

OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
EMBEDDINGS = {  # equal copies in every block
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
HEADS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # one matrix in the official DiT


# -------------------------------------------------------------------------------------------- read


def read_folder(folder: Path) -> tuple[OfficialWeights, dict[str, Any]]:
    """Weights under official names, and config.json, from a folder of the model or of a whole `DiTPipeline`.

    Raises:
        UserError: a file is missing or cannot be read, or the model is no DiT.
    """
    inside = folder / "transformer"
    model = inside if inside.is_dir() else folder
    config = read_diffusers_json(model / CONFIG)
    what = model.name
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
    if size > MOST_PATCHES * patch:  # the size of the file says nothing: it has no table
        raise UserError(f"{model / CONFIG}: at most {MOST_PATCHES} patches a side are known: got {size // patch}")
    weights = dict(_official(strip_wrappers(read_weights(model), what), depth, what))
    width = next(iter(weights[PATCHES].shape), 0)
    if width != heads * _whole(config, "attention_head_dim", 72, model) or size % patch or width % 4:
        raise UserError(f"{model / CONFIG} does not fit its weights of width {width}: get the folder again")
    fixed = sincos(width, size // patch, size // patch)[None]
    weights[POSITION] = fixed.to(weights[PATCHES].dtype)
    scheduler = model.parent / "scheduler" / "scheduler_config.json"
    piped = inside.is_dir() or (model.parent / PIPELINE_INDEX).exists()  # a model without a scheduler predicts noise
    predict = _predicts(scheduler) if piped else "noise"
    unlabelled = config.get("num_embeds_ada_norm") is None
    classes = None if unlabelled else _whole(config, "num_embeds_ada_norm", 1000, model)
    eps = config.get("norm_eps", 1e-5)
    if not isinstance(eps, float) or not 0 < eps <= 1:
        raise UserError(f"{model / CONFIG}: norm_eps must be a number from 0 to 1: got {str(eps)[:40]!r}")
    official = OfficialWeights(
        weights, weights, heads=heads, clock="diffusers", predict=predict, eps=eps, classes=classes
    )
    return official, config


def _whole(config: dict[str, Any], name: str, default: int, model: Path) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or not 1 <= value <= 65536:
        raise UserError(f"{model / CONFIG}: {name} must be a whole number from 1 to 65536: got {str(value)[:40]!r}")
    return value


def _predicts(path: Path) -> Predicted:
    """The prediction type of a pipeline's scheduler.

    The keys for the noise levels and times of training must be DiT's. The keys for sampling are ignored: a run has its
    own `sample`.

    Raises:
        UserError: the scheduler or one of its keys is unknown or not DiT's.
    """
    config = read_diffusers_json(path)
    if (name := str(config.get("_class_name"))) not in SCHEDULERS:
        raise UserError(
            f"{path} is of {name[:40]!r}, which is not known to have DiT's schedule{did_you_mean(name, SCHEDULERS)}"
        )
    for key, value in config.items():
        shown = truncate(value, 40)
        if key in SCHEDULE and value != SCHEDULE[key]:
            raise UserError(f"{path}: DiT's schedule has {key}={SCHEDULE[key]}: got {shown}")
        if key not in (*SCHEDULE, *SAMPLING, "prediction_type") and not key.startswith("_") and value not in UNSET:
            raise UserError(
                f"{path}: the key {truncate(key, 40)}={shown} is not known: give a scheduler with DiT's schedule"
            )
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise UserError(f"{path}: prediction_type must be one of {', '.join(PREDICTIONS)}: got {str(kind)[:40]!r}")
    return PREDICTIONS[kind]


def _official(weights: Weights, depth: int, what: str) -> Iterator[tuple[str, Tensor]]:
    """Weights of a `diffusers` folder under official names, unordered; UserError if a weight is missing or unknown."""
    left = dict(weights)

    def take(name: str) -> Tensor:
        if name not in left:
            raise UserError(f"{what} holds no weights of a DiT: there is no {name}")
        return left.pop(name)

    for official, name in OUTSIDE.items():
        for part in ("weight", "bias"):
            yield f"{official}.{part}", take(f"{name}.{part}")
    for official, name in EMBEDDINGS.items():
        copies = [take(f"transformer_blocks.{i}.norm1.emb.{name}") for i in range(depth)]
        if not all(copy.dtype == copies[0].dtype and torch.equal(copy, copies[0]) for copy in copies):
            raise UserError(f"{what}: {name} must be the same in every block: it differs; give weights of a DiT")
        yield official, copies[0]
    for i in range(depth):
        for part in ("weight", "bias"):
            apart = [take(f"transformer_blocks.{i}.{name}.{part}") for name in HEADS]
            if len({(tensor.shape, tensor.dtype) for tensor in apart}) > 1 or not apart[0].ndim:
                raise UserError(f"{what}: queries, keys and values of block {i} differ in shape: get the folder again")
            yield f"blocks.{i}.attn.qkv.{part}", torch.cat(apart)
            for official, name in BLOCK.items():
                yield f"blocks.{i}.{official}.{part}", take(f"transformer_blocks.{i}.{name}.{part}")
    if left:
        raise UserError(f"{what}: {CLASSES[0]} of {depth} blocks has no {min(left)[:60]!r}; get the folder again")


# ------------------------------------------------------------------------------------------- write


def to_diffusers(weights: Weights, depth: int) -> dict[str, Tensor]:
    """Official weights under the names of `diffusers`, without the position table, which `diffusers` computes."""
    renamed = {f"{b}.{part}": weights[f"{a}.{part}"] for a, b in OUTSIDE.items() for part in ("weight", "bias")}
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        # Copies: safetensors refuses shared memory.
        renamed |= {f"{block}norm1.emb.{b}": weights[a].clone() for a, b in EMBEDDINGS.items()}
        for part in ("weight", "bias"):
            apart = weights[f"blocks.{i}.attn.qkv.{part}"].chunk(3)
            renamed |= {f"{block}{name}.{part}": tensor.clone() for name, tensor in zip(HEADS, apart, strict=True)}
            renamed |= {f"{block}{b}.{part}": weights[f"blocks.{i}.{a}.{part}"] for a, b in BLOCK.items()}
    return renamed


def config_of(model: ModelConfig) -> dict[str, Any]:
    """config.json of a `DiTTransformer2DModel` with the model's sizes."""
    return {
        "_class_name": CLASSES[0],
        **FIXED,
        "attention_head_dim": model.outer.width // model.outer.num_heads,
        "dropout": 0.0,
        "in_channels": model.channels,
        "norm_eps": model.mlp_norm_eps,
        "norm_num_groups": 32,
        "num_attention_heads": model.outer.num_heads,
        "num_embeds_ada_norm": model.num_classes,
        "num_layers": model.blocks("outer"),
        "out_channels": model.out_channels,
        "patch_size": model.patch_size,
        "sample_size": model.image_size[0],
        "upcast_attention": False,
    }


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write config.json and the weights into an empty folder."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
