# SPDX-License-Identifier: Apache-2.0
"""The fused steps in C++ (csrc/cpu/steps.cpp): strided rows in place, deterministic. Results are allocated here.

Operands arrive checked, [B, S, D] with a unit last stride; results are contiguous.
"""

from __future__ import annotations

import torch

from .. import native_steps as native
from ..mounting import fresh


def add_layer_norm_fwd(
    x, branch, weight, bias, row_scale, eps: float, skip_cls: bool, *, branch_bias=None, total=None, out=None
):
    """-> (sum [B, S, D], None without a branch; normed [B, S, D]), in the dtype of x.

    branch_bias [D], in the dtype of x: added to every row of the branch. total, out: where the results go, contiguous;
    total may be x, and out x or branch.
    """
    if branch is not None and total is None:
        total = fresh(x)
    out = fresh(x) if out is None else out
    operands = dict(branch=branch, weight=weight, bias=bias, branch_bias=branch_bias, row_scale=row_scale)
    native.run(native.ADD_LAYER_NORM_FWD, x, total=total, out=out, eps=eps, skip_cls=skip_cls, **operands)
    return total, out


def add_layer_norm_bwd(dsum, dnormed, total, weight, row_scale, eps: float, skip_cls: bool, branch_dtype):
    """-> (dx, dbranch, None without a branch_dtype; dweight, dbias). dsum may be None."""
    dx = fresh(total)
    dbranch = None if branch_dtype is None else total.new_empty(total.shape, dtype=branch_dtype)
    if total.numel() == 0:
        return dx, dbranch, torch.zeros_like(weight), torch.zeros_like(weight)
    dweight, dbias = fresh(weight), fresh(weight)
    operands = dict(dout=_unit(dnormed), dsum=_unit(dsum), weight=weight, row_scale=row_scale, eps=eps)
    results = dict(dx=dx, dbranch=dbranch, dweight=dweight, dbias=dbias)
    native.run(native.ADD_LAYER_NORM_BWD, total, skip_cls=skip_cls, **operands, **results)
    return dx, dbranch, dweight, dbias


def bias_gelu_fwd(x, bias, *, out=None):
    """x [B, S, D] -> out [B, S, D]: fresh memory, or what is given, which may be x."""
    out = fresh(x) if out is None else out
    native.run(native.BIAS_GELU_FWD, x, bias=bias, out=out)
    return out


def bias_gelu_bwd(dout, x, bias):
    """dout, x [B, S, D] -> (dx, dbias)."""
    dx = fresh(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(bias)
    dbias = fresh(bias)
    native.run(native.BIAS_GELU_BWD, x, dout=_unit(dout), bias=bias, dx=dx, dbias=dbias)
    return dx, dbias


def _unit(dout):
    """A gradient whose rows are contiguous: sum().backward() hands in an expanded scalar."""
    return dout if dout is None or dout.stride(2) == 1 or dout.shape[2] == 1 else dout.contiguous()
