# SPDX-License-Identifier: Apache-2.0
"""Faults that have hurt comparable projects; the number in a test's id is that of the list each project keeps."""

import mmap
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import (
    DTYPES,
    Case,
    assert_no_worse,
    attention,
    check,
    device_of,
    interpreted,
    make_dout,
    make_qkv,
    others_serve,
    same,
    widest,
    with_gradients,
    with_weights,
)

from timesformer_kernels import grid_attention, space_attention, time_attention

TIME, SPACE = Case("time", (2, 3, 5), "exclude"), Case("space", (2, 3, 5), "per_group")
GLOBAL, KEY = Case("space", (2, 3, 5), "global"), Case("time", (2, 3, 5), "key")
BOTH = pytest.mark.parametrize("case", [TIME, SPACE, GLOBAL, KEY], ids=str)


def run(case, backend):
    return lambda q, k, v: grid_attention(q, k, v, **case.options(backend=backend))


# 1-5: sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@BOTH
def test_01_empty_batch(backend, case, dtype):
    for batch, heads in ((0, 2), (2, 0), (0, 0)):
        q = torch.zeros(batch, case.tokens, heads, 8, dtype=dtype, device=device_of(backend))
        got = with_gradients(run(case, backend), q, q, q, torch.ones_like(q))
        assert all(x.shape == q.shape and x.dtype == dtype for x in got)


@pytest.mark.parametrize("cls", ["exclude", "per_group", "key", "global"])
def test_01_no_patches(backend, cls):
    """A class row alone: its own value where it attends to itself, zero elsewhere; never NaN."""
    q, k, v = make_qkv(2, 1, 2, 8, device=device_of(backend))
    for frames, size in ((4, (0, 0, 4)), (4, (2, 0, 4))):
        case = Case("space", size, cls)
        got = with_gradients(run(case, backend), q, k, v, torch.ones_like(q))
        assert same(backend, got[0], space_attention(q, k, v, frames=frames, cls=cls, backend=backend))
        expected = v if cls in ("per_group", "global") else torch.zeros_like(v)
        torch.testing.assert_close(got[0], expected)
        assert all(g.isfinite().all() for g in got[1:])


def test_01_no_patches_and_no_class_row(backend):
    q = torch.zeros(2, 0, 2, 8, device=device_of(backend))
    assert time_attention(q, q, q, frames=4, cls="none", backend=backend).shape == q.shape


@pytest.mark.parametrize("cls", ["none", "exclude"])
def test_02_one_frame_returns_the_values(backend, cls):
    case = Case("time", (3, 4, 1), cls)
    q, k, v = case.qkv(backend, 2, 2, 20)
    out = run(case, backend)(q, k, v)
    first = int(cls != "none")
    assert torch.equal(out[:, first:], v[:, first:]) and (out[:, :first] == 0).all()


def test_02_one_patch_returns_the_values(backend):
    case = Case("space", (1, 1, 6), "none")
    q, k, v = case.qkv(backend, 2, 2, 20)
    assert torch.equal(run(case, backend)(q, k, v), v)


@pytest.mark.parametrize("length", [5, 9, 17, 63, 65])
def test_04_lengths_that_no_tile_divides(engine, length):
    for cls in ("none", "key"):
        case = Case("time", (1, 2, length), cls)
        check(run(case, engine), *case.qkv(engine, 1, 1, 24), case)


@pytest.mark.parametrize(
    "batch, patches", [(3, 21845), (2, 32768), (7, 10000)], ids=["65535", "65536", "70000"]
)  # the grid limit of a GPU's y and z axes, and beyond
def test_05_many_sequences(fused, batch, patches):
    if interpreted(fused):
        pytest.skip("the interpreter has no grid, so no limit, and would take many minutes")
    case = Case("time", (patches, 1, 2), "exclude")
    q, k, v = case.qkv(fused, batch, 1, 2)
    got = with_gradients(run(case, fused), q, k, v, dout := make_dout(q))
    parts = [with_gradients(run(case, fused), *(x[i : i + 1] for x in (q, k, v, dout))) for i in range(batch)]
    for name, whole, *pieces in zip(("out", "dq", "dk", "dv"), got, *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces)), name
    check(run(case, fused), q, k, v, case, dout)


# 6-11: strides and dtypes


def test_06_stride_beyond_int32_of_a_tiny_tensor(fused):
    """A batch of one may have any stride: it must not reach an int32."""
    for case in (TIME, SPACE):
        packed = case.qkv(fused, 1, 2, 8)
        far = [x.as_strided(x.shape, (2**40 + 7, *x.stride()[1:]), x.storage_offset()) for x in packed]
        assert torch.equal(run(case, fused)(*far), run(case, fused)(*packed))
        check(run(case, fused), *far, case)


def test_06_offsets_beyond_int32(fused):
    """Two clips 2^31 elements apart in one mapping, of which only the touched pages exist; on a GPU, 4 GiB."""
    if interpreted(fused):
        pytest.skip("the interpreter copies the whole mapping")
    step, dtype = 2**31 + 64, torch.bfloat16
    if device_of(fused) == "cpu":
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # unnamed before Python 3.13
        pages = mmap.mmap(-1, 2 * (step + 4096), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        memory = torch.frombuffer(pages, dtype=dtype)
    else:
        memory = torch.empty(step + 4096, dtype=dtype, device=device_of(fused))
    for case in (TIME, SPACE):
        packed = case.qkv(fused, 2, 1, 8, dtype)
        shape, size = packed[0].shape, packed[0][0].numel()
        far = [memory.as_strided(shape, (step, 8, 8, 1), i * size) for i in range(3)]
        for to, x in zip(far, packed, strict=True):
            to.copy_(x)
        got, expected = (with_gradients(run(case, fused), *x, make_dout(packed[0])) for x in (far, packed))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@BOTH
def test_07_views_of_every_kind(backend, case):
    """transposed, permuted, sliced, step 2, flipped, chunk, unbind, channels-last: equal to the contiguous call."""
    q, k, v = (x.contiguous() for x in case.qkv(backend, 2, 2, 8))
    expected = run(case, backend)(q, k, v)
    video = torch.stack([q, k, v]).permute(0, 2, 3, 4, 1).contiguous()  # [3, S, H, D, B]
    views = {
        "transpose": [
            x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k, v)
        ],
        "slice": [torch.cat([x, x, x], 1)[:, case.tokens : 2 * case.tokens] for x in (q, k, v)],
        "step": [torch.stack([x, x + 1], 3).flatten(2, 3)[:, :, ::2] for x in (q, k, v)],
        "flip": [x.flip(0).flip(0) for x in (q, k, v)],
        "chunk": torch.cat([q, k, v], 2).chunk(3, 2),
        "unbind": torch.stack([q, k, v], 2).unbind(2),
        "batch-last": [x.permute(3, 0, 1, 2).contiguous() for x in video],
    }
    for name, x in views.items():
        assert same(backend, run(case, backend)(*x), expected), name


@BOTH
def test_08_expanded_inputs(backend, case):
    """One clip, one row or one head for all: strides of zero."""
    q, k, v = case.qkv(backend, 1, 1, 8)
    shape = (3, case.tokens, 2, 8)
    for x in (
        [x.expand(shape) for x in (q, k, v)],
        [q.expand(shape), k[:, :1].expand(shape), v.expand(shape)],
        [q[:, :, :1].expand(shape), k.expand(shape), v[:, :1].expand(shape)],
    ):
        check(run(case, backend), *x, case)
        assert same(backend, run(case, backend)(*x), run(case, backend)(*(y.contiguous() for y in x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_09_misaligned_by_one_element(engine, dtype):
    for case in (TIME, SPACE):
        q, k, v = (x.contiguous() for x in case.qkv(engine, 2, 2, 64, dtype))
        moved = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
        assert all(x.storage_offset() == 1 for x in moved)
        a, b = (with_gradients(run(case, engine), *x, make_dout(q)) for x in ((q, k, v), moved))
        if others_serve(engine, moved):
            check(run(case, engine), *moved, case)
        else:
            assert all(same(engine, x, y) for x, y in zip(a, b, strict=True))


@BOTH
def test_10_overlapping_memory_is_read_only(backend, case):
    memory = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(device_of(backend))
    x = [memory.as_strided((2, case.tokens, 2, 8), (5, 3, 2, 1), at) for at in (0, 100, 200)]
    before = memory.clone()
    check(run(case, backend), *x, case)
    assert torch.equal(memory, before)


# 16-20: values


@BOTH
def test_16_nan_in_one_query_stays_in_its_row(backend, case):
    q, k, v = case.qkv(backend, 2, 2, 8)
    q[1, 7, 1, 3] = float("nan")
    out = run(case, backend)(q, k, v)
    bad = out.isnan()
    assert bad[1, 7, 1].all()
    bad[1, 7, 1] = False
    assert not bad.any()


@BOTH
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("row", [0, 7])
def test_16_nan_in_one_key_or_value_goes_where_the_oracle_says(backend, case, which, row):
    q, k, v = case.qkv(backend, 2, 2, 8)
    {"k": k, "v": v}[which][1, row, 1, 3] = float("nan")
    got, expected = run(case, backend)(q, k, v), attention(q, k, v, case)
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf")], ids=["inf", "-inf"])
def test_17_infinities_as_eager_float32(backend, case, which, value):
    q, k, v = case.qkv(backend, 2, 2, 8)
    {"q": q, "k": k, "v": v}[which][0, 3, 0, 2] = value
    got, expected = run(case, backend)(q, k, v), attention(q, k, v, case)
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("size", [1e4, 1e5])
def test_18_huge_logits(engine, case, size):
    q, k, v = case.qkv(engine, 2, 2, 8)
    k = k * size
    check(run(case, engine), q, k, v, case)


@BOTH
def test_18_all_logits_equal_and_very_negative(engine, case):
    """A finite mask value instead of -inf would win against these."""
    q, k, v = case.qkv(engine, 2, 2, 8)
    q, k = torch.full_like(q, 1e3), torch.full_like(k, -1e5 / 8 / 1e3 * 8**0.5)
    check(run(case, engine), q, k, v, case)


@BOTH
def test_19_half_precision_products_beyond_65504(engine, case):
    """200 * 200 * 64 overflows fp16: the sum is taken in float32. So does plain torch in fp16: float32's is rounded."""
    q, k, v = (x.half() for x in case.qkv(engine, 2, 2, 64))
    q, k = q.sign() * 200, k.sign() * 200
    got = with_gradients(run(case, engine), q, k, v, make_dout(q))
    exact = with_gradients(lambda *x: attention(*x, case), *(x.cpu().double() for x in (q, k, v, make_dout(q))))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, exact, strict=True):
        assert_no_worse(name, a.cpu(), b, b.half())


def test_19_half_precision_subnormals_survive(engine):
    """Values below 2^-14 are not flushed to zero, on the way in or out."""
    case = Case("time", (3, 3, 1), "none")
    v = (torch.arange(9 * 21, device=device_of(engine)) + 1).view(1, 9, 1, 21).half() * 2**-24
    q = torch.zeros_like(v)
    assert torch.equal(run(case, engine)(q, q, v), v)


@BOTH
def test_20_scale_zero_is_the_mean(backend, case):
    q, k, v = case.qkv(backend, 2, 2, 8, widest(backend))
    case = Case(case.scheme, case.grid, case.cls, scale=0)
    torch.testing.assert_close(run(case, backend)(q, k, v), attention(q * 0, k, v, case))


# 23-28: autograd and processes (23, 24 and 26 also in test_gradients.py and test_ops.py)


@BOTH
@pytest.mark.needs(dtype=torch.float64)
def test_23_one_tensor_three_times(backend, case):
    x = case.qkv(backend, 1, 1, 8, torch.float64)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(case, backend)(x, x, x), (x,), fast_mode=True)


@BOTH
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_25_saved_input_changed_in_place(fused, case, which):
    leaves = [x.detach().requires_grad_() for x in case.qkv(fused, 1, 1, 8)]
    inputs = [x * 1 for x in leaves]
    out = run(case, fused)(*inputs)
    inputs[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_25_saved_class_weights_changed_in_place(fused):
    case = with_weights(SPACE, 1).on(fused)
    out = run(case, fused)(*(x.detach().requires_grad_() for x in case.qkv(fused, 1, 1, 8)))
    case.weights.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@BOTH
def test_inputs_are_never_written(backend, case):
    inputs = case.qkv(backend, 2, 2, 8)
    dout = make_dout(inputs[0])
    before = [x.clone() for x in (*inputs, dout)]
    with_gradients(run(case, backend), *inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, dout), strict=True))


@BOTH
def test_28_eight_threads(backend, case):
    if interpreted(backend):
        pytest.skip("the interpreter keeps its state in globals")
    inputs = case.qkv(backend, 2, 2, 16)
    expected = with_gradients(run(case, backend), *inputs, make_dout(inputs[0]))
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(with_gradients, run(case, backend), *inputs, make_dout(inputs[0])) for _ in range(40)]
        for job in jobs:
            for a, b in zip(job.result(), expected, strict=True):
                torch.testing.assert_close(a, b, atol=0 if backend != "reference" else 1e-6, rtol=1e-6)


class Clips(torch.utils.data.Dataset):
    """Attention inside a DataLoader's forked worker."""

    def __init__(self, backend):
        self.backend = backend

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return run(SPACE, self.backend)(*SPACE.qkv(self.backend, 1, 2, 16, seed=i))[0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_28_fork_after_use(backend):
    if device_of(backend) == "cuda":
        pytest.skip("CUDA does not work in a forked process")
    big = make_qkv(2, 1 + 64 * 8, 4, 32)
    space_attention(*big, frames=8, backend=backend)  # the thread pool exists before the fork
    loader = torch.utils.data.DataLoader(
        Clips(backend), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for i, batch in enumerate(loader):
        expected = torch.stack([run(SPACE, backend)(*SPACE.qkv(backend, 1, 2, 16, seed=2 * i + j))[0] for j in (0, 1)])
        torch.testing.assert_close(batch, expected, atol=1e-6, rtol=1e-6)


def spawned(backend, queue):
    from timesformer_kernels import time_attention

    queue.put(float(time_attention(*TIME.qkv(backend, 1, 2, 8), frames=5, backend=backend).sum()))


def test_28_import_in_a_spawned_child(backend):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=spawned, args=(backend, queue))
    child.start()
    got = queue.get(timeout=120)
    child.join(60)
    assert got == pytest.approx(float(run(TIME, backend)(*TIME.qkv(backend, 1, 2, 8)).sum()), rel=1e-5)
