# SPDX-License-Identifier: Apache-2.0
"""Attention over sequences that fit on chip whole: time attention always, space attention up to 16 x 16 patches.

A program serves one head and holds all keys and values of its sequences as blocks whose sizes are powers of two (197
members are 128 + 64 + 16 rows, not 256), so every softmax row is complete: one pass, no running maximum, and a
backward that needs neither the output nor a log-sum-exp.

Short sequences are packed, P.PACK of them one below the other in one block. Scores outside the blocks on the diagonal
are discarded; their products still meet the rows of other sequences with weight zero, and zero times NaN is NaN. So
a tile in which anything is not finite is done again, one sequence at a time.
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
    normalised,
    of_head,
    power,
    product,
    program,
    scaled,
    store_parts,
    store_rows,
    store_sums,
    store_zero_row,
    token_rows,
)

SIZES = ("tokens", "heads", "tiles", *VIEW)


@triton.jit
def members(index, tile, where, part, P: tl.constexpr):
    """What row `index` of a tile is: its group, its place in the sequence, its token row, and whether it exists.

    part: the one sequence of a packed tile that is to exist, all of them if negative.
    """
    if P.PACK > 1:
        own = index // P.M
        group = tile * P.PACK + own
        place = index % P.M
        exists = (own < P.PACK) & (group < where[0]) & ((own == part) | (part < 0))
    else:
        group = index * 0 + tile
        place = tl.minimum(index, P.M - 1)
        exists = index < P.M
    row = token_rows(group, place, where, P)
    if P.PACK > 1:  # says that addresses change with `part`: kept in registers beside the data they cost occupancy
        row = tl.where(exists, row, 0)
    return group, place, row, exists


@triton.jit
def load_block(ptr, stride, tile, where, part, start, SIZE: tl.constexpr, P: tl.constexpr):
    _, _, row, exists = members(start + tl.arange(0, SIZE), tile, where, part, P)
    return load_rows(ptr, row, stride, exists, P)


@triton.jit
def load_blocks(ptr, stride, tile, where, part, P: tl.constexpr):
    """All members of a tile as a tuple of [P.BLOCKS[i], BLOCK_D]."""
    out = ()
    for i in tl.static_range(len(P.BLOCKS)):
        out = out + (load_block(ptr, stride, tile, where, part, P.STARTS[i], P.BLOCKS[i], P),)
    return out


@triton.jit
def zero_block(SIZE: tl.constexpr, P: tl.constexpr):
    BLOCK_D: tl.constexpr = P.BLOCK_D
    return tl.zeros([SIZE, BLOCK_D], tl.float32)


@triton.jit
def zero_blocks(P: tl.constexpr):
    out = ()
    for i in tl.static_range(len(P.BLOCKS)):
        out = out + (zero_block(P.BLOCKS[i], P),)
    return out


@triton.jit
def hide(x, other, group, place, start, SIZE: tl.constexpr, P: tl.constexpr):
    """x [queries, SIZE keys from start], `other` where a query does not see a key.

    In a packed tile rows that do not exist see one another: they are zero, and nobody reads what comes of them.
    """
    index = start + tl.arange(0, SIZE)
    if P.PACK > 1:
        same = (tl.arange(0, P.BLOCK_M) // P.M)[:, None] == (index // P.M)[None, :]
        if P.CLS == 1:  # the class row asks nothing
            same = same & (place > 0)[:, None]
        x = tl.where(same, x, other)
    elif start + SIZE > P.M:
        x = tl.where((index < P.M)[None, :], x, other)
    if P.CLS == 3:  # the one softmax of the class row counts the class key once
        x = tl.where(((place == 0) & (group > 0))[:, None] & (index % P.M == 0)[None, :], other, x)
    return x


@triton.jit
def scores(q, k, group, place, scale, P: tl.constexpr):
    """q @ k^T scaled, for every block of keys, -inf where unseen, and the maxima of the rows."""
    BLOCK_M: tl.constexpr = P.BLOCK_M
    top = tl.full([BLOCK_M], -INFINITY, tl.float32)
    out = ()
    for i in tl.static_range(len(P.BLOCKS)):
        s = scaled(inner(q, k[i], P), scale, P)
        s = hide(s, -INFINITY, group, place, P.STARTS[i], P.BLOCKS[i], P)
        top = tl.maximum(top, tl.max(s, 1))
        out = out + (s,)
    if P.PACK > 1 and P.CLS == 1:  # its row sees nothing: exp(-inf - 0) = 0, and no NaN for the others
        top = tl.where(top > -INFINITY, top, 0.0)
    return out, top


@triton.jit
def finite(x):
    """Whether [R, C] holds only finite numbers."""
    return tl.sum(tl.sum(x * 0.0, 1), 0) == 0.0


@triton.jit
def forward_tile(pointers, numbers, where, part, P: tl.constexpr):
    """One tile of resident_forward, or one sequence of it. Returns whether all was finite."""
    q_ptr, k_ptr, v_ptr, o_ptr, cls_ptr, top_ptr, sums_ptr = pointers
    qs, ks, vs, batch, head, tile, heads, tiles, scale = numbers
    groups = where[0]
    k = load_blocks(k_ptr, ks, tile, where, part, P)
    v = load_blocks(v_ptr, vs, tile, where, part, P)
    fine = True
    for m0 in range(P.SKIP, P.ROWS, P.BLOCK_M):
        group, place, row, exists = members(m0 + tl.arange(0, P.BLOCK_M), tile, where, part, P)
        q = load_rows(q_ptr, row, qs, exists if P.PACK > 1 else None, P)
        s, top = scores(q, k, group, place, scale, P)
        total = top * 0
        acc = zero_block(P.BLOCK_M, P)
        for i in tl.static_range(len(P.BLOCKS)):
            e = power(s[i] - top[:, None], P)
            total += tl.sum(e, 1)
            acc += product(e, v[i], P)
        if P.PACK > 1:
            fine = finite(acc)
        out = acc / total[:, None]
        store_rows(o_ptr, row, heads * (P.D // P.VEC), out, exists & (place >= (P.CLS > 0)), P)
        if P.CLS >= 2:
            index = (batch * groups + group) * heads + head
            first = exists & (place == 0)
            if P.CLS == 3:
                out = acc
                tl.store(top_ptr + index, top, mask=first)
                tl.store(top_ptr + index + tl.num_programs(0) // tiles * groups, total, mask=first)
            store_parts(cls_ptr, index, out, first, P)
        if P.STATS:
            index = ((batch * heads + head) * groups + group) * P.M + place
            store_sums(sums_ptr, index, top, total, exists)
    return fine


@triton.jit(do_not_specialize=QKV_STRIDES + SIZES)
def resident_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, cls_ptr, top_ptr, sums_ptr,
    qb, qs, qh, kb, ks, kh, vb, vs, vh,
    tokens, heads, groups, tiles, gn1, gn2, gs0, gs1, gs2, ls0, ls1, ls2, scale,
    P: tl.constexpr,
):  # fmt: skip
    """o [B, S, H, D] for one head of a tile of sequences. Grid (batch * tiles * heads,), heads fastest.

    cls_ptr [B, G, H, D] float32: the class row's output in each group, for P.CLS == 3 not yet divided by its sum;
    top_ptr [2, B, G, H]: that row's maximum and sum, then. sums_ptr [B, H, G, M, 2]: those of every row, if P.STATS.
    """
    head, tile, batch = program(heads, tiles)
    where = (groups, gn1, gn2, gs0, gs1, gs2, P.SEQ[1], P.SEQ[2], ls0, ls1, ls2)
    q_ptr = of_head(q_ptr, qb, qh, batch, head, P)
    o_ptr += (batch * tokens * heads + head) * P.D
    k_ptr = of_head(k_ptr, kb, kh, batch, head, P)
    v_ptr = of_head(v_ptr, vb, vh, batch, head, P)
    if P.FIRST == 1 and P.CLS < 2:
        if tile == 0:
            store_zero_row(o_ptr, P)
    pointers = (q_ptr, k_ptr, v_ptr, o_ptr, cls_ptr, top_ptr, sums_ptr)
    numbers = (qs, ks, vs, batch, head, tile, heads, tiles, scale)
    if P.PACK == 1:
        forward_tile(pointers, numbers, where, -1, P)
    else:
        part = -1
        parts = 0
        while part < parts:
            if not forward_tile(pointers, numbers, where, part, P):
                parts = P.PACK
            part += 1


@triton.jit
def store_gradient(
    ptr, cls_ptr, which, x, start, batch, tile, head, heads, stride, where, part, SIZE: tl.constexpr, P: tl.constexpr
):
    """One block of a gradient: patches to their token rows, the class row's part to cls_ptr [B, G, H, 3, D]."""
    group, place, row, exists = members(start + tl.arange(0, SIZE), tile, where, part, P)
    store_rows(ptr, row, stride, x, exists & (place >= (P.CLS > 0)), P)
    if P.CLS > 0:
        index = ((batch * where[0] + group) * heads + head) * 3 + which
        store_parts(cls_ptr, index, x, exists & (place == 0), P)


@triton.jit
def probabilities(q, do, k, v, group, place, scale, cls_top, cls_total, P: tl.constexpr):
    """p and dp = do @ v^T of a tile of queries for every block of keys, and delta = sum(p * dp) of each row."""
    s, top = scores(q, k, group, place, scale, P)
    if P.CLS == 3:
        top = tl.where(place == 0, cls_top, top)
    total = top * 0
    e = ()
    for i in tl.static_range(len(P.BLOCKS)):
        x = power(s[i] - top[:, None], P)
        total += tl.sum(x, 1)
        e = e + (x,)
    if P.CLS == 3:
        total = tl.where(place == 0, cls_total if P.FULL else 1.0, total)
    delta = top * 0
    p = ()
    dp = ()
    for i in tl.static_range(len(P.BLOCKS)):
        x = hide_packed(normalised(e[i], total[:, None], P), group, place, P.STARTS[i], P.BLOCKS[i], P)
        y = hide_packed(inner(do, v[i], P), group, place, P.STARTS[i], P.BLOCKS[i], P)
        delta += tl.sum(x * y, 1)
        p = p + (x,)
        dp = dp + (y,)
    return p, dp, delta


@triton.jit
def hide_packed(x, group, place, start, SIZE: tl.constexpr, P: tl.constexpr):
    """Zero where two sequences of a packed tile meet: what is there may not be finite, and reaches a gradient."""
    if P.PACK > 1:
        x = hide(x, 0.0, group, place, start, SIZE, P)
    return x


@triton.jit
def backward_tile(pointers, numbers, where, part, P: tl.constexpr):
    """One tile of resident_backward, or one sequence of it. Returns whether all was finite."""
    q_ptr, k_ptr, v_ptr, do_ptr, _, dq_ptr, dk_ptr, dv_ptr, _, cls_ptr, weights_ptr, _ = pointers
    qs, ks, vs, os, gs, batch, head, tile, heads, scale, cls_top, cls_total, cls_delta = numbers
    groups = where[0]
    k = load_blocks(k_ptr, ks, tile, where, part, P)
    v = load_blocks(v_ptr, vs, tile, where, part, P)
    fine = True
    dk = zero_blocks(P)
    dv = zero_blocks(P)
    for m0 in range(P.SKIP, P.ROWS, P.BLOCK_M):
        group, place, row, exists = members(m0 + tl.arange(0, P.BLOCK_M), tile, where, part, P)
        if P.CLS == 1:  # the class row asks nothing
            exists = exists & (place > 0)
        q = load_rows(q_ptr, row, qs, exists if P.PACK > 1 else None, P)
        do = load_rows(do_ptr, row, os, exists, P)
        if P.CLS == 2:
            do = class_gradient(do, place, batch, group, groups, weights_ptr, P)
        p, dp, delta = probabilities(q, do, k, v, group, place, scale, cls_top, cls_total, P)
        if P.CLS == 3:
            delta = tl.where(place == 0, cls_delta, delta)
        dq = zero_block(P.BLOCK_M, P)
        dk_before = dk
        dv_before = dv
        dk = ()
        dv = ()
        for i in tl.static_range(len(P.BLOCKS)):
            ds = p[i] * (dp[i] - delta[:, None]) * scale
            ds = hide_packed(ds, group, place, P.STARTS[i], P.BLOCKS[i], P)
            dq += product(ds, k[i], P)
            dk_now = dk_before[i] + product(tl.trans(ds), q, P)
            dv_now = dv_before[i] + product(tl.trans(p[i]), do, P)
            if P.PACK > 1:
                fine = finite(dq + dk_now + dv_now)
            dk = dk + (dk_now,)
            dv = dv + (dv_now,)
        if P.CLS == 1:
            store_rows(dq_ptr, row, gs, dq, exists, P)
        else:
            store_gradient(dq_ptr, cls_ptr, 0, dq, m0, batch, tile, head, heads, gs, where, part, P.BLOCK_M, P)
    for i in tl.static_range(len(P.BLOCKS)):
        start = P.STARTS[i]
        store_gradient(dk_ptr, cls_ptr, 1, dk[i], start, batch, tile, head, heads, gs, where, part, P.BLOCKS[i], P)
        store_gradient(dv_ptr, cls_ptr, 2, dv[i], start, batch, tile, head, heads, gs, where, part, P.BLOCKS[i], P)
    return fine


@triton.jit
def backward_tile_saved(pointers, numbers, where, P: tl.constexpr):
    """The tile of a sequence whose rows' sums the forward has saved: done with one block of keys at a time."""
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, dq_ptr, dk_ptr, dv_ptr, cls_out_ptr, cls_ptr, weights_ptr, sums_ptr = pointers
    qs, ks, vs, os, gs, batch, head, tile, heads, scale, cls_top, cls_total, cls_delta = numbers
    groups = where[0]
    k = load_blocks(k_ptr, ks, tile, where, -1, P)
    v = load_blocks(v_ptr, vs, tile, where, -1, P)
    dk = zero_blocks(P)
    dv = zero_blocks(P)
    for m0 in range(P.SKIP, P.ROWS, P.BLOCK_M):
        group, place, row, exists = members(m0 + tl.arange(0, P.BLOCK_M), tile, where, -1, P)
        do = load_rows(do_ptr, row, os, exists, P)
        if P.CLS == 2:
            do = class_gradient(do, place, batch, group, groups, weights_ptr, P)
        out = load_rows(o_ptr, row, heads * (P.D // P.VEC), exists, P)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        if P.CLS >= 2:
            delta = tl.where(place == 0, cls_delta, delta)
        index = ((batch * heads + head) * groups + group) * P.M + place
        top, total = load_sums(sums_ptr, index, exists, P)
        if P.CLS == 3:
            top = tl.where(place == 0, cls_top, top)
            total = tl.where(place == 0, cls_total, total)
        q = load_rows(q_ptr, row, qs, None, P)
        dq = zero_block(P.BLOCK_M, P)
        dk_before = dk
        dv_before = dv
        dk = ()
        dv = ()
        for i in tl.static_range(len(P.BLOCKS)):
            s = scaled(inner(q, k[i], P), scale, P)
            s = hide(s, -INFINITY, group, place, P.STARTS[i], P.BLOCKS[i], P)
            p = power(s - top[:, None], P)
            if P.FULL:
                p = p / total[:, None]
            dv = dv + (dv_before[i] + product(tl.trans(p), do, P),)
            ds = p * (inner(do, v[i], P) - delta[:, None]) * scale
            dk = dk + (dk_before[i] + product(tl.trans(ds), q, P),)
            dq += product(ds, k[i], P)
        if P.CLS == 1:
            store_rows(dq_ptr, row, gs, dq, exists, P)
        else:
            store_gradient(dq_ptr, cls_ptr, 0, dq, m0, batch, tile, head, heads, gs, where, -1, P.BLOCK_M, P)
    for i in tl.static_range(len(P.BLOCKS)):
        start = P.STARTS[i]
        store_gradient(dk_ptr, cls_ptr, 1, dk[i], start, batch, tile, head, heads, gs, where, -1, P.BLOCKS[i], P)
        store_gradient(dv_ptr, cls_ptr, 2, dv[i], start, batch, tile, head, heads, gs, where, -1, P.BLOCKS[i], P)


@triton.jit(do_not_specialize=QKV_STRIDES + GRAD_STRIDES + SIZES)
def resident_backward(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, dq_ptr, dk_ptr, dv_ptr,
    cls_out_ptr, cls_ptr, weights_ptr, cls_sums_ptr, sums_ptr,
    qb, qs, qh, kb, ks, kh, vb, vs, vh, ob, os, oh, gb, gs, gh,
    tokens, heads, groups, tiles, gn1, gn2, gs0, gs1, gs2, ls0, ls1, ls2, scale,
    P: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of one head of a tile of sequences. Grid as in the forward.

    cls_ptr [B, G, H, 3, D] float32: what each group has of the class row's three gradients. weights_ptr [B, G]: what
    a group counts for in the class row's output, if P.WEIGHTS. cls_sums_ptr [B, H, 2]: for P.CLS == 3, maximum and sum
    of that row's one softmax. If P.SAVED, o_ptr, sums_ptr [B, H, G, M, 2] and for P.CLS == 2 cls_out_ptr
    [B, G, H, D]: what the forward left, so that a block of keys is done with at a time. Without it q, k, v and do are
    enough.
    """
    head, tile, batch = program(heads, tiles)
    where = (groups, gn1, gn2, gs0, gs1, gs2, P.SEQ[1], P.SEQ[2], ls0, ls1, ls2)
    q_ptr = of_head(q_ptr, qb, qh, batch, head, P)
    k_ptr = of_head(k_ptr, kb, kh, batch, head, P)
    v_ptr = of_head(v_ptr, vb, vh, batch, head, P)
    do_ptr = of_head(do_ptr, ob, oh, batch, head, P)
    dq_ptr = of_head(dq_ptr, gb, gh, batch, head, P)
    dk_ptr = of_head(dk_ptr, gb, gh, batch, head, P)
    dv_ptr = of_head(dv_ptr, gb, gh, batch, head, P)
    if P.SAVED or P.CLS == 3:
        o_ptr += (batch * tokens * heads + head) * P.D
    if P.FIRST == 1 and P.CLS == 0:
        if tile == 0:
            store_zero_row(dq_ptr, P)
            store_zero_row(dk_ptr, P)
            store_zero_row(dv_ptr, P)
    cls_top = 0.0
    cls_total = 1.0
    cls_delta = 0.0
    if P.CLS == 3:
        cls_top, cls_total = load_sums(cls_sums_ptr, batch * heads + head, None, P)
        row = tl.arange(0, 16) * 0  # a product, as dp is one: where one key has all the weight the two are equal
        dots = inner(load_rows(do_ptr, row, os, None, P), load_rows(o_ptr, row, 0, None, P), P)
        cls_delta = tl.max(tl.max(dots, 1), 0)
    if P.CLS == 2 and P.SAVED:  # a tile is a group
        index = (batch * groups + tile) * heads + head
        cls_delta = class_delta(do_ptr, cls_out_ptr, index, batch, tile, groups, weights_ptr, P)
    pointers = (q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, dq_ptr, dk_ptr, dv_ptr, cls_out_ptr, cls_ptr, weights_ptr, sums_ptr)
    numbers = (qs, ks, vs, os, gs, batch, head, tile, heads, scale, cls_top, cls_total, cls_delta)
    if P.SAVED:
        backward_tile_saved(pointers, numbers, where, P)
    elif P.PACK == 1:
        backward_tile(pointers, numbers, where, -1, P)
    else:
        part = -1
        parts = 0
        while part < parts:
            if not backward_tile(pointers, numbers, where, part, P):
                parts = P.PACK
            part += 1
