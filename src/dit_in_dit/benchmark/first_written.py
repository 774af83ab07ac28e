"""A plainly written nested model: the reference for outputs and speed.

It computes the same function as `NestedDiT`, from the same weights, without the optimisations. The condition is
repeated for every patch, so adaLN of the inner blocks runs on N*T rows. Inner tokens are separate sequences
(N*T, S, E). Both embeddings are strided convolutions whose outputs are reordered. Modulation, gates and sums are
separate operations.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.condition import TIME_FREQUENCIES
from dit_in_dit.model.layers import sdpa, sincos

_NAMES = (  # of NestedDiT, and here
    (".branches.mix.", ".attention."),
    (".branches.mlp.0.", ".up."),
    (".branches.mlp.2.", ".down."),
    (".modulation.linear.", ".adaln."),
    (".final.", "."),
    ("time_embed.mlp.0.", "time_in."),
    ("time_embed.mlp.2.", "time_out."),
    ("label_embed.table.", "label_table."),
    ("outer_embed.proj.", "outer_conv."),
    ("inner_embed.position", "inner_position"),
)
_INNER_EMBED = re.compile(r"inner_embed\.embed\.(?:1|conv)\.")


def to_first_written(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a NestedDiT under the names of `FirstWritten`; embeddings keep their shape."""
    renamed = {}
    for name, tensor in state.items():
        new_name = _INNER_EMBED.sub("inner_conv.", name)
        for before, after in _NAMES:
            new_name = new_name.replace(before, after)
        renamed[new_name] = tensor
    return renamed


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of tokens (B, L, D), then a shift and a scale (B, D) for each row."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class FirstAttention(nn.Module):
    """Multi-head attention, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (y.reshape(batch, length, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        mixed = sdpa(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class FirstBlock(nn.Module):
    """adaLN-Zero block: tokens (B, L, D) and condition rows (B, K) -> (B, L, D)."""

    def __init__(self, width: int, condition: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention = FirstAttention(width, heads)
        self.up = nn.Linear(width, int(width * mlp_ratio))
        self.down = nn.Linear(int(width * mlp_ratio), width)
        self.adaln = nn.Linear(condition, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaln(F.silu(c)).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attention(modulated(x, shift, scale))
        hidden = F.gelu(self.up(modulated(x, mlp_shift, mlp_scale)), approximate="tanh")
        return x + mlp_gate.unsqueeze(1) * self.down(hidden)


class FirstHead(nn.Module):
    """adaLN and a linear layer: tokens (B, L, D) and condition rows (B, K) -> (B, L, out)."""

    def __init__(self, width: int, condition: int, out: int) -> None:
        super().__init__()
        self.adaln = nn.Linear(condition, 2 * width)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln(F.silu(c)).chunk(2, dim=1)
        return self.linear(modulated(x, shift, scale))


class FirstAggregate(nn.Module):
    """Aggregate the inner tokens (N*T, S, E) of each patch into one vector: (N*T, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        inner, width = model.inner, model.outer.width
        self.kind = inner.aggregate
        if self.kind == "weighted":
            self.weight = nn.Parameter(torch.empty(model.sub_patches))
        if self.kind == "attention":
            self.query = nn.Parameter(torch.empty(inner.num_heads, 1, inner.width // inner.num_heads))
            self.kv = nn.Linear(inner.width, 2 * inner.width)
        if self.kind == "concat":
            self.proj: nn.Module = nn.Linear(model.sub_patches * inner.width, width)
        else:
            same = inner.width == width and self.kind != "attention"
            self.proj = nn.Identity() if same else nn.Linear(inner.width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            return self.proj(x.mean(dim=1))
        if self.kind == "weighted":
            return self.proj((x * self.weight[None, :, None]).sum(dim=1))
        if self.kind == "concat":
            return self.proj(x.reshape(len(x), -1))
        k, v = self.kv(F.layer_norm(x, x.shape[-1:], eps=1e-6)).chunk(2, dim=-1)
        heads = len(self.query)
        k, v = (y.reshape(*y.shape[:2], heads, -1).transpose(1, 2) for y in (k, v))
        pooled = sdpa(self.query.expand(len(x), -1, -1, -1), k, v)
        return self.proj(pooled.reshape(len(x), -1))


class FirstFuse(nn.Module):
    """Fuse outer tokens and aggregated tokens, both (N, T, D), into new outer tokens (N, T, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.kind = model.inner.fuse
        if self.kind == "gate":
            self.gate = nn.Parameter(torch.empty(model.outer.width))

    def forward(self, outer: Tensor, aggregated: Tensor, position: Tensor) -> Tensor:
        if self.kind == "add":
            return outer + aggregated
        return outer + self.gate * aggregated if self.kind == "gate" else aggregated + position


class FirstSpread(nn.Module):
    """Broadcast each patch token to its sub-patches: outer tokens (N, T, D) -> (N*T, S, E)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(model.outer.width, model.sub_patches * model.inner.width)
        self.shape = -1, model.sub_patches, model.inner.width

    def forward(self, outer: Tensor) -> Tensor:
        return self.proj(F.layer_norm(outer, outer.shape[-1:], eps=1e-6)).reshape(self.shape)


def check_first_written(model: ModelConfig) -> None:
    """Raise UserError if the config has a choice that the plainly written version lacks."""
    needed = [("model.qk_norm", str(model.qk_norm).lower(), "false")]
    needed += [(f"{level.prefix}.norm", level.norm, "layer") for level in (model.outer, model.inner)]
    if model.blocks("inner"):
        choices = {"mixer": "patch", "condition": "image", "spread": "add"}
        needed += [(f"model.inner.{name}", getattr(model.inner, name), value) for name, value in choices.items()]
    for key, got, value in needed:
        if got != value:
            raise UserError(f"the first-written model needs {key}={value}: got {got}")


class FirstWritten(nn.Module):
    """x (N, C, H, W), t (N,) and y (N,) or None -> (N, C, H, W), like the `NestedDiT` of the same config. UserError if
    the config has a choice that this version lacks."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        outer, inner = model.outer, model.inner
        check_first_written(model)
        self.config, levels = model, [level for level, _ in model.program]
        self.register_buffer("position", sincos(outer.width, *model.grid), persistent=False)
        self.position: Tensor
        self.time_in, self.time_out = nn.Linear(TIME_FREQUENCIES, outer.width), nn.Linear(outer.width, outer.width)
        self.label_table = nn.Embedding(model.num_classes + 1, outer.width)
        if model.reads_patches:
            self.outer_conv = nn.Conv2d(model.channels, outer.width, model.patch_size, stride=model.patch_size)
        self.outer_blocks = nn.ModuleList(
            FirstBlock(outer.width, outer.width, outer.num_heads, outer.mlp_ratio) for _ in range(model.blocks("outer"))
        )
        self.inner_blocks = nn.ModuleList(
            FirstBlock(inner.width, outer.width, inner.num_heads, inner.mlp_ratio) for _ in range(model.blocks("inner"))
        )
        pairs = list(pairwise(levels))
        self.aggregates = nn.ModuleList(FirstAggregate(model) for pair in pairs if pair == ("inner", "outer"))
        self.fuses = nn.ModuleList(FirstFuse(model) for _ in self.aggregates)
        self.spreads = nn.ModuleList(FirstSpread(model) for pair in pairs if pair == ("outer", "inner"))
        if len(self.inner_blocks):
            s, kernel = inner.sub_patch, inner.kernel if inner.embed == "conv" else 1
            padding = (kernel - 1) // 2 * s
            self.inner_conv = nn.Conv2d(model.channels, inner.width, kernel * s, stride=s, padding=padding)
            self.inner_position = nn.Parameter(torch.empty(model.sub_patches, inner.width))
        if levels[-1] == "outer" or inner.fuse != "replace":
            self.outer_head = FirstHead(outer.width, outer.width, model.patch_size**2 * model.channels)
        if levels[-1] == "inner":
            self.inner_head = FirstHead(inner.width, outer.width, inner.sub_patch**2 * model.channels)

    def load(self, state: dict[str, Tensor]) -> FirstWritten:
        """Load the state dict of a NestedDiT of this config; returns the model."""
        own, given = self.state_dict(), to_first_written(state)
        self.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in given.items()})
        return self

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from x (N, C, H, W) at times t (N,); y None: the null class."""
        model, images = self.config, len(x)
        c = self.condition(t) + (self.label_table.weight[-1] if y is None else self.label_table(y))  # N D
        per_patch = c.repeat_interleave(model.patches, dim=0)  # N*T D
        outer = self.position.expand(images, -1, -1)  # N T D
        if model.reads_patches:
            outer = self.outer_conv(x).flatten(2).transpose(1, 2).contiguous() + self.position
        inner = self.cut(x) if len(self.inner_blocks) else x  # N*T S E
        blocks = {"outer": iter(self.outer_blocks), "inner": iter(self.inner_blocks)}
        aggregates, fuses, spreads = iter(self.aggregates), iter(self.fuses), iter(self.spreads)
        previous = ""
        for level, count in model.program:
            if (previous, level) == ("inner", "outer"):
                outer = next(fuses)(outer, next(aggregates)(inner).reshape(images, model.patches, -1), self.position)
            if (previous, level) == ("outer", "inner"):
                inner = inner + next(spreads)(outer)
            for _ in range(count):
                if level == "outer":
                    outer = next(blocks["outer"])(outer, c)
                else:
                    inner = next(blocks["inner"])(inner, per_patch)
            previous = level
        return self.draw(outer, inner, c, per_patch, previous)

    def condition(self, t: Tensor) -> Tensor:
        """Embed times (N,) as vectors (N, D)."""
        half = TIME_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) / half * steps)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.time_in.weight.dtype)
        return self.time_out(F.silu(self.time_in(features)))

    def cut(self, x: Tensor) -> Tensor:
        """Cut images (N, C, H, W) into inner tokens (N*T, S, E)."""
        (rows, columns), side = self.config.grid, self.config.sub_grid
        tokens = self.inner_conv(x)  # N E H/s W/s
        tokens = tokens.reshape(len(x), -1, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        return tokens.reshape(-1, side * side, tokens.shape[-1]) + self.inner_position

    def draw(self, outer: Tensor, inner: Tensor, c: Tensor, per_patch: Tensor, last: str) -> Tensor:
        """The image (N, C, H, W) that the heads predict; `last`: the level of the program's last stage."""
        model = self.config
        (rows, columns), side, s, p = model.grid, model.sub_grid, model.inner.sub_patch, model.patch_size
        image = torch.zeros((), device=outer.device, dtype=outer.dtype)
        if last == "outer" or model.inner.fuse != "replace":
            pixels = self.outer_head(outer, c).reshape(-1, rows, columns, p, p, model.channels)
            image = pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, *model.image_shape)
        if last == "inner":
            pixels = self.inner_head(inner, per_patch).reshape(-1, rows, columns, side, side, s, s, model.channels)
            pixels = pixels.permute(0, 7, 1, 3, 5, 2, 4, 6)
            image = image + pixels.reshape(-1, *model.image_shape)
        return image
