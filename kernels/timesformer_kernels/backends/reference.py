# SPDX-License-Identifier: Apache-2.0
"""The specification: the shortest correct program, in plain differentiable torch, for any dtype and device.

When this file and a kernel disagree, read this file first. It forms the probabilities and copies its operands; it is
not meant to be fast. Scores and softmax are computed in at least float32 (paper, equations 5 to 7).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..grid import View
from ..registry import Backend


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """q [B, G, L, H, D] over k, v [B, G, M, H, D] -> [B, G, L, H, D]."""
    p = (torch.einsum("bglhd,bgmhd->bghlm", q, k) * scale).softmax(-1)
    return torch.einsum("bghlm,bgmhd->bglhd", dropout(p, dropout_p), v)


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
    dtype, rows = q.dtype, view.rows(q.device)
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    groups, length = rows.shape
    qg, kg, vg = (x[:, rows] for x in (q, k, v))  # [B, G, L, H, D]
    if view.cls in ("per_group", "key", "global"):
        kg, vg = (torch.cat([x[:, :1, None].expand(-1, groups, -1, -1, -1), xg], 2) for x, xg in ((k, kg), (v, vg)))
    if view.cls == "per_group":
        qg = torch.cat([q[:, :1, None].expand(-1, groups, -1, -1, -1), qg], 2)

    og = _attend(qg, kg, vg, scale, dropout_p)
    cls_row = torch.zeros_like(q[:, :1])
    if view.cls == "per_group":
        cls_out, og = og[:, :, 0], og[:, :, 1:]  # [B, G, H, D], [B, G, L, H, D]
        if average_cls:
            weights = cls_out.new_full((len(q), groups), 1 / max(groups, 1)) if cls_weights is None else cls_weights
            cls_row = torch.einsum("bg,bghd->bhd", weights.to(cls_out.dtype), cls_out)[:, None]
    elif view.cls == "global":
        cls_row = _attend(q[:, None, :1], k[:, None], v[:, None], scale, dropout_p)[:, 0]

    patches = og.flatten(1, 2)[:, rows.flatten().argsort()]  # back to token order
    out = (patches if view.cls == "none" else torch.cat([cls_row, patches], 1)).to(dtype)
    return out if average_cls else (out, cls_out.to(dtype))


def forward(q, k, v, view, scale, cls_weights):
    return attend(q, k, v, view, scale, cls_weights).contiguous()


def backward(dout, q, k, v, view, scale, cls_weights):
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad(attend(*inputs, view, scale, cls_weights), inputs, dout)
    return tuple(g.contiguous() for g in grads)


def why_not(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    return None  # any dtype, any device


BACKEND = Backend("reference", forward, backward, why_not)
