# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of sequences over 16 members, executed on the CPU: lengths at every edge of a tile, a warp and a
block, what is kept for the backward, numbers that are not finite, and every way a gradient is asked for.
"""

import pytest
import torch
from arena import Arena, carved
from cuda_sim import bits16, checked, regime, run, tensor_cores, view_of
from oracle import Case, attention, check, make_dout, make_qkv, with_gradients, with_weights

from timesformer_kernels import grid_attention_qkvpacked, native_cuda, ops
from timesformer_kernels.backends import cuda

modes = pytest.mark.parametrize("cls", ["none", "key", "per_group"])


def sequence(members, cls, groups=1):
    """A case whose sequences have so many members."""
    return Case("space", (members - (cls not in ("none", "exclude")), 1, groups), cls)


# --- lengths ---------------------------------------------------------------------------------------------------------


@bits16
@modes
@pytest.mark.parametrize("members", [17, 32, 49, 96, 113, 128])
def test_a_block_with_16_queries_to_a_warp(simt, members, cls, dtype):
    case = sequence(members, cls)
    checked(simt, case, *make_qkv(1, case.tokens, 1, 64, dtype, seed=members), "resident")


@bits16
@modes
@pytest.mark.parametrize("members", [129, 145, 160, 197, 225, 255, 256])
def test_two_blocks_with_32_queries_to_a_warp(simt, members, cls, dtype):
    """Warps without a tile, with one of two, and keys that arrive in three parts and in four."""
    case = sequence(members, cls)
    checked(simt, case, *make_qkv(1, case.tokens, 1, 64, dtype, seed=members), "resident")


@bits16
@modes
@pytest.mark.parametrize("members", [17, 100, 128, 129])
def test_wide_heads(simt, members, cls, dtype):
    case = sequence(members, cls)
    expected = tensor_cores(case, head_dim=128)
    assert expected == ("resident" if members <= 128 else "streaming")
    checked(simt, case, *make_qkv(1, case.tokens, 1, 128, dtype, seed=members), expected)


@bits16
@pytest.mark.parametrize("cls", ["none", "key", "per_group", "global"])
@pytest.mark.parametrize("members", [257, 288, 321])
def test_sequences_that_stream(simt, members, cls, dtype):
    """Blocks of rows that are full, that have one member, and warps without any."""
    case = sequence(members, cls)
    checked(simt, case, *make_qkv(1, case.tokens, 1, 64, dtype, seed=members), "streaming")


@bits16
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weights"])
@pytest.mark.parametrize("members, head_dim", [(50, 64), (150, 64), (140, 128), (260, 32)])
def test_a_class_row_of_many_groups(simt, members, head_dim, weighted, dtype):
    """Its output is a mean: what a group has of it counts for its own gradient, and that mean for none."""
    case = sequence(members, "per_group", groups=3)
    if weighted:
        case = with_weights(case, batch=2)
    check(run(case), *make_qkv(2, case.tokens, 2, head_dim, dtype), case)


@bits16
@pytest.mark.parametrize("kind", ["large-logits", "constant-rows", "one-hot", "near-overflow"])
@pytest.mark.parametrize("members, cls", [(40, "key"), (150, "per_group"), (270, "per_group"), (270, "global")])
def test_hard_inputs_of_long_sequences(simt, members, cls, kind, dtype):
    case = sequence(members, cls, groups=2)
    check(run(case), *make_qkv(1, case.tokens, 1, 32, dtype, kind=kind), case)


@bits16
@pytest.mark.parametrize("scale", [0.0, -0.25, 2])
@pytest.mark.parametrize("members", [150, 270])
def test_scales_of_long_sequences(simt, members, scale, dtype):
    case = Case("space", (members - 1, 1, 2), "per_group", scale=scale)
    check(run(case), *make_qkv(1, case.tokens, 1, 32, dtype), case)


# --- memory ----------------------------------------------------------------------------------------------------------


@bits16
@pytest.mark.parametrize("gap", [0, 8], ids=["dense", "gaps"])
@pytest.mark.parametrize(
    "case, head_dim",
    [
        (sequence(40, "key", groups=2), 64),
        (sequence(145, "per_group", groups=2), 64),
        (sequence(273, "per_group", groups=2), 32),
        (sequence(131, "key", groups=2), 128),
        (Case("joint", (5, 5, 11), "exclude", "time_major"), 64),
    ],
    ids=str,
)
def test_guard_arena_of_long_sequences(simt, case, head_dim, gap, dtype, monkeypatch):
    q, k, v = make_qkv(2, case.tokens, 2, head_dim, dtype)
    arena = Arena(1 << 24)

    def place(x):
        padded = arena.take(*x.shape[:-1], x.shape[-1] + gap, dtype=dtype)
        return padded[..., : x.shape[-1]].copy_(x)

    guarded = [place(x) for x in (q, k, v, make_dout(q))]
    before = [x.clone() for x in guarded]
    with carved(monkeypatch, arena):
        got = with_gradients(run(case), *guarded)
    assert arena.damage() == []
    assert all(x.isfinite().all() for x in got), "NaN from outside a tensor, or a row that was never written"
    assert all(torch.equal(x, y) for x, y in zip(guarded, before, strict=True)), "an input was written"


@bits16
@pytest.mark.parametrize("members, cls", [(40, "key"), (197, "per_group"), (290, "per_group"), (290, "global")])
def test_the_order_of_threads_does_not_matter_to_long_sequences(simt, members, cls, dtype):
    case = sequence(members, cls)
    q, k, v = make_qkv(1, case.tokens, 1, 64, dtype)
    results = []
    for seed in (0, 1, 2):
        simt.c.simt_seed(seed)
        results.append(with_gradients(run(case), q, k, v, make_dout(q)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- what the forward keeps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", cuda.TENSOR_CORE_HEAD_DIMS)
@pytest.mark.parametrize("cls", ["exclude", "key", "per_group", "global"])
def test_statistics_are_kept_where_a_backward_reads_them(simt, cls, head_dim):
    """stats_size() knows without the library which kernels will serve a call, and which would on another device."""
    for members in (3, 16, 17, 127, 128, 129, 255, 256, 257, 400):
        case = sequence(members, cls)
        q = torch.empty(1, case.tokens, 1, head_dim, dtype=torch.float16)
        served, size = regime(case, q, q, q), cuda.stats_size(q.shape, q.dtype, view_of(case))
        rows = case.tokens - (cls == "exclude")
        hopper = head_dim == 64 and members > 128
        kept = 2 * rows if served == "streaming" or cls == "global" or hopper else 0
        assert size == kept + (head_dim if kept and cls == "per_group" else 0), members


@bits16
@pytest.mark.parametrize("cls", ["none", "key", "per_group"])
def test_what_is_kept_of_streaming_sequences(simt, cls, dtype):
    G, M, H, D, scale = 2, 270, 2, 32, 0.3
    case = sequence(M, cls, groups=G)
    q, k, v = make_qkv(2, case.tokens, H, D, dtype)
    kept = torch.full((cuda.stats_size(q.shape, dtype, view_of(case)),), float("nan"))
    cuda.forward(q, k, v, view_of(case), scale, None, kept)
    stats, outputs = kept[: 2 * 2 * H * G * M].view(2, H, G, M, 2), kept[2 * 2 * H * G * M :]
    for g in range(G):
        first, patches = int(cls != "none"), case.grid[0]
        rows = [0] * first + list(range(first + g, first + patches * G, G))
        s = torch.einsum("bihd,bjhd->bhij", q[:, rows].double(), k[:, rows].double()) * scale
        exact = torch.stack([s.max(-1).values, (s - s.max(-1, keepdim=True).values).exp().sum(-1)], -1)
        asks = slice(int(cls == "key"), None)  # the class row is no query there
        torch.testing.assert_close(stats[:, :, g, asks].double(), exact[:, :, asks], rtol=1e-5, atol=1e-5)
        if cls == "per_group":
            own = torch.einsum("bhj,bjhd->bhd", s[:, :, 0].softmax(-1), v[:, rows].double())
            torch.testing.assert_close(outputs.view(2, G, H, D)[:, g].double(), own, rtol=0.02, atol=0.02)


def test_a_streaming_backward_without_statistics_is_refused(simt):
    case = sequence(300, "per_group")
    q, k, v = make_qkv(1, case.tokens, 1, 32, torch.bfloat16)
    with pytest.raises(RuntimeError, match="sequences of 300 members needs the forward's result and statistics"):
        cuda.backward(make_dout(q), q, k, v, view_of(case), 1.0, None)


@bits16
@pytest.mark.parametrize("cls", ["key", "per_group", "global"])
def test_a_misaligned_gradient_goes_to_the_generic_backward(simt, cls, dtype):
    """It takes the statistics that the streaming forward has kept."""
    case = sequence(261, cls)
    q, k, v = make_qkv(1, case.tokens, 1, 32, dtype)
    dout = torch.cat([q.new_zeros(1), make_dout(q).flatten()])[1:].view(q.shape)
    grads = (dout, *(torch.empty_like(q) for _ in range(3)))
    assert native_cuda.regime(q, k, v, q, view_of(case), grads=grads) == "generic"
    check(run(case), q, k, v, case, dout=dout)


@pytest.mark.parametrize("cls", ["none", "per_group", "global"])
def test_every_way_to_a_gradient_of_streaming_sequences(simt, cls):
    """Packed, under vmap and as a registered operator: the same bits."""
    case = sequence(270, cls)
    clips = [make_qkv(1, case.tokens, 1, 32, torch.float16, seed=seed) for seed in range(2)]
    dout = make_dout(clips[0][0])
    expected = [with_gradients(run(case), *clip, dout) for clip in clips]

    packed = torch.stack(clips[0], 2).requires_grad_()
    out = grid_attention_qkvpacked(packed, **case.options(backend="cuda"))
    (dqkv,) = torch.autograd.grad(out, packed, dout)
    for a, b in zip((out, *dqkv.unbind(2)), expected[0], strict=True):
        assert torch.equal(a, b)

    both = [torch.stack(x) for x in zip(*clips, strict=True)]
    got = torch.func.vmap(lambda *x: torch.func.vjp(run(case), *x)[1](dout))(*both)
    for i, clip in enumerate(expected):
        assert all(torch.equal(a[i], b) for a, b in zip(got, clip[1:], strict=True))

    view = view_of(case)
    arguments = (*(x.requires_grad_() for x in clips[0]), *view.flat(), view.cls, 0.3, "cuda", None)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.ATTN_FWD, arguments, test_utils=utilities)


# --- numbers that are not finite -------------------------------------------------------------------------------------


@bits16
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("members, cls", [(37, "none"), (37, "key"), (150, "per_group"), (270, "per_group")])
def test_what_is_not_finite_stays_in_its_long_sequence(simt, members, cls, which, value, dtype):
    case = sequence(members, cls, groups=2)
    q, k, v = make_qkv(1, case.tokens, 2, 32, dtype)
    dout = make_dout(q)
    {"q": q, "k": k, "v": v, "dout": dout}[which][0, (cls != "none") + 2 * 9, 1, 3] = value
    expected = with_gradients(lambda *x: attention(*x, case), *(x.double() for x in (q, k, v)), dout.double())
    for name, a, b in zip(("out", "dq", "dk", "dv"), with_gradients(run(case), q, k, v, dout), expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
        if value != value:
            assert torch.equal(a.isnan(), b.isnan()), name


@bits16
@pytest.mark.parametrize("cls", ["none", "key", "per_group"])
@pytest.mark.parametrize("members, hidden", [(37, 5), (150, 70), (270, 1), (270, 140)])
def test_gradients_of_keys_of_weight_zero(simt, members, hidden, cls, dtype):
    """Scores of -inf: the keys' own gradients are zero, and those of all others finite but dq, which meets infinity."""
    case = sequence(members, cls)
    q, k, v = make_qkv(1, case.tokens, 1, 32, dtype)
    q, first, dout = q.abs(), int(cls != "none"), make_dout(q)
    k[:, first : first + hidden] = float("-inf")
    exact = with_gradients(lambda *x: attention(*x, case), *(x.double() for x in (q, k, v)), dout.double())
    got = with_gradients(run(case), q, k, v, dout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, exact, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
    for a, b in zip(got[2:], exact[2:], strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03)
        assert not a[:, first : first + hidden].any()
