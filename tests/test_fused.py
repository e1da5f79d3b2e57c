# SPDX-License-Identifier: Apache-2.0
"""The fused steps: values and gradients against float64, the row-0 rule, and what they read, write and keep."""

from functools import partial

import pytest
import torch
from arena import REAL, Arena, carved
from fused_oracle import (
    CPP,
    GRADIENTS,
    KERNEL_DTYPES,
    able,
    check_gelu,
    check_norm,
    gelu_oracle,
    gradients,
    name_of,
    norm_oracle,
    operands,
    randn,
    row_scale,
    served,
    strided,
)
from oracle import device_of

from timesformer_kernels.fused import add_layer_norm, bias_gelu

OPS = torch.ops.timesformer_kernels
DIMS = (1, 3, 17, 192, 768, 1000, 1536)
dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d).split(".")[1])


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


# Values and gradients


@dtypes
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("skip_cls", [False, True], ids=["all-rows", "skip-cls"])
def test_add_layer_norm(engine, dim, dtype, skip_cls):
    check_norm(engine, operands(engine, 2, 5, dim, dtype), skip_cls=skip_cls)


@dtypes
@pytest.mark.parametrize("dim", DIMS)
def test_bias_gelu(engine, dim, dtype):
    x, _, _, bias = operands(engine, 2, 5, dim, dtype, spread=3.0)
    check_gelu(engine, x, bias)


@pytest.mark.parametrize("skip_cls", [False, True], ids=["all-rows", "skip-cls"])
@pytest.mark.parametrize("shape", [(3,), (3, 7)], ids=["per-clip", "per-token"])
def test_row_scale(engine, shape, skip_cls):
    check_norm(engine, operands(engine, 3, 7, 40), skip_cls=skip_cls, row_scale=row_scale(engine, *shape))


@pytest.mark.parametrize("scale", [None, (3, 7)], ids=["plain", "scaled"])
@pytest.mark.parametrize("dsum, dnormed", [(True, False), (False, True)], ids=["sum-only", "normed-only"])
def test_one_result_used(engine, dsum, dnormed, scale):
    scale = None if scale is None else row_scale(engine, *scale)
    check_norm(engine, operands(engine, 3, 7, 40), dsum, dnormed, row_scale=scale)


@dtypes
def test_without_a_branch(engine, dtype):
    x, _, weight, bias = operands(engine, 2, 6, 48, dtype)
    assert add_layer_norm(x, None, weight, bias, backend=engine)[0] is x
    check_norm(engine, [x, None, weight, bias])


@pytest.mark.parametrize("dim", [2048, 2049, 5000, 8192])
def test_wide_rows(engine, dim):
    """Up to four blocks of the widest tile, and a ragged last one."""
    check_norm(engine, operands(engine, 1, 3, dim), skip_cls=True)
    check_gelu(engine, *operands(engine, 1, 3, dim)[::3])


@pytest.mark.parametrize("dim", [3, 40, 300])
def test_more_tiles_than_partial_sums(triton, dim, monkeypatch):
    """Every program of a backward visits several tiles, the last ones fewer, and the last tile is not full."""
    from timesformer_kernels.backends.triton import fused as launches

    monkeypatch.setattr(launches, "PARTS", 3)
    check_norm(triton, operands(triton, 3, 37, dim), skip_cls=True, row_scale=row_scale(triton, 3, 37))
    check_gelu(triton, *operands(triton, 3, 37, dim)[::3])


def test_row_numbers_in_64_bits(triton, monkeypatch):
    from timesformer_kernels.backends.triton import fused as launches

    monkeypatch.setattr(launches, "WIDE_ROWS", 0)
    check_norm(triton, operands(triton, 3, 9, 20), skip_cls=True, row_scale=row_scale(triton, 3, 9))
    check_gelu(triton, *operands(triton, 3, 9, 20)[::3])


def test_strides_beyond_32_bits(kernels):
    """Two clips 2^31 elements apart: only the rows are ever touched."""
    step, device = 2**31 + 64, device_of(kernels)
    buffer = REAL["empty"](step + 64, dtype=torch.bfloat16, device=device)
    x = buffer.as_strided((2, 2, 16), (step, 16, 1)).copy_(randn(2, 2, 16, seed=0, device=device))
    branch, weight, bias = operands(kernels, 2, 2, 16, torch.bfloat16)[1:]
    dense = x.clone(memory_format=torch.contiguous_format)
    for got, expected in zip(
        add_layer_norm(x, branch, weight, bias, backend=kernels),
        add_layer_norm(dense, branch, weight, bias, backend=kernels),
        strict=True,
    ):
        assert torch.equal(got, expected)
    assert torch.equal(bias_gelu(x, bias, backend=kernels), bias_gelu(dense, bias, backend=kernels))


MIXED = [  # x, branch, weight: float32 streams with 16-bit branches, and float32 parameters of 16-bit streams
    pytest.param(torch.float32, torch.bfloat16, torch.float32, id="16-bit-branch"),
    pytest.param(torch.bfloat16, torch.bfloat16, torch.float32, id="float32-weights"),
]


@pytest.mark.parametrize("skip_cls", [False, True], ids=["all-rows", "skip-cls"])
@pytest.mark.parametrize("x_dtype, branch_dtype, weight_dtype", MIXED)
def test_mixed_dtypes(engine, x_dtype, branch_dtype, weight_dtype, skip_cls):
    inputs = operands(engine, 2, 5, 72, x_dtype, branch_dtype, weight_dtype)
    check_norm(engine, inputs, skip_cls=skip_cls)
    check_gelu(engine, *operands(engine, 2, 5, 72, x_dtype, None, weight_dtype)[::3])


def test_offset_rows_keep_their_statistics(engine):
    """A mean a thousand times the deviation: sums of squares would cancel."""
    x, branch, weight, bias = operands(engine, 2, 3, 768)
    check_norm(engine, [x + 1000, branch, weight, bias])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:], ids=["float16", "bfloat16"])
def test_the_norm_is_that_of_the_sum_which_is_returned(engine, dtype):
    """The backward reads the rounded sum: else it would be that of another function. (An element may round apart.)"""
    x, branch, weight, bias = operands(engine, 2, 9, 192, dtype)
    total, normed = add_layer_norm(x, branch, weight, bias, backend=engine)
    assert (normed != add_layer_norm(total, None, weight, bias, backend=engine)[1]).float().mean() < 1e-3


def test_constant_rows(engine):
    x, branch, weight, bias = operands(engine, 2, 3, 33)
    total, normed = add_layer_norm(torch.ones_like(x), torch.ones_like(x), weight, bias, backend=engine)
    assert (total == 2).all() and torch.equal(normed, bias.expand_as(normed))


def test_eps(engine):
    inputs = operands(engine, 1, 3, 24)
    inputs[0], inputs[1] = inputs[0] * 1e-3, inputs[1] * 1e-3
    check_norm(engine, inputs, eps=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gelu_far_from_zero(engine, dtype):
    """Both tails: to x + bias above, to nothing (and never -inf * 0) below."""
    x = torch.linspace(-40, 40, 1601, device=device_of(engine)).to(dtype).view(1, 1, -1)
    check_gelu(engine, x, torch.zeros_like(x[0, 0]))
    huge = torch.tensor([-1e30, -1e10, 1e10, 1e30], device=x.device, dtype=dtype)
    out, dx, _ = gradients(partial(bias_gelu, backend=engine), [huge, torch.zeros_like(huge)], [torch.ones_like(huge)])
    assert torch.equal(out, huge.clamp_min(0).cpu()) and torch.equal(dx, (huge > 0).to(dx))


# The row-0 rule


@dtypes
def test_skip_cls_never_reads_row_0_of_the_branch(engine, dtype):
    x, branch, weight, bias = operands(engine, 3, 4, 24, dtype)
    scale = row_scale(engine, 3, 4)
    clean = branch.clone()
    clean[:, 0] = 0
    branch[:, 0], scale[:, 0] = float("nan"), float("nan")
    douts = [randn(3, 4, 24, seed=s, device=x.device) for s in (1, 2)]
    options = dict(skip_cls=True, backend=engine)
    got = gradients(partial(add_layer_norm, row_scale=scale, **options), [x, branch, weight, bias], douts)
    scale[:, 0] = 1
    expected = gradients(partial(add_layer_norm, row_scale=scale, **options), [x, clean, weight, bias], douts)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(got[0][:, 0], x[:, 0].cpu())
    assert (got[3][:, 0] == 0).all() and torch.equal(got[3][:, 1:].any(-1), scale[:, 1:].cpu() > 0)


def test_skip_cls_of_a_lone_class_row(engine):
    x, branch, weight, bias = operands(engine, 2, 1, 16)
    check_norm(engine, [x, branch, weight, bias], skip_cls=True)


def test_nan_elsewhere_is_not_hidden(engine):
    x, branch, weight, bias = operands(engine, 2, 4, 16)
    branch[1, 2, 3] = float("nan")
    for out in add_layer_norm(x, branch, weight, bias, skip_cls=True, backend=engine):
        assert out[1, 2].isnan().any() and out.isnan().any(-1).sum() == 1


# Memory


@pytest.mark.parametrize("dim", [17, 192])
@pytest.mark.parametrize("how", ["gaps", "misaligned", "odd-clips", "transposed", "patches"])
def test_strided_operands(engine, how, dim):
    x, branch, weight, bias = operands(engine, 3, 6, dim, torch.float16)
    check_norm(engine, [strided(x, how), branch, weight, bias], skip_cls=True)
    check_norm(engine, [x, strided(branch, how), weight, bias])
    check_norm(engine, [strided(x, how), None, weight, bias])
    check_gelu(engine, strided(x, how), bias)


def test_expanded_operands(engine):
    x, branch, weight, bias = operands(engine, 1, 5, 24)
    check_norm(engine, [x.expand(4, 5, 24), branch.expand(4, 5, 24), weight, bias])
    scale = row_scale(engine, 4, 1).expand(4, 5)
    check_norm(engine, [x.expand(4, 5, 24), branch.expand(4, 5, 24), weight, bias], row_scale=scale)


def test_expanded_gradient(engine):
    """sum().backward() hands in one number with stride 0."""
    inputs = [x.requires_grad_() for x in operands(engine, 2, 3, 24)]
    total, normed = add_layer_norm(*inputs, backend=engine)
    got = torch.autograd.grad(total.sum() + normed.sum() + bias_gelu(*inputs[::3], backend=engine).sum(), inputs)
    total, normed = norm_oracle(*inputs)
    expected = torch.autograd.grad(total.sum() + normed.sum() + gelu_oracle(*inputs[::3]).sum(), inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 4, 24), (2, 1, 3, 2, 24)], ids=str)
def test_gelu_of_any_rank(engine, shape):
    bias = operands(engine, 1, 1, 24)[3]
    check_gelu(engine, randn(*shape, seed=0, device=bias.device), bias)


def test_gelu_merges_dimensions_without_a_copy(engine):
    bias = operands(engine, 1, 1, 24)[3]
    x = randn(2, 13, 24, seed=0, device=bias.device)
    check_gelu(engine, x[:, 1:].unflatten(1, (4, 3)), bias)
    check_gelu(engine, x[:, 1:].unflatten(1, (4, 3)).unflatten(0, (1, 2)), bias)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_nothing_to_do(engine, shape):
    inputs = operands(engine, *shape)
    empty = torch.zeros(shape, device=device_of(engine))
    got = gradients(partial(add_layer_norm, skip_cls=True, backend=engine), inputs, [empty, empty])
    assert [tuple(x.shape) for x in got] == [shape] * 4 + [(8,)] * 2 and not any(x.any() for x in got)
    out, dx, dbias = gradients(partial(bias_gelu, backend=engine), inputs[::3], [empty])
    assert out.shape == dx.shape == shape and not dbias.any()


@dtypes
@pytest.mark.parametrize("dim", [1, 40, 300])
@pytest.mark.parametrize("gap, skew", [(0, 0), (3, 1)], ids=["dense", "gaps-misaligned"])
def test_guard_arena(kernels, dim, dtype, gap, skew, monkeypatch):
    """Nothing is written outside the tensors, and NaN lies wherever nothing may be read."""
    inputs, arena = operands(kernels, 3, 7, dim, dtype), Arena(device=device_of(kernels))
    inputs += [randn(3, 7, dim, seed=s, dtype=dtype, device=device_of(kernels)) for s in (4, 5)]

    def place(x):
        padded = arena.take(*x.shape[:-1], x.shape[-1] + gap, dtype=dtype, skew=skew * dtype.itemsize)
        return padded[..., : x.shape[-1]].copy_(x)

    guarded, scale = [place(x) for x in inputs], arena.put(row_scale(kernels, 3, 7))

    def run(x, branch, weight, bias, dsum, dnormed):
        norm = partial(add_layer_norm, skip_cls=True, row_scale=scale, backend=kernels)
        return gradients(norm, [x, branch, weight, bias], [dsum, dnormed]) + gradients(
            partial(bias_gelu, backend=kernels), [x, bias], [dnormed]
        )

    with carved(monkeypatch, arena):
        got = run(*guarded)
    assert arena.damage() == []
    assert all(x.isfinite().all() for x in got), "NaN from outside a tensor, or a row that was never written"
    for x, y in zip(guarded, inputs, strict=True):
        assert torch.equal(x, y), "an input was written"
    assert all(torch.equal(a, b) for a, b in zip(got, run(*inputs), strict=True))


def test_same_bits_in_every_run(kernels):
    inputs = operands(kernels, 3, 20, 40, torch.float16)
    douts = [randn(3, 20, 40, seed=s, device=inputs[0].device) for s in (1, 2)]

    def run():
        norm = gradients(partial(add_layer_norm, skip_cls=True, backend=kernels), inputs, douts)
        return norm + gradients(partial(bias_gelu, backend=kernels), inputs[::3], douts[:1])

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_saved_for_the_backward(kernels):
    """LayerNorm keeps the sum it returns and GELU its operand: no statistics, no mask, no normalised rows."""
    x, branch, weight, bias = [t.requires_grad_() for t in operands(kernels, 2, 3, 8)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t.detach(), lambda t: t):
        total, _ = add_layer_norm(x, branch, weight, bias, skip_cls=True, backend=kernels)
        assert {t.data_ptr() for t in saved} == {total.data_ptr(), weight.data_ptr()}
        saved.clear()
        bias_gelu(x, bias, backend=kernels)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), bias.data_ptr()}


def test_a_saved_tensor_changed_in_place_is_noticed(kernels):
    inputs = [t.requires_grad_() for t in operands(kernels, 2, 3, 8)]
    total, normed = add_layer_norm(*inputs, backend=kernels)
    with torch.no_grad():
        total.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


@pytest.mark.parametrize("frozen", range(4), ids=GRADIENTS)
def test_only_wanted_gradients(engine, frozen):
    inputs = operands(engine, 2, 3, 8)
    for i, t in enumerate(inputs):
        t.requires_grad_(i != frozen)
    total, normed = add_layer_norm(*inputs, row_scale=row_scale(engine, 2), backend=engine)
    (total.sum() + normed.square().sum()).backward()
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(4)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_cuda_graph(kernels):
    if device_of(kernels) != "cuda":
        pytest.skip(f"{kernels} runs on {device_of(kernels)}")
    inputs = [t.requires_grad_() for t in operands(kernels, 2, 9, 192, torch.bfloat16)]

    def step():
        total, normed = add_layer_norm(*inputs, skip_cls=True, backend=kernels)
        out = bias_gelu(normed, inputs[3], backend=kernels)
        return total, out, *torch.autograd.grad(total.sum() + out.square().sum(), inputs)

    expected = [t.detach().clone() for t in step()]  # compiles the kernels, too
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for t in got:
        t.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# The reference


def test_gradcheck_of_the_reference():
    inputs = [t.requires_grad_() for t in operands("reference", 2, 3, 5, torch.float64)]
    scale = row_scale("reference", 2, 3)
    for options in ({}, {"skip_cls": True}, {"row_scale": scale}, {"skip_cls": True, "row_scale": scale}):
        norm = partial(add_layer_norm, backend="reference", **options)
        assert torch.autograd.gradcheck(norm, inputs) and torch.autograd.gradgradcheck(norm, inputs)
    gelu = partial(bias_gelu, backend="reference")
    assert torch.autograd.gradcheck(gelu, inputs[::3]) and torch.autograd.gradgradcheck(gelu, inputs[::3])


@pytest.mark.parametrize("options", [{}, {"skip_cls": True}, {"row_scale": (2,)}], ids=["plain", "skip-cls", "scaled"])
def test_the_reference_as_an_op_has_the_same_gradients(options):
    """Where autograd cannot look, inside an op, its formula is written out."""
    options = {k: row_scale("reference", *v) if k == "row_scale" else v for k, v in options.items()}
    inputs = operands("reference", 2, 3, 5, torch.float64)
    douts = [randn(2, 3, 5, seed=s, dtype=torch.float64) for s in (1, 2)]
    given = options.get("row_scale"), 1e-6, options.get("skip_cls", False), "reference"
    got = gradients(lambda *t: OPS.add_layer_norm_fwd(*t, *given), inputs, douts)
    expected = gradients(partial(add_layer_norm, backend="reference", **options), inputs, douts)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    got = gradients(lambda *t: OPS.bias_gelu_fwd(*t, "reference"), inputs[::3], douts[:1])
    expected = gradients(partial(bias_gelu, backend="reference"), inputs[::3], douts[:1])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


# The C++ library


@pytest.fixture(params=CPP, ids=name_of)
def cpp(request):
    yield from served(request.param)


@pytest.mark.parametrize("dim", [*range(1, 34), 63, 65, 129])
def test_every_tail_of_a_row(cpp, dim):
    inputs = operands(cpp, 2, 3, dim, torch.bfloat16)
    check_norm(cpp, inputs, skip_cls=True, row_scale=row_scale(cpp, 2, 3))
    check_gelu(cpp, *inputs[::3])


@pytest.mark.parametrize("dim", [*range(1, 18), 192])
def test_float64(cpp, dim):
    """Against the formulas in the same precision: to its rounding."""
    inputs, scale = operands(cpp, 2, 3, dim, torch.float64), row_scale(cpp, 2, 3)
    douts = [randn(2, 3, dim, seed=s, dtype=torch.float64) for s in (1, 2)]
    options = dict(skip_cls=True, row_scale=scale, eps=1e-3)
    got = gradients(partial(add_layer_norm, backend=cpp, **options), inputs, douts)
    expected = gradients(partial(norm_oracle, **options), inputs, douts)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    x = inputs[0] * 4
    got = gradients(partial(bias_gelu, backend=cpp), [x, inputs[3]], douts[:1])
    torch.testing.assert_close(got, gradients(gelu_oracle, [x, inputs[3]], douts[:1]), atol=1e-14, rtol=1e-13)


def test_gradcheck(cpp):
    inputs = [t.requires_grad_() for t in operands(cpp, 2, 3, 11, torch.float64)]
    norm = partial(add_layer_norm, skip_cls=True, row_scale=row_scale(cpp, 2, 3), backend=cpp)
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradcheck(partial(bias_gelu, backend=cpp), inputs[::3])


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 1301, 67), (3, 4001, 12)], ids=["runs", "longer-runs"])
def test_same_bits_over_thread_counts(cpp, shape, dtype, threads):
    """Enough rows for several runs of 32, in the second shape for more than may be kept; several threads share them."""
    inputs = operands(cpp, *shape, dtype)
    douts = [randn(*shape, seed=s) for s in (1, 2)]

    def run():
        norm = gradients(partial(add_layer_norm, skip_cls=True, backend=cpp), inputs, douts)
        return norm + gradients(partial(bias_gelu, backend=cpp), inputs[::3], douts[:1])

    threads(1)
    first = run()
    for count in (2, 3, 8):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True)), f"{count} threads"
    check_norm(cpp, inputs, skip_cls=True)
    check_gelu(cpp, *inputs[::3])


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e15, 1e30], ids=str)
def test_hard_sizes(cpp, size):
    """eps decides about tiny rows; of huge ones the squares overflow (plain torch gives NaN), and they are normed."""
    x, branch, weight, bias = operands(cpp, 2, 3, 40)
    total, normed = add_layer_norm(x * size, branch * size, weight, bias, backend=cpp)
    expected = norm_oracle(*(t.double() for t in (x * size, branch * size, weight, bias)))
    torch.testing.assert_close(normed.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), expected[0], rtol=1e-6, atol=0)


def test_hard_curve_of_gelu(cpp):
    """Float32 rounding of the result everywhere, and more correct digits of the lower tail than 1 + erf has."""
    u = torch.linspace(-12, 12, 200_001).view(1, 1, -1)
    out = bias_gelu(u, torch.zeros_like(u[0, 0]), backend=cpp).double()
    exact = u.double() * torch.special.ndtr(u.double())
    error = (out - exact).abs()
    assert (error / u.double().abs().clamp_min(1)).max() < 2.5e-7 and error.mean() < 3e-8
    tail = (u > -5) & (u < 0)
    assert (error[tail] / exact[tail].abs()).max() < 2e-6


def test_hard_offsets(cpp):
    """A mean 10^5 times the deviation: the mean's own rounding must not be part of the squares."""
    x, _, weight, bias = operands(cpp, 2, 3, 768)
    check_norm(cpp, [x + 100_000, None, weight, bias])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_hard_infinities_stay_in_their_row(cpp, value):
    x, branch, weight, bias = operands(cpp, 2, 4, 19)
    clean = *add_layer_norm(x, branch, weight, bias, backend=cpp), bias_gelu(x, bias, backend=cpp)
    x[1, 2, 17] = value
    total, normed = add_layer_norm(x, branch, weight, bias, backend=cpp)
    assert torch.equal(total[1, 2, 17], x[1, 2, 17]) or total[1, 2, 17].isnan() and x[1, 2, 17].isnan()
    assert normed[1, 2].isnan().all() and normed.isnan().sum() == 19
    out = bias_gelu(x, bias, backend=cpp)
    assert out[1, 2, 17] == value if value > 0 else out[1, 2, 17].isnan()
    for got, expected in zip((total, normed, out), clean, strict=True):
        got[1, 2] = expected[1, 2] = 0
        assert torch.equal(got, expected)
