# SPDX-License-Identifier: Apache-2.0
"""q, k and v in one tensor: the same numbers as apart, and a gradient that nobody has to put together."""

import pytest
import torch
from oracle import Case, interpreted, make_dout

from timesformer_kernels import grid_attention, grid_attention_qkvpacked

CASES = [
    Case("time", (2, 3, 4), "exclude"),  # short sequences
    Case("time", (2, 1, 24), "none", "time_major"),
    Case("space", (3, 3, 2), "per_group"),
    Case("joint", (2, 3, 2), "key"),
    Case("global", (2, 4, 4), "global"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def packed(case, backend, dtype=torch.float32, batch=2, heads=None, head_dim=16):
    heads = heads or (1 if interpreted(backend) else 2)  # the interpreter's time grows with the heads
    return torch.stack(case.qkv(backend, batch, heads, head_dim, dtype), 2).detach().requires_grad_()


def apart(qkv, case, backend):
    return grid_attention(*qkv.unbind(2), **case.options(backend=backend))


def together(qkv, case, backend):
    return grid_attention_qkvpacked(qkv, **case.options(backend=backend))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bitwise_as_apart(backend, case, dtype):
    qkv = packed(case, backend, dtype)
    dout = make_dout(qkv[:, :, 0])
    (a, da), (b, db) = (
        (o, torch.autograd.grad(o, qkv, dout)[0]) for o in (f(qkv, case, backend) for f in (together, apart))
    )
    assert torch.equal(a, b) and torch.equal(da, db)
    with torch.no_grad():
        assert torch.equal(together(qkv, case, backend), a)


@cases
@pytest.mark.needs(dtype=torch.float64)
def test_gradcheck(backend, case):
    qkv = packed(case, backend, torch.float64, batch=1, heads=1, head_dim=3)
    assert torch.autograd.gradcheck(lambda x: together(x, case, backend), qkv)


def test_the_gradient_is_written_in_place(fused):
    case = CASES[0]
    qkv = packed(case, fused)
    out = together(qkv, case, fused)
    dout = make_dout(out)
    with torch.profiler.profile() as profile:
        out.backward(dout)
    names = {event.name for event in profile.events()}
    copies = set() if interpreted(fused) else {"aten::copy_"}  # the interpreter works on copies
    assert not names & {"aten::stack", "aten::cat", *copies}, names
    assert qkv.grad.is_contiguous()


def test_a_slice_of_a_wider_tensor(fused):
    case = CASES[2]
    qkv = packed(case, fused)
    wide = torch.cat([qkv, torch.full_like(qkv, float("nan"))], 4).detach().requires_grad_()
    dense = wide.detach()[..., :16].contiguous().requires_grad_()
    grads = [
        torch.autograd.grad(together(x, case, fused).sum(), y)[0] for x, y in ((wide[..., :16], wide), (dense, dense))
    ]
    assert torch.equal(grads[0][..., :16], grads[1]) and not grads[0][..., 16:].any()


@pytest.mark.parametrize("backend_name", ["eager", "aot_eager"])
def test_compiled(fused, backend_name):
    case = CASES[2]
    qkv = packed(case, fused)
    f = lambda x: together(x, case, fused).square().sum()  # noqa: E731
    (expected,) = torch.autograd.grad(f(qkv), qkv)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend=backend_name)(qkv), qkv)
    torch.testing.assert_close(got, expected)


def test_func_autocast_and_refusals(fused):
    case = CASES[0]
    qkv = packed(case, fused)
    f = lambda x: together(x, case, fused).float().square().sum()  # noqa: E731
    (expected,) = torch.autograd.grad(f(qkv), qkv)
    assert torch.equal(torch.func.grad(f)(qkv.detach()), expected)
    with torch.autocast(qkv.device.type, dtype=torch.bfloat16):
        assert together(qkv, case, fused).dtype == torch.bfloat16
        assert torch.autograd.grad(f(qkv), qkv)[0].dtype == torch.float32
    (first,) = torch.autograd.grad(f(qkv), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(first.sum(), qkv)
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        torch.func.jvp(f, (qkv.detach(),), (qkv.detach(),))


@pytest.mark.parametrize(
    "qkv, error, words",
    [
        pytest.param([1.0], TypeError, ["qkv", "list"], id="no-tensor"),
        pytest.param(torch.zeros(1, 25, 2, 8), ValueError, ["qkv", "(1, 25, 2, 8)", "3, heads"], id="rank"),
        pytest.param(
            torch.zeros(1, 25, 2, 2, 8), ValueError, ["qkv", "(1, 25, 2, 2, 8)", "3, heads"], id="two-of-three"
        ),
        pytest.param(torch.zeros(1, 26, 3, 2, 8), ValueError, ["26", "25"], id="tokens"),
        pytest.param(torch.zeros(1, 25, 3, 2, 8, dtype=torch.int32), ValueError, ["int32", "float32"], id="dtype"),
    ],
)
def test_bad_input(qkv, error, words):
    with pytest.raises(error) as caught:
        together(qkv, CASES[0], "auto")
    assert all(word in str(caught.value) for word in words), caught.value
