# SPDX-License-Identifier: Apache-2.0
"""The registered ops under everything torch does to an op: compile, export, torch.func, autocast, checkpoint, modes."""

import io
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from oracle import Case, attention, device_of, interpreted, make_dout, same, widest, with_gradients, with_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import timesformer_kernels.flops  # noqa: F401  before any FlopCounterMode
from timesformer_kernels import available_backends, grid_attention, registry, space_attention, time_attention

OP = torch.ops.timesformer_kernels.attn_fwd.default
OP_BWD = torch.ops.timesformer_kernels.attn_bwd.default
CASES = [
    Case("time", (2, 3, 4), "exclude"),
    Case("space", (2, 3, 4), "per_group"),
    Case("global", (2, 4, 4), "global", "time_major"),
]
close = partial(torch.testing.assert_close, atol=2e-6, rtol=2e-6)


def run(case, backend):
    return lambda q, k, v: grid_attention(q, k, v, **case.options(backend=backend))


def loss(f):
    """A scalar of one tensor used as q, k and v."""
    return lambda x: f(x, x, x).square().sum()


def leaves(case, backend):
    heads = 1 if interpreted(backend) else 2  # its time grows with the heads, and kernels are not the point here
    return [x.detach().requires_grad_() for x in case.qkv(backend, 2, heads, 8)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def without_fused(monkeypatch):
    """No backend but the reference can run, as after an install without a compiler."""
    for name in available_backends():
        if name != "reference":
            unwilling = replace(registry.get(name), why_not=lambda *a: "the library was not built")
            monkeypatch.setitem(registry._BACKENDS, name, unwilling)
    registry.resolve.cache_clear()
    yield
    monkeypatch.undo()
    registry.resolve.cache_clear()


class Recorder(TorchDispatchMode):
    """Every op call with its arguments; `only` narrows to one op."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, op):
        return [args for func, args in self.calls if func is op]


class Block(torch.nn.Module):
    """What a model does: one projection, strided views of it, time and space attention."""

    def __init__(self, backend, frames=4):
        super().__init__()
        self.qkv, self.backend, self.frames = torch.nn.Linear(16, 48), backend, frames

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 8).unbind(2)
        time = time_attention(q, k, v, frames=self.frames, backend=self.backend)
        space = space_attention(q, k, v, frames=self.frames, backend=self.backend)
        return (time + space).flatten(2)


# Registration


def recorded_arguments(case, backend, inputs):
    """The real arguments of both ops, taken from one call."""
    with Recorder() as recorder:
        run(case, backend)(*inputs).sum().backward()
    return recorder.of(OP)[0], recorder.of(OP_BWD)[0]


@pytest.mark.parametrize("case", [*CASES, with_weights(CASES[1], 2)], ids=["time", "space", "global", "weights"])
def test_opcheck_with_grad(fused, case):
    case = case.on(fused)
    forward, backward = recorded_arguments(case, fused, leaves(case, fused))
    torch.library.opcheck(OP, forward)
    torch.library.opcheck(OP_BWD, tuple(x.detach() if torch.is_tensor(x) else x for x in backward))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_strided_inputs(fused, case):
    forward, backward = recorded_arguments(case, fused, leaves(case, fused))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2).detach() for x in leaves(case, fused)]
    torch.library.opcheck(OP, (*turned, *forward[3:]))
    arguments = [x.detach() if torch.is_tensor(x) else x for x in backward]
    for at in range(1, 4):  # dout comes first, then q, k, v
        arguments[at] = turned[at - 1]
    torch.library.opcheck(OP_BWD, tuple(arguments))


# torch.compile and torch.export


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic(fused, compiler):
    block, device = Block(fused).to(device_of(fused)), device_of(fused)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=compiler)
    for patches in (3, 5, 11):
        x = torch.randn(2, 1 + patches * 4, 16, device=device, requires_grad=True)
        results = []
        for f in (compiled, block):
            y = f(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, block.qkv.weight))))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_compile_is_one_graph_for_all_lengths(fused):
    counter = torch._dynamo.testing.CompileCounter()
    device = device_of(fused)
    compiled = torch.compile(Block(fused).to(device), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for patches in (3, 5, 7, 11):
            compiled(torch.randn(2, 1 + patches * 4, 16, device=device))
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compile_same_tensor_three_times(backend, case):
    x = leaves(case, backend)[0]
    (expected,) = torch.autograd.grad(loss(lambda *a: attention(*a, case))(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss(run(case, backend)), fullgraph=True, backend="aot_eager")(x), x)
    close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_auto_without_a_library(case, without_fused):
    """Where no fused backend can run, the op serves compiled calls, forward and backward, through the reference."""
    inputs = leaves(case, "reference")
    dout = torch.ones_like(inputs[0])
    exact = with_gradients(lambda *a: attention(*a, case), *inputs, dout)
    compiled = torch.compile(run(case, "auto"), fullgraph=True, backend="aot_eager")
    for f in (run(case, "auto"), compiled):
        for a, b in zip(with_gradients(f, *inputs, dout), exact, strict=True):
            close(a, b)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_dynamic_save_and_load(fused, strict):
    device = device_of(fused)
    block, dim = Block(fused).eval().to(device), torch.export.Dim("patches", min=2, max=64)
    x = torch.randn(2, 1 + 5 * 4, 16, device=device)
    program = torch.export.export(block, (x,), dynamic_shapes=({1: 4 * dim + 1},), strict=strict).run_decompositions()
    assert sum(node.target is OP for node in program.graph.nodes) == 2  # the ops survive as ops
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = torch.randn(2, 1 + 9 * 4, 16, device=device)
    close(torch.export.load(buffer).module()(x), block(x))


# torch.func


@pytest.mark.parametrize("case", CASES, ids=str)
class TestFunc:
    def inputs(self, case, backend, batch=3):
        return case.qkv(backend, batch, 1, 4, widest(backend))[0][:, None]

    def agree(self, transform, case, backend, x):
        got, expected = (transform(f)(x) for f in (run(case, backend), lambda *a: attention(*a, case)))
        limit = 1e-10 if x.dtype == torch.float64 else 1e-5
        close(got, expected, atol=limit, rtol=limit)

    def test_grad(self, backend, case):
        self.agree(lambda f: torch.func.grad(loss(f)), case, backend, self.inputs(case, backend)[0])

    def test_vmap(self, backend, case):
        self.agree(lambda f: torch.vmap(lambda x: f(x, x * 2, x - 1)), case, backend, self.inputs(case, backend))

    def test_vmap_over_other_dimensions(self, backend, case):
        x = self.inputs(case, backend)
        moved = x.movedim(0, 2)

        def both(f):
            return lambda _: torch.vmap(f, in_dims=(0, 2, None), out_dims=1)(x, moved, x[0])

        self.agree(both, case, backend, x)

    def test_vmap_grad(self, backend, case):
        self.agree(lambda f: torch.vmap(torch.func.grad(loss(f))), case, backend, self.inputs(case, backend))

    def test_vmap_grad_class_weights(self, backend, case):
        if case.cls != "per_group":
            pytest.skip("no class weights")
        case = with_weights(case, 1).on(backend)
        self.agree(lambda f: torch.vmap(torch.func.grad(loss(f))), case, backend, self.inputs(case, backend))

    def test_jacrev(self, backend, case):
        def some(f):  # six numbers of the result: the class row and two patches
            return torch.func.jacrev(lambda x: f(x, x, x)[:, :3, :, ::2])

        self.agree(some, case, backend, self.inputs(case, backend)[0])

    def test_vjp(self, backend, case):
        def pullback(f):
            def call(x):
                out, vjp = torch.func.vjp(lambda x: f(x, x, x), x)
                return vjp(make_dout(out))[0]

            return call

        self.agree(pullback, case, backend, self.inputs(case, backend)[0])

    # Beyond first order a fused backend refuses; it never answers with a wrong number.

    def test_jvp_refuses(self, fused, case):
        x = self.inputs(case, fused)[0]
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(loss(run(case, fused)), (x,), (x,))

    def test_hessian_refuses(self, fused, case):
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.hessian(loss(run(case, fused)))(self.inputs(case, fused)[0])

    def test_grad_of_grad_refuses(self, fused, case):
        inner = torch.func.grad(loss(run(case, fused)))
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.grad(lambda x: inner(x).sum())(self.inputs(case, fused)[0])

    def test_forward_mode_refuses(self, fused, case):
        x = self.inputs(case, fused)[0]
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            loss(run(case, fused))(forward_ad.make_dual(x, x))

    def test_forward_mode_refuses_beside_requires_grad(self, fused, case):
        x = self.inputs(case, fused)[0].requires_grad_()
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            loss(run(case, fused))(forward_ad.make_dual(x, x.detach()))

    def test_reference_does_it_all(self, case):
        x, plain = self.inputs(case, "reference")[0], lambda *a: attention(*a, case)
        got, expected = (torch.func.jvp(loss(f), (x,), (x,)) for f in (run(case, "reference"), plain))
        close(got, expected, atol=1e-10, rtol=1e-10)
        got, expected = (torch.func.hessian(loss(f))(x[:, :, :, :1]) for f in (run(case, "reference"), plain))
        close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_double_backward_refuses(fused, case, compiled):
    f = loss(run(case, fused))
    if compiled:
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    x = leaves(case, fused)[0]
    with pytest.raises((RuntimeError, NotImplementedError)):
        (g,) = torch.autograd.grad(f(x), x, create_graph=True)
        torch.autograd.grad(g.sum(), x)


def test_double_backward_through_the_op_refuses(fused):
    """A mode makes the call a visible op; its backward must refuse, too."""
    x = leaves(CASES[0], fused)[0]
    with Recorder() as recorder:
        out = loss(run(CASES[0], fused))(x)
    assert recorder.of(OP)
    with pytest.raises((RuntimeError, NotImplementedError)):
        (g,) = torch.autograd.grad(out, x, create_graph=True)
        torch.autograd.grad(g.sum(), x)


# Autocast, checkpoint, modes


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(backend, dtype, compiled):
    case = CASES[1]
    f = run(case, backend)
    if compiled:
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    inputs = leaves(case, backend)
    with torch.autocast(device_of(backend), dtype=dtype):
        out = f(*inputs)
    assert out.dtype == dtype
    assert same(backend, out, run(case, backend)(*(x.to(dtype) for x in inputs)))
    for x, g in zip(inputs, torch.autograd.grad(out.float().sum(), inputs), strict=True):
        assert g.dtype == x.dtype == torch.float32 and g.isfinite().all()


def test_autocast_brings_mixed_dtypes_together(backend):
    q, k, v = CASES[1].qkv(backend, 2, 2, 8)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        out = run(CASES[1], backend)(q, k.bfloat16(), v)
    assert same(backend, out, run(CASES[1], backend)(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_autocast_switched_off_inside(backend):
    q, k, v = CASES[1].qkv(backend, 2, 2, 8)
    device = device_of(backend)
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        assert same(backend, run(CASES[1], backend)(q, k, v), run(CASES[1], backend)(q, k, v))
        assert run(CASES[1], backend)(q, k, v).dtype == torch.float32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint(backend, case):
    inputs = leaves(case, backend)
    dout = make_dout(inputs[0])
    expected = with_gradients(run(case, backend), *inputs, dout)
    got = with_gradients(lambda *a: checkpoint(run(case, backend), *a, use_reentrant=False), *inputs, dout)
    assert all(same(backend, a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_selective_checkpoint_saves_the_op(fused, compiled):
    case = CASES[1]

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is OP else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def f(q, k, v):
        return checkpoint(run(case, fused), q, k, v, use_reentrant=False, context_fn=contexts)

    inputs = leaves(case, fused)
    expected = with_gradients(run(case, fused), *inputs, make_dout(inputs[0]))
    if compiled:
        got = with_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), *inputs, make_dout(inputs[0]))
    else:
        with Recorder() as recorder:
            got = with_gradients(f, *inputs, make_dout(inputs[0]))
        assert len(recorder.of(OP)) == 1  # saved, not recomputed
    for a, b in zip(got, expected, strict=True):
        close(a, b)


def test_fake_tensors_of_enormous_size(fused):
    with FakeTensorMode():
        x = torch.randn(1 << 20, 1 + 196 * 8, 12, 64, device=device_of(fused))
        for f in (time_attention, space_attention):
            out = f(x, x, x, frames=8, backend=fused)
            assert out.shape == x.shape and out.is_contiguous()


@pytest.mark.parametrize("name", ["auto", *available_backends()])
def test_meta_tensors(name):
    """Shapes without a device: a named backend need not be able to run here."""
    if name == "reference":
        pytest.skip("plain torch code, no op")
    x = torch.randn(2, 1 + 6 * 4, 3, 2, 8, device="meta").unbind(2)
    out = space_attention(*x, frames=4, backend=name)
    assert out.device.type == "meta" and out.shape == (2, 25, 2, 8) and out.is_contiguous()


def test_flop_counter_opened_before_the_formulas_warns(fused):
    """The formulas load with the counter or by import, never with the package: the counter imports Triton."""
    program = f"""
import sys, warnings, torch, timesformer_kernels
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.ones(1, 9, 1, 8, device={device_of(fused)!r})
def count():
    with FlopCounterMode(display=False) as mode, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timesformer_kernels.time_attention(q, q, q, frames=4, backend={fused!r})
    return mode.get_total_flops(), [str(w.message) for w in caught if "FlopCounterMode" in str(w.message)]
flops, caught = count()
assert flops == 0 and len(caught) == 1 and "timesformer_kernels.flops" in caught[0], (flops, caught)
assert count() == (2 * 4 * 4 * 4 * 8, []), count()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_flop_counter_sees_the_op(fused):
    case = Case("space", (2, 3, 4), "per_group")
    q, k, v = case.qkv(fused, 2, 2, 8)
    with FlopCounterMode(display=False) as mode:
        run(case, fused)(q, k, v)
    # 4 groups of 7 queries over 7 keys; two products of 2 * head_dim FLOP, 2 clips x 2 heads
    assert mode.get_total_flops() == 2 * 2 * 4 * 7 * 7 * 8 * 4


def test_flop_counter_counts_the_backward(fused):
    case = Case("time", (2, 3, 4), "none")
    q, k, v = (x.requires_grad_() for x in case.qkv(fused, 2, 2, 8))
    with FlopCounterMode(display=False) as mode:
        run(case, fused)(q, k, v).sum().backward()
    # 6 groups of 4 tokens; two products in the forward, five in the backward
    assert mode.get_total_flops() == 7 * 2 * 8 * 6 * 4 * 4 * 2 * 2


def test_inference_mode(backend):
    q, k, v = CASES[0].qkv(backend, 2, 2, 8)
    expected = run(CASES[0], backend)(q, k, v)
    with torch.inference_mode():
        out = run(CASES[0], backend)(*(x * 1 for x in (q, k, v)))
    assert same(backend, out, expected) and out.is_inference()


def test_parameters_and_no_grad(backend):
    inputs = [torch.nn.Parameter(x.contiguous()) for x in CASES[0].qkv(backend, 1, 2, 8)]
    with torch.no_grad():
        out = run(CASES[0], backend)(*inputs)
    assert not out.requires_grad and same(backend, out, run(CASES[0], backend)(*inputs))
