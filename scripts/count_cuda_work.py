"""Count the work of a training step on CUDA that is not matrix products: kernels launched and bytes moved.

`python scripts/count_cuda_work.py [PRESET[:BATCH] ...] [--json FILE]` prints a table. A step is the forward pass, the
loss and the backward pass in eager mode, in bfloat16 under CUDA's autocast policy with weights in float32. The
optimizer is a column of its own. No GPU is needed: nothing is computed and nothing is allocated.

How it counts:

- Tensors are on PyTorch's meta device. CPU builds cannot hold autograd graphs of fake CUDA tensors. The autocast
  policy is that of `tests/autocast.py`, which reads its lists from the installed PyTorch; a dispatch mode sees every
  operator, with the casts.
- An operator is one kernel. Views and `empty` are none. Some CUDA operators launch two or more kernels: the count is a
  lower bound.
- Bytes are those of the tensors that an operator reads and writes, each once. An expanded tensor counts its distinct
  elements. A tensor that is overwritten is not read. Caches are ignored.
- Products are not counted: mm, addmm, bmm, baddbmm, convolutions and attention, forward and backward. A product with a
  vector (one row or one column) is bound by memory and is counted.
- Attention is one operator in each direction, with outputs in the memory layout of FlashAttention.
- The optimizer is fused AdamW: one kernel, which reads weights, gradients and two moments and writes all but the
  gradients, 28 bytes per weight.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_in_dit.config import presets
from dit_in_dit.config.run import RunConfig
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.model import layers
from dit_in_dit.model.kernels import KERNELS, Kernels
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.tables import text_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from autocast import CudaAutocast

PRESETS = ("dit-xl2:256", "dit-in-dit-xl2:256", "dit-b16:256", "dit-in-dit-b16:256", "dit-in-dit-xl16:256")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "zero_", "fill_"}  # write their first argument without reading it
ADAMW = 28  # bytes per weight


class _Attention(torch.autograd.Function):
    """Shapes and memory layouts of attention, without kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return _in_rows(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(_in_rows, ctx.saved_tensors))


def _in_rows(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


class _Autocast(CudaAutocast):
    """CUDA's autocast policy, with attention as one operator."""

    def __torch_function__(self, function, types, given=(), named=None):  # type: ignore[no-untyped-def]
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*(x.to(self.half) for x in given))
        return super().__torch_function__(function, types, given, named)


class Count(TorchDispatchMode):
    """Kernels and bytes of the operators called in this context, products excluded; see the module for the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, given=(), named=None):  # type: ignore[no-untyped-def]
        out = function(*given, **(named or {}))
        name, schema = function._schema.name.removeprefix("aten::"), function._schema
        written, read = _tensors(out), []
        for number, argument in enumerate(schema.arguments):
            value = given[number] if number < len(given) else (named or {}).get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if not (argument.is_out or (is_written and name in OVERWRITES) or _only_shapes(name)):
                read += _tensors(value)
            if is_written:
                written += _tensors(value)
        written, read = _distinct(written), _distinct(read)
        is_view = not schema.is_mutable and bool(read) and {_storage(x) for x in written} <= {_storage(x) for x in read}
        if name not in WITHOUT_KERNEL and not is_view and not _is_product(name, read):
            self.kernels[name] += 1
            self.bytes[name] += sum(_bytes(x) for x in (*read, *written))
        return out


def _only_shapes(name: str) -> bool:
    """Whether an operator takes sizes and types from its argument, but no numbers."""
    return name.startswith("new_") or name.endswith("_like")


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({(_storage(x), x.storage_offset(), x.shape, x.stride()): x for x in tensors}.values())


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0)
    return x.element_size() * torch.Size(sizes).numel()


def _is_product(name: str, read: list[Tensor]) -> bool:
    """Whether an operator is a product, but not one with a vector."""
    if name not in PRODUCTS:
        return False
    return "convolution" in name or all(read[at].shape[side] > 1 for at, side in ((-2, -2), (-1, -1)))


@contextmanager
def as_on_cuda(fused: bool) -> Iterator[None]:
    """On the meta device, attention in chunks of sequences as on CUDA, and `model.fused` if `fused`."""
    before = layers.LIMITED
    layers.LIMITED = frozenset({"meta"})
    KERNELS["meta"] = Kernels(fused=fused)
    try:
        yield
    finally:
        layers.LIMITED = before
        del KERNELS["meta"]


def count(step: Callable[[], Tensor], *, fused: bool = False) -> Count:
    """The work of `step`, a function under autocast that returns a loss, and of its backward pass."""
    with Count() as counted, as_on_cuda(fused):
        with _Autocast():
            loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
    return counted


def training_step(config: RunConfig, batch: int) -> tuple[NestedDiT, Callable[[], Tensor]]:
    """A network on the meta device, and the function that gives its loss on a batch of images."""
    with torch.device("meta"):
        net = NestedDiT(config.model, recompute=config.train.recompute)
        x, noise = torch.empty(2, batch, *config.model.image_shape)
        t, y = torch.empty(batch), torch.empty(batch, dtype=torch.int64)
    objective = Objective(config.diffusion)
    return net, lambda: objective.loss(net, x, noise, t, y).mean()


def measure(name: str) -> dict[str, Any]:
    """The counts of `PRESET:BATCH`, as shipped and with fused functions."""
    preset, _, batch = name.partition(":")
    results: dict[str, Any] = {"preset": preset, "batch": int(batch or 256)}
    for kind, fused in (("shipped", False), ("fused", True)):
        net, step = training_step(presets.get(preset), results["batch"])
        counted = count(step, fused=fused)
        results[kind] = {
            "kernels": counted.kernels.total(),
            "bytes": counted.bytes.total(),
            "kernels_by_operator": dict(counted.kernels.most_common()),
            "bytes_by_operator": dict(counted.bytes.most_common()),
        }
    results["optimizer_bytes"] = ADAMW * sum(p.numel() for p in net.parameters() if p.requires_grad)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("presets", nargs="*", default=PRESETS, metavar="PRESET[:BATCH]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts, by operator too")
    arguments = parser.parse_args()
    results = [measure(name) for name in arguments.presets]
    rows = []
    for r in results:
        shipped, fused = r["shipped"], r["fused"]
        numbers = [f"{r['batch']}"]
        for counts in (shipped, fused):
            numbers += [f"{counts['kernels']:,}", f"{counts['bytes'] / 1e9:,.0f}"]
        ratio = fused["bytes"] / shipped["bytes"]
        rows.append([r["preset"], *numbers, f"{ratio:.2f}", f"{r['optimizer_bytes'] / 1e9:.1f}"])
    columns = ["preset", "batch", "kernels", "GB", "kernels fused", "GB fused", "ratio of GB", "GB in the optimizer"]
    print(text_table(columns, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
