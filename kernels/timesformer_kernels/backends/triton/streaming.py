# SPDX-License-Identifier: Apache-2.0
"""Attention over sequences too long for one program to hold: space attention at 448 pixels, joint attention.

Keys and values pass by in blocks under an online softmax (FlashAttention-2, arXiv 2307.08691). The backward is two
kernels, one that owns queries and one that owns keys, so that every sum has one writer: no atomics, the same bits at
every run. The tiles of one head are neighbours in the grid and find its keys and values in the L2 cache.
"""

import triton
import triton.language as tl

from .device import (
    GRAD_STRIDES,
    INFINITY,
    QKV_STRIDES,
    VIEW,
    class_delta,
    class_gradient,
    inner,
    load_rows,
    load_sums,
    of_head,
    power,
    product,
    program_of_group,
    scaled,
    store_parts,
    store_rows,
    store_sums,
    store_zero_row,
    token_rows,
)

SIZES = ("tokens", "heads", "members", "tiles", "ln1", "ln2", *VIEW)


@triton.jit
def place_rows(place, members, group, where, P: tl.constexpr):
    """Token row of each place, that of the last member where there is none, and whether there is one."""
    return token_rows(group, tl.minimum(place, members - 1), where, P), place < members


@triton.jit
def seen(x, other, place, key, group, P: tl.constexpr):
    """`other` where the one softmax of the class row would count the class key again; place and key broadcast."""
    if P.CLS == 3:
        x = tl.where((place == 0) & (key == 0) & (group > 0), other, x)
    return x


@triton.jit
def attend(
    acc, top, total, q, place, k_ptr, v_ptr, ks, vs, start, stop, members, group, where, scale,
    TAIL: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from start to stop. TAIL: some of them may not exist."""
    for n0 in range(start, stop, P.BLOCK_N):
        key = n0 + tl.arange(0, P.BLOCK_N)
        row, exists = place_rows(key, members, group, where, P)
        k = load_rows(k_ptr, row, ks, exists if TAIL else None, P)
        s = scaled(inner(q, k, P), scale, P)
        if TAIL:
            s = tl.where(exists[None, :], s, -INFINITY)
        s = seen(s, -INFINITY, place[:, None], key[None, :], group, P)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher > -INFINITY, higher, 0.0)  # -inf so far is no NaN yet
        e = power(s - base[:, None], P)
        kept = power(top - base, P)
        total = total * kept + tl.sum(e, 1)
        v = load_rows(v_ptr, row, vs, exists if TAIL else None, P)
        acc = acc * kept[:, None] + product(e, v, P)
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=QKV_STRIDES + SIZES)
def streaming_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, cls_ptr, top_ptr, sums_ptr,
    qb, qs, qh, kb, ks, kh, vb, vs, vh,
    tokens, heads, members, tiles, groups, gn1, gn2, gs0, gs1, gs2, ln1, ln2, ls0, ls1, ls2, scale,
    P: tl.constexpr,
):  # fmt: skip
    """o [B, S, H, D] for a tile of queries. Grid (batch * groups * heads * tiles,); pointers as in resident_forward."""
    head, tile, group, batch = program_of_group(heads, tiles, groups)
    where = (groups, gn1, gn2, gs0, gs1, gs2, ln1, ln2, ls0, ls1, ls2)
    k_ptr = of_head(k_ptr, kb, kh, batch, head, P)
    v_ptr = of_head(v_ptr, vb, vh, batch, head, P)
    o_ptr += (batch * tokens * heads + head) * P.D
    if P.FIRST == 1 and P.CLS < 2:
        if (tile == 0) & (group == 0):
            store_zero_row(o_ptr, P)
    place = P.SKIP + tile * P.BLOCK_M + tl.arange(0, P.BLOCK_M)
    row, exists = place_rows(place, members, group, where, P)
    q = load_rows(of_head(q_ptr, qb, qh, batch, head, P), row, qs, None, P)
    BLOCK_M: tl.constexpr = P.BLOCK_M
    BLOCK_D: tl.constexpr = P.BLOCK_D
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = members // P.BLOCK_N * P.BLOCK_N
    acc, top, total = attend(
        acc, top, total, q, place, k_ptr, v_ptr, ks, vs, 0, whole, members, group, where, scale, False, P
    )
    acc, top, total = attend(
        acc, top, total, q, place, k_ptr, v_ptr, ks, vs, whole, members, members, group, where, scale, True, P
    )
    out = acc / total[:, None]
    store_rows(o_ptr, row, heads * (P.D // P.VEC), out, exists & (place >= (P.CLS > 0)), P)
    if P.CLS >= 2:
        index = place * 0 + ((batch * groups + group) * heads + head)
        first = place == 0
        if P.CLS == 3:
            out = acc
            tl.store(top_ptr + index, top, mask=first)
            tl.store(top_ptr + index + (tl.num_programs(0) // tiles).to(tl.int64), total, mask=first)
        store_parts(cls_ptr, index, out, first, P)
    if P.STATS:
        store_sums(sums_ptr, ((batch * heads + head) * groups + group) * members + place, top, total, exists)


@triton.jit
def query_gradient(
    dq, q, do, top, total, delta, place, k_ptr, v_ptr, ks, vs, start, stop, members, group, where, scale,
    TAIL: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries over the keys from start to stop. TAIL: some of them may not exist."""
    for n0 in range(start, stop, P.BLOCK_N):
        key = n0 + tl.arange(0, P.BLOCK_N)
        row, exists = place_rows(key, members, group, where, P)
        k = load_rows(k_ptr, row, ks, exists if TAIL else None, P)
        v = load_rows(v_ptr, row, vs, exists if TAIL else None, P)
        p = power(scaled(inner(q, k, P), scale, P) - top[:, None], P)
        if P.FULL:
            p = p / total[:, None]
        if TAIL:
            p = tl.where(exists[None, :], p, 0.0)
        p = seen(p, 0.0, place[:, None], key[None, :], group, P)
        ds = p * (inner(do, v, P) - delta[:, None]) * scale
        dq += product(ds, k, P)
    return dq


@triton.jit
def query_delta(
    delta, q, do, top, total, place, k_ptr, v_ptr, ks, vs, members, group, where, scale, P: tl.constexpr
):  # fmt: skip
    """sum(p * dp) of each row, in the arithmetic of dp. sum(o * do), `delta`, is the same in real numbers only.

    Where one key has all the weight, dp - delta is then exactly zero, and not one rounding error times a huge key. It
    costs a pass over the keys; to 16 bits o is rounded more than that.
    """
    own = delta * 0
    for n0 in range(0, members, P.BLOCK_N):
        key = n0 + tl.arange(0, P.BLOCK_N)
        row, exists = place_rows(key, members, group, where, P)
        k = load_rows(k_ptr, row, ks, exists, P)
        v = load_rows(v_ptr, row, vs, exists, P)
        p = power(scaled(inner(q, k, P), scale, P) - top[:, None], P)
        own += tl.sum(tl.where(exists[None, :], p, 0.0) * inner(do, v, P), 1)
    own = own / total
    if P.CLS == 3:  # the class row's sum runs over all groups
        own = tl.where(place == 0, delta, own)
    return own


@triton.jit(do_not_specialize=QKV_STRIDES + GRAD_STRIDES + SIZES)
def streaming_backward_q(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, dq_ptr, cls_out_ptr, cls_ptr, weights_ptr, cls_sums_ptr, sums_ptr, delta_ptr,
    qb, qs, qh, kb, ks, kh, vb, vs, vh, ob, os, oh, gb, gs, gh,
    tokens, heads, members, tiles, groups, gn1, gn2, gs0, gs1, gs2, ln1, ln2, ls0, ls1, ls2, scale,
    P: tl.constexpr,
):  # fmt: skip
    """dq for a tile of queries, and delta = sum(o * do) of each, [B, H, G, M], for the kernel that follows.

    o_ptr, sums_ptr [B, H, G, M, 2]: what the forward left. cls_out_ptr [B, G, H, D] float32: the class row's output in
    each group (P.CLS == 2). cls_sums_ptr [B, H, 2] (P.CLS == 3). cls_ptr [B, G, H, 3, D] float32 takes its gradient.
    """
    head, tile, group, batch = program_of_group(heads, tiles, groups)
    where = (groups, gn1, gn2, gs0, gs1, gs2, ln1, ln2, ls0, ls1, ls2)
    k_ptr = of_head(k_ptr, kb, kh, batch, head, P)
    v_ptr = of_head(v_ptr, vb, vh, batch, head, P)
    o_ptr += (batch * tokens * heads + head) * P.D
    do_ptr = of_head(do_ptr, ob, oh, batch, head, P)
    dq_ptr = of_head(dq_ptr, gb, gh, batch, head, P)
    if P.FIRST == 1 and P.CLS == 0:
        if (tile == 0) & (group == 0):
            store_zero_row(dq_ptr, P)
    place = P.SKIP + tile * P.BLOCK_M + tl.arange(0, P.BLOCK_M)
    row, exists = place_rows(place, members, group, where, P)
    q = load_rows(of_head(q_ptr, qb, qh, batch, head, P), row, qs, None, P)
    do = load_rows(do_ptr, row, os, exists, P)
    at = ((batch * heads + head) * groups + group) * members + place
    top, total = load_sums(sums_ptr, at, exists, P)
    if P.CLS == 2:
        do = class_gradient(do, place, batch, group + place * 0, groups, weights_ptr, P)
    out = load_rows(o_ptr, row, heads * (P.D // P.VEC), exists, P)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if P.CLS == 2:
        index = (batch * groups + group) * heads + head
        own = class_delta(do_ptr, cls_out_ptr, index, batch, group, groups, weights_ptr, P)
        delta = tl.where(place == 0, own, delta)
    if P.CLS == 3:
        cls_top, cls_total = load_sums(cls_sums_ptr, batch * heads + head, None, P)
        top = tl.where(place == 0, cls_top, top)
        total = tl.where(place == 0, cls_total, total)
    if P.FULL:
        delta = query_delta(delta, q, do, top, total, place, k_ptr, v_ptr, ks, vs, members, group, where, scale, P)
    tl.store(delta_ptr + at, delta, mask=exists)
    BLOCK_M: tl.constexpr = P.BLOCK_M
    BLOCK_D: tl.constexpr = P.BLOCK_D
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = members // P.BLOCK_N * P.BLOCK_N
    dq = query_gradient(
        dq, q, do, top, total, delta, place, k_ptr, v_ptr, ks, vs, 0, whole, members, group, where, scale, False, P
    )
    dq = query_gradient(
        dq, q, do, top, total, delta, place, k_ptr, v_ptr, ks, vs, whole, members, members, group, where, scale, True, P
    )
    store_rows(dq_ptr, row, gs, dq, exists & (place >= (P.CLS > 0)), P)
    if P.CLS >= 2:
        store_parts(cls_ptr, place * 0 + ((batch * groups + group) * heads + head) * 3, dq, place == 0, P)


@triton.jit(do_not_specialize=QKV_STRIDES + GRAD_STRIDES + SIZES)
def streaming_backward_kv(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, cls_ptr, weights_ptr, cls_sums_ptr, sums_ptr, delta_ptr,
    qb, qs, qh, kb, ks, kh, vb, vs, vh, ob, os, oh, gb, gs, gh,
    tokens, heads, members, tiles, groups, gn1, gn2, gs0, gs1, gs2, ln1, ln2, ls0, ls1, ls2, scale,
    P: tl.constexpr,
):  # fmt: skip
    """dk and dv for a tile of P.BLOCK_N keys, queries passing by. Runs after streaming_backward_q."""
    head, tile, group, batch = program_of_group(heads, tiles, groups)
    where = (groups, gn1, gn2, gs0, gs1, gs2, ln1, ln2, ls0, ls1, ls2)
    q_ptr = of_head(q_ptr, qb, qh, batch, head, P)
    do_ptr = of_head(do_ptr, ob, oh, batch, head, P)
    dk_ptr = of_head(dk_ptr, gb, gh, batch, head, P)
    dv_ptr = of_head(dv_ptr, gb, gh, batch, head, P)
    if P.FIRST == 1 and P.CLS == 0:
        if (tile == 0) & (group == 0):
            store_zero_row(dk_ptr, P)
            store_zero_row(dv_ptr, P)
    key = tile * P.BLOCK_N + tl.arange(0, P.BLOCK_N)
    key_row, key_exists = place_rows(key, members, group, where, P)
    k_ptr = of_head(k_ptr, kb, kh, batch, head, P)
    v_ptr = of_head(v_ptr, vb, vh, batch, head, P)
    k = load_rows(k_ptr, key_row, ks, key_exists, P)
    v = load_rows(v_ptr, key_row, vs, key_exists, P)
    if P.CLS == 3:
        cls_top, cls_total = load_sums(cls_sums_ptr, batch * heads + head, None, P)
    BLOCK_N: tl.constexpr = P.BLOCK_N
    BLOCK_D: tl.constexpr = P.BLOCK_D
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    stats = ((batch * heads + head) * groups + group) * members
    for m0 in range(P.SKIP, members, P.BLOCK_M):
        place = m0 + tl.arange(0, P.BLOCK_M)
        row, exists = place_rows(place, members, group, where, P)
        q = load_rows(q_ptr, row, qs, None, P)
        do = load_rows(do_ptr, row, os, exists, P)
        if P.CLS == 2:
            do = class_gradient(do, place, batch, group + place * 0, groups, weights_ptr, P)
        top, total = load_sums(sums_ptr, stats + place, exists, P)
        delta = tl.load(delta_ptr + stats + place, mask=exists, other=0.0)
        if P.CLS == 3:
            top = tl.where(place == 0, cls_top, top)
            total = tl.where(place == 0, cls_total, total)
        if P.PRECISION == "ieee" and P.FULL and P.BLOCK_D > 64:
            # Registers cannot hold wide rows of both as true float32 products want them: fetched from the cache again.
            # The mask says nothing new, but that it changes with m0: else the compiler moves all this before the loop.
            k = load_rows(k_ptr, key_row, ks, key_exists & (m0 < members), P)
            v = load_rows(v_ptr, key_row, vs, key_exists & (m0 < members), P)
        p = power(scaled(inner(k, q, P), scale, P) - top[None, :], P)  # [keys, queries]
        if P.FULL:
            p = p / total[None, :]
        p = seen(p, 0.0, place[None, :], key[:, None], group, P)
        dv += product(p, do, P)
        ds = p * (inner(v, do, P) - delta[None, :]) * scale
        dk += product(ds, q, P)
    keep = key_exists & (key >= (P.CLS > 0))
    store_rows(dk_ptr, key_row, gs, dk, keep, P)
    store_rows(dv_ptr, key_row, gs, dv, keep, P)
    if P.CLS > 0:
        index = key * 0 + ((batch * groups + group) * heads + head) * 3
        store_parts(cls_ptr, index + 1, dk, key == 0, P)
        store_parts(cls_ptr, index + 2, dv, key == 0, P)
