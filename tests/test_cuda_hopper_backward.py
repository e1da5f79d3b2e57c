# SPDX-License-Identifier: Apache-2.0
"""The backward on compute capability 9.0 (csrc/cuda/hopper_backward.cuh), executed on the CPU: against the float64
oracle, with copies and products that end at random times; which calls it takes.
"""

import pytest
import torch
from arena import Arena, carved
from cuda_sim import bits16, run, view_of
from oracle import Case, attention, check, make_dout, make_qkv, with_gradients, with_weights

from timesformer_kernels import native_cuda
from timesformer_kernels.backends import cuda

LAUNCH_FAILURE = 719  # cudaError_t
MODES = pytest.mark.parametrize("cls", ["none", "exclude", "key", "per_group", "global"])


@pytest.fixture
def simt(simt):
    """The library on a GPU of compute capability 9.0."""
    simt.c.simt_capability(90)
    yield simt
    simt.c.simt_copies(0), simt.c.simt_old_driver(0), simt.c.simt_kernel_threads(1024)


def regime(case, q, k, v, dout=None, **more):
    """Of the backward, after a forward that has kept what it should."""
    grads = (make_dout(q) if dout is None else dout, *(torch.empty_like(q) for _ in range(3)))
    size = cuda.stats_size(q.shape, q.dtype, view_of(case))
    stats = torch.empty(size) if size else None
    return native_cuda.regime(q, k, v, torch.empty_like(q), view_of(case), stats, grads, **more)


def right(simt, case, q, k, v, dout=None):
    """Output and gradients against the oracle, by these kernels: one forward, two of them, and the class row's."""
    assert regime(case, q, k, v, dout) == "hopper"
    before = simt.c.simt_launches()
    check(run(case), q, k, v, case, dout=dout)
    classes = {"none": 0, "exclude": 0, "key": 1}.get(case.cls, 2)
    assert (simt.c.simt_launches() - before) % (3 + classes) == 0


# --- against the oracle ----------------------------------------------------------------------------------------------


@bits16
@MODES
@pytest.mark.parametrize(
    "frames", [129, 144, 177, 193, 196, 255, 256, 257, 271, 289, 305, 319, 320, 321, 384, 449, 600]
)
def test_lengths(simt, frames, cls, dtype):
    """What passes by in every part of 64, in fewer stages than there are places and twice around; class rows alone in
    a block; on both sides of what a block of other kernels would hold whole."""
    case = Case("time", (1, 2, frames), cls)
    right(simt, case, *make_qkv(1, case.tokens, 1, 64, dtype, seed=frames))


@bits16
@pytest.mark.parametrize("frames", [64, 65, 130, 193, 256])
def test_short_sequences_with_one_softmax_over_all(simt, frames, dtype):
    """A global class row streams at any length; here fewer stages than there are places."""
    case = Case("time", (1, 3, frames), "global")
    right(simt, case, *make_qkv(2, case.tokens, 2, 64, dtype, seed=frames))


@bits16
@pytest.mark.parametrize("scheme", ["space", "joint", "time"])
@pytest.mark.parametrize("cls", ["key", "per_group", "global"])
@pytest.mark.parametrize("order", ["space_major", "time_major"])
def test_schemes_of_one_axis(simt, scheme, cls, order, dtype):
    case = Case(scheme, {"space": (17, 16, 2), "joint": (9, 15, 2), "time": (2, 1, 270)}[scheme], cls, order)
    right(simt, case, *make_qkv(2, case.tokens, 2, 64, dtype))


@bits16
@pytest.mark.parametrize("cls", ["none", "per_group"])
def test_space_at_448_pixels(simt, cls, dtype):
    case = Case("space", (28, 28, 1), cls)
    right(simt, case, *make_qkv(1, case.tokens, 1, 64, dtype))


@bits16
def test_class_row_weights(simt, dtype):
    case = with_weights(Case("time", (1, 3, 270), "per_group"), batch=2)
    right(simt, case, *make_qkv(2, case.tokens, 2, 64, dtype))


HARD = [
    Case("time", (1, 2, 273), "none"),
    Case("space", (17, 17, 2), "per_group"),
    Case("space", (14, 14, 2), "per_group"),
    Case("space", (17, 18, 2), "global", "time_major"),
    Case("joint", (5, 11, 5), "key"),
]


@bits16
@pytest.mark.parametrize("kind", ["large-logits", "constant-rows", "one-hot", "near-overflow"])
@pytest.mark.parametrize("case", HARD, ids=str)
def test_hard_inputs(simt, case, kind, dtype):
    right(simt, case, *make_qkv(1, case.tokens, 1, 64, dtype, kind=kind))


@bits16
@pytest.mark.parametrize("scale", [1e-3, 2, 0.0, -0.25])
@pytest.mark.parametrize("grid", [(17, 16, 2), (17, 17, 2), (14, 14, 2)])
def test_scales(simt, grid, scale, dtype):
    """All: where the forward leaves a call to other kernels, this takes what they have kept."""
    case = Case("space", grid, "per_group", scale=scale)
    right(simt, case, *make_qkv(1, case.tokens, 2, 64, dtype))


# --- numbers that are not finite -------------------------------------------------------------------------------------


@bits16
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
@pytest.mark.parametrize("cls", ["none", "key", "per_group"])
@pytest.mark.parametrize("row", [0, 19])
def test_what_is_not_finite_stays_in_its_sequence(simt, row, cls, which, value, dtype):
    case = Case("space", (27, 10, 2), cls)
    q, k, v = make_qkv(1, case.tokens, 2, 64, dtype)
    inputs = [q, k, v, make_dout(q)]
    inputs[which][0, row, 1, 3] = value
    assert regime(case, *inputs) == "hopper"
    exact = with_gradients(lambda *x: attention(*x, case), *(x.double() for x in inputs))
    asks = slice(int(cls == "key"), None)  # the class row is no query there, whatever it holds
    for name, a, b in zip(("out", "dq", "dk", "dv"), with_gradients(run(case), *inputs), exact, strict=True):
        assert torch.equal(a[:, asks].isfinite(), b[:, asks].isfinite()), name
        if value != value:
            assert torch.equal(a[:, asks].isnan(), b[:, asks].isnan()), name


@bits16
@pytest.mark.parametrize("cls", ["none", "key", "per_group"])
@pytest.mark.parametrize("length, hidden", [(269, 1), (269, 140), (300, 290)])
def test_gradients_of_keys_of_weight_zero(simt, length, hidden, cls, dtype):
    """Scores of -inf: the keys' own gradients are zero, and those of all others finite but dq, which meets infinity.
    Nor does what lies behind the last query, zeros times infinity, reach them."""
    case = Case("time", (1, 1, length), cls)
    q, k, v = make_qkv(1, case.tokens, 1, 64, dtype)
    q, first, dout = q.abs(), int(cls != "none"), make_dout(q)
    k[:, first : first + hidden] = float("-inf")
    assert regime(case, q, k, v) == "hopper"
    exact = with_gradients(lambda *x: attention(*x, case), *(x.double() for x in (q, k, v)), dout.double())
    got = with_gradients(run(case), q, k, v, dout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, exact, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
    for a, b in zip(got[2:], exact[2:], strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03)
        assert not a[:, first : first + hidden].any()


@bits16
@pytest.mark.parametrize("cls", ["none", "key"])
def test_scores_far_below_zero(simt, cls, dtype):
    """Zeros behind the last key would have exponentials of infinity against these."""
    case = Case("time", (1, 1, 270), cls)
    q, k, v = make_qkv(1, case.tokens, 1, 64, dtype)
    right(simt, case, q.abs() + 1, -k.abs() - 1, v)


# --- memory and order ------------------------------------------------------------------------------------------------


@bits16
@pytest.mark.parametrize("gap", [0, 8], ids=["dense", "gaps"])
@pytest.mark.parametrize("case", HARD, ids=str)
def test_guard_arena(simt, case, gap, dtype, monkeypatch):
    q, k, v = make_qkv(2, case.tokens, 2, 64, dtype)
    arena = Arena(1 << 24)

    def place(x):
        padded = arena.take(*x.shape[:-1], x.shape[-1] + gap, dtype=dtype)
        return padded[..., : x.shape[-1]].copy_(x)

    guarded = [place(x) for x in (q, k, v, make_dout(q))]
    before = [x.clone() for x in guarded]
    assert regime(case, *guarded) == "hopper"
    with carved(monkeypatch, arena):
        got = with_gradients(run(case), *guarded)
    assert arena.damage() == []
    assert all(x.isfinite().all() for x in got), "NaN from outside a tensor, or a row that was never written"
    assert all(torch.equal(x, y) for x, y in zip(guarded, before, strict=True)), "an input was written"


LAYOUTS = {  # tensors with the same values and other strides; whether the accelerator takes them
    "heads-first": (True, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "every-second-row": (True, lambda x: torch.stack([x, x + 9], 2).flatten(1, 2)[:, ::2]),
    "one-head-for-all": (False, lambda x: x[:, :, :1].expand(x.shape)),
}


@bits16
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(simt, layout, dtype):
    takes, arrange = LAYOUTS[layout]
    case = Case("space", (27, 10, 2), "per_group")
    q, k, v = map(arrange, make_qkv(2, case.tokens, 2, 64, dtype))
    dout = arrange(make_dout(q))
    assert regime(case, q, k, v, dout) == ("hopper" if takes else "streaming")
    check(run(case), q, k, v, case, dout=dout)


@bits16
@pytest.mark.parametrize("case", HARD, ids=str)
def test_neither_the_order_of_threads_nor_of_copies_matters(simt, case, dtype):
    """Copies and products by chance, at the last moment, at once."""
    q, k, v = make_qkv(1, case.tokens, 1, 64, dtype)
    results = []
    for copies in (0, 1, 2):
        for seed in (0, 1, 2):
            simt.c.simt_copies(copies), simt.c.simt_seed(seed)
            results.append(with_gradients(run(case), q, k, v, make_dout(q)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- which calls -----------------------------------------------------------------------------------------------------


def test_other_calls_are_left_to_other_kernels(simt):
    def name(case, head_dim=64, dtype=torch.bfloat16):
        return regime(case, *make_qkv(1, case.tokens, 1, head_dim, dtype))

    long = Case("space", (17, 16, 2), "per_group")
    assert name(long) == name(long, dtype=torch.float16) == "hopper"
    assert name(long, 32) == name(long, 128) == "streaming"
    assert name(long, dtype=torch.float32) == name(long, 40) == "generic"
    assert name(Case("space", (16, 16, 2), "none")) == name(Case("space", (16, 8, 2), "key")) == "hopper"
    assert name(Case("space", (16, 8, 2), "none")) == "resident"
    assert name(Case("time", (1, 2, 60), "global")) == "streaming"  # a block's rows are more than there are
    assert name(Case("local", (20, 20, 5), "key")) == "streaming"  # sequences of several axes


@pytest.mark.parametrize("side, other", [(17, "streaming"), (14, "resident")])
def test_other_gpus_drivers_and_builds_have_the_other_kernels(simt, side, other):
    """With the same workspace and statistics."""
    case = Case("space", (side, 16, 2), "per_group")
    q, k, v = make_qkv(1, case.tokens, 1, 64, torch.bfloat16)

    def served(expected):
        assert regime(case, q, k, v) == expected
        check(run(case), q, k, v, case)

    for capability, expected in ((80, other), (90, "hopper"), (100, other), (120, other)):
        simt.c.simt_capability(capability)
        served(expected)
    simt.c.simt_capability(90), simt.c.simt_old_driver(1)
    served(other)
    simt.c.simt_old_driver(0), simt.c.simt_kernel_threads(32)  # compiled for 90, not for 90a
    served(other)


def test_without_what_a_forward_keeps_a_block_holds_the_sequence(simt):
    """Statistics, and rows of the output that are aligned."""
    case = Case("space", (14, 14, 2), "per_group")
    q, k, v = make_qkv(1, case.tokens, 1, 64, torch.bfloat16)
    grads, stats = [make_dout(q), *(torch.empty_like(q) for _ in range(3))], torch.empty(10_000)
    far = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    names = [native_cuda.regime(q, k, v, o, view_of(case), s, grads) for o, s in ((q, None), (far, stats), (q, stats))]
    assert names == ["resident", "resident", "hopper"]


def test_a_failed_launch_raises_with_its_name(simt):
    case = Case("time", (1, 1, 270), "none")
    q, k, v = make_qkv(1, case.tokens, 1, 64, torch.bfloat16)
    out = run(case)(*(x.requires_grad_() for x in (q, k, v)))
    simt.c.simt_fail_next(LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match=rf"kernel hopper_backward_queries: .*\(CUDA error {LAUNCH_FAILURE}\)"):
        out.backward(make_dout(q))
