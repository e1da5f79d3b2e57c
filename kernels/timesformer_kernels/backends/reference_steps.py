# SPDX-License-Identifier: Apache-2.0
"""The specification of the fused steps in plain torch, for any dtype and device; the forwards are differentiable.

Operands are [B, S, D]. Everything is computed in at least float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_token(row_scale: Tensor, first: int = 0) -> Tensor:
    """[B] or [B, S] -> a factor of [B, S - first, D]: of the tokens from `first` on."""
    return row_scale[:, None, None] if row_scale.dim() == 1 else row_scale[:, first:, None]


def add_layer_norm_fwd(x, branch, weight, bias, row_scale, eps, skip_cls):
    total = None
    if branch is not None:
        first = int(skip_cls)
        part = _wide(branch[:, first:])
        if row_scale is not None:
            part = part * _per_token(row_scale, first)
        total = (_wide(x[:, first:]) + part).to(x.dtype).contiguous()
        if skip_cls:
            total = torch.cat([x[:, :1], total], 1)
    row = _wide(x if total is None else total)
    normed = F.layer_norm(row, row.shape[-1:], weight.to(row.dtype), bias.to(row.dtype), eps)
    return total, normed.to(x.dtype).contiguous()


def add_layer_norm_bwd(dsum, dnormed, total, weight, row_scale, eps, skip_cls, branch_dtype):
    """The formula written out, for where autograd cannot look: inside a registered op."""
    row, dout = _wide(total), _wide(dnormed)
    centred = row - row.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    score, dscore = centred * rstd, dout * weight.to(row.dtype)
    dx = rstd * (dscore - dscore.mean(-1, keepdim=True) - score * (dscore * score).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + dsum
    dbranch = None
    if branch_dtype is not None:
        dbranch = dx if row_scale is None else dx * _per_token(row_scale)
        dbranch = dbranch.to(branch_dtype, copy=True, memory_format=torch.contiguous_format)
        if skip_cls:
            dbranch[:, :1] = 0
    dweight, dbias = (g.sum((0, 1)).to(weight.dtype) for g in (dout * score, dout))
    return dx.to(total.dtype).contiguous(), dbranch, dweight, dbias


def bias_gelu_fwd(x, bias):
    return F.gelu(_wide(x) + _wide(bias)).to(x.dtype).contiguous()


def bias_gelu_bwd(dout, x, bias):
    dx = torch.ops.aten.gelu_backward(_wide(dout), _wide(x) + _wide(bias))
    return dx.to(x.dtype).contiguous(), dx.sum((0, 1)).to(bias.dtype)
