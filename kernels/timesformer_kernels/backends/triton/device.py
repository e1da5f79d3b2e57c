# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share on the device: where a member of a sequence lives, and rows in and out of memory.

A sequence has M members: its L patches and, where the class token takes part, the class row as member 0. `P` is the
`regimes.Plan` a kernel is compiled for. P.CLS says what the class row is: 0 no member (modes "none" and "exclude"), 1 a
key ("key"), 2 a key and a query of every group ("per_group"), 3 the same with one softmax over all groups ("global").

Strides arrive divided by P.VEC, the elements in 16 bytes, and are multiplied again here: so the compiler knows that
rows are aligned without specialising on the numbers. P.VEC is 1 where some row is not.

`where` is (groups, gn1, gn2, gs0, gs1, gs2, ln1, ln2, ls0, ls1, ls2): the number of groups, then for groups and
sequence the sizes of the second and third axis and the steps of up to three, in token rows.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
# Integer arguments, on whose values no kernel is specialised: strides of q, k, v; of dout and of the gradients; a view.
QKV_STRIDES = ("qb", "qs", "qh", "kb", "ks", "kh", "vb", "vs", "vh")
GRAD_STRIDES = ("ob", "os", "oh", "gb", "gs", "gh")
VIEW = ("groups", "gn1", "gn2", "gs0", "gs1", "gs2", "ls0", "ls1", "ls2")


@triton.jit
def program(heads, tiles):
    """(head, tile, the rest) of this program: heads are neighbours, and read neighbouring memory."""
    pid = tl.program_id(0)
    return (pid % heads).to(tl.int64), pid // heads % tiles, (pid // heads // tiles).to(tl.int64)


@triton.jit
def program_of_group(heads, tiles, groups):
    """(head, tile, group, batch): the tiles of a sequence are neighbours, and find its keys in the cache."""
    pid = tl.program_id(0)
    rest = pid // tiles // heads
    return (pid // tiles % heads).to(tl.int64), pid % tiles, rest % groups, (rest // groups).to(tl.int64)


@triton.jit
def of_head(ptr, stride_b, stride_h, batch, head, P: tl.constexpr):
    """The first row of one head of a clip."""
    return ptr + (batch * stride_b + head * stride_h) * P.VEC


@triton.jit
def walk(index, n1, n2, step0, step1, step2, AXES: tl.constexpr):
    """Token rows to the `index`-th point of up to three axes, outermost first."""
    if AXES == 0:
        return index * 0
    elif AXES == 1:
        return index * step0
    elif AXES == 2:
        return index // n1 * step0 + index % n1 * step1
    else:
        outer = index // n2
        return outer // n1 * step0 + outer % n1 * step1 + index % n2 * step2


@triton.jit
def token_rows(group, place, where, P: tl.constexpr):
    """The token row of each member: `place` in the sequence of `group`."""
    groups, gn1, gn2, gs0, gs1, gs2, ln1, ln2, ls0, ls1, ls2 = where
    row = P.FIRST + walk(group, gn1, gn2, gs0, gs1, gs2, P.GROUP_AXES)
    if P.CLS > 0:
        return tl.where(place == 0, 0, row + walk(place - 1, ln1, ln2, ls0, ls1, ls2, P.SEQ_AXES))
    else:
        return row + walk(place, ln1, ln2, ls0, ls1, ls2, P.SEQ_AXES)


@triton.jit
def row_offsets(row, stride, P: tl.constexpr):
    """Elements to the first of each row; 32 bits where a clip is known to fit them."""
    if P.WIDE:
        row = row.to(tl.int64)
    return row * stride * P.VEC


@triton.jit
def load_rows(ptr, row, stride, keep, P: tl.constexpr):
    """Rows [R, BLOCK_D] at ptr, zero where not `keep` [R] (None: all are kept) and past the head dimension."""
    d = tl.arange(0, P.BLOCK_D)
    at = ptr + row_offsets(row, stride, P)[:, None] + d[None, :]
    if keep is None:
        if P.BLOCK_D == P.D:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=(d < P.D)[None, :], other=0.0)
    elif P.BLOCK_D == P.D:
        x = tl.load(at, mask=keep[:, None], other=0.0)
    else:
        x = tl.load(at, mask=keep[:, None] & (d < P.D)[None, :], other=0.0)
    if P.UPCAST:  # the interpreter multiplies the bit patterns of bfloat16
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(ptr, row, stride, x, keep, P: tl.constexpr):
    """The inverse of load_rows, in the dtype of the pointer."""
    d = tl.arange(0, P.BLOCK_D)
    at = ptr + row_offsets(row, stride, P)[:, None] + d[None, :]
    if P.BLOCK_D == P.D:
        tl.store(at, x.to(ptr.dtype.element_ty), mask=keep[:, None])
    else:
        tl.store(at, x.to(ptr.dtype.element_ty), mask=keep[:, None] & (d < P.D)[None, :])


@triton.jit
def store_parts(ptr, index, x, keep, P: tl.constexpr):
    """Rows of x into row index[R] of a contiguous float32 [.., D]: what each group has of the class row."""
    d = tl.arange(0, P.BLOCK_D)
    mask = keep[:, None]
    if P.BLOCK_D != P.D:
        mask = mask & (d < P.D)[None, :]
    tl.store(ptr + (index * P.D)[:, None] + d[None, :], x, mask=mask)


@triton.jit
def store_zero_row(ptr, P: tl.constexpr):
    """Zeros for the class row of one head, which takes no part."""
    d = tl.arange(0, P.BLOCK_D)
    tl.store(ptr + d, (d * 0).to(ptr.dtype.element_ty), mask=d < P.D)


@triton.jit
def product(a, b, P: tl.constexpr):
    """a @ b in float32, the wider of the two rounded to the type of b."""
    out = tl.dot(a.to(b.dtype), b, input_precision=P.PRECISION)
    if P.PRECISION == "ieee" and P.FULL and P.BLOCK_D > 64:
        # True float32 keeps its operands in registers; the barrier stops the next product's from being fetched early.
        tl.debug_barrier()
    return out


@triton.jit
def inner(a, b, P: tl.constexpr):
    """a [M, BLOCK_D] @ b [N, BLOCK_D]^T in float32.

    A true float32 product holds whole rows of both in registers. Over 32 columns at a time 64 fit; 128 fit as they are,
    in the small tiles that the table has for them, and do not when they are split: the parts are fetched all at once.
    """
    if P.PRECISION == "ieee" and P.FULL and P.BLOCK_D <= 64 and a.shape[1] > 32:
        even_a, odd_a = tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))
        even_b, odd_b = tl.split(tl.reshape(b, [b.shape[0], b.shape[1] // 2, 2]))
        return inner(even_a, even_b, P) + inner(odd_a, odd_b, P)
    else:
        return product(a, tl.trans(b), P)


@triton.jit
def class_share(batch, group, groups, weights_ptr, P: tl.constexpr):
    """What a group counts for in the class row's output."""
    if P.WEIGHTS:
        return tl.load(weights_ptr + batch * groups + group)
    else:
        return 1.0 / groups + 0.0 * group


@triton.jit
def class_gradient(dout, place, batch, group, groups, weights_ptr, P: tl.constexpr):
    """dout [R, D] with the rows of the class query scaled by what their group counts for."""
    share = class_share(batch, group, groups, weights_ptr, P)
    weighted = (dout.to(tl.float32) * tl.where(place == 0, share, 1.0)[:, None]).to(dout.dtype)
    return tl.where((place == 0)[:, None], weighted, dout)


@triton.jit
def scaled(s, scale, P: tl.constexpr):
    """Scores in the unit of `power`'s exponents."""
    if P.FULL:
        return s * scale
    else:
        return s * (scale * LOG2E)


@triton.jit
def power(x, P: tl.constexpr):
    """e ** x; to 16 bits 2 ** x, so that the factor log2(e) is part of the scale.

    For float32 that would round it in proportion to a score, not to a score's distance from the maximum.
    """
    if P.FULL:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def normalised(e, total, P: tl.constexpr):
    """Exponentials [R, C] over the sums of their rows, [R, 1] or [1, C]."""
    if P.FULL:
        return e / total
    else:
        return e * (1.0 / total)


@triton.jit
def load_sums(ptr, index, keep, P: tl.constexpr):
    """What turns a score of row index[R] into a probability: power(score - top) / total, the second for float32 alone.

    At scores of 1e5 a float32 has no room for the logarithm of the sum beside the maximum. To 16 bits scores are not
    that exact, and one number is enough. A row that does not exist has probabilities power(-inf).
    """
    if keep is None:
        top = tl.load(ptr + index * 2)
        total = tl.load(ptr + index * 2 + 1)
    else:
        top = tl.load(ptr + index * 2, mask=keep, other=float("inf"))
        total = tl.load(ptr + index * 2 + 1, mask=keep, other=1.0)
    if not P.FULL:
        top += tl.log2(total)
    return top, total


@triton.jit
def store_sums(ptr, index, top, total, keep):
    tl.store(ptr + index * 2, top, mask=keep)
    tl.store(ptr + index * 2 + 1, total, mask=keep)


@triton.jit
def class_delta(do_ptr, cls_out_ptr, index, batch, group, groups, weights_ptr, P: tl.constexpr):
    """sum(o * dout) of the class row in one group: o holds a mean over the groups, row `index` of cls_out its own."""
    row = tl.arange(0, 16) * 0  # sixteen times the same, so that a thread loads 16 bytes
    d = tl.arange(0, P.BLOCK_D)
    own = tl.load(cls_out_ptr + index * P.D + row[:, None] + d[None, :], mask=(d < P.D)[None, :], other=0.0)
    dout = load_rows(do_ptr, row, 0, None, P)
    return tl.max(tl.sum(own * dout.to(tl.float32), 1), 0) * class_share(batch, group, groups, weights_ptr, P)
