"""Passes of a micro-batch as a CUDA graph, train.compile=graphs: one launch in place of hundreds, for small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError, truncate

WARM_UP = 3  # passes before the capture: compilation, and libraries that allocate at their first call
Backward = Callable[..., Tensor]


class Graphed:
    """`backward(count, *inputs)`, which adds gradients to those of the weights and returns losses, as a graph.

    The graph adds to the same gradient tensors at each replay: set them to zero, not to None. Clipping, optimizer and
    average stay outside, because learning rate and decay change with each step. Inputs of other shapes than the first
    are not replayed, but passed to `backward`.
    """

    def __init__(self, backward: Backward, weights: Iterable[nn.Parameter]) -> None:
        self.backward, self.weights = backward, list(weights)
        self.inputs: list[Tensor] = []
        self.kind: object = None  # count, shapes and types of the captured inputs

    def __call__(self, count: int, *inputs: Tensor) -> Tensor:
        kind = count, [(each.shape, each.dtype) for each in inputs]
        if self.kind is None:
            self.kind, self.inputs = kind, [each.clone() for each in inputs]
            self.replay, self.losses = capture(lambda: self.backward(count, *self.inputs))
            torch._foreach_zero_([weight.grad for weight in self.weights if weight.grad is not None])  # of the warm-up
        if kind != self.kind:
            return self.backward(count, *inputs)
        torch._foreach_copy_(self.inputs, list(inputs), non_blocking=True)
        self.replay()
        return self.losses.clone()  # the next replay overwrites them


def capture(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Run `call` WARM_UP times, then record it without running it: a function that replays it, and the tensor that then
    holds its result. UserError if `call` waits for the device, which a graph cannot."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # By default, another thread that pins memory of the next batch would end the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call()
    except UserError:
        raise
    except RuntimeError as error:
        reason = truncate(str(error).partition("\n")[0])
        raise UserError(f"a step cannot become a CUDA graph: set train.compile=true ({reason})") from None
    return graph.replay, result
