# SPDX-License-Identifier: Apache-2.0
"""gradcheck in float64 for every scheme, class mode and order, and the odd ways in which gradients are asked for.

A backend without float64 is spared gradcheck (test_attention.py has its gradients, against the oracle's) and runs the
rest in float32.
"""

import pytest
import torch
from oracle import Case, attention, every_case, make_dout, same, widest, with_gradients, with_weights
from torch.autograd import gradcheck

from timesformer_kernels import grid_attention

SMALL = every_case(split_grid=(2, 2, 4), plain_grid=(2, 3, 2))
PLAIN = [Case("time", (2, 3, 5), "exclude"), Case("space", (2, 3, 4), "per_group"), Case("space", (3, 2, 4), "global")]


def run(case, backend):
    return lambda q, k, v: grid_attention(q, k, v, **case.options(backend=backend))


def leaves(case, backend, batch=1, heads=1, head_dim=3):
    return [x.detach().requires_grad_() for x in case.qkv(backend, batch, heads, head_dim, widest(backend))]


def assert_close(actual, exact):
    limit = 1e-12 if actual.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, exact, atol=limit, rtol=limit)


needs_float64 = pytest.mark.needs(dtype=torch.float64)


@needs_float64
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(engine, case):
    assert gradcheck(run(case, engine), leaves(case, engine), fast_mode=engine == "reference")


@needs_float64
@pytest.mark.parametrize("case", [c for c in SMALL if c.cls == "per_group"], ids=str)
def test_gradcheck_class_weights(engine, case):
    case = with_weights(case, batch=2).on(engine)
    assert gradcheck(run(case, engine), leaves(case, engine, 2, head_dim=2), fast_mode=engine == "reference")


@needs_float64
def test_gradcheck_scale(backend):
    case = Case("space", (2, 2, 3), "per_group", scale=1.7)
    assert gradcheck(run(case, backend), leaves(case, backend, heads=2, head_dim=9), fast_mode=True)


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
def test_only_the_gradients_asked_for(backend, case, wanted):
    inputs = case.qkv(backend, 2, 2, 16)
    dout = make_dout(inputs[0])
    exact = dict(zip("qkv", with_gradients(run(case, backend), *inputs, dout)[1:], strict=True))
    mine = {name: x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", inputs, strict=True)}
    out = run(case, backend)(*mine.values())
    out.backward(dout)
    for name, x in mine.items():
        if name in wanted:
            assert same(backend, x.grad, exact[name]), name
        else:
            assert x.grad is None, name


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_one_tensor_as_q_k_and_v(backend, case):
    x = case.qkv(backend, 2, 2, 16, widest(backend))[0]
    dout = make_dout(x)
    shared, exact = (x.detach().clone().requires_grad_() for _ in range(2))
    run(case, backend)(shared, shared, shared).backward(dout)
    attention(exact, exact, exact, case).backward(dout)
    assert_close(shared.grad, exact.grad)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_sum_backward_is_an_expanded_gradient(backend, case):
    mine, exact = (leaves(case, backend, 2, 2, 16) for _ in range(2))
    run(case, backend)(*mine).sum().backward()
    attention(*exact, case).sum().backward()
    for a, b in zip(mine, exact, strict=True):
        assert_close(a.grad, b.grad)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_gradients_reach_the_packed_projection(backend, case):
    """q, k, v unbound from one (B, S, 3, H, D) leaf, as the module does it."""
    packed = torch.stack(case.qkv(backend, 2, 2, 16, widest(backend)), 2)
    mine, exact = (packed.clone().requires_grad_() for _ in range(2))
    run(case, backend)(*mine.unbind(2)).square().sum().backward()
    attention(*exact.unbind(2), case).square().sum().backward()
    assert_close(mine.grad, exact.grad)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_backward_twice_through_a_retained_graph(backend, case):
    inputs = leaves(case, backend, 2, 2, 8)
    out = run(case, backend)(*inputs)
    dout = make_dout(out)
    first = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    second = torch.autograd.grad(out, inputs, dout)
    assert all(same(backend, a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_rows_outside_attention_get_zero_gradients(backend, case):
    """exclude and key write a zero class row: nothing flows through it; exclude reads no class row either."""
    for cls in ("exclude", "key"):
        case = Case(case.scheme, case.grid, cls)
        inputs = leaves(case, backend, 1, 1, 8)
        out = run(case, backend)(*inputs)
        assert (out[:, 0] == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out[:, 0].sum(), inputs, retain_graph=True))
        dq, dk, dv = torch.autograd.grad(out.sum(), inputs)
        assert (dq[:, 0] == 0).all()
        assert all((g[:, 0] == 0).all() == (cls == "exclude") for g in (dv,))
        if cls == "exclude":
            assert (dk[:, 0] == 0).all()


def test_reference_is_differentiable_twice():
    case = Case("space", (2, 2, 2), "per_group")
    assert torch.autograd.gradgradcheck(run(case, "reference"), leaves(case, "reference", head_dim=2), fast_mode=True)


def test_class_weights_that_want_a_gradient(fused):
    """They are constants of the fused kernels: a wanted gradient is refused, never dropped in silence."""
    case = with_weights(Case("space", (2, 2, 3), "per_group"), 1).on(fused)
    case.weights.requires_grad_()
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match="cls_weights"):
        run(case, fused)(*leaves(case, fused)).sum().backward()
