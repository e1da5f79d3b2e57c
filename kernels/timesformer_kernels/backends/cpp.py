# SPDX-License-Identifier: Apache-2.0
"""C++ kernels on the CPU (csrc/cpu): strided operands in place, output in the model's layout, deterministic."""

from __future__ import annotations

import torch

from .. import native
from ..mounting import fresh
from ..registry import Backend


def forward(q, k, v, view, scale, cls_weights, stats=None, *, out=None, q_bias=None):
    """out: where the result goes, contiguous. q_bias [H, D], contiguous, in the dtype of q: added to every query."""
    out = fresh(q) if out is None else out
    native.attention(q, k, v, out, view, scale, _dense(cls_weights), q_bias=q_bias)
    return out


def backward(dout, q, k, v, view, scale, cls_weights, grads=None, saved=None):
    if dout.stride(3) != 1 and dout.shape[3] > 1:  # y.sum().backward() hands in an expanded scalar
        dout = dout.contiguous()
    grads = grads or (fresh(q), fresh(q), fresh(q))
    native.attention(q, k, v, None, view, scale, _dense(cls_weights), (dout, *grads))
    return grads


def _dense(cls_weights):
    return None if cls_weights is None else cls_weights.contiguous()


def why_not(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device_type != "cpu":
        return f"its kernels run on cpu, not on {device_type}"
    if dtype not in native.DTYPE_CODES:
        return f"no kernel for {dtype}"
    return native.library()[1]


BACKEND = Backend("cpp", forward, backward, why_not)
