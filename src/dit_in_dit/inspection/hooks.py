"""Observe a running model with forward hooks; the model needs no flag, and its outputs do not change.

Each context manager of this module observes every forward pass while the context is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_in_dit.model.aggregate import FUSIONS
from dit_in_dit.model.compiled import uncompiled
from dit_in_dit.model.layers import Attention, Block, MlpBlock, attention_weights
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.stages import AggregateStage, Head, State

Look = Callable[[str, Tensor, Tensor], None]
Hook = Callable[..., Any]


@contextmanager
def forward_hooks(
    after: Iterable[tuple[nn.Module, Hook]], before: Iterable[tuple[nn.Module, Hook]] = (), *, compiled: bool = False
) -> Iterator[None]:
    """Register forward hooks while the context is open.

    Args:
        after: (module, hook); `hook(module, arguments, output)` runs after each forward pass of the module.
        before: (module, hook); `hook(module, arguments)` runs before each forward pass.
        compiled: compiled blocks stay compiled; hooks of modules inside them may then not be called.

    A return value other than None replaces the output (`after`) or the arguments (`before`).
    """
    with ExitStack() as stack:
        if not compiled:
            stack.enter_context(uncompiled())
        for module, hook in before:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        for module, hook in after:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def attentions(model: NestedDiT) -> dict[str, Attention]:
    """Attention modules by block name (`outer_blocks.0`, `inner_blocks.1`), outer blocks first."""
    named = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    return {name.removesuffix(".attention").removesuffix(".branches.mix"): module for name, module in named.items()}


@contextmanager
def watch_heads(model: NestedDiT, look: Look) -> Iterator[None]:
    """Call `look(name, q, k)` after every attention, with queries and keys (N, groups, heads, L, d).

    A group is the whole image for outer blocks, mixer=image and mixer=compact, a patch for mixer=patch, a window for
    mixer=window. Tokens of time and class are first. Compute weights with `attention_weights`, some queries per call.
    """

    @torch.no_grad()
    def hook(name: str, module: Attention, arguments: tuple[Tensor], output: Tensor) -> None:
        q, k, _ = (x.reshape(len(arguments[0]), -1, *x.shape[1:]) for x in module.heads(*arguments))
        look(name, q, k)

    with forward_hooks((module, partial(hook, name)) for name, module in attentions(model).items()):
        yield


@contextmanager
def watch_attention(model: NestedDiT) -> Iterator[dict[str, Tensor]]:
    """Attention weights of the last forward pass by block name: (N, groups, heads, L, L), rows sum to one.

    Groups are those of `watch_heads`. Blocks without attention are left out. The weights of all blocks are in memory
    together: use `watch_heads` for long sequences.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, q: Tensor, k: Tensor) -> None:
        seen[name] = attention_weights(q, k)

    with watch_heads(model, keep):
        yield seen


@contextmanager
def _watch(named: Iterable[tuple[str, nn.Module]], value: Hook) -> Iterator[dict[str, Tensor]]:
    """The value of each module's last forward pass, `value(module, arguments, output)`, in the order of execution."""
    seen: dict[str, Tensor] = {}

    def hook(name: str, *call: Any) -> None:
        seen.pop(name, None)  # so that the order is that of the last pass
        seen[name] = value(*call).detach()

    with forward_hooks((module, partial(hook, name)) for name, module in named):
        yield seen


def watch_aggregation(model: NestedDiT) -> AbstractContextManager[dict[str, Tensor]]:
    """Weight of each sub-patch in the last forward pass, by stage (`aggregates.0`): (N, T, heads, S)."""
    named = ((f"aggregates.{number}", module) for number, module in enumerate(model.aggregates))
    return _watch(named, lambda module, arguments, output: module.weights(*arguments))


@contextmanager
def watch_contribution(model: NestedDiT) -> Iterator[dict[str, Tensor]]:
    """Share of the inner path in each patch in the last forward pass, (N, T), from 0 (none) to 1 (all).

    `aggregates.0` is |added| / (|added| + |outer token|) at the first aggregation, `aggregates.1` at the second.
    `inner_head` is the same ratio for the pixels of the two heads.
    """
    seen: dict[str, Tensor] = {}
    stages = [stage for stage in model.stages if isinstance(stage, AggregateStage)]
    images: dict[str, Tensor] = {}
    p = model.config.patch_size

    def share(part: Tensor, rest: Tensor) -> Tensor:
        return part / (part + rest).clamp(min=torch.finfo(part.dtype).tiny)

    def fused(number: int, module: nn.Module, arguments: tuple[State, Any], output: State) -> None:
        keeps = FUSIONS[model.config.inner.fuse].keeps_outer
        outer = arguments[0].outer if keeps else torch.zeros_like(output.outer)
        added = output.outer - outer
        seen[f"aggregates.{number}"] = share(added.norm(dim=-1), outer.norm(dim=-1)).detach()

    def drawn(module: Head, arguments: tuple[Any, ...], output: Tensor) -> None:
        prediction = output[:, : model.config.channels]  # without the variance fraction
        patches = prediction.unfold(2, p, p).unfold(3, p, p).flatten(2, 3).transpose(1, 2)  # N T C p p
        images[module.name] = patches.flatten(2).norm(dim=-1).detach()
        if module.name == "inner head":  # this head runs last
            inner = images["inner head"]
            seen["inner_head"] = share(inner, images.get("outer head", torch.zeros_like(inner)))

    joining = [(stage, partial(fused, number)) for number, stage in enumerate(stages)]
    with forward_hooks([*joining, *((head, drawn) for head in model.heads)]):
        yield seen


def watch_blocks(model: NestedDiT) -> AbstractContextManager[dict[str, Tensor]]:
    """Output tokens of every block in the last forward pass, by name, in the order of execution."""
    blocks = ((name, module) for name, module in model.named_modules() if isinstance(module, Block | MlpBlock))
    return _watch(blocks, lambda module, arguments, output: output)


def can_run_without_inner(model: NestedDiT) -> bool:
    """Whether the model works if the inner path adds nothing; false if inner tokens replace the outer tokens."""
    joins = any(isinstance(stage, AggregateStage) for stage in model.stages)
    return bool(model.inner_blocks) and (not joins or FUSIONS[model.config.inner.fuse].keeps_outer)


@contextmanager
def without_inner(model: NestedDiT) -> Iterator[None]:
    """Disable the inner path in the context: it adds nothing to outer tokens or the image, as with a gate of zero."""
    joins = [stage for stage in model.stages if isinstance(stage, AggregateStage)]
    heads = [head for head in model.heads if head.is_inner]
    unchanged = [(stage, lambda module, arguments, output: arguments[0]) for stage in joins]
    blank = [(head, lambda module, arguments, output: torch.zeros_like(output)) for head in heads]
    with forward_hooks([*unchanged, *blank]):
        yield
