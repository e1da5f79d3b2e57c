# SPDX-License-Identifier: Apache-2.0
"""The forward on compute capability 9.0 (csrc/cuda/hopper.cuh), executed on the CPU: against the float64 oracle, with
copies and products that end at random times; which calls it takes; what is left to the other kernels.
"""

import math

import pytest
import torch
from arena import Arena, carved
from cuda_sim import bits16, checked, regime, run, tensor_cores, view_of
from oracle import Case, assert_no_worse, attention, check, make_dout, make_qkv, with_gradients, with_weights

from timesformer_kernels import native_cuda
from timesformer_kernels.backends import cuda

LAUNCH_FAILURE = 719  # cudaError_t


@pytest.fixture
def simt(simt):
    """The library on a GPU of compute capability 9.0."""
    simt.c.simt_capability(90)
    yield simt
    simt.c.simt_copies(0), simt.c.simt_old_driver(0), simt.c.simt_kernel_threads(1024)


def right(simt, case, q, k, v):
    """The output against the oracle, by this kernel and, where the class row asks, one more."""
    assert regime(case, q, k, v) == "hopper"
    before = simt.c.simt_launches()
    got = run(case)(q, k, v)
    assert simt.c.simt_launches() == before + 1 + (case.cls in ("per_group", "global"))
    assert_no_worse("out", got, attention(*(x.double() for x in (q, k, v)), case), attention(q, k, v, case))


# --- against the oracle ----------------------------------------------------------------------------------------------


@bits16
@pytest.mark.parametrize("cls", ["none", "exclude", "key", "per_group", "global"])
@pytest.mark.parametrize("frames", [65, 80, 81, 111, 128, 129, 192, 193, 241, 256, 257, 385, 600])
def test_lengths(simt, frames, cls, dtype):
    """Keys in every part of 64, as many as the stages hold, one more, once and twice around them; queries likewise."""
    case = Case("time", (1, 2, frames), cls)
    right(simt, case, *make_qkv(1, case.tokens, 2, 64, dtype, seed=frames))


@bits16
@pytest.mark.parametrize("cls", ["none", "key", "per_group", "global"])
@pytest.mark.parametrize("frames", [66, 130, 257, 330])
def test_wide_heads(simt, frames, cls, dtype):
    case = Case("time", (1, 2, frames), cls)
    right(simt, case, *make_qkv(2, case.tokens, 1, 128, dtype, seed=frames))


@bits16
@pytest.mark.parametrize("scheme", ["space", "joint", "time", "height", "width"])
@pytest.mark.parametrize("cls", ["key", "per_group", "global"])
@pytest.mark.parametrize("order", ["space_major", "time_major"])
def test_schemes_of_one_axis(simt, scheme, cls, order, dtype):
    grid = {"time": (2, 1, 70), "height": (70, 1, 2), "width": (1, 70, 2)}.get(scheme, (7, 10, 2))
    case = Case(scheme, grid, cls, order)
    checked(simt, case, *make_qkv(2, case.tokens, 3, 64, dtype), "hopper")


@bits16
@pytest.mark.parametrize("cls", ["none", "per_group", "global"])
@pytest.mark.parametrize("side", [14, 28])
def test_space_at_224_and_448_pixels(simt, side, cls, dtype):
    case = Case("space", (side, side, 1 if side == 28 else 2), cls)
    right(simt, case, *make_qkv(1, case.tokens, 1, 64, dtype))


@bits16
@pytest.mark.parametrize("scheme", ["time", "space"])
def test_class_row_weights(simt, scheme, dtype):
    case = with_weights(Case(scheme, (1, 70, 3) if scheme == "space" else (1, 3, 70), "per_group"), batch=2)
    checked(simt, case, *make_qkv(2, case.tokens, 3, 64, dtype), "hopper")


HARD = [
    Case("time", (1, 2, 81), "none"),
    Case("space", (9, 9, 2), "per_group"),
    Case("space", (17, 18, 2), "global", "time_major"),
    Case("joint", (3, 9, 3), "key"),
]


@bits16
@pytest.mark.parametrize("kind", ["large-logits", "constant-rows", "one-hot", "near-overflow"])
@pytest.mark.parametrize("case", HARD, ids=str)
def test_hard_inputs(simt, case, kind, dtype):
    checked(simt, case, *make_qkv(1, case.tokens, 2, 64, dtype, kind=kind), "hopper")


@bits16
@pytest.mark.parametrize("scale, expected", [(1e-3, "hopper"), (2, "hopper"), (0.0, "resident"), (-0.25, "resident")])
def test_scales(simt, scale, expected, dtype):
    """Scores are scaled when their maximum is known; without a positive scale the other kernels serve."""
    case = Case("space", (9, 9, 2), "per_group", scale=scale)
    q, k, v = make_qkv(2, case.tokens, 2, 64, dtype)
    assert native_cuda.regime(q, k, v, torch.empty_like(q), view_of(case), scale=scale) == expected
    check(run(case), q, k, v, case)


@bits16
@pytest.mark.parametrize("cls", ["none", "key"])
@pytest.mark.parametrize("length, hidden", [(80, 33), (300, 129), (300, 299)])
def test_keys_of_weight_zero_come_first(simt, length, hidden, cls, dtype):
    """Scores of -inf up to and past the first block of keys, the class key too, and one row of +inf there."""
    case = Case("joint", (1, length, 1), cls)
    q, k, v = make_qkv(1, case.tokens, 1, 64, dtype)
    q = q.abs()
    q[:, 5] *= -1
    k[:, :hidden] = float("-inf")
    asks = slice(int(cls == "key"), None)  # the class row's output is zero
    exact = attention(*(x.double() for x in (q, k, v)), case)
    assert exact[:, 5].isnan().all() and exact[:, asks][:, :4].isfinite().all()
    eager = attention(*(x.float() for x in (q, k, v)), case).to(dtype)  # torch's products of bfloat16 make infinity NaN
    assert regime(case, q, k, v) == "hopper"
    assert_no_worse("out", run(case)(q, k, v), exact, eager)


@bits16
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("cls", ["none", "key", "per_group", "global"])
@pytest.mark.parametrize("row", [0, 100])
def test_what_is_not_finite_stays_in_its_sequence(simt, row, cls, value, dtype):
    """In row 0 it reaches every sequence that has the class row, elsewhere one and, with a class query, that row."""
    case = Case("time", (1, 3, 70), cls)
    q, k, v = make_qkv(1, case.tokens, 2, 64, dtype)
    assert regime(case, q, k, v) == "hopper"
    for spoilt in range(3):
        inputs = [x.clone() for x in (q, k, v)]
        inputs[spoilt][0, row, 1] = value
        exact = attention(*(x.double() for x in inputs), case)
        got = run(case)(*inputs)
        assert torch.equal(got.isfinite(), exact.isfinite()), ("q", "k", "v")[spoilt]


@bits16
@pytest.mark.parametrize("cls", ["none", "key", "per_group", "global"])
@pytest.mark.parametrize("frames", [80, 330])
def test_statistics(simt, frames, cls, dtype):
    case = Case("time", (1, 3, frames), cls)
    q, k, v = make_qkv(2, case.tokens, 2, 64, dtype)
    first = int(cls != "none")
    shape = (2, 2, 3, frames + first, 2)
    numbers = cuda.stats_size(q.shape, dtype, view_of(case)) or math.prod(shape)  # "per_group": behind them more
    kept = torch.full((numbers,), float("nan"))
    native_cuda.attention(q, k, v, torch.empty(q.shape, dtype=dtype), view_of(case), 0.3, None, stats=kept)
    stats = kept[: math.prod(shape)].view(shape)
    exact = torch.empty(stats.shape, dtype=torch.float64)
    for g in range(3):
        rows = [0] * first + list(range(first + g * frames, first + (g + 1) * frames))
        s = torch.einsum("bihd,bjhd->bhij", q[:, rows].double(), k[:, rows].double()) * 0.3
        if cls == "global":  # one softmax of the class row, for all groups the same
            s = s[:, :, 1:]
        top = s.max(-1).values
        exact[:, :, g, first * (cls == "global") :] = torch.stack([top, (s - top[..., None]).exp().sum(-1)], -1)
    if cls == "global":
        s = torch.einsum("bhd,bjhd->bhj", q[:, 0].double(), k.double()) * 0.3
        top = s.max(-1).values
        exact[:, :, :, 0] = torch.stack([top, (s - top[..., None]).exp().sum(-1)], -1)[:, :, None]
    asks = slice(int(cls == "key"), None)  # the class row is no query there
    torch.testing.assert_close(stats[:, :, :, asks].double(), exact[:, :, :, asks], rtol=1e-5, atol=1e-5)


# --- memory and order ------------------------------------------------------------------------------------------------


@bits16
@pytest.mark.parametrize("gap", [0, 8], ids=["dense", "gaps"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", HARD, ids=str)
def test_guard_arena(simt, case, head_dim, gap, dtype, monkeypatch):
    q, k, v = make_qkv(2, case.tokens, 2, head_dim, dtype)
    arena = Arena(1 << 23)

    def place(x):
        padded = arena.take(*x.shape[:-1], x.shape[-1] + gap, dtype=dtype)
        return padded[..., : x.shape[-1]].copy_(x)

    guarded = [place(x) for x in (q, k, v)]
    before = [x.clone() for x in guarded]
    assert regime(case, *guarded) == "hopper"
    with carved(monkeypatch, arena):
        got = run(case)(*guarded)
    assert arena.damage() == []
    assert got.isfinite().all(), "NaN from outside a tensor, or a row that was never written"
    assert all(torch.equal(x, y) for x, y in zip(guarded, before, strict=True)), "an input was written"
    assert_no_worse("out", got, attention(*(x.double() for x in (q, k, v)), case), attention(q, k, v, case))


LAYOUTS = {  # q, k, v with the same values and other strides; whether the accelerator takes them
    "contiguous": (True, lambda x: x.contiguous()),
    "heads-first": (True, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "batch-inside": (True, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "every-second-row": (True, lambda x: torch.stack([x, x + 9], 2).flatten(1, 2)[:, ::2]),
    "one-head-for-all": (False, lambda x: x[:, :, :1].expand(x.shape)),
    "odd-rows": (False, lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1]),
}


@bits16
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(simt, layout, dtype):
    takes, arrange = LAYOUTS[layout]
    for case in (Case("space", (5, 14, 3), "per_group"), Case("time", (2, 1, 70), "none")):
        q, k, v = map(arrange, make_qkv(2, case.tokens, 3, 64, dtype))
        assert (regime(case, q, k, v) == "hopper") == takes
        check(run(case), q, k, v, case)


def test_strides_past_32_bits(simt, tmp_path):
    """Clips 2^32 elements apart, in sparse files."""
    case, shape, strides = Case("time", (1, 1, 70), "key"), (2, 71, 1, 64), (2**32 + 64, 2**20, 8, 1)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    near, far = make_qkv(2, 71, 1, 64, torch.bfloat16), []
    for i, x in enumerate(near):
        memory = torch.from_file(str(tmp_path / str(i)), shared=True, size=size, dtype=torch.bfloat16)
        far.append(memory.as_strided(shape, strides).copy_(x))
    assert regime(case, *far) == "hopper"
    assert torch.equal(run(case)(*far), run(case)(*near))


@bits16
@pytest.mark.parametrize("case", HARD, ids=str)
def test_neither_the_order_of_threads_nor_of_copies_matters(simt, case, dtype):
    """Copies and products by chance, at the last moment, at once."""
    q, k, v = make_qkv(2, case.tokens, 2, 64, dtype)
    results = []
    for copies in (0, 1, 2):
        for seed in (0, 1, 2, 3):
            simt.c.simt_copies(copies), simt.c.simt_seed(seed)
            results.append(run(case)(q, k, v))
    assert all(torch.equal(results[0], other) for other in results[1:])


@bits16
@pytest.mark.parametrize("cls", ["none", "exclude", "key", "per_group", "global"])
def test_gradients_do_not_depend_on_the_forward(simt, cls, dtype):
    """What the backward has of the forward it has of either."""
    case = Case("space", (9, 9, 2), cls)
    q, k, v = make_qkv(2, case.tokens, 2, 64, dtype)
    new = with_gradients(run(case), q, k, v, make_dout(q))
    simt.c.simt_capability(80)
    old = with_gradients(run(case), q, k, v, make_dout(q))
    for name, a, b in zip(("out", "dq", "dk", "dv"), new, old, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02, msg=name)


# --- which calls -----------------------------------------------------------------------------------------------------


def test_other_calls_are_left_to_other_kernels(simt):
    def name(case, head_dim=64, dtype=torch.bfloat16):
        return regime(case, *make_qkv(1, case.tokens, 2, head_dim, dtype))

    long = Case("space", (9, 9, 2), "per_group")
    assert name(long) == name(long, 128) == name(long, dtype=torch.float16) == "hopper"
    assert name(long, 32) == "resident" and name(long, dtype=torch.float32) == name(long, 40) == "generic"
    assert name(Case("space", (8, 8, 2), "none")) == "resident" and name(Case("space", (8, 8, 2), "key")) == "hopper"
    for scheme in ("local", "global"):  # sequences of several axes
        split = Case(scheme, (10, 10, 6), "key")
        assert name(split) == tensor_cores(split)
    q, k, v = make_qkv(1, long.tokens, 2, 64, torch.bfloat16)
    grads = (make_dout(q), *(torch.empty_like(q) for _ in range(3)))
    assert native_cuda.regime(q, k, v, torch.empty_like(q), view_of(long), grads=grads) == "resident"


def test_other_gpus_drivers_and_builds_have_the_other_kernels(simt):
    case = Case("space", (9, 9, 2), "per_group")
    q, k, v = make_qkv(1, case.tokens, 2, 64, torch.bfloat16)
    for capability, expected in ((80, "resident"), (90, "hopper"), (100, "resident"), (120, "resident")):
        simt.c.simt_capability(capability)
        checked(simt, case, q, k, v, expected)
    simt.c.simt_capability(90), simt.c.simt_old_driver(1)
    checked(simt, case, q, k, v, "resident")
    simt.c.simt_old_driver(0), simt.c.simt_kernel_threads(32)  # compiled for 90, not for 90a
    checked(simt, case, q, k, v, "resident")


def test_a_failed_launch_raises_with_its_name_and_the_next_call_works(simt):
    case = Case("space", (9, 9, 2), "per_group")
    q, k, v = make_qkv(1, case.tokens, 2, 64, torch.bfloat16)
    expected = run(case)(q, k, v)
    simt.c.simt_fail_next(LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match=rf"kernel hopper_forward: .*\(CUDA error {LAUNCH_FAILURE}\)"):
        run(case)(q, k, v)
    assert torch.equal(run(case)(q, k, v), expected)
