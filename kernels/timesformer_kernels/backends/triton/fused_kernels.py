# SPDX-License-Identifier: Apache-2.0
"""Kernels of the block's steps between matrix products: residual sum + LayerNorm, bias + GELU, each with its backward.

A program of LayerNorm holds ROWS whole rows as BLOCKS tiles [ROWS, BLOCK_D], so a row is read once and its statistics
are two sums over registers; a block that lies within the row needs no mask. D is known at compile time: a model has few
widths. All arithmetic is float32, converted right after the load and right before the store.

Strides arrive divided by VEC, the elements in 16 bytes, and are multiplied again here: so the compiler knows that rows
are aligned without specialising on the numbers. VEC is 1 where some row is not. WIDE counts rows in 64 bits.

Gradients of weight and bias are sums over all rows. Every program adds up the rows it visits and writes one partial
sum; `reduce_kernel` adds those in a fixed order. No atomics, hence the same bits in every run.
"""

import triton
import triton.language as tl

SIZES = ("rows", "S")
FWD_NUMBERS = ("stride_xb", "stride_xs", "stride_yb", "stride_ys", "stride_rb", "stride_rs", *SIZES, "eps")
BWD_NUMBERS = ("stride_sb", "stride_ss", "stride_rb", "stride_rs", *SIZES, "tiles", "eps")


@triton.jit
def program(WIDE: tl.constexpr):
    """The number of this program, and through it every row number, in as many bits as those take."""
    if WIDE:
        return tl.program_id(0).to(tl.int64)
    else:
        return tl.program_id(0)


@triton.jit
def tile_rows(tile, rows, S, ROWS: tl.constexpr):
    """The rows of a tile: their number, clip and token [ROWS] in 64 bits, and which exist [ROWS, 1]."""
    row = tile * ROWS + tl.arange(0, ROWS)
    clip = row // S
    return row.to(tl.int64), clip.to(tl.int64), (row - clip * S).to(tl.int64), (row < rows)[:, None]


@triton.jit
def within(i: tl.constexpr, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of block i of the rows exist: [ROWS, BLOCK_D], or [ROWS, 1] where no row ends in the block."""
    if (i + 1) * BLOCK_D <= D:
        return exists
    else:
        return exists & (i * BLOCK_D + tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def load_vector(ptr, i: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Block i of a vector [D] as [1, BLOCK_D] float32."""
    d = i * BLOCK_D + tl.arange(0, BLOCK_D)
    if (i + 1) * BLOCK_D <= D:
        return tl.load(ptr + d).to(tl.float32)[None, :]
    else:
        return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalise(totals, exists, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr):
    """Blocks [ROWS, BLOCK_D] of rows -> their standard scores and 1 / deviation [ROWS, 1]; zero outside both times."""
    added = totals[0]
    for i in tl.static_range(1, BLOCKS):
        added += totals[i]
    # Rounded, unlike Triton's division: in a row of equal numbers their mean has to be that number.
    mean = tl.div_rn(tl.sum(added, 1), D * 1.0)[:, None]
    centred = ()
    for i in tl.static_range(BLOCKS):
        block = totals[i] - mean
        if (i + 1) * BLOCK_D > D:
            block = tl.where(within(i, exists, D, BLOCK_D), block, 0.0)
        centred = centred + (block,)
    added = centred[0] * centred[0]
    for i in tl.static_range(1, BLOCKS):
        added += centred[i] * centred[i]
    rstd = tl.rsqrt(tl.sum(added, 1) / D + eps)[:, None]
    scores = ()
    for i in tl.static_range(BLOCKS):
        scores = scores + (centred[i] * rstd,)
    return scores, rstd


@triton.jit(do_not_specialize=FWD_NUMBERS)
def add_layer_norm_fwd_kernel(
    x_ptr,  # [B, S, D]
    branch_ptr,  # [B, S, D], None without a branch
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    scale_ptr,  # [B, S] float32 by stride_rb, stride_rs; None without
    sum_ptr,  # [B * S, D], None without a branch
    out_ptr,  # [B * S, D]
    stride_xb,
    stride_xs,
    stride_yb,
    stride_ys,
    stride_rb,
    stride_rs,
    rows,
    S,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    SKIP_CLS: tl.constexpr,
):
    row, clip, token, exists = tile_rows(program(WIDE), rows, S, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    flat = row[:, None] * D + d  # [ROWS, BLOCK_D]
    x_at = x_ptr + (clip * stride_xb * VEC + token * stride_xs * VEC)[:, None] + d
    if branch_ptr is not None:
        branch_at = branch_ptr + (clip * stride_yb * VEC + token * stride_ys * VEC)[:, None] + d
        takes = exists
        if SKIP_CLS:
            takes = exists & (token > 0)[:, None]  # the branch's row 0 is not even read
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + clip * stride_rb + token * stride_rs, mask=row < rows, other=0.0)[:, None]
    totals = ()
    for i in tl.static_range(BLOCKS):
        total = tl.load(x_at + i * BLOCK_D, mask=within(i, exists, D, BLOCK_D), other=0.0)
        if branch_ptr is not None:
            mask = within(i, takes, D, BLOCK_D)
            branch = tl.load(branch_at + i * BLOCK_D, mask=mask, other=0.0).to(tl.float32)
            if scale_ptr is not None:
                branch = branch * scale
            total = tl.where(takes, total.to(tl.float32) + branch, total.to(tl.float32))
            # Rounded before the statistics: the norm is that of the sum which the caller gets and the backward reads.
            total = total.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + flat + i * BLOCK_D, total, mask=within(i, exists, D, BLOCK_D))
        totals = totals + (total.to(tl.float32),)
    scores, _ = normalise(totals, exists, eps, D, BLOCK_D, BLOCKS)
    for i in tl.static_range(BLOCKS):
        out = scores[i] * load_vector(weight_ptr, i, D, BLOCK_D) + load_vector(bias_ptr, i, D, BLOCK_D)
        out = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + flat + i * BLOCK_D, out, mask=within(i, exists, D, BLOCK_D))


@triton.jit(do_not_specialize=BWD_NUMBERS)
def add_layer_norm_bwd_kernel(
    dsum_ptr,  # [B * S, D], None where only the norm was used
    dout_ptr,  # [B * S, D]
    sum_ptr,  # [B, S, D]
    weight_ptr,  # [D]
    scale_ptr,  # [B, S] float32 by stride_rb, stride_rs; None without
    dx_ptr,  # [B * S, D]
    dbranch_ptr,  # [B * S, D], None where it is dx
    partial_ptr,  # [programs, 2, D] float32: dweight, dbias
    stride_sb,
    stride_ss,
    stride_rb,
    stride_rs,
    rows,
    S,
    tiles,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    SKIP_CLS: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)[None, :]
    dweights = ()
    dbiases = ()
    for _ in tl.static_range(BLOCKS):
        dweights = dweights + (tl.zeros([ROWS, BLOCK_D], tl.float32),)
        dbiases = dbiases + (tl.zeros([ROWS, BLOCK_D], tl.float32),)
    for tile in range(program(WIDE), tiles, tl.num_programs(0)):
        row, clip, token, exists = tile_rows(tile, rows, S, ROWS)
        flat = row[:, None] * D + d  # [ROWS, BLOCK_D]
        sum_at = sum_ptr + (clip * stride_sb * VEC + token * stride_ss * VEC)[:, None] + d
        totals = ()
        douts = ()
        dsums = ()
        for i in tl.static_range(BLOCKS):
            mask = within(i, exists, D, BLOCK_D)
            totals = totals + (tl.load(sum_at + i * BLOCK_D, mask=mask, other=0.0).to(tl.float32),)
            douts = douts + (tl.load(dout_ptr + flat + i * BLOCK_D, mask=mask, other=0.0).to(tl.float32),)
            if dsum_ptr is not None:
                dsums = dsums + (tl.load(dsum_ptr + flat + i * BLOCK_D, mask=mask, other=0.0),)
        scores, rstd = normalise(totals, exists, eps, D, BLOCK_D, BLOCKS)
        across = tl.zeros([ROWS, BLOCK_D], tl.float32)
        along = tl.zeros([ROWS, BLOCK_D], tl.float32)
        more_dweights = ()
        more_dbiases = ()
        for i in tl.static_range(BLOCKS):
            more_dweights = more_dweights + (dweights[i] + douts[i] * scores[i],)
            more_dbiases = more_dbiases + (dbiases[i] + douts[i],)
            dscore = douts[i] * load_vector(weight_ptr, i, D, BLOCK_D)
            across += dscore
            along += dscore * scores[i]
        dweights = more_dweights
        dbiases = more_dbiases
        across_mean = (tl.sum(across, 1) / D)[:, None]
        along_mean = (tl.sum(along, 1) / D)[:, None]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + clip * stride_rb + token * stride_rs, mask=row < rows, other=0.0)[:, None]
        for i in tl.static_range(BLOCKS):
            mask = within(i, exists, D, BLOCK_D)
            dscore = douts[i] * load_vector(weight_ptr, i, D, BLOCK_D)
            dx = rstd * (dscore - across_mean - scores[i] * along_mean)
            if dsum_ptr is not None:
                dx += dsums[i].to(tl.float32)
            tl.store(dx_ptr + flat + i * BLOCK_D, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dbranch_ptr is not None:
                if scale_ptr is not None:
                    dx = dx * scale
                if SKIP_CLS:
                    dx = tl.where((token > 0)[:, None], dx, 0.0)
                tl.store(dbranch_ptr + flat + i * BLOCK_D, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(BLOCKS):
        n = i * BLOCK_D + tl.arange(0, BLOCK_D)
        at = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * D + n
        tl.store(at, tl.sum(dweights[i], 0), mask=n < D)
        tl.store(at + D, tl.sum(dbiases[i], 0), mask=n < D)


@triton.jit(do_not_specialize=("parts", "D"))
def reduce_kernel(
    partial_ptr,  # [parts, D] float32, or [parts, 2, D] with a second result
    first_ptr,  # [D]
    second_ptr,  # [D] or None
    parts,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over parts, in an order that depends on `parts` alone."""
    n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    width = D
    if second_ptr is not None:
        width = 2 * D
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        at = partial_ptr + part.to(tl.int64) * width + n[None, :]
        acc += tl.load(at, mask=(part < parts) & (n < width)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    tl.store(first_ptr + n, total.to(first_ptr.dtype.element_ty), mask=n < D)
    if second_ptr is not None:
        tl.store(second_ptr + n - D, total.to(second_ptr.dtype.element_ty), mask=(n >= D) & (n < width))


@triton.jit
def normal(u):
    """Of the normal distribution: the probability below u, and exp(-u^2 / 2).

    Abramowitz and Stegun 7.1.26, |error| <= 0.8e-7: closer than float32's 1 + erf(u / sqrt(2)), which cancels below
    zero, and half of its instructions, which would bind the kernel rather than memory.
    """
    bell = tl.exp2(-0.7213475204444817 * u * u)
    t = 1.0 / (1.0 + 0.23164188945 * tl.abs(u))
    series = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    tail = t * series * bell
    return tl.where(u > 0, 1.0 - tail, tail), bell


@triton.jit(do_not_specialize=("stride_xb", "stride_xs", *SIZES))
def bias_gelu_fwd_kernel(
    x_ptr,  # [B, S, D]
    bias_ptr,  # [D]
    out_ptr,  # [B * S, D]
    stride_xb,
    stride_xs,
    rows,
    S,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row, clip, token, exists = tile_rows(program(WIDE) // COLUMNS, rows, S, ROWS)
    d = (tl.program_id(0) % COLUMNS * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    inside = exists & (d < D)  # [ROWS, BLOCK_D]
    u = tl.load(x_ptr + (clip * stride_xb * VEC + token * stride_xs * VEC)[:, None] + d, mask=inside, other=0.0)
    u = u.to(tl.float32) + tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    out = u * normal(u)[0]
    tl.store(out_ptr + row[:, None] * D + d, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("stride_xb", "stride_xs", *SIZES, "tiles"))
def bias_gelu_bwd_kernel(
    dout_ptr,  # [B * S, D]
    x_ptr,  # [B, S, D]
    bias_ptr,  # [D]
    dx_ptr,  # [B * S, D]
    partial_ptr,  # [programs / COLUMNS, D] float32
    stride_xb,
    stride_xs,
    rows,
    S,
    tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part = program(WIDE) // COLUMNS
    d = (tl.program_id(0) % COLUMNS * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in range(part, tiles, tl.num_programs(0) // COLUMNS):
        row, clip, token, exists = tile_rows(tile, rows, S, ROWS)
        inside = exists & (d < D)  # [ROWS, BLOCK_D]
        flat = row[:, None] * D + d
        at = (clip * stride_xb * VEC + token * stride_xs * VEC)[:, None] + d
        u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
        dout = tl.load(dout_ptr + flat, mask=inside, other=0.0).to(tl.float32)
        below, bell = normal(u)
        dx = dout * (below + 0.3989422804014327 * u * bell)
        dbias += dx
        tl.store(dx_ptr + flat, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    n = tl.program_id(0) % COLUMNS * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(partial_ptr + part.to(tl.int64) * D + n, tl.sum(dbias, 0), mask=n < D)
