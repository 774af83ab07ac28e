"""The Triton kernel against the plain formula: in Triton's interpreter on a CPU, and on a GPU if there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from conftest import inputs, perturbed, small_model
from dit_in_dit.model.kernels import KERNELS, Kernels
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.tiny import packed_tiny_attention, tiny_attention, tiny_fits

triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton==3.7.1")
# groups, heads, tokens, channels of a head: tiles that are full, half empty, and the last of which has groups missing
SHAPES = [(8, 2, 4, 16), (5, 3, 4, 8), (3, 2, 16, 16), (7, 1, 9, 24), (2, 2, 64, 32), (1, 1, 1, 72), (3, 1, 2, 128)]
SHAPES += [(9, 4, 4, 72), (5, 2, 16, 72), (2, 3, 5, 20), (3, 1, 7, 96), (2, 2, 16, 100), (4, 1, 3, 5)]


def in_double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def check(shape: tuple[int, ...], device: str, dtype: torch.dtype, error: float, *, apart: bool = False) -> None:
    """Check outputs and gradients, for heads split from one tensor as in a model, or for separate tensors (`apart`)."""
    groups, heads, length, width = shape
    draw = torch.Generator().manual_seed(0)
    qkv, grad = (torch.randn(groups, length, n, heads, width, generator=draw).to(device, dtype) for n in (3, 1))
    qkv.requires_grad_()
    results = []
    for formula in (tiny_attention, in_double, packed_tiny_attention):
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if apart:
            k = k.clone(memory_format=torch.contiguous_format)
        assert tiny_fits(q, k)
        out = formula(qkv) if formula is packed_tiny_attention else formula(q, k, v)
        results.append((out, *torch.autograd.grad(out, qkv, grad[:, :, 0].transpose(1, 2).to(out))))
    for found, expected in [*zip(*results[:2], strict=True), *zip(*results[:0:-1], strict=True)]:
        assert found.shape == expected.shape
        distance = (found - expected).norm() / expected.norm().clamp(min=1e-3)
        assert distance < error, (shape, float(distance))


@triton
@pytest.mark.slow
def test_the_kernel_equals_softmax_attention_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_kernel_equals_softmax_attention_on_a_gpu(shape, dtype, error):
    check(shape, "cuda", dtype, error)


@triton
@pytest.mark.slow
@pytest.mark.parametrize(("length", "heads", "width"), [(4, 16, 72), (16, 4, 32), (4, 2, 16), (4, 8, 96), (4, 3, 8)])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_every_load_and_store_on_sm_90_has_16_bytes(name, length, heads, width):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from dit_in_dit.model import tiny_kernel

    kernel = getattr(tiny_kernel, name)
    alone, packed = ((length * n * heads * width, width, n * heads * width) for n in (1, 3))
    strides = {"stride": packed, "grad": alone, "out": alone if name == "forward" else packed}
    known = {**tiny_kernel.tiles(length, width), "ALIGN": 8}
    values = {f"{of}_{axis}": step for of, steps in strides.items() for axis, step in zip("bhl", steps, strict=True)}
    values |= {"groups": 1 << 20, "heads": heads, "length": length}
    signature, constants, aligned = {}, {}, {}
    for at, argument in enumerate(kernel.arg_names):
        if argument in known:
            signature[argument], constants[at,] = "constexpr", known[argument]
        elif argument.endswith("_at"):
            signature[argument], aligned[at,] = "*bf16", [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
            if values.get(argument, 1) % 16 == 0:
                aligned[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiny_kernel.WARPS})
    moved = set(re.findall(r"(?:ld|st)\.global\S*", made.asm["ptx"]))
    assert moved == {"ld.global.v4.b32", "st.global.v4.b32"}


def test_inputs_outside_the_kernels_limits_go_to_pytorch():
    q = torch.zeros(2, 2, 4, 8)
    for queries, keys in (
        (q[:, :, :1], q),  # pooling: fewer queries than keys
        (torch.zeros(1, 1, 65, 8),) * 2,
        (torch.zeros(1, 1, 4, 136),) * 2,
        (q.double(),) * 2,
    ):
        assert not tiny_fits(queries, keys)


def test_the_kernel_is_off_by_default():
    assert KERNELS == {}


def check_model() -> None:
    """Check that a model gives the same results with the kernel, which also computes the outer attention."""
    model = perturbed(NestedDiT(small_model("inner outer inner")))
    results = []
    for longest in (0, 8):
        KERNELS["cpu"] = Kernels(tiny_up_to=longest)
        out = model(*inputs(model.config))
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":  # in the interpreter
    for case in SHAPES:
        check(case, "cpu", torch.float32, 1e-5)
        check(case, "cpu", torch.float32, 1e-5, apart=True)
    check_model()
    torch.library.opcheck(packed_tiny_attention, [torch.randn(2, 4, 3, 2, 8, requires_grad=True)])
    torch.library.opcheck(tiny_attention, [torch.randn(2, 2, 4, 8, requires_grad=True) for _ in range(3)])
