# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels made for one number of members (1, 2, 4, 8, 16, no class row among them), executed on the CPU."""

import pytest
import torch
from cuda_sim import bits16, checked, run, view_of
from oracle import Case, attention, make_dout, make_qkv, with_gradients

from timesformer_kernels import native_cuda

members = pytest.mark.parametrize("members", [1, 2, 4, 8, 16])


@bits16
@members
@pytest.mark.parametrize("cls", ["none", "exclude"])
@pytest.mark.parametrize("groups", [1, 7, 33])
def test_tiles_full_and_not(simt, groups, cls, members, dtype):
    case = Case("time", (1, groups, members), cls)
    checked(simt, case, *make_qkv(2, case.tokens, 3, 32, dtype, seed=members), "short")


@bits16
@members
@pytest.mark.parametrize("head_dim", [64, 128])
def test_head_dims(simt, head_dim, members, dtype):
    case = Case("time", (3, 7, members), "exclude")
    checked(simt, case, *make_qkv(1, case.tokens, 5, head_dim, dtype), "short")


@bits16
@pytest.mark.parametrize("order", ["time_major", "space_major"])
@pytest.mark.parametrize("patches", [(1, 1), (2, 1), (2, 2), (2, 4), (4, 4)], ids=str)
def test_members_along_two_axes(simt, patches, order, dtype):
    case = Case("space", (*patches, 5), "exclude", order)
    checked(simt, case, *make_qkv(2, case.tokens, 2, 32, dtype), "short")


@bits16
@members
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("group", [0, 5])
def test_what_is_not_finite_stays_in_its_sequence(simt, group, which, value, members, dtype):
    """Of the first sequence too, whose rows stand in for those that the last tile lacks."""
    case = Case("time", (19, 1, members), "none")
    q, k, v = make_qkv(1, case.tokens, 1, 32, dtype)
    dout = make_dout(q)
    {"q": q, "k": k, "v": v, "dout": dout}[which][0, group * members + members // 2, 0, 3] = value
    expected = with_gradients(lambda *x: attention(*x, case), *(x.double() for x in (q, k, v)), dout.double())
    for name, a, b in zip(("out", "dq", "dk", "dv"), with_gradients(run(case), q, k, v, dout), expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), name
        others = torch.arange(case.tokens) // members != group
        torch.testing.assert_close(a[:, others].double(), b[:, others], rtol=0.03, atol=0.03)


@bits16
@members
def test_statistics(simt, members, dtype):
    case = Case("time", (1, 5, members), "exclude")
    q, k, v = make_qkv(2, case.tokens, 3, 32, dtype)
    stats = torch.full((2, 3, 5, members, 2), float("nan"))
    native_cuda.attention(q, k, v, torch.empty(q.shape, dtype=dtype), view_of(case), 0.3, None, stats=stats)
    x, y = (x[:, 1:].double().unflatten(1, (5, members)) for x in (q, k))
    s = torch.einsum("bgihd,bgjhd->bhgij", x, y) * 0.3
    top = s.max(-1).values
    exact = torch.stack([top, (s - top[..., None]).exp().sum(-1)], -1)
    torch.testing.assert_close(stats.double(), exact, rtol=1e-5, atol=1e-5)
