# SPDX-License-Identifier: Apache-2.0
"""Attention of the class row alone, where nobody asks for the patches: the last block of a classifier.

One query needs neither keys nor values. With z the rows that q, k and v are made of, and per head,

    q . (W_k z_j) = (W_k^T q) . z_j            sum_j P_j (W_v z_j) = W_v sum_j P_j z_j

so that of a product of all rows with three matrices two small ones are left, of all rows with a vector per head. The
key's bias cancels in the softmax; the value's comes out as it is, as the weights of a row sum to 1. Exact in real
arithmetic, differentiable, and in 16 bits computed in float32 throughout, as scores in a kernel are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    z: Tensor,
    weight: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    *,
    heads: int,
    scale: float,
    groups: int,
    cls_weights: Tensor | None = None,
) -> Tensor:
    """The class row's attention output before its projection, [B, D], in the dtype of z.

    z: [B, S, D], row 0 the class row, then patches in order (n groups); it is a key and a query of every group, and its
    output their mean, or the sum weighted by cls_weights [B, groups]. weight: [3 D, D] of q, k and v; biases: [D] each.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    z, dim, out_dtype = z.to(dtype), z.shape[2], z.dtype
    to_q, to_k, to_v = weight.to(dtype).view(3, heads, -1, dim).unbind()
    q = torch.einsum("bi,hdi->bhd", z[:, 0], to_q)
    if q_bias is not None:
        q = q + q_bias.to(dtype).view(heads, -1)
    along = torch.einsum("bhd,hdi->bhi", q * scale, to_k)
    scores = z @ along.mT  # [B, S, H]
    own, others = scores[:, :1, None], scores[:, 1:].unflatten(1, (-1, groups))  # [B, 1, 1, H], [B, N, G, H]
    p = torch.cat([own.expand(-1, 1, groups, -1), others], 1).softmax(1)
    shares = p.new_full((1, groups), 1 / groups) if cls_weights is None else cls_weights.to(dtype)
    p = p * shares[:, None, :, None]
    p = torch.cat([p[:, :1].sum(2), p[:, 1:].flatten(1, 2)], 1)  # [B, S, H]
    out = torch.einsum("bhi,hdi->bhd", p.mT @ z, to_v).flatten(1)
    if v_bias is not None:
        out = out + v_bias.to(dtype) * shares.sum(1, keepdim=True)
    return out.to(out_dtype)
