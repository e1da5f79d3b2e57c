# SPDX-License-Identifier: Apache-2.0
"""What interpreter.py changes in Triton's interpreter: it finds what it found before, and computes the same."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def integers(a, b, out, operation: tl.constexpr):
    x, y = tl.load(a + tl.arange(0, 2)), tl.load(b + tl.arange(0, 2))
    if operation == "add":
        result = plus(x, y)
    elif operation == "sub":
        result = x - y
    else:
        result = x * y
    tl.store(out + tl.arange(0, 2), result)


@triton.jit
def largest_product(a, b, out):
    i = tl.arange(0, 16)
    tile = i[:, None] * 16 + i[None, :]
    product = tl.dot(tl.load(a + tile), tl.load(b + tile))
    tl.store(out + i, tl.max(product, axis=1))


LIMIT = {torch.int32: 2**31, torch.int16: 2**15}
CASES = [("add", "max", 0, 1), ("sub", "min", 0, 1), ("mul", "max", 1, 2)]


@pytest.mark.parametrize("dtype", LIMIT, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("operation, end, inside, outside", CASES, ids=[case[0] for case in CASES])
def test_an_overflow_is_an_error(operation, end, inside, outside, dtype):
    edge = LIMIT[dtype] - 1 if end == "max" else -LIMIT[dtype]
    a = torch.tensor([0, edge], dtype=dtype)
    out = torch.empty_like(a)
    integers[(1,)](a, torch.tensor([inside, inside], dtype=dtype), out, operation)
    assert out.tolist() == [0 if operation == "mul" else inside, edge]
    with pytest.raises(Exception, match=f"int{dtype.itemsize * 8} overflow in {operation}"):
        integers[(1,)](a, torch.tensor([inside, outside], dtype=dtype), out, operation)


def test_the_language_is_its_own_again_after_a_launch():
    before = tl.load, tl.range, tl.tensor.__add__
    a = torch.ones(2, dtype=torch.int32)
    integers[(1,)](a, a, torch.empty_like(a), "add")
    assert (tl.load, tl.range, tl.tensor.__add__) == before


def test_products_are_rounded_once():
    """And functions of the standard library (max) work inside a kernel that names `triton.language` alone."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator) for _ in range(2))
    out = torch.empty(16)
    largest_product[(1,)](a, b, out)
    assert torch.equal(out, (a.double() @ b.double()).float().amax(1))
