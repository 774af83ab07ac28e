"""Names of weights in the official code of each model, and in ours; conversion in both directions, bit for bit.

An entry of a table is `official:ours`, for a tensor or for the weight and bias of a module. Entries are in the order of
the official state dict. `*` is the number of a block, `+` the same number counted on from the outer blocks. `a&b` are
matrices that are one of ours. After a second colon, `conv` marks the weight of a strided convolution, `one` that of a
1x1 convolution, `lead` a leading axis of length 1, and `rows` rows in the order (channel, row, column), which are ours
in the order (row, column, channel). `=level.what` instead of our name is a table that is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dit_in_dit.config.model import ModelConfig
from dit_in_dit.model.layers import sincos
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.rope import GridRope, places

Weights = Mapping[str, Tensor]
OfficialKind = Literal[
    "dit", "sit", "repa", "lightningdit", "jit", "ddt", "deco", "pixnerd", "pixeldit", "pixeldit_post", "rae", "raev2",
    "mpdit",
]  # fmt: skip
POSITION = "pos_embed"


class Entry(NamedTuple):
    """A tensor of ours, the official tensors that are its parts, and the mark that says how it is converted."""

    official: list[str]
    ours: str
    how: str = ""


def _blocks(prefix: str, level: str, *parts: str) -> str:
    """Entries of the blocks of a level; `mix` and `mlp` are branches of our blocks."""
    text = " ".join(parts).replace(":mix", ":branches.mix").replace(":mlp", ":branches.mlp")
    return f"{prefix}." + text.replace(" ", f" {prefix}.").replace("&", f"&{prefix}.").replace(
        ":", f":{level}_blocks.*."
    )


def _head(level: str, *parts: str) -> str:
    return " ".join(f"final_layer.{part.replace(':', f':{level}_head.final.', 1)}" for part in parts)


def _angles(name: str, level: str) -> str:
    return " ".join(f"{name}.freqs_{wave}:={level}.{wave}" for wave in ("cos", "sin"))


_TIME = "t_embedder.mlp.0:time_embed.mlp.0 t_embedder.mlp.2:time_embed.mlp.2"
_CONDITION = f"{_TIME} y_embedder.embedding_table:label_embed.table"
_POSITION, _EMBED = f"{POSITION}:=outer.position", "x_embedder.proj:outer_embed.proj:conv"
_1, _2, _QKV, _PROJ = "norm1:norm_mix", "norm2:norm_mlp", "attn.qkv:mix.qkv", "attn.proj:mix.proj"
_QK = "attn.q_norm.weight:mix.qk_norm.query attn.k_norm.weight:mix.qk_norm.key"
_GELU, _SWIGLU = "mlp.fc1:mlp.0 mlp.fc2:mlp.2", "mlp.w12:mlp.up mlp.w3:mlp.down"
_ADALN, _ADALN_0 = "adaLN_modulation.1:modulation.linear", "adaLN_modulation.0:modulation.linear"
_NORM, _LINEAR = "norm_final:norm", "linear:linear"

_PLAIN = f"{_POSITION} {_EMBED} {_CONDITION} {_blocks('blocks.*', 'outer', _QKV, _PROJ, _GELU, _ADALN)} "
_PLAIN += _head("outer", _LINEAR, _ADALN)
_MODERN = (_1, _2, _QKV, _QK, _PROJ, _SWIGLU, _ADALN)  # LightningDiT and RAE
_BARE = (_1, _QKV, _QK, _PROJ, _2, "mlp.w1&mlp.w3:mlp.up mlp.w2:mlp.down", _ADALN_0)  # DDT, DeCo, PixNerd and PixelDiT
_BARE_EMBED = f"s_embedder.proj:outer_embed.proj {_CONDITION}"
_COMPACT = " ".join((_QKV, _QK, _PROJ)).replace(":mix.", ":mix.attention.")
_PIXELS = ("compress_to_attn:mix.compress expand_from_attn:mix.expand", _1, _COMPACT, _2, _GELU, _ADALN_0)
_PIXELDIT = f"pixel_embedder.proj:inner_embed.embed.1 {_BARE_EMBED} {_head('inner', 'norm:norm', _LINEAR)} "
_PIXELDIT += f"{_blocks('patch_blocks.*', 'outer', *_BARE)} {_blocks('pixel_blocks.*', 'inner', *_PIXELS)}"
_DCT = f"x_embedder.embedder.0:inner_embed.embed.proj {_BARE_EMBED}"
_ROWS = "s_projector:conditions.0.proj t_embedder.W:time_embed.frequencies"
_INNER_EMBED, _OUTER_EMBED = "x_embedder.proj:inner_embed.embed.1:conv", "s_embedder.proj:outer_embed.proj:conv"
_QKV_APART, _W1_W2 = "attn.q&attn.k&attn.v:mix.qkv", "mlp.w1&mlp.w2:mlp.up mlp.w3:mlp.down"
_RAEV2 = (_1, _2, _QKV_APART, _PROJ, _QK, _W1_W2, _ADALN.lower())

_TABLES: dict[OfficialKind, str] = {
    **dict.fromkeys(("dit", "sit", "repa"), _PLAIN),
    "lightningdit": f"{_POSITION} {_EMBED} {_CONDITION} {_angles('feat_rope', 'outer')} "
    f"{_blocks('blocks.*', 'outer', *_MODERN)} {_head('outer', _NORM, _LINEAR, _ADALN)}",
    "jit": f"{_POSITION} in_context_posemb:tokens.label_offsets:lead {_CONDITION} "
    "x_embedder.proj1:outer_embed.bottleneck:conv x_embedder.proj2:outer_embed.proj:one "
    f"{_blocks('blocks.*', 'outer', _1, _QK, _QKV, _PROJ, _2, _SWIGLU, _ADALN)} "
    f"{_head('outer', _NORM, _LINEAR, _ADALN)}",
    "ddt": f"x_embedder.proj:inner_embed.embed.1 {_BARE_EMBED} {_head('inner', 'linear:linear:rows', _ADALN_0)} "
    f"{_blocks('blocks.*', 'outer', *_BARE)} {_blocks('blocks.+', 'inner', *_BARE)}",
    "deco": f"{_DCT} {_blocks('blocks.*', 'outer', *_BARE)} "
    "dec_net.cond_embed:conditions.0.proj dec_net.input_proj:inner_embed.second "
    f"{_blocks('dec_net.res_blocks.*', 'inner', 'in_ln:norm_mlp mlp.0:mlp.0 mlp.2:mlp.2', _ADALN)} "
    "dec_net.final_layer.linear:inner_head.final.linear",
    "pixnerd": f"{_DCT} {_head('inner', 'norm:norm', _LINEAR)} {_blocks('blocks.*', 'outer', *_BARE)} "
    f"{_blocks('blocks.+', 'inner', 'param_generator1.0:mlp.weights norm:norm_mlp')}",
    **dict.fromkeys(("pixeldit", "pixeldit_post"), _PIXELDIT),
    "rae": f"{_POSITION} {_INNER_EMBED} {_OUTER_EMBED} {_ROWS} {_CONDITION} {_head('inner', _NORM, _LINEAR, _ADALN)} "
    f"{_angles('enc_feat_rope', 'outer')} {_angles('dec_feat_rope', 'inner')} "
    f"{_blocks('blocks.*', 'outer', *_MODERN)} {_blocks('blocks.+', 'inner', *_MODERN)}",
    "raev2": f"{_OUTER_EMBED} {_INNER_EMBED} {_ROWS} t_embedder.learnable_tokens:tokens.time_offsets {_TIME} "
    "ctx_embedder.learnable_tokens:tokens.label_offsets ctx_embedder.embedding_table:label_embed.table "
    f"{_blocks('blocks.*', 'outer', *_RAEV2)} {_blocks('blocks.+', 'inner', *_RAEV2)} "
    f"{_head('inner', 'norm:norm', _LINEAR, _ADALN.lower())} {_angles('enc_rope', 'outer')} "
    f"{_angles('dec_rope', 'inner')}",
    "mpdit": f"{POSITION}:=inner.position pos_embed_downsampled:=outer.position {_EMBED} "
    f"x_embedder_skip.proj:inner_embed.embed.1:conv linear_skip:inner_embed.second {_TIME} "
    "y_embedder.embedding_table:tokens.own.table time_modulation.1:shared_modulation.linear "
    f"{_blocks('downsample_blocks.*', 'outer', _QKV, _PROJ, _GELU)} "
    "upsampler.proj:spreads.0.proj:rows upsampler.refine:spreads.0.refine "
    f"{_blocks('upsample_blocks.*', 'inner', _QKV, _PROJ, _GELU)} {_head('inner', _LINEAR)}",
}
TABLES = {
    kind: [Entry(official.split("&"), *ours) for official, *ours in (entry.split(":") for entry in table.split())]
    for kind, table in _TABLES.items()
}
# Weights of official models that their forward pass does not use: REPA's projectors, RAEv2's guidance head.
UNUSED: dict[OfficialKind, str] = {"repa": "projectors.", "raev2": "base_final_layer."}


def entries(kind: OfficialKind, model: ModelConfig) -> list[Entry]:
    """The entries of all tensors of a model, in the order of the official state dict."""
    with torch.device("meta"):
        known, found = NestedDiT(model).state_dict().keys(), list[Entry]()
    for level, group in groupby(TABLES[kind], lambda entry: re.split("_blocks|$", entry.ours)[0] * ("*" in entry.ours)):
        table = list(group)  # the entries of a block stand together
        for number in range(model.blocks(level)) if level else (0,):
            shift = str(number + model.blocks("outer"))
            for official, ours, how in table:
                names = [name.replace("*", str(number)).replace("+", shift) for name in official]
                name = ours.replace("*", str(number))
                whole = name in known or name.startswith("=")  # else a module: its weight, and its bias if it has one
                hows = {"": how} if whole else {".weight": how, ".bias": "rows" if how == "rows" else ""}
                parts = [(part, mark) for part, mark in hows.items() if whole or name + part in known]
                found += [Entry([official + part for official in names], name + part, mark) for part, mark in parts]
    return found


def to_ours(weights: Weights, kind: OfficialKind, model: ModelConfig, *, turn: bool) -> dict[str, Tensor]:
    """Official weights under our names, as views where possible; `turn` changes the sign of the output."""
    ours = {}
    for official, name, how in entries(kind, model):
        if name.startswith("="):
            continue
        tensor = torch.cat([weights[part] for part in official]) if len(official) > 1 else weights[official[0]]
        if how == "rows":
            tensor = rearrange(tensor, "(c p) ... -> (p c) ...", c=_channels(name, model))
        elif how:  # a strided convolution is linear
            tensor = tensor[0] if how == "lead" else tensor.flatten(1)
        ours[name] = -tensor if turn and ".final.linear." in name else tensor
    return ours


def to_official(weights: Weights, kind: OfficialKind, model: ModelConfig, *, turn: bool) -> dict[str, Tensor]:
    """The inverse of `to_ours`, with the computed tables; in the official order, but for weight and bias of parts."""
    found, tables, like = dict[str, Tensor](), computed_tables(kind, model), weights["outer_embed.proj.weight"]
    for official, name, how in entries(kind, model):
        if name.startswith("="):
            found[official[0]] = tables[official[0]].to(like)
            continue
        tensor = -weights[name] if turn and ".final.linear." in name else weights[name]
        if how == "rows":
            tensor = rearrange(tensor, "(p c) ... -> (c p) ...", c=_channels(name, model))
        elif how:
            side = 1 if how == "one" else model.inner.sub_patch if name.startswith("inner") else model.patch_size
            tensor = tensor[None] if how == "lead" else tensor.view(len(tensor), -1, side, side)
        parts = tensor.chunk(len(official))
        found |= {part: value.clone() if len(parts) > 1 else value for part, value in zip(official, parts, strict=True)}
    return found


def _channels(name: str, model: ModelConfig) -> int:
    return model.out_channels if ".final.linear." in name else model.inner.width


def computed_tables(kind: OfficialKind, model: ModelConfig) -> dict[str, Tensor]:
    """The tables of an official state dict that are computed, in float32: positions (1, T, D), and cosines and sines of
    rotary angles (T, d), at the end those of tokens without a place."""
    found = {}
    for (official, *_), ours, _ in (entry for entry in TABLES[kind] if entry.ours.startswith("=")):
        level, what = ours[1:].split(".")
        rows, columns = (side * (model.sub_grid if level == "inner" else 1) for side in model.grid)
        size, lead = (model.inner, 0) if level == "inner" else (model.outer, model.tokens.count)
        if what == "position":
            found[official] = sincos(size.width, rows, columns)[None]
        else:
            rope = GridRope(size.width // size.num_heads, places(rows, columns).flatten(0, 1), (rows, columns), lead)
            found[official] = getattr(rope, what).roll(-lead, dims=0).repeat_interleave(2, dim=1)
    return found


def official_names(kind: OfficialKind, ours: str, outer: int = 0) -> list[str]:
    """Official names, in block 0 of a level, of the parts of a parameter of ours or of a computed table; empty if there
    is none. `outer`: number of outer blocks."""
    module, _, part = ours.rpartition(".")
    for names, name, _ in TABLES[kind]:
        if name in (ours, module):
            end = "" if name == ours else f".{part}"
            return [official.replace("*", "0").replace("+", str(outer)) + end for official in names]
    return []


def seen_kind(weights: Weights) -> OfficialKind | None:
    """The kind of model that has most names of the weights, and fewest others; None for those that look like DiT's."""
    seen = {re.sub(r"blocks\.\d+", "blocks.*", name) for name in weights}

    def fits(kind: OfficialKind) -> int:
        names = {name.replace("+", "*") for entry in TABLES[kind] for name in entry.official}
        return sum(1 if seen & {name, f"{name}.weight"} else -1 for name in names)

    kind = max(TABLES, key=fits)  # the first of equals
    if kind == "dit":
        return "repa" if any(name.startswith(UNUSED["repa"]) for name in weights) else None
    modulation, tokens = (f"pixel_blocks.0.{name}.bias" for name in ("adaLN_modulation.0", "expand_from_attn"))
    is_post = kind == "pixeldit" and {modulation, tokens} <= weights.keys()
    return "pixeldit_post" if is_post and weights[modulation].numel() == 4 * weights[tokens].numel() else kind
