"""Names of weights in the official code of each model, and in ours; conversion in both directions, bit for bit.

A table has an entry per module or tensor, in the order of the official state dict: `official: ours`. `*` is the number
of a block; `+` is the same number, counted on from the outer blocks. Several official names are parts of one matrix of
ours, first part first. After our name, `conv` marks the weight of a strided convolution, `one` that of a 1x1
convolution, `lead` a leading axis of length 1, and `rows` rows in the order (channel, row, column), which are ours in
the order (row, column, channel). Instead of our name, `=` marks a table that is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dit_in_dit.config.model import ModelConfig
from dit_in_dit.model.layers import sincos
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.rope import GridRope, places

Table = dict[str, str]
Weights = Mapping[str, Tensor]
OfficialKind = Literal[
    "dit", "sit", "repa", "lightningdit", "jit", "ddt", "deco", "pixnerd", "pixeldit", "pixeldit_post", "rae", "raev2",
    "mpdit",
]  # fmt: skip
POSITION = "pos_embed"


def _blocks(official: str, level: str, parts: Table) -> Table:
    return {" ".join(f"{official}.{name}" for name in a.split()): f"{level}_blocks.*.{b}" for a, b in parts.items()}


_TIME = {"t_embedder.mlp.0": "time_embed.mlp.0", "t_embedder.mlp.2": "time_embed.mlp.2"}
_CONDITION = _TIME | {"y_embedder.embedding_table": "label_embed.table"}
_EMBED = {"x_embedder.proj": "outer_embed.proj conv"}
_POSITION = {POSITION: "=position outer"}
_ATTENTION = {"attn.qkv": "branches.mix.qkv", "attn.proj": "branches.mix.proj"}
_QK = {"attn.q_norm.weight": "branches.mix.qk_norm.query", "attn.k_norm.weight": "branches.mix.qk_norm.key"}
_MLP = {"mlp.fc1": "branches.mlp.0", "mlp.fc2": "branches.mlp.2"}
_MODULATION = {"adaLN_modulation.1": "modulation.linear"}
_NORM_1, _NORM_2 = {"norm1": "norm_mix"}, {"norm2": "norm_mlp"}
_SWIGLU = {"mlp.w12": "branches.mlp.up", "mlp.w3": "branches.mlp.down"}


def _head(level: str, norm: str = "", modulation: str = "", how: str = "") -> Table:
    head = f"{level}_head.final."
    table = {f"final_layer.{norm}": f"{head}norm"} if norm else {}
    table["final_layer.linear"] = f"{head}linear{how}"
    return table | ({f"final_layer.{modulation}": f"{head}modulation.linear"} if modulation else {})


# DiT, SiT and REPA, whose projectors are no part of the model.
_DIT = _ATTENTION | _MLP | _MODULATION
_PLAIN = _POSITION | _EMBED | _CONDITION | _blocks("blocks.*", "outer", _DIT) | _head("outer", "", "adaLN_modulation.1")

# Blocks of LightningDiT and RAE, and of JiT.
_MODERN = _NORM_1 | _NORM_2 | {"attn.qkv": "branches.mix.qkv"} | _QK | _ATTENTION | _SWIGLU | _MODULATION
_JIT = _NORM_1 | _QK | _ATTENTION | _NORM_2 | _SWIGLU | _MODULATION
_MODERN_HEAD = ("norm_final", "adaLN_modulation.1")

# Blocks of DDT, DeCo, PixNerd and PixelDiT.
_BARE_MLP = {"mlp.w1 mlp.w3": "branches.mlp.up", "mlp.w2": "branches.mlp.down"}
_BARE = _NORM_1 | {"attn.qkv": "branches.mix.qkv"} | _QK | _ATTENTION | _NORM_2 | _BARE_MLP
_BARE |= {"adaLN_modulation.0": "modulation.linear"}
_RES = {"in_ln": "norm_mlp", "mlp.0": "branches.mlp.0", "mlp.2": "branches.mlp.2"} | _MODULATION
_HYPER = {"param_generator1.0": "branches.mlp.weights", "norm": "norm_mlp"}
_COMPACT = {"compress_to_attn": "branches.mix.compress", "expand_from_attn": "branches.mix.expand"} | _NORM_1
_COMPACT |= {
    name: ours.replace("mix.", "mix.attention.")
    for name, ours in ({"attn.qkv": "branches.mix.qkv"} | _QK | _ATTENTION).items()
}
_COMPACT |= _NORM_2 | _MLP | {"adaLN_modulation.0": "modulation.linear"}
_BARE_EMBED = {"s_embedder.proj": "outer_embed.proj"} | _CONDITION
_DCT_EMBED = {"x_embedder.embedder.0": "inner_embed.embed.proj"} | _BARE_EMBED
_PIXELDIT = {"pixel_embedder.proj": "inner_embed.embed.1"} | _BARE_EMBED | _head("inner", "norm")
_PIXELDIT |= _blocks("patch_blocks.*", "outer", _BARE) | _blocks("pixel_blocks.*", "inner", _COMPACT)

_RAE_EMBED = {"x_embedder.proj": "inner_embed.embed.1 conv"}, {"s_embedder.proj": "outer_embed.proj conv"}
_RAE_ROWS = {"s_projector": "conditions.0.proj", "t_embedder.W": "time_embed.frequencies"}
_APART = {"attn.q attn.k attn.v": "branches.mix.qkv", "attn.proj": "branches.mix.proj"}
_RAEV2_MLP = {"mlp.w1 mlp.w2": "branches.mlp.up", "mlp.w3": "branches.mlp.down"}
_RAEV2 = _NORM_1 | _NORM_2 | _APART | _QK | _RAEV2_MLP | {"adaln_modulation.1": "modulation.linear"}
_RAEV2_TOKENS = {"t_embedder.learnable_tokens": "tokens.time_offsets"} | _TIME
_RAEV2_TOKENS |= {"ctx_embedder.learnable_tokens": "tokens.label_offsets"}
_MPDIT = _ATTENTION | _MLP


def _angles(name: str, level: str) -> Table:
    return {f"{name}.freqs_{wave}": f"={wave} {level}" for wave in ("cos", "sin")}


TABLES: dict[OfficialKind, Table] = {
    "dit": _PLAIN,
    "sit": _PLAIN,
    "repa": _PLAIN,
    "lightningdit": _POSITION
    | _EMBED
    | _CONDITION
    | _angles("feat_rope", "outer")
    | _blocks("blocks.*", "outer", _MODERN)
    | _head("outer", *_MODERN_HEAD),
    "jit": _POSITION
    | {"in_context_posemb": "tokens.label_offsets lead"}
    | _CONDITION
    | {"x_embedder.proj1": "outer_embed.bottleneck conv", "x_embedder.proj2": "outer_embed.proj one"}
    | _blocks("blocks.*", "outer", _JIT)
    | _head("outer", *_MODERN_HEAD),
    "ddt": {"x_embedder.proj": "inner_embed.embed.1"}
    | _BARE_EMBED
    | _head("inner", "", "adaLN_modulation.0", " rows")
    | _blocks("blocks.*", "outer", _BARE)
    | _blocks("blocks.+", "inner", _BARE),
    "deco": _DCT_EMBED
    | _blocks("blocks.*", "outer", _BARE)
    | {"dec_net.cond_embed": "conditions.0.proj", "dec_net.input_proj": "inner_embed.second"}
    | _blocks("dec_net.res_blocks.*", "inner", _RES)
    | {"dec_net.final_layer.linear": "inner_head.final.linear"},
    "pixnerd": _DCT_EMBED
    | _head("inner", "norm")
    | _blocks("blocks.*", "outer", _BARE)
    | _blocks("blocks.+", "inner", _HYPER),
    "pixeldit": _PIXELDIT,
    "pixeldit_post": _PIXELDIT,
    "rae": _POSITION
    | _RAE_EMBED[0]
    | _RAE_EMBED[1]
    | _RAE_ROWS
    | _CONDITION
    | _head("inner", *_MODERN_HEAD)
    | _angles("enc_feat_rope", "outer")
    | _angles("dec_feat_rope", "inner")
    | _blocks("blocks.*", "outer", _MODERN)
    | _blocks("blocks.+", "inner", _MODERN),
    "raev2": _RAE_EMBED[1]
    | _RAE_EMBED[0]
    | _RAE_ROWS
    | _RAEV2_TOKENS
    | {"ctx_embedder.embedding_table": "label_embed.table"}
    | _blocks("blocks.*", "outer", _RAEV2)
    | _blocks("blocks.+", "inner", _RAEV2)
    | _head("inner", "norm", "adaln_modulation.1")
    | _angles("enc_rope", "outer")
    | _angles("dec_rope", "inner"),
    "mpdit": {POSITION: "=position inner", "pos_embed_downsampled": "=position outer"}
    | _EMBED
    | {"x_embedder_skip.proj": "inner_embed.embed.1 conv", "linear_skip": "inner_embed.second"}
    | _TIME
    | {"y_embedder.embedding_table": "tokens.own.table", "time_modulation.1": "shared_modulation.linear"}
    | _blocks("downsample_blocks.*", "outer", _MPDIT)
    | {"upsampler.proj": "spreads.0.proj rows", "upsampler.refine": "spreads.0.refine"}
    | _blocks("upsample_blocks.*", "inner", _MPDIT)
    | _head("inner"),
}
# Weights of official models that their forward pass does not use: REPA's projectors, RAEv2's guidance head.
BESIDE: dict[OfficialKind, str] = {"repa": "projectors.", "raev2": "base_final_layer."}


class Entry(NamedTuple):
    """A tensor of ours, the official tensors it is made of, and the mark that says how."""

    official: tuple[str, ...]
    ours: str
    how: str


def entries(kind: OfficialKind, model: ModelConfig) -> list[Entry]:
    """The entries of all tensors of a model, in the order of the official state dict."""
    with torch.device("meta"):
        known = NestedDiT(model).state_dict().keys()
    table, found = list(TABLES[kind].items()), list[Entry]()
    while table:
        level = re.match(r"(outer|inner)_blocks", table[0][1])
        group = [table.pop(0)]
        while level and table and table[0][1].startswith(level[0]):  # the entries of a block stand together
            group.append(table.pop(0))
        for number in range(model.blocks(level[1])) if level else (0,):
            shift = number + (model.blocks("outer") if level and level[1] == "inner" else 0)
            for official, ours in group:
                names = official.replace("*", str(number)).replace("+", str(shift)).split()
                found += _parameters(names, ours.replace("*", str(number)), known)
    return found


def _parameters(official: Iterable[str], ours: str, known: Iterable[str]) -> list[Entry]:
    """The entries of a module: its weight and its bias, if the model has them."""
    ours, _, how = ours.partition(" ")
    if ours in known or ours.startswith("="):
        return [Entry(tuple(official), ours, how)]
    parts = [part for part in ("weight", "bias") if f"{ours}.{part}" in known]
    return [Entry(tuple(f"{name}.{part}" for name in official), f"{ours}.{part}", how) for part in parts]


def to_ours(weights: Weights, kind: OfficialKind, model: ModelConfig, *, turn: bool) -> dict[str, Tensor]:
    """Official weights under our names, as views where possible; `turn` changes the sign of the output."""
    ours = {}
    for official, name, how in entries(kind, model):
        if name.startswith("="):
            continue
        parts = [weights[part] for part in official]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if how in ("conv", "one") and tensor.ndim == 4:  # a strided convolution is linear
            tensor = tensor.flatten(1)
        elif how == "lead":
            tensor = tensor[0]
        elif how == "rows":
            tensor = tensor.unflatten(0, (_channels(name, model), -1)).transpose(0, 1).flatten(0, 1)
        ours[name] = -tensor if turn and _is_output(name) else tensor
    return ours


def to_official(weights: Weights, kind: OfficialKind, model: ModelConfig, *, turn: bool) -> dict[str, Tensor]:
    """The inverse of `to_ours`, in the official order, with the computed tables."""
    found, like = {}, weights["outer_embed.proj.weight"]
    for official, name, how in entries(kind, model):
        if name.startswith("="):
            found[official[0]] = computed(name, how, model).to(like)
            continue
        tensor = -weights[name] if turn and _is_output(name) else weights[name]
        if how in ("conv", "one") and tensor.ndim == 2:
            side = 1 if how == "one" else model.inner.sub_patch if name.startswith("inner") else model.patch_size
            tensor = tensor.view(len(tensor), -1, side, side)
        elif how == "lead":
            tensor = tensor[None]
        elif how == "rows":
            tensor = tensor.unflatten(0, (-1, _channels(name, model))).transpose(0, 1).flatten(0, 1)
        parts = [part.clone() for part in tensor.chunk(len(official))] if len(official) > 1 else [tensor]
        found |= dict(zip(official, parts, strict=True))
    first: dict[str, int] = {}  # a module's weight and bias stand together, also where several modules are one of ours
    places = {name: first.setdefault(name.rpartition(".")[0], number) for number, name in enumerate(found)}
    return {name: found[name] for name in sorted(found, key=places.__getitem__)}


def _channels(name: str, model: ModelConfig) -> int:
    return model.out_channels if _is_output(name) else model.inner.width


def _is_output(name: str) -> bool:
    return ".final.linear." in name


def computed(what: str, level: str, model: ModelConfig) -> Tensor:
    """A table of the official state dict that is computed: positions (1, T, D), or cosines or sines of rotary angles
    (T, d), at the end those of tokens without a place."""
    inner = level == "inner"
    sides = tuple(side * model.sub_grid for side in model.grid) if inner else model.grid
    size = model.inner if inner else model.outer
    if what == "=position":
        return sincos(size.width, *sides)[None]
    lead = 0 if inner else model.tokens.count
    rope = GridRope(size.width // size.num_heads, places(*sides).flatten(0, 1), model.grid, lead)
    return (rope.cos if what == "=cos" else rope.sin).roll(-lead, dims=0).repeat_interleave(2, dim=1)
