# SPDX-License-Identifier: Apache-2.0
"""Operands and float64 oracles of the fused steps, residual sum + LayerNorm and bias + GELU."""

import math
from functools import partial

import pytest
import torch
from oracle import assert_no_worse, device_of

from timesformer_kernels import fused, native
from timesformer_kernels.fused import add_layer_norm, bias_gelu

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRADIENTS = ("dx", "dbranch", "dweight", "dbias")


CPP = tuple(("cpp", isa) for isa in native.isas()) or ("cpp",)  # once per instruction set that this chip runs


def name_of(engine):
    return engine if isinstance(engine, str) else "-".join(engine)


def served(engine):
    """For a fixture: the name of an engine that can run, its instruction set forced meanwhile."""
    name, isa = (engine, None) if isinstance(engine, str) else engine
    able(name)
    before = native.isa() if isa else None
    if isa:
        native.force_isa(isa)
    yield name
    if isa:
        native.force_isa(before)


def able(name):
    """The name, or a skip with the reason why the steps cannot run there."""
    if reason := fused.why_not(name, device_of(name), torch.float32, 8):
        pytest.skip(f"{name}: {reason}")
    return name


def randn(*shape, seed, dtype=torch.float32, device="cpu"):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(device, dtype)


def operands(engine, B, S, D, dtype=torch.float32, branch_dtype=None, weight_dtype=None, spread=1.0):
    """x, branch, weight, bias."""
    device = device_of(engine)
    return [
        randn(B, S, D, seed=0, dtype=dtype, device=device) * spread + 0.5,
        randn(B, S, D, seed=1, dtype=branch_dtype or dtype, device=device),
        randn(D, seed=2, dtype=weight_dtype or dtype, device=device),
        randn(D, seed=3, dtype=weight_dtype or dtype, device=device),
    ]


# The oracles: the formulas, spelled out. In float64 they are exact, in the dtype under test they are plain torch. The
# yardstick of the reference is torch's own LayerNorm, which is less exact where the mean outweighs the deviation.


def norm_oracle(x, branch, weight, bias, eps=1e-6, skip_cls=False, row_scale=None, own=False):
    total = x
    if branch is not None:
        branch = branch.to(x.dtype)
        if row_scale is not None:
            branch = branch * row_scale.to(x.dtype).view(x.shape[0], -1, 1)
        if skip_cls:
            takes = torch.arange(x.shape[1]).view(1, -1, 1) > 0
            branch = torch.where(takes, branch, torch.zeros_like(branch))
        total = x + branch
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    if own:
        weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
        return total, torch.nn.functional.layer_norm(wide, weight.shape, weight, bias, eps).to(x.dtype)
    mean = wide.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((wide - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return total, (((wide - mean) / (variance + eps).sqrt()) * weight + bias).to(x.dtype)


def gelu_oracle(x, bias):
    u = x + bias
    return (u * 0.5 * (1 + torch.special.erf(u / math.sqrt(2)))).to(x.dtype)


def gradients(run, inputs, douts):
    """[*results, *gradients] of run(*inputs), which gives a tensor or a tuple; None stays None."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    pairs = [(y, d) for y, d in zip(out, douts, strict=True) if d is not None]
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad([y for y, _ in pairs], wanted, [d.to(y) for y, d in pairs])
    return [x.detach().cpu() for x in (*out, *grads)]


def check(run, oracle, inputs, douts, names, plain=None):
    """Values and gradients of run against the oracle, by the one error rule; `plain` is the yardstick, if another."""
    got = gradients(run, inputs, douts)
    cpu = [None if x is None else x.detach().cpu() for x in inputs]
    douts = [None if d is None else d.cpu() for d in douts]
    exact = gradients(oracle, [None if x is None else x.double() for x in cpu], douts)
    eager = gradients(plain or oracle, cpu, douts)
    for name, *trio in zip(names, got, exact, eager, strict=True):
        assert_no_worse(name, *trio)


def check_norm(engine, inputs, dsum=True, dnormed=True, **options):
    x = inputs[0]
    wanted = (dsum, 7), (dnormed, 8)
    douts = [randn(*x.shape, seed=seed, device=x.device) if want else None for want, seed in wanted]
    on_cpu = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    names = ["sum", "normed", *(name for name, t in zip(GRADIENTS, inputs, strict=True) if t is not None)]
    run = partial(add_layer_norm, backend=engine, **options)
    oracle, plain = (partial(norm_oracle, **on_cpu, own=own) for own in (False, engine == "reference"))
    if not dnormed:  # the sum alone has no gradient for weight and bias
        names, rest = ["sum", *names[2:4]], inputs[2:]
        run, oracle, plain = (lambda *x, f=f: f(*x, *(t.to(x[0]) for t in rest))[0] for f in (run, oracle, plain))
        inputs, douts = inputs[:2], douts[:1]
    check(run, oracle, inputs, douts, names, plain)


def check_gelu(engine, x, bias):
    dout = randn(*x.shape, seed=9, device=x.device)
    check(partial(bias_gelu, backend=engine), gelu_oracle, [x, bias], [dout], ("out", "dx", "dbias"))


def row_scale(engine, *shape):
    """Factors of stochastic depth: some rows dropped, the others scaled up."""
    kept = (randn(*shape, seed=5) > -0.5).float() / 0.7
    return kept.to(device_of(engine))


def strided(x, how):
    """A tensor of the values of x [B, S, D] that lies differently in memory."""
    B, S, D = x.shape
    if how == "gaps":  # every second token, a slice of wider rows
        wide = x.new_full((B, 2 * S, D + 16), float("nan"))
        view = wide[:, ::2, 8 : 8 + D]
    elif how == "misaligned":
        view = x.new_full((B, S, D + 3), float("nan"))[..., 1 : 1 + D]
    elif how == "odd-clips":  # rows of a clip aligned with one another, clips not
        view = x.new_full((B * (S * D + 1),), float("nan")).as_strided((B, S, D), (S * D + 1, D, 1))
    elif how == "transposed":
        view = x.new_full((S, B, D), float("nan")).transpose(0, 1)
    else:  # "patches": the rows behind a class row
        view = x.new_full((B, S + 1, D), float("nan"))[:, 1:]
    return view.copy_(x)
