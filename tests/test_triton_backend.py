# SPDX-License-Identifier: Apache-2.0
"""The Triton backend as the registry and the ops see it: when it runs, why not, and what it keeps for the backward."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from oracle import Case, assert_no_worse, attention, device_of, make_dout, make_qkv, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from timesformer_kernels import explain, grid, grid_attention, grid_attention_qkvpacked, registry, time_attention
from timesformer_kernels.backends import reference
from timesformer_kernels.backends import triton as triton_backend

close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)


def why_not(device="cuda", dtype=torch.float32, head_dim=64):
    return registry.get("triton").why_not(device, dtype, head_dim)


# When it runs


@pytest.fixture
def compiled(monkeypatch):
    """As on a machine with a GPU: kernels that Triton compiles. Loaded kernels are forgotten, and remembered again."""
    monkeypatch.setattr(triton_backend, "_kernels", cache(triton_backend._kernels.__wrapped__))
    monkeypatch.setattr(triton_backend, "_interpreted", lambda: False)


@pytest.fixture
def gpus(compiled, monkeypatch):
    """gpus((9, 0), ...) makes torch see GPUs of these compute capabilities, and triton a driver."""
    pytest.importorskip("triton")
    import triton

    def see(*capabilities):
        monkeypatch.setattr(triton_backend, "_kernels", lambda: None)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"model {i}")
        driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: None))
        monkeypatch.setattr(triton.runtime, "driver", driver)
        return driver

    return see


def test_it_runs_here():
    """Guards every other test of the backend: they skip where it says that it cannot run."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert why_not(device_of("triton"), dtype, 128) is None


@pytest.mark.parametrize(
    "arguments, reason",
    [
        pytest.param(dict(dtype=torch.float64), "no kernel for torch.float64", id="dtype"),
        pytest.param(dict(head_dim=129), "kernels for head_dim up to 128, got 129", id="head-dim"),
        pytest.param(dict(device="meta"), "its kernels run on cuda, not on meta", id="meta"),
        pytest.param(dict(device="cpu"), "not on cpu; TRITON_INTERPRET=1 runs them on cpu, slowly", id="cpu"),
    ],
)
def test_what_it_has_no_kernel_for(compiled, arguments, reason):
    assert reason in why_not(**arguments)


def test_cuda_tensors_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_backend, "_interpreted", lambda: True)
    assert why_not().startswith("TRITON_INTERPRET=1 is set")


def test_triton_is_missing(compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert why_not() == "triton is not installed"


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0", "unknown"])
def test_triton_is_too_old(compiled, monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert why_not() == f"its kernels do not import: triton {version} is installed, 3.6 or later is needed"


def test_kernels_that_do_not_import(compiled, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delattr(triton_backend, "attention", raising=False)
    monkeypatch.setitem(sys.modules, f"{triton_backend.__name__}.attention", None)
    assert why_not().startswith("its kernels do not import: ")


def test_a_gpu_of_today(gpus):
    gpus((8, 0))
    assert why_not() is None
    gpus((9, 0), (12, 0))
    assert why_not() is None


def test_one_of_the_gpus_is_too_old(gpus):
    gpus((9, 0), (7, 5))
    assert why_not().startswith("GPU 1 (model 1) has compute capability 7.5, 8.0 is needed")


def test_amd_has_no_compute_capability(gpus, monkeypatch):
    gpus((6, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_not() is None


def test_no_driver(gpus, monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    gpus((9, 0))
    monkeypatch.setattr(torch.cuda, "init", fail)
    expected = "no usable GPU: The NVIDIA driver on your system is too old (found version 11040)."
    assert why_not() == expected


def test_tritons_own_driver_fails(gpus):
    def fail():
        raise RuntimeError("Failed to find C compiler")

    gpus((9, 0)).active.get_current_target = fail
    assert why_not() == "no usable GPU: Failed to find C compiler"


def python(code, **environment):
    """Standard output of a fresh interpreter; TRITON_INTERPRET is set only if given here."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CPU = """
import sys, torch
from timesformer_kernels import explain, time_attention
x = torch.randn(1, 9, 2, 8)
print(explain(x, x, x).replace("\\n", " | "))
plain = time_attention(x, x, x, frames=4, backend="reference")
print(torch.allclose(time_attention(x, x, x, frames=4), plain, atol=1e-5))
try:
    time_attention(x, x, x, frames=4, backend="triton")
except RuntimeError as error:
    print(error)
print("triton" in sys.modules)
"""


def test_cpu_tensors_never_import_triton():
    table, same, refusal, imported = python(CPU).strip().splitlines()
    reason = "its kernels run on cuda, not on cpu; TRITON_INTERPRET=1 runs them on cpu, slowly"
    assert f"triton: {reason} |" in table and same == "True"
    assert refusal.startswith(f"backend 'triton' cannot run: {reason}; ")
    assert imported == "False"


def test_a_triton_that_breaks_at_import(tmp_path):
    """auto goes on with the next backend, a named call raises, and both have the text."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise OSError('libtriton.so: bad magic')\n")
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    table, same, refusal, _ = python(CPU, TRITON_INTERPRET="1", PYTHONPATH=search).strip().splitlines()
    reason = "its kernels do not import: libtriton.so: bad magic"
    assert f"triton: {reason} |" in table and same == "True" and reason in refusal


def test_the_interpreter_must_be_chosen_before_triton_is_imported():
    pytest.importorskip("triton")
    code = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'" + CPU
    assert "TRITON_INTERPRET changed after triton was imported; set it before" in python(code)


def test_auto_passes_over_the_interpreter(monkeypatch):
    """It would be picked by nobody who wants a result today."""
    monkeypatch.setattr(triton_backend, "_interpreted", lambda: True)
    monkeypatch.setattr(triton_backend, "_kernels", lambda: None)
    registry.resolve.cache_clear()
    try:
        assert registry.resolve("triton", "cpu", torch.float32, 8).name == "triton"
        assert registry.resolve("auto", "cpu", torch.float32, 8).name != "triton"
        x = torch.zeros(1, 5, 1, 8)
        assert "triton: can run, but auto passes over it: name it" in explain(x, x, x)
    finally:
        monkeypatch.undo()
        registry.resolve.cache_clear()


# What is kept for the backward: a backend that checks what it gets back


def digest(q, k):
    """[H, B, S] flat: on purpose not clip after clip, so that it cannot be cut or put together along the batch."""
    return (q * k).sum(-1).float().permute(2, 0, 1).flatten()


@pytest.fixture
def keeper(monkeypatch):
    """The reference as a backend with statistics; its list of (step, was anything kept)."""
    calls = []

    def forward(q, k, v, view, scale, cls_weights, stats=None):
        calls.append(("forward", stats is not None))
        if stats is not None:
            assert stats.shape == (q[..., 0].numel(),) and stats.dtype == torch.float32
            stats.copy_(digest(q, k))
        return reference.forward(q, k, v, view, scale, cls_weights)

    def backward(dout, q, k, v, view, scale, cls_weights, grads=None, saved=None):
        calls.append(("backward", saved is not None))
        if q.numel():
            out, stats = saved
            close(out, reference.forward(q, k, v, view, scale, cls_weights))
            torch.testing.assert_close(stats, digest(q, k))
        return reference.backward(dout, q, k, v, view, scale, cls_weights, grads)

    def size(shape, dtype, view):
        assert isinstance(view, grid.View) and type(shape[3]) is int
        return shape[0] * shape[1] * shape[2]

    backend = registry.Backend("keeper", forward, backward, lambda *a: None, size)
    monkeypatch.setitem(registry._BACKENDS, "keeper", backend)
    registry.resolve.cache_clear()
    yield calls
    registry.resolve.cache_clear()


CASE = Case("space", (2, 3, 4), "per_group")
OP = torch.ops.timesformer_kernels.attn_fwd.default
OP_BWD = torch.ops.timesformer_kernels.attn_bwd.default
ARGUMENTS = ([4, 1], [6, 4], "per_group", 0.5, "keeper", None)


def kept(q, k, v):
    return grid_attention(q, k, v, **CASE.options(backend="keeper"))


def plain(q, k, v):
    return attention(q, k, v, CASE)


def inputs(batch=2):
    return make_qkv(batch, CASE.tokens, 2, 4, torch.float64)


def agree(transform, *x):
    for got, expected in zip(transform(kept)(*x), transform(plain)(*x), strict=True):
        close(got, expected)


def test_kept_only_where_a_gradient_is_wanted(keeper):
    agree(lambda f: lambda *x: with_gradients(f, *x, make_dout(x[0])), *inputs())
    assert keeper == [("forward", True), ("backward", True)]
    keeper.clear()
    kept(*inputs())
    with torch.no_grad():
        kept(*(x.detach().requires_grad_() for x in inputs()))
    assert keeper == [("forward", False)] * 2


def test_kept_by_the_packed_call(keeper):
    packed = torch.stack(inputs(), 2).requires_grad_()
    out = grid_attention_qkvpacked(packed, **CASE.options(backend="keeper"))
    (got,) = torch.autograd.grad(out.square().sum(), packed)
    (expected,) = torch.autograd.grad(plain(*packed.unbind(2)).square().sum(), packed)
    close(got, expected)
    assert keeper == [("forward", True), ("backward", True)]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_kept_under_compile(keeper, compiler, dynamic):
    torch._dynamo.reset()
    f = torch.compile(kept, fullgraph=True, dynamic=dynamic, backend=compiler)
    agree(lambda g: lambda *x: with_gradients(f if g is kept else g, *x, make_dout(x[0])), *inputs())
    assert keeper[-2:] == [("forward", True), ("backward", True)]


def test_kept_by_the_op_and_its_contract(keeper):
    q, k, v = (x.requires_grad_() for x in inputs())
    out, stats = OP(q, k, v, *ARGUMENTS)
    assert out.requires_grad and not stats.requires_grad
    torch.library.opcheck(OP, (q, k, v, *ARGUMENTS))
    plain = [x.detach() for x in (out, q, k, v, out, stats)]
    torch.library.opcheck(OP_BWD, (*plain, *ARGUMENTS))
    with FakeTensorMode():
        x = torch.randn(3, 25, 2, 4, dtype=torch.float64)
        out, stats = OP(x, x, x, *ARGUMENTS)
    assert out.shape == x.shape and stats.shape == (3 * 25 * 2,) and stats.dtype == torch.float32


def loss(f):
    return lambda x: f(x, x * 2, x - 1).square().sum()


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda f: torch.func.grad(loss(f)), id="grad"),
        pytest.param(lambda f: torch.func.jacrev(lambda x: f(x, x, x)[:, :2]), id="jacrev"),
    ],
)
def test_kept_in_torch_func(keeper, transform):
    agree(lambda f: lambda x: [transform(f)(x)], inputs()[0])
    assert ("backward", True) in keeper and ("backward", False) not in keeper


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda f: torch.vmap(torch.func.grad(loss(f))), id="vmap-grad"),
        pytest.param(lambda f: torch.vmap(torch.vmap(torch.func.grad(loss(f)))), id="vmap-vmap-grad"),
        pytest.param(lambda f: torch.vmap(torch.func.jacrev(lambda x: f(x, x, x)[0, :2])), id="vmap-jacrev"),
        pytest.param(lambda f: torch.func.jacrev(torch.vmap(lambda x: f(x, x, x)[0, :2])), id="jacrev-vmap"),
        pytest.param(lambda f: torch.func.grad(lambda x: torch.vmap(loss(f))(x).sum()), id="grad-vmap"),
    ],
)
def test_kept_under_vmap(keeper, transform, request):
    x = torch.stack(make_qkv(2, CASE.tokens, 2, 4, torch.float64))  # [3, 2, S, H, D]
    x = torch.stack([x, x + 1]) if "vmap-vmap" in request.node.callspec.id else x
    agree(lambda f: lambda x: [transform(f)(x)], x)
    assert ("backward", True) in keeper and ("backward", False) not in keeper


def test_vmap_of_the_ops(keeper):
    """Called by name, as a compiled graph does: forward and backward together, and the backward alone."""
    q, k, v = inputs()
    dout = torch.stack([make_dout(q, seed) for seed in (1, 2, 3)])
    out, stats = OP(q, k, v, *ARGUMENTS)
    expected = [OP_BWD(d, q, k, v, out, stats, *ARGUMENTS) for d in dout]
    got = torch.vmap(lambda d: OP_BWD(d, q, k, v, out, stats, *ARGUMENTS))(dout)
    for each, stacked in zip(zip(*expected, strict=True), got, strict=True):
        close(torch.stack(each), stacked)
    many = torch.stack([q, q + 1, q - 1])
    both = torch.vmap(lambda q, d: OP_BWD(d, q, k, v, *OP(q, k, v, *ARGUMENTS), *ARGUMENTS))(many, dout)
    for i, (x, d) in enumerate(zip(many, dout, strict=True)):
        for a, b in zip(OP_BWD(d, x, k, v, *OP(x, k, v, *ARGUMENTS), *ARGUMENTS), both, strict=True):
            close(a, b[i])


def test_kept_through_a_checkpoint(keeper):
    f = lambda *x: checkpoint(kept, *x, use_reentrant=False)  # noqa: E731
    agree(lambda g: lambda *x: with_gradients(f if g is kept else g, *x, make_dout(x[0])), *inputs())
    assert keeper == [("forward", True)] * 2 + [("backward", True)]


def test_nothing_is_kept_of_an_empty_batch(keeper):
    q = torch.zeros(0, CASE.tokens, 2, 4)
    with_gradients(kept, q, q, q, q)
    assert keeper == [("forward", False), ("backward", False)]


def test_a_changed_result_is_noticed(keeper):
    out = kept(*(x.requires_grad_() for x in inputs()))
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_is_refused(keeper):
    x = inputs()[0].requires_grad_()
    (g,) = torch.autograd.grad(kept(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(g.sum(), x)


def saved_for_backward(f, *x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t.detach(), lambda t: t):
        f(*(t.detach().requires_grad_() for t in x))
    return saved


def test_backends_without_statistics_keep_their_operands_only(keeper):
    assert len(saved_for_backward(kept, *inputs())) == 5  # q, k, v, out, stats
    without = replace(registry.get("keeper"), stats_size=None)
    registry.register(without)
    assert len(saved_for_backward(kept, *inputs())) == 3
    if registry.get("cpp").why_not("cpu", torch.float64, 4) is None:
        assert len(saved_for_backward(partial(time_attention, frames=4, backend="cpp"), *inputs())) == 3


# The kernels' own statistics


@pytest.mark.parametrize(
    "case",
    [
        Case("time", (1, 1, 40), "none"),  # longer than what float32 keeps on chip: log-sum-exp of every query
        Case("space", (5, 8, 2), "per_group"),  # and the class row's output in every group
        Case("space", (2, 2, 2), "global"),  # one softmax over all groups
    ],
    ids=str,
)
def test_statistics_of_the_kernels_under_vmap(case, need):
    need("triton")
    x = case.qkv("triton", 2, 2, 16)[0][:, None]  # [2, 1, S, H, D]
    view = grid.view(case.scheme, case.grid, case.cls, case.order)
    assert registry.get("triton").stats_size(x[0].shape, x.dtype, view) > 0
    f = lambda x: grid_attention(x, x * 2, x - 1, **case.options(backend="triton"))  # noqa: E731
    g = lambda x: attention(x, x * 2, x - 1, case)  # noqa: E731
    for transform in (
        lambda f: torch.vmap(torch.func.grad(lambda x: f(x).square().sum())),
        lambda f: lambda x: torch.func.jacrev(lambda x: f(x)[:, :2, 0, :2])(x[0]),
    ):
        assert_no_worse(str(case), transform(f)(x).cpu(), transform(g)(x.cpu().double()), transform(g)(x.cpu()))
