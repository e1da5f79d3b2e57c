# SPDX-License-Identifier: Apache-2.0
"""The fused steps as ops, under everything torch does to an op; which backend runs; bad input."""

import struct
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from fused_oracle import CPP, able, gradients, name_of, operands, randn, row_scale, served, strided
from oracle import device_of, same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timesformer_kernels import fused, native, native_steps, registry
from timesformer_kernels.fused import add_layer_norm, bias_gelu

OPS = torch.ops.timesformer_kernels


@pytest.fixture(params=["triton", *CPP, "reference"], ids=name_of)
def engine(request):
    """Every backend that has the steps, where it can run, the C++ one on every instruction set."""
    yield from served(request.param)


@pytest.fixture(params=["triton", *CPP], ids=name_of)
def kernels(request):
    """Those that are not plain torch."""
    yield from served(request.param)


@pytest.fixture
def triton():
    return able("triton")


# As ops: opcheck, fake tensors, torch.compile, torch.func


CALLS = {
    "plain": {},
    "skip-cls": {"skip_cls": True},
    "scaled": {"row_scale": (2, 5)},
    "skip-cls-scaled": {"skip_cls": True, "row_scale": (2,)},
}
calls = pytest.mark.parametrize("call", CALLS)


def options_of(call, engine):
    return {k: row_scale(engine, *v) if k == "row_scale" else v for k, v in CALLS[call].items()}


@calls
@pytest.mark.parametrize("how", ["dense", "transposed"])
def test_opcheck(engine, call, how):
    inputs = operands(engine, 2, 5, 8)
    if how != "dense":
        inputs[:2] = [strided(t, how) for t in inputs[:2]]
    x, branch, weight, bias = [t.detach().requires_grad_() for t in inputs]
    options = options_of(call, engine)
    scale, skip = options.get("row_scale"), options.get("skip_cls", False)
    torch.library.opcheck(OPS.add_layer_norm_fwd.default, (x, branch, weight, bias, scale, 1e-6, skip, engine))
    torch.library.opcheck(OPS.bias_gelu_fwd.default, (x, bias, engine))
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    dsum, dnormed = (randn(2, 5, 8, seed=s, device=x.device) for s in (1, 2))
    for first, branch_dtype in ((dsum, torch.float32), (None, None)):
        arguments = first, dnormed, x, weight, scale, 1e-6, skip, branch_dtype, engine
        torch.library.opcheck(OPS.add_layer_norm_bwd.default, arguments)
    torch.library.opcheck(OPS.bias_gelu_bwd.default, (dnormed, x, bias, engine))


def test_opcheck_without_a_branch(engine):
    x, _, weight, bias = [t.requires_grad_() for t in operands(engine, 2, 5, 8)]
    torch.library.opcheck(OPS.add_layer_norm_fwd.default, (x, None, weight, bias, None, 1e-6, False, engine))


def test_fake_tensors_of_any_size(engine):
    with FakeTensorMode():
        x = torch.empty(2**16, 2**10, 768, dtype=torch.bfloat16, device=device_of(engine))
        vector = x.new_empty(768)
        total, normed = add_layer_norm(x, x, vector, vector, skip_cls=True, backend=engine)
        assert total.shape == normed.shape == bias_gelu(x, vector, backend=engine).shape == x.shape
        assert normed.dtype == torch.bfloat16 and normed.is_contiguous()


@calls
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(engine, call, dynamic):
    torch._dynamo.reset()
    options = options_of(call, engine)

    def block(x, branch, weight, bias):
        total, normed = add_layer_norm(x * 2, branch, weight, bias, backend=engine, **options)
        return total, bias_gelu(normed, bias, backend=engine)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for dim in (8, 24) if dynamic else (8,):
        inputs = operands(engine, 2, 5, dim)
        douts = [randn(2, 5, dim, seed=s, device=inputs[0].device) for s in (1, 2)]
        for a, b in zip(gradients(compiled, inputs, douts), gradients(block, inputs, douts), strict=True):
            assert same(engine, a, b)


def test_compile_is_one_graph_for_all_lengths(engine):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(partial(add_layer_norm, backend=engine), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for tokens in (3, 5, 7, 11):
            compiled(*operands(engine, 2, tokens, 8))
    assert counter.frame_count == 1


def graph_of(f, *inputs):
    """Names of the calls in the graph that the compiler gets of f."""
    torch._dynamo.reset()
    names = []

    def record(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    torch.compile(f, fullgraph=True, backend=record)(*inputs)
    return names


def test_the_compiler_sees_a_named_backend_as_an_op_and_its_own_gelu_as_torch(kernels):
    x, branch, weight, bias = operands(kernels, 2, 5, 8)
    norm = graph_of(partial(add_layer_norm, backend=kernels), x, branch, weight, bias)
    assert any("add_layer_norm_fwd" in name for name in norm)
    assert any("bias_gelu_fwd" in name for name in graph_of(partial(bias_gelu, backend=kernels), x, bias))
    auto = graph_of(bias_gelu, x, bias)
    assert not any("timesformer_kernels" in name for name in auto) and any("gelu" in name for name in auto)


def scalar(backend, **options):
    """A number from one tensor, through both steps."""

    def f(x):
        total, normed = add_layer_norm(x, x.sin(), x[0, 0] + 1, x[0, 1], backend=backend, **options)
        return (total * bias_gelu(normed, x[0, 0], backend=backend)).sum()

    return f


@calls
def test_func_grad(engine, call):
    x, options = operands(engine, 2, 5, 8)[0], options_of(call, engine)
    got = torch.func.grad(scalar(engine, **options))(x)
    leaf = x.clone().requires_grad_()
    (eager,) = torch.autograd.grad(scalar(engine, **options)(leaf), leaf)
    torch.testing.assert_close(got, eager, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"skip_cls": True}], ids=["plain", "skip-cls"])
def test_higher_derivatives_refuse(kernels, options):
    f, x = scalar(kernels, **options), operands(kernels, 2, 5, 8)[0]
    refuses = partial(pytest.raises, (RuntimeError, NotImplementedError))
    with refuses():
        torch.func.jvp(f, (x,), (x,))
    with refuses():
        torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x)
    with forward_ad.dual_level(), refuses():
        f(forward_ad.make_dual(x, x))
    leaf = x.clone().requires_grad_()
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        with refuses():
            (g,) = torch.autograd.grad(run(leaf), leaf, create_graph=True)
            torch.autograd.grad(g.sum(), leaf)


class Watching(TorchDispatchMode):
    """Any mode makes a call a visible op."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_double_backward_through_the_ops_refuses(kernels):
    """Each on its own: the backward op would otherwise warn and answer with wrong numbers."""
    x, branch, weight, bias = [t.requires_grad_() for t in operands(kernels, 2, 5, 8)]
    for call in (
        lambda: add_layer_norm(x, branch, weight, bias, backend=kernels)[1],
        lambda: bias_gelu(x, bias, backend=kernels),
    ):
        with Watching():
            out = call()
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward of a fused step"):
            torch.autograd.grad(g.sum(), x)


def test_autocast_leaves_the_stream_alone(engine):
    """A float32 stream takes the 16-bit branches of autocast and stays float32."""
    x, branch, weight, bias = operands(engine, 2, 5, 8, branch_dtype=torch.bfloat16)
    expected = add_layer_norm(x, branch, weight, bias, backend=engine)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        got = add_layer_norm(x, branch, weight, bias, backend=engine)
    assert all(a.dtype == torch.float32 and same(engine, a, b) for a, b in zip(got, expected, strict=True))


# Which backend runs


DTYPES_AND_WIDTHS = ((torch.float32, 8), (torch.float64, 8), (torch.float32, 10_000))


def test_auto_without_kernels_is_the_reference(monkeypatch):
    """auto passes over the interpreter, and over a library that is not there; the named backend says so."""
    monkeypatch.setattr(native, "library", lambda: (None, "the CPU library was not built (no compiler)"))
    native_steps.library.cache_clear()
    fused.resolve.cache_clear()
    for dtype, width in DTYPES_AND_WIDTHS:
        assert fused.resolve("auto", "cpu", dtype, width)[0] == "reference"
    inputs = operands("reference", 2, 3, 8, torch.float64)
    assert add_layer_norm(*inputs)[1].dtype == torch.float64
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: the CPU library was not built"):
        bias_gelu(*inputs[::3], backend="cpp")
    native_steps.library.cache_clear()
    fused.resolve.cache_clear()


def test_auto_on_a_cpu_is_the_library():
    able("cpp")
    for dtype, width in DTYPES_AND_WIDTHS:
        assert fused.resolve("auto", "cpu", dtype, width)[0] == "cpp"
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: its kernels run on cpu, not on cuda"):
        fused.resolve("cpp", "cuda", torch.float32, 8)


def test_a_library_of_another_struct_is_refused(monkeypatch):
    able("cpp")
    monkeypatch.setattr(native_steps, "_CALL", struct.Struct("q"))
    native_steps.library.cache_clear()
    assert "reinstall" in fused.why_not("cpp", "cpu", torch.float32, 8)
    native_steps.library.cache_clear()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"code": 7}, "dtype code 7 is unknown"),
        ({"branch": 3}, "a branch of dtype code 3 beside rows of 0"),
        ({"bias": 2}, "vectors of dtype code 2 beside rows of 0"),
        ({"dim": 0}, "sizes are out of range"),
        ({"threads": 0}, "sizes are out of range"),
        ({"step": 4}, "step 4 is unknown"),
    ],
)
def test_bad_calls_are_refused_by_the_library(change, message):
    able("cpp")
    n = {"dim": 4, "threads": 1, "code": 0, "branch": 0, "weight": 0, "bias": 0, "step": 0, **change}
    sizes = 1, 1, n["dim"], n["threads"]
    codes = n["code"], n["branch"], n["weight"], n["bias"], 0, 0
    call, lib = native_steps._CALL.pack(*[0] * 25, 1e-6, *sizes, *codes), native_steps.library()[0]
    with pytest.raises(RuntimeError, match=message):
        native_steps._check(lib, lib.tsk_step_run(call, n["step"]))
    assert lib.tsk_step_workspace(call, n["step"]) < 0


@pytest.mark.parametrize("auto", [False, True], ids=["named", "auto"])
def test_the_kernels_serve_every_way_of_calling(kernels, auto, monkeypatch):
    """No way to the result, eager or op, with or without grad, misses the kernels."""
    if auto and kernels == "triton" and device_of(kernels) == "cpu":
        pytest.skip("auto passes over the interpreter")
    backend, (counted, real) = "auto" if auto else kernels, ([], fused._LOADERS[kernels]())
    spies = fused.Steps(*(lambda *a, f=f, n=n: counted.append(n) or f(*a) for n, f in real._asdict().items()))
    monkeypatch.setitem(fused._LOADERS, kernels, lambda: spies)
    fused.resolve.cache_clear()
    inputs = [t.requires_grad_() for t in operands(kernels, 2, 3, 8)]

    def call(*inputs):
        return (
            sum(t.square().sum() for t in add_layer_norm(*inputs, backend=backend))
            + bias_gelu(*inputs[::3], backend=kernels).square().sum()
        )

    torch._dynamo.reset()
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        counted.clear()
        torch.autograd.grad(run(*inputs), inputs)
        assert sorted(counted) == sorted(fused.Steps._fields)
    with torch.no_grad():
        counted.clear()
        call(*inputs)
        assert counted == ["add_layer_norm_fwd", "bias_gelu_fwd"]
    fused.resolve.cache_clear()


def test_a_named_backend_raises_its_reason(triton):
    inputs = operands(triton, 2, 3, 8, torch.float64)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: no kernel for torch.float64"):
        add_layer_norm(*inputs, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: no kernel for torch.float64"):
        bias_gelu(*inputs[::3], backend="triton")
    with pytest.raises(RuntimeError, match="cannot run: kernels for rows of up to 8192 elements, got 8193"):
        add_layer_norm(*operands(triton, 1, 1, 8193), backend="triton")
    assert fused.why_not("triton", "meta", torch.float32, 8) == registry.get("triton").why_not("meta", torch.float32, 8)


# Bad input


def bad(name, error, message, **changes):
    return pytest.param(error, message, changes, id=name)


X, V = torch.zeros(2, 3, 4), torch.zeros(4)
NORM_FAULTS = [
    bad("x-list", TypeError, "x: got list, expected a torch.Tensor", x=[1.0]),
    bad("x-rank", ValueError, r"x: got shape \(3, 4\), expected 3 dimensions", x=X[0]),
    bad("x-dtype", ValueError, "x: got dtype torch.int64, expected one of torch.float32", x=X.long()),
    bad("x-no-columns", ValueError, r"x: got shape \(2, 3, 0\), expected .* at least 1", x=X[..., :0]),
    bad("x-stride", ValueError, "x: got stride 3 in the last dimension, expected 1", x=torch.zeros(2, 4, 3).mT),
    bad("branch-type", TypeError, "branch: got int, expected a torch.Tensor", branch=0),
    bad("branch-shape", ValueError, r"branch: got shape \(2, 2, 4\), expected the shape of x", branch=X[:, 1:]),
    bad("branch-dtype", ValueError, "branch: got dtype torch.float64, expected .* or a 16-bit", branch=X.double()),
    bad("branch-device", ValueError, "branch: got device meta, expected the device of x", branch=X.to("meta")),
    bad("branch-stride", ValueError, "branch: got stride 3", branch=torch.zeros(2, 4, 3).mT),
    bad("weight-none", TypeError, "weight: got NoneType, expected a torch.Tensor", weight=None),
    bad("weight-shape", ValueError, r"weight: got shape \(3,\), expected \(4,\)", weight=V[1:]),
    bad("weight-dtype", ValueError, "weight: got dtype torch.float16, expected the dtype of x", weight=V.half()),
    bad("weight-device", ValueError, "weight: got device meta, expected", weight=V.to("meta")),
    bad("weight-stride", ValueError, "weight: got stride 0 in the last", weight=torch.zeros(1).expand(4)),
    bad("bias-shape", ValueError, r"bias: got shape \(1, 4\), expected \(4,\)", bias=V[None]),
    bad("bias-dtype", ValueError, "bias: got dtype torch.float64, expected", bias=V.double()),
    bad("eps-zero", ValueError, "eps: got 0, expected a finite number of at least", eps=0),
    bad("eps-nan", ValueError, "eps: got nan, expected a finite number", eps=float("nan")),
    bad("eps-text", TypeError, "eps: got str, expected a number", eps="1e-6"),
    bad("skip-cls", TypeError, "skip_cls: got int, expected True or False", skip_cls=1),
    bad("scale-type", TypeError, "row_scale: got float, expected a torch.Tensor or None", row_scale=0.5),
    bad("scale-shape", ValueError, r"row_scale: got shape \(3,\).*expected \(2,\) .*or \(2, 3\)", row_scale=X[0, :, 0]),
    bad("scale-dtype", ValueError, "row_scale: .*float64.*torch.float32", row_scale=X[:, 0, 0].double()),
    bad("scale-device", ValueError, "row_scale: .*on meta.*on cpu", row_scale=X[:, 0, 0].to("meta")),
    bad(
        "scale-grad",
        ValueError,
        "row_scale: .*requires grad, expected a const",
        row_scale=torch.ones(2).requires_grad_(),
    ),
    bad("skip-no-branch", ValueError, "skip_cls: given with branch=None", branch=None, skip_cls=True),
    bad("scale-no-branch", ValueError, "row_scale: given with branch=None", branch=None, row_scale=torch.ones(2)),
    bad("backend", ValueError, "backend: got 'cudnn', expected one of auto, triton, cpp, reference", backend="cudnn"),
    bad("backend-cuda", ValueError, "backend: got 'cuda', expected one of auto, triton, cpp, ref", backend="cuda"),
]
GELU_FAULTS = [
    bad("x-none", TypeError, "x: got NoneType", x=None),
    bad("x-scalar", ValueError, r"x: got shape \(\), expected", x=torch.tensor(1.0)),
    bad("x-dtype", ValueError, "x: got dtype torch.bool", x=X.bool()),
    bad("x-stride", ValueError, "x: got stride 3 in the last dimension", x=torch.zeros(2, 4, 3).mT),
    bad("x-scattered", ValueError, "x: got shape .* merge into two", x=torch.zeros(4, 4, 4, 4)[::2, ::2, ::2]),
    bad("bias-shape", ValueError, r"bias: got shape \(3,\), expected \(4,\), the width of x", bias=V[1:]),
    bad("bias-dtype", ValueError, "bias: got dtype torch.float16, expected the dtype of x", bias=V.half()),
    bad("bias-none", TypeError, "bias: got NoneType", bias=None),
    bad("backend", ValueError, "backend: got 0, expected one of auto", backend=0),
]


@pytest.mark.parametrize("error, message, changes", NORM_FAULTS)
def test_bad_input_of_add_layer_norm(error, message, changes):
    arguments = {"x": X, "branch": X, "weight": V, "bias": V, **changes}
    with pytest.raises(error, match=message):
        add_layer_norm(**arguments)


@pytest.mark.parametrize("error, message, changes", GELU_FAULTS)
def test_bad_input_of_bias_gelu(error, message, changes):
    arguments = {"x": X, "bias": V, **changes}
    with pytest.raises(error, match=message):
        bias_gelu(**arguments)


def test_a_gradient_of_row_scale_is_the_references_alone():
    inputs, scale = operands("reference", 2, 3, 4), torch.ones(2, requires_grad=True)
    add_layer_norm(*inputs, row_scale=scale, backend="reference")[1].square().sum().backward()
    assert scale.grad.abs().sum() > 0
