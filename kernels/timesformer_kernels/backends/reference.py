# SPDX-License-Identifier: Apache-2.0
"""The specification: the shortest correct program, in plain differentiable torch, for any dtype and device.

When this file and a kernel disagree, read this file first. It forms the probabilities and copies its operands; it is
not meant to be fast. Everything is computed in at least float32 (paper, equations 5 to 7).
"""

from __future__ import annotations

import torch
from torch import Tensor, einsum
from torch.nn.functional import dropout

from ..grid import View
from ..registry import Backend


def _parts(view: View, tokens: int, device) -> list[tuple[Tensor, Tensor]]:
    """Who attends to whom: pairs of token rows, queries [G, L] and keys [G, M]."""
    rows = view.rows(device)
    with_cls = torch.cat([rows.new_zeros(len(rows), 1), rows], 1)
    if view.cls == "per_group":
        return [(with_cls, with_cls)]
    if view.cls == "key":
        return [(rows, with_cls)]
    if view.cls == "global":
        return [(rows, with_cls), (rows.new_zeros(1, 1), torch.arange(tokens, device=device)[None])]
    return [(rows, rows)]


def _share(view: View, queries: Tensor, cls_weights: Tensor | None, like: Tensor) -> Tensor:
    """What a group's output counts for in its row: [B or 1, G, L, 1, 1], 1 but for the class row of "per_group"."""
    share = like.new_ones(1, *queries.shape)
    if view.cls == "per_group":
        mean = like.new_full((1, len(queries)), 1 / max(len(queries), 1))
        weights = mean if cls_weights is None else cls_weights.to(like.dtype)
        share = torch.cat([weights[..., None], share[:, :, 1:].expand(len(weights), -1, -1)], 2)
    return share[..., None, None]


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _put(rows: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """values [B, G, L, H, D] added into their token rows: [B, S, H, D]."""
    return like.new_zeros(like.shape).index_add(1, rows.flatten(), values.flatten(1, 2))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: View,
    scale: float,
    cls_weights: Tensor | None = None,
    dropout_p: float = 0.0,
    average_cls: bool = True,
):
    """Attention over `view`: q, k, v [B, S, H, D] -> out [B, S, H, D].

    dropout_p drops attention probabilities. With average_cls=False (class mode "per_group" only) the result is
    (out, cls_out [B, G, H, D]): the class row of every group on its own, and row 0 of out is zero.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):  # it would narrow the products again
            return attend(q, k, v, view, scale, cls_weights, dropout_p, average_cls)
    dtype = q.dtype
    q, k, v = _wide(q, k, v)
    out = q.new_zeros(q.shape)
    for queries, keys in _parts(view, q.shape[1], q.device):
        p = (einsum("bglhd,bgmhd->bghlm", q[:, queries], k[:, keys]) * scale).softmax(-1)
        o = einsum("bghlm,bgmhd->bglhd", dropout(p, dropout_p), v[:, keys])
        if not average_cls:
            return _put(queries[:, 1:], o[:, :, 1:], q).to(dtype), o[:, :, 0].to(dtype)
        out = out + _put(queries, o * _share(view, queries, cls_weights, q), q)
    return out.to(dtype)


def forward(q, k, v, view, scale, cls_weights, stats=None):
    return attend(q, k, v, view, scale, cls_weights).contiguous()


def backward(dout, q, k, v, view, scale, cls_weights, grads=None, saved=None):
    """The formula written out, for where autograd cannot look: inside a registered op."""
    dtype = q.dtype
    q, k, v, dout = _wide(q, k, v, dout)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for queries, keys in _parts(view, q.shape[1], q.device):
        qg, kg, vg = q[:, queries], k[:, keys], v[:, keys]
        do = dout[:, queries] * _share(view, queries, cls_weights, q)
        p = (einsum("bglhd,bgmhd->bghlm", qg, kg) * scale).softmax(-1)
        dp = einsum("bglhd,bgmhd->bghlm", do, vg)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq += _put(queries, einsum("bghlm,bgmhd->bglhd", ds, kg), q)
        dk += _put(keys, einsum("bghlm,bglhd->bgmhd", ds, qg), k)
        dv += _put(keys, einsum("bghlm,bglhd->bgmhd", p, do), v)
    grads = grads or tuple(q.new_empty(q.shape, dtype=dtype) for _ in range(3))
    for grad, x in zip(grads, (dq, dk, dv), strict=True):
        grad.copy_(x)
    return grads


def why_not(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    return None  # any dtype, any device


BACKEND = Backend("reference", forward, backward, why_not)
