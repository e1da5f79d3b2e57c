# SPDX-License-Identifier: Apache-2.0
"""Linears that make their input anew: the numbers of ordinary ones, under autocast and twice differentiated too."""

import blocks
import pytest
import torch
from oracle import assert_no_worse
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from timesformer.layers import plain
from timesformer.model import DividedBlock
from timesformer.recompute import Source, linear, segment


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def block_of(generator, dtype=torch.float64, backend="auto"):
    block = DividedBlock(16, 32, drop=0.0, layer_norm_eps=1e-6, num_heads=2)
    block.backend = backend
    return blocks.randomise(block.to(dtype), generator)


def oracle(p, x, frames=3):
    return blocks.mlp(p, "", blocks.divided(p, "", x, frames, 2))


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(7, 4), (2, 7, 4), (2, 0, 4)], ids=str)
def test_linear(generator, bias, shape):
    """Gradients of input, weight and bias, although the input is not kept: it is zeroed before the backward."""
    layer = nn.Linear(4, 5, bias).double()
    x, dout = randn(generator, *shape).requires_grad_(), randn(generator, *shape[:-1], 5)
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x.sin()), wanted, dout)
    y = x.sin()
    out = linear(layer, y, Source(torch.sin, (x,)))
    with torch.no_grad():
        y.zero_()
    for got, exact in zip(torch.autograd.grad(out, wanted, dout), expected, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_what_needs_no_gradient_gets_none(generator, frozen):
    layer, x = nn.Linear(4, 5).double(), randn(generator, 7, 4).requires_grad_(frozen != "x")
    if frozen != "x":
        getattr(layer, frozen).requires_grad_(False)
    linear(layer, x.sin(), Source(torch.sin, (x,))).sum().backward()
    for name, t in (("weight", layer.weight), ("bias", layer.bias), ("x", x)):
        assert (t.grad is None) == (name == frozen)


def test_second_derivatives(generator):
    """Of a block on the reference, which has them: against the independent block."""
    block = block_of(generator, backend="reference")
    x, v = randn(generator, 2, 13, 16), randn(generator, 2, 13, 16)
    results = []
    for run in (lambda y: block(y, 3), lambda y: oracle(dict(block.named_parameters()), y)):
        y = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # of the oracle: the others have no second derivatives
            (dx,) = torch.autograd.grad(run(y).square().sum(), y, create_graph=True)
        results.append(torch.autograd.grad((dx * v).sum(), [y, *block.parameters()], allow_unused=True))
    for got, exact in zip(*results, strict=True):
        assert (got is None) == (exact is None)
        if got is not None:
            torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mode", ["none", "light"])
def test_autocast_by_the_rule(generator, mode):
    """Values and gradients under autocast, against float64, within the rule's factor of plain torch under autocast."""
    block = block_of(generator, torch.float32)
    block.checkpoint = mode
    x, dout = randn(generator, 2, 13, 16).float(), randn(generator, 2, 13, 16).float()

    def step(run, parameters, x, dtype=None):
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            out = run(y)
        return [out.detach(), *torch.autograd.grad(out, [y, *parameters], dout.to(out.dtype))]

    got = step(lambda y: block(y, 3), block.parameters(), x)
    plain = {n: p.detach().clone().requires_grad_() for n, p in block.named_parameters()}
    exact = {n: p.detach().double().requires_grad_() for n, p in block.named_parameters()}
    eager = step(lambda y: oracle(plain, y), plain.values(), x)
    truth = step(lambda y: oracle(exact, y), exact.values(), x.double(), torch.float64)
    for name, a, b, c in zip(["out", "dx", *plain], got, truth, eager, strict=True):
        assert_no_worse(name, a, b, c)


def test_a_segment_runs_its_last_product_once(generator):
    """What it saves last is saved before the product that needs it runs again."""
    calls = []
    x, w = randn(generator, 3, 4).requires_grad_(), randn(generator, 4, 4).requires_grad_()

    def run(x):
        calls.append("sin")
        return nn.functional.linear(x.sin(), w)

    with torch.profiler.profile() as trace:
        segment(True, run, x).sum().backward()
    assert calls == ["sin", "sin"]
    expected = torch.autograd.grad(nn.functional.linear(x.sin(), w).sum(), [x, w])
    assert all(torch.equal(a, b) for a, b in zip((x.grad, w.grad), expected, strict=True))
    assert sum(e.count for e in trace.key_averages() if e.key == "aten::sin") == 2


def test_who_is_plain():
    layer = nn.Linear(2, 2)
    assert plain(layer) and not plain(nn.Sequential()) and plain(nn.LayerNorm(2), nn.LayerNorm)
    assert not plain(type("Adapter", (nn.Linear,), {})(2, 2))
    layer.forward = lambda x: x
    assert not plain(layer)
