"""Rates of the device, limits of PyTorch's attention, and pieces of the model beside a copy of as many bytes."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_in_dit.benchmark.device.cases import Cases, Values

CORE = ("numpy", "einops", "PIL", "safetensors", "yaml")  # what models and training import
OTHER = ("rich", "jinja2", "diffusers", "triton", "matplotlib")
SEQUENCES = (8192, 16384, 32768, 65535, 65536)  # of PyTorch's attention; then the last by `model.layers.sdpa`
BFLOAT16_ERROR = 2e-2  # relative, of attention with inputs in bfloat16
HALF, WHOLE = 2, 4  # bytes of a number in bfloat16, in float32


def measure_place(cases: Cases) -> None:
    """The device, its software, what it copies and multiplies in a second."""
    device, tiny = cases.device, cases.tiny
    cases.add("machine", "facts", partial(_facts, device))
    cases.add(
        "rates", "copy", lambda: {"says": f"copy {(rate := copy_rate(device, tiny)) / 1e9:,.0f} GB/s", "bytes": rate}
    )
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("TF32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        cases.add("rates", name, partial(_product_rate, name, dtype, precision, device))  # fmt: skip
    cases.add("rates", "launch", partial(_launch, device))


def _facts(device: torch.device) -> Values:
    missing = [name for name in (*CORE, *OTHER) if find_spec(name) is None]
    facts: dict[str, Any] = {"name": platform.processor() or platform.machine(), "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count(), "missing": missing}
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        facts |= {"name": known.name, "memory": known.total_memory, "multiprocessors": known.multi_processor_count}
        with suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["driver"] = subprocess.run(
                query, check=False, capture_output=True, text=True, timeout=10
            ).stdout.strip()
    shown = [facts["name"], f"{facts.get('memory', 0) / 1e9:.0f} GB", f"torch {torch.__version__}"]
    shown += [f"driver {facts.get('driver', '-')}", f"Python {facts['python']}", f"{facts['cores']} cores"]
    return {**facts, "says": ", ".join([*shown, f"not installed: {', '.join(missing) or 'nothing'}"])}


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float = 0.4) -> float:
    """Median seconds of `work`, measured for about `seconds`."""
    from dit_in_dit.benchmark.timing import time_alternately

    return time_alternately({"": work}, device, seconds)[""].seconds


def copy_rate(device: torch.device, tiny: bool) -> float:
    """Bytes per second, read and written, of a copy that is much larger than the caches."""
    source = torch.randn(2**16 if tiny else 2**29, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def _product_rate(name: str, dtype: torch.dtype, precision: str, device: torch.device) -> Values:
    from dit_in_dit.benchmark.timing import best_product

    torch.set_float32_matmul_precision(precision)
    try:
        macs = best_product(device, dtype)
    finally:
        torch.set_float32_matmul_precision("highest")
    return {"says": f"{name} {2 * macs / 1e12:,.1f} TFLOP/s", "flops": 2 * macs}


def _launch(device: torch.device) -> Values:
    """Seconds from one launch of a small kernel to the next."""
    x = torch.zeros(1, device=device)
    each = seconds_of(lambda: [x.add_(1) for _ in range(100)], device) / 100
    return {"says": f"a launch {1e6 * each:.1f} us", "launch": each}


def measure_limits(cases: Cases) -> None:
    """PyTorch's attention of many short sequences, with each number of sequences in a process of its own."""
    number = cases.share[0]
    ours = number == len(SEQUENCES)
    count = SEQUENCES[-1] if ours else SEQUENCES[number]
    device, row = cases.device, "in chunks, as the model calls it" if ours else "PyTorch's, whole"
    draw = torch.Generator(device).manual_seed(0)
    shape = (count // 512 if cases.tiny else count, 16, 4, 72)
    q, k, v, grad = (torch.randn(shape, device=device, dtype=torch.bfloat16, generator=draw) for _ in range(4))
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention
    if ours:
        from dit_in_dit.model.layers import sdpa as attention
    cases.add(row, f"{count:,} forward", lambda: _compared((attention(q, k, v),), (q, k, v), None))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cases.add(
        row,
        f"{count:,} backward",
        lambda: _compared(torch.autograd.grad(attention(*leaves), leaves, grad), (q, k, v), grad),
    )


def _compared(results: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grad: Tensor | None) -> Values:
    """Largest relative error of the first, middle and last sequences against float64."""
    count = len(inputs[0])
    some = torch.tensor(sorted({0, 1, count // 2, count - 2, count - 1}), device=inputs[0].device)
    exact = [x.detach()[some].double().requires_grad_() for x in inputs]
    weights = (exact[0] @ exact[1].transpose(-1, -2) * exact[0].shape[-1] ** -0.5).softmax(-1)
    out = weights @ exact[2]
    right = (out,) if grad is None else torch.autograd.grad(out, exact, grad[some].double())
    error = max(relative_error(a[some], b) for a, b in zip(results, right, strict=True))
    finite = all(bool(result.isfinite().all()) for result in results)
    return {"error": error, "passed": finite and error < BFLOAT16_ERROR}


def relative_error(found: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """||found - exact|| / ||exact||, in float64; `floor` is the smallest divisor."""
    exact = exact.detach().double()
    return float((found.detach().to(exact) - exact).norm() / max(float(exact.norm()), floor, 1e-30))


def measure_pieces(cases: Cases) -> None:
    """Forward and backward passes of the model's pieces: bytes that must move, over seconds, beside a copy."""
    device, tiny = cases.device, cases.tiny
    copied = copy_rate(device, tiny)
    for length in (4, 16):
        cases.add("attention in groups", f"{length} tokens", partial(_attention, cases, length), needs=5)
    images = 1 if tiny else 64
    pixels, outer = (images, 256, 256, 16), (images, 256, 96 if tiny else 1152)
    for where, shape in (("pixels", (images, 4, 4, 16) if tiny else pixels), ("outer tokens", outer)):
        for name, (ways, bytes_each) in _pieces(shape, device).items():
            for way, (work, inputs) in ways.items():
                measure = partial(_rate, cases, way, work, inputs, bytes_each, copied)
                cases.add(f"{name}, {where}, of copy", way, measure, needs=4)


Way = tuple[Callable[..., Any], list[Tensor]]  # a function, and its inputs


def _pieces(shape: tuple[int, ...], device: torch.device) -> Mapping[str, tuple[Mapping[str, Way], int]]:
    """Functions by piece and way, and the bytes per number of the tokens that forward and backward pass must move: each
    input, output and gradient once; the stream of tokens in float32, all that belongs to a branch in bfloat16."""
    from dit_in_dit.model.fused import gate_residual, norm_modulate
    from dit_in_dit.model.mlps import MLPS
    from dit_in_dit.model.modulation import modulate
    from dit_in_dit.model.norms import NORMS

    tokens, width, nested = partial(torch.randn, device=device, dtype=torch.bfloat16), shape[-1], len(shape) == 4
    x, branch, row = tokens(shape).float(), tokens(shape), (*shape[: 2 if nested else 1], 1, width)
    shift, scale, gate = (tokens(row) for _ in range(3))
    norm, mlp = NORMS["layer"](width), MLPS["gelu"](width, width if nested else 4 * width).to(device)
    normed: dict[str, Way] = {
        "plain": (lambda x, *rows: modulate(norm(x), *rows), [x, shift, scale]),
        "own": (lambda x, *rows: norm_modulate(x, norm, *rows)[1], [x, shift, scale]),
    }
    gated: dict[str, Way] = {"plain": (torch.addcmul, [x, gate, branch]), "own": (gate_residual, [x, gate, branch])}
    pieces: dict[str, tuple[dict[str, Way], int]] = {"norm and modulate": (normed, 3 * WHOLE + 2 * HALF)}
    pieces["gate"] = gated, 3 * WHOLE + 3 * HALF
    if nested:
        grid, kernel = tokens(shape[0], width, *[round((shape[1] * shape[2]) ** 0.5)] * 2), tokens(width, 1, 3, 3)
        convolve, last = partial(F.conv2d, padding=1, groups=width), grid.to(memory_format=torch.channels_last)
        ways: dict[str, Way] = {
            "channels first": (convolve, [grid, kernel]),
            "channels last": (convolve, [last, kernel]),
        }
        pieces["depthwise 3x3"] = ways, 5 * HALF
    return pieces | {"MLP": ({"plain": (mlp, [branch])}, 5 * HALF)}


def _rate(
    cases: Cases, way: str, work: Callable[..., Tensor], inputs: list[Tensor], each: int, copied: float
) -> Values:
    """Rates of a function, eager, and compiled if it is plain PyTorch."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    autocast, rates = partial(torch.autocast, cases.device.type, torch.bfloat16), {}
    compiled = torch.compile(work, backend="aot_eager" if cases.tiny else "inductor", dynamic=False)
    for how, function in (("eager", work), ("compiled", compiled))[: 1 if way == "own" else 2]:
        called = autocast()(function)
        grad = torch.randn_like(called(*leaves))
        seconds = seconds_of(partial(_passes, called, leaves, grad), cases.device, 0.2)
        rates[how] = each * max(x.numel() for x in inputs) / seconds
    says = ", ".join(f"{how} {rate / copied:.2f}" for how, rate in rates.items())
    return {"says": f"{way} {says}", "bytes_per_second": rates, "copy": copied}


def _passes(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(function(*leaves), leaves, grad)


def _attention(cases: Cases, length: int) -> Values:
    """Attention within groups: of the bandwidth of a copy, the best share without and with a backward pass."""
    from dit_in_dit.benchmark.attention import group_times

    tokens, width, heads = (2**8, 128, 16) if cases.tiny else (2**18, 1152, 16)
    how = torch.bfloat16, cases.device, 0.1 if cases.tiny else 2.0
    copy, forward, trained = group_times(length, tokens, width, heads, *how)
    shares = {name: copy.seconds / times.seconds for name, times in forward.items()}
    # Forward and backward pass read q, k, v and read them again with the gradient; they write four tensors.
    both = {name: 11 / 4 * copy.seconds / times.seconds for name, times in trained.items()}
    says = ", ".join(f"{name} {share:.2f} (trained {both[name]:.2f})" for name, share in shares.items())
    return {"says": f"{length} tokens: {says} of copy", "share": max(shares.values()), "trained": both}
