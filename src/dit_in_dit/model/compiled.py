"""Compilation by block: blocks of one kind share compiled code, whatever the depth of the model.

The forward function of a block is compiled, not its call, as in PyTorch's regional compilation: hooks of the block,
among them those of FSDP2, run as before.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import nn

from dit_in_dit.config.errors import LeftOutWarning, UserError, truncate
from dit_in_dit.model.layers import Block, MlpBlock

BACKEND: str | Callable[..., Any] = "inductor"  # of torch.compile
GRAPHS = 64  # most graphs of a kind of block: with and without gradients, in each precision, of one size and of any
_number = count()


def compile_blocks(*models: nn.Module, fall_back: bool = False, by_length: bool = False) -> None:
    """Compile every kind of block of the models at its first call, in place, as one graph each. A module without blocks
    of this package is compiled whole.

    Call it before FSDP or DDP wraps a model. The parameters' names stay, and `copy.deepcopy` works.

    Args:
        fall_back: run blocks that do not compile without compilation, and warn once; false: raise UserError.
        by_length: compile each number of tokens apart. Otherwise the second number gives code for any, which later
            takes the place of the first: last bits would depend on what ran before.
    """
    kinds: dict[Any, _Kind | _Lengths] = {}
    for model in models:
        blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block | MlpBlock)]
        for module in blocks or [model]:
            if (kind := _kind_of(module)) not in kinds:
                make = partial(_Kind, type(module).forward, fall_back, fullgraph=bool(blocks))
                kinds[kind] = _Lengths(make) if by_length else make()
            module.forward = partial(kinds[kind], module)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_blocks` has compiled the model."""
    return any(
        isinstance(getattr(module.__dict__.get("forward"), "func", None), _Kind | _Lengths)
        for module in model.modules()
    )


@contextmanager
def explain_failures() -> Iterator[None]:
    """Raise a UserError of one line in place of the compiler's error."""
    try:
        yield
    except Exception as error:
        if failure := _failure(error):
            raise failure from None
        raise


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled blocks without compilation while the context is open: hooks of modules inside blocks are called."""
    # PyTorch's compiler takes seconds to import. If it is not imported, nothing is compiled.
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with stance:
        yield


def _failure(error: BaseException) -> UserError | None:
    """The UserError of a failed compilation; None for other errors."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    reason = truncate(" ".join(str(error).split("\n")[:2]), 90)
    return UserError(f"the model's blocks do not compile here: set train.compile=false ({reason})")


def _kind_of(block: nn.Module) -> tuple[Any, ...]:
    """Classes and shapes of a block; the compiler checks all else that its code depends on."""
    shapes = tuple((name, tensor.shape) for name, tensor in block.state_dict(keep_vars=True).items())
    return (*map(type, block.modules()), shapes)


class _Kind:
    """The compiled forward function of blocks of one kind."""

    def __init__(self, forward: Any, fall_back: bool, *, fullgraph: bool) -> None:
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, GRAPHS)
        config.optimize_ddp = False  # do not split blocks at DDP's buckets: gradients come block by block anyway
        # A code object of its own: PyTorch counts graphs, and learns which sizes vary, by code object and name.
        code = forward.__code__.replace(co_name=f"{forward.__qualname__.replace('.', '_')}_{next(_number)}")
        self.forward = FunctionType(code, forward.__globals__, code.co_name, forward.__defaults__, forward.__closure__)
        self.forward.__kwdefaults__ = forward.__kwdefaults__
        self.run: Callable[..., Any] = torch.compile(self.forward, fullgraph=fullgraph, backend=BACKEND)
        self.fall_back = fall_back

    def __call__(self, *call: Any, **keywords: Any) -> Any:
        try:
            return self.run(*call, **keywords)
        except Exception as error:
            failure = _failure(error)
            if failure is None:
                raise
            if not self.fall_back:
                raise failure from None
        warnings.warn(f"{failure}; this time they run without compilation", LeftOutWarning, stacklevel=2)
        self.run = self.forward
        return self.run(*call, **keywords)


class _Lengths(dict[int, _Kind]):
    """A compiled forward function for each number of tokens of blocks of one kind."""

    def __init__(self, make: Callable[[], _Kind]) -> None:
        self.make = make

    def __missing__(self, length: int) -> _Kind:
        self[length] = self.make()
        return self[length]

    def __call__(self, block: nn.Module, x: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        return self[x.shape[1]](block, x, *arguments, **keywords)
