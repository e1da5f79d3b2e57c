# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas of the ops for `torch.utils.flop_counter.FlopCounterMode`; importing this file registers them.

It is imported by itself where the counter was imported before this package. Not otherwise: the counter imports Triton,
and this package must load beside a missing, slow or broken one.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from .grid import View


@register_flop_formula(torch.ops.timesformer_kernels.attn_fwd)
def forward_flops(q, k, v, groups, sequence, cls, *_, out_shape=None, **__) -> int:
    """Two products of 2 head_dim FLOP for each query-key pair."""
    (batch, tokens, heads, head_dim), view = q, View.from_flat(groups, sequence, cls)
    queries = view.length + int(cls == "per_group")
    pairs = view.num_groups * queries * (view.length + int(cls in ("per_group", "key", "global")))
    return 4 * batch * heads * head_dim * (pairs + (tokens if cls == "global" else 0))


@register_flop_formula(torch.ops.timesformer_kernels.attn_bwd)
def backward_flops(dout, q, k, v, out, stats, *args, out_shape=None, **kwargs) -> int:
    """Five products against two: the scores once more, dP, dV, dQ and dK."""
    return forward_flops(q, k, v, *args, **kwargs) * 5 // 2
