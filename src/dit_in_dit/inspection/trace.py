"""Shapes, tokens, parameters, MACs and memory of a model, from a forward pass on fake tensors.

Shapes, kernels and saved tensors are the same as in a real pass, but nothing is allocated: a model of any size is
inspected in a second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.config.token_drop import TokenDrop
from dit_in_dit.inspection.cost import macs, parameters, training_macs
from dit_in_dit.inspection.plugin_parts import check_plugin_parts
from dit_in_dit.model.embed import SplitSubPatches
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.recompute import KEPT
from dit_in_dit.model.route import Route
from dit_in_dit.model.stages import AggregateStage
from dit_in_dit.reporting.tables import text_table


class Inspection(dict[str, Any]):
    """The result of `inspect`, shown as a table."""

    def __repr__(self) -> str:
        parts = dict.fromkeys((*self["parameters"], *self["activation_bytes"]))  # in order
        columns = ("parameters", "macs", "activation_bytes")
        rows = [[part, *(f"{self[column].get(part, 0):,}" for column in columns)] for part in parts]
        return text_table(["", "parameters", "MACs per image", "bytes kept for backward"], rows)


def inspect(config: Any, batch: int = 1, recompute: str = "none", *, token_drop: TokenDrop | None = None) -> Inspection:
    """Count the shapes, tokens, parameters, MACs and activations of a model.

    Args:
        config: a `ModelConfig`, a `RunConfig`, a loaded model or a network.
        batch: number of images.
        recompute: levels whose blocks recompute activations, or selective, as `train.recompute`.
        token_drop: patches that bypass outer blocks in training, as the `token_drop` of a `RunConfig`.

    Returns:
        flow: list of {name, shape} in order, for `batch` images.
        tokens, token_layers: {outer, inner, total} per image; a token-layer is one token in one block.
        parameters, macs: {part: count, ..., total}; MACs for one image.
        activation_bytes: {part: bytes, ..., total} saved for the backward pass, in float32, for `batch` images.
        training_macs: only with `token_drop`: {part: count, ..., total} of a training step for one image; `flow` and
        `macs` are those of all patches.

    >>> dd.inspect(dd.preset("emoji"))["tokens"]
    {'outer': 16, 'inner': 1024, 'total': 1040}
    """
    config = getattr(config, "config", config)
    model: ModelConfig = getattr(config, "model", config)
    check_plugin_parts(model)
    flow, activation_bytes = _trace(model, batch, recompute, token_drop)
    tokens = {"outer": model.patches, "inner": model.patches * model.sub_patches * bool(model.blocks("inner"))}
    layers = {level: count * model.blocks(level) for level, count in tokens.items()}
    counts = {"tokens": {**tokens, "total": sum(tokens.values())}}
    counts |= {"token_layers": {**layers, "total": sum(layers.values())}}
    counts |= {"parameters": parameters(model), "macs": macs(model), "activation_bytes": activation_bytes}
    if token_drop:
        counts["training_macs"] = training_macs(model, token_drop)
    return Inspection(batch=batch, flow=flow, **counts)


def _trace(
    model: ModelConfig, batch: int, recompute: str, drop: TokenDrop | None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Shapes at the main points of a forward pass, and bytes saved for the backward pass by part."""
    flow: list[dict[str, Any]] = []
    saved: dict[str, int] = {}
    storages: dict[int, Any] = {}  # kept alive, so that no address is reused
    part = ["other"]

    def note(name: str, tensor: Tensor) -> None:
        flow.append({"name": name, "shape": list(tensor.shape)})

    def watch(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _m, _i, out: note(name, out))

    def account(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _m, _i: part.append(name))
        module.register_forward_hook(lambda _m, _i, _o: [part.pop(), None][1])

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage
            saved[part[-1]] = saved.get(part[-1], 0) + storage.nbytes()
        return tensor

    inside: list[nn.Module] = []  # the selective block that runs

    class Kept(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Notes results that selective recomputation keeps; autograd does not see them."""

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = operation(*args, **(kwargs or {}))
            if inside and operation in KEPT:
                tree_map_only(Tensor, keep, out)
            return out

    with FakeTensorMode():
        net = NestedDiT(model, recompute=recompute)
        for parameter in (*net.parameters(), *net.buffers()):
            storages[parameter.untyped_storage()._cdata] = parameter.untyped_storage()
        watch(net.outer_embed, "outer tokens")
        for module in net.inner_embed.modules():
            if isinstance(module, SplitSubPatches):
                watch(module, "sub-patches")
        if net.inner_blocks:
            watch(net.inner_embed, "inner tokens")
        for part_name in ("outer_embed", "inner_embed", "time_embed", "label_embed", "tokens", "shared_modulation"):
            if getattr(net, part_name):
                account(getattr(net, part_name), part_name)
        for stage in net.stages:
            name = str(stage.name)
            if isinstance(stage, AggregateStage):
                watch(stage.aggregate, name)
            else:
                level = 0 if name.startswith("outer") else 1
                stage.register_forward_hook(lambda _m, _i, out, name=name, level=level: note(name, out[level]))
            account(stage, f"{name.split('*', maxsplit=1)[0]}_blocks" if "*" in name else name)
        for head in (*net.heads, *([net.internal_head] if net.internal_head else [])):
            watch(head.final, head.name)
            account(head, head.name.replace(" ", "_"))
        for block in (*net.outer_blocks, *net.inner_blocks):
            if block.selective:
                block.register_forward_pre_hook(lambda module, _i: inside.append(module))
                block.register_forward_hook(lambda _m, _i, _o: [inside.pop(), None][1])
        x = torch.empty(batch, *model.image_shape)
        note("image", x)
        route = Route(torch.empty(batch, drop.kept, dtype=torch.int64), drop.first, drop.last) if drop else None
        with Kept(), saved_tensors_hooks(keep, lambda tensor: tensor):  # type: ignore[no-untyped-call]
            out = net(x, torch.empty(batch), torch.empty(batch, dtype=torch.int64), route=route)
        note("prediction", out)
    return flow, {**saved, "total": sum(saved.values())}
