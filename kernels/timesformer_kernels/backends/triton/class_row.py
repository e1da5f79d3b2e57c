# SPDX-License-Identifier: Apache-2.0
"""The class row where every group has a part of it: the parts are added in a fixed order, one program for one row."""

import triton
import triton.language as tl

from .device import power, store_sums

INFINITY = tl.constexpr(float("inf"))
GROUPS = tl.constexpr(16)  # parts read at a time


@triton.jit
def add_parts(ptr, first, step, groups, share_ptr, share_first, share_step, top, P: tl.constexpr):
    """Sum [D] over groups of share * row first + group * step of ptr [.., D] float32.

    share: 1 without share_ptr, else what lies there; with `top`, power(that - top).
    """
    BLOCK_D: tl.constexpr = P.BLOCK_D
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([GROUPS, BLOCK_D], tl.float32)
    for g0 in range(0, groups, GROUPS):
        group = g0 + tl.arange(0, GROUPS)
        keep = group < groups
        at = ptr + ((first + group * step) * P.D)[:, None] + d[None, :]
        x = tl.load(at, mask=keep[:, None] & (d < P.D)[None, :], other=0.0)
        if share_ptr is not None:
            share = tl.load(share_ptr + share_first + group * share_step, mask=keep, other=0.0)
            if top is not None:
                share = tl.where(keep, power(share - top, P), 0.0)
            x = x * share[:, None]
        acc += x
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["tokens", "heads", "groups"])
def class_forward(o_ptr, cls_ptr, top_ptr, weights_ptr, sums_ptr, tokens, heads, groups, P: tl.constexpr):
    """Row 0 of o [B, S, H, D] from cls_ptr [B, G, H, D]. Grid (batch * heads,).

    P.CLS == 2: their mean, or sum weighted by weights_ptr [B, G]. P.CLS == 3: one softmax over all groups, from the
    maxima and sums top_ptr [2, B, G, H]; its own go to sums_ptr [B, H, 2].
    """
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    batch = (pid // heads).to(tl.int64)
    first = batch * groups * heads + head
    if P.CLS == 2:
        if P.WEIGHTS:
            row = add_parts(cls_ptr, first, heads, groups, weights_ptr, batch * groups, 1, None, P)
        else:
            row = add_parts(cls_ptr, first, heads, groups, None, 0, 0, None, P) / groups
    else:
        tops = tl.full([GROUPS], -INFINITY, tl.float32)
        for g0 in range(0, groups, GROUPS):
            group = g0 + tl.arange(0, GROUPS)
            tops = tl.maximum(tops, tl.load(top_ptr + first + group * heads, mask=group < groups, other=-INFINITY))
        top = tl.max(tops, 0)
        sums = tl.zeros([GROUPS], tl.float32)
        sum_ptr = top_ptr + (tl.num_programs(0) * groups).to(tl.int64)
        for g0 in range(0, groups, GROUPS):
            group = g0 + tl.arange(0, GROUPS)
            keep = group < groups
            at = first + group * heads
            share = power(tl.load(top_ptr + at, mask=keep, other=-INFINITY) - top, P)
            sums += tl.where(keep, share * tl.load(sum_ptr + at, mask=keep, other=0.0), 0.0)
        total = tl.sum(sums, 0)
        row = add_parts(cls_ptr, first, heads, groups, top_ptr, first, heads, top, P) / total
        if P.STATS:
            store_sums(sums_ptr, batch * heads + head, top, total, None)
    d = tl.arange(0, P.BLOCK_D)
    at = o_ptr + (batch * tokens * heads + head) * P.D + d
    tl.store(at, row.to(o_ptr.dtype.element_ty), mask=d < P.D)


@triton.jit(do_not_specialize=["heads", "groups", "gb", "gh"])
def class_backward(dq_ptr, dk_ptr, dv_ptr, cls_ptr, heads, groups, gb, gh, P: tl.constexpr):
    """Row 0 of dq, dk and dv from cls_ptr [B, G, H, 3, D]; for P.CLS == 1 that of dq is zero. Grid (batch * heads,)."""
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    batch = (pid // heads).to(tl.int64)
    first = (batch * groups * heads + head) * 3
    d = tl.arange(0, P.BLOCK_D)
    at = (batch * gb + head * gh) * P.VEC + d
    if P.CLS == 1:
        row = (d * 0).to(tl.float32)
    else:
        row = add_parts(cls_ptr, first, heads * 3, groups, None, 0, 0, None, P)
    tl.store(dq_ptr + at, row.to(dq_ptr.dtype.element_ty), mask=d < P.D)
    row = add_parts(cls_ptr, first + 1, heads * 3, groups, None, 0, 0, None, P)
    tl.store(dk_ptr + at, row.to(dk_ptr.dtype.element_ty), mask=d < P.D)
    row = add_parts(cls_ptr, first + 2, heads * 3, groups, None, 0, 0, None, P)
    tl.store(dv_ptr + at, row.to(dv_ptr.dtype.element_ty), mask=d < P.D)
