# SPDX-License-Identifier: Apache-2.0
"""Folded blocks on a CPU in memory taken once, biases left out of the products: the kernels' part by the error rule,
the model's in float64, and that nobody else is given memory which will be written again."""

import oracle
import pytest
import torch
from arena import Arena
from blocks import TINY, clip, randomise
from fused_oracle import CPP, name_of, norm_oracle, operands, row_scale, served
from oracle import DTYPES, Case, assert_no_worse, every_case, with_weights
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from timesformer import TimeSformer, inplace
from timesformer.inplace import InPlace
from timesformer_kernels import grid, native
from timesformer_kernels.backends import cpp as attention
from timesformer_kernels.backends import cpp_steps

EXACT = dict(rtol=1e-10, atol=1e-11)
KINDS = ("divided_space_time", "joint_space_time", "space_only")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


@pytest.fixture(params=CPP, ids=name_of)
def cpp(request):
    yield from served(request.param)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# --- the kernels' part -----------------------------------------------------------------------------------------------


def attend(case, q, k, v, **given):
    view = grid.view(case.scheme, case.grid, case.cls, case.order)
    scale = q.shape[3] ** -0.5 if case.scale is None else float(case.scale)
    return attention.forward(q, k, v, view, scale, case.weights, **given)


def check_query_bias(case, head_dim, dtype, heads=3):
    q, k, v = case.qkv("cpp", 2, heads, head_dim, dtype)
    bias = torch.linspace(-2, 2, heads * head_dim, dtype=torch.float64).to(dtype).view(heads, head_dim)
    got = attend(case, q, k, v, q_bias=bias)
    exact = oracle.attention(q.double() + bias.double(), k.double(), v.double(), case)
    if dtype == torch.float64:  # nothing more exact is at hand
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_no_worse("out", got, exact, oracle.attention(q + bias, k, v, case))
    assert not torch.equal(got, attend(case, q, k, v))


@dtypes
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_query_bias_of_every_view(cpp, case, dtype):
    check_query_bias(with_weights(case, 2) if case.cls == "per_group" else case, 8, dtype)


@dtypes
@pytest.mark.parametrize("head_dim", [1, 7, 16, 20, 64, 65, 128])
@pytest.mark.parametrize("frames", [1, 3, 8, 16, 17])
def test_query_bias_of_every_length_and_width(cpp, frames, head_dim, dtype):
    if frames > 1:  # softmax of one has no use for a query
        check_query_bias(Case("time", (1, 2, frames), "exclude"), head_dim, dtype)
    check_query_bias(Case("space", (3, 7, frames), "per_group"), head_dim, dtype, heads=2)


@pytest.mark.parametrize("head_dim", [7, 16])
def test_query_bias_is_read_in_bounds(cpp, head_dim):
    arena, case = Arena(), Case("space", (2, 3, 4), "per_group")
    q, k, v = case.qkv("cpp", 1, 2, head_dim)
    bias = torch.randn(2, head_dim)
    out = attend(case, q, k, v, q_bias=arena.put(bias), out=arena.take(*q.shape))
    assert arena.damage() == [] and torch.equal(out, attend(case, q, k, v, q_bias=bias))


def test_a_backward_with_a_query_bias_is_refused():
    q, k, v = Case("time", (1, 2, 4), "exclude").qkv("cpp", 1, 1, 8)
    view, grads = grid.view("time", (1, 2, 4), "exclude"), [torch.empty(q.shape) for _ in range(3)]
    with pytest.raises(RuntimeError, match="q_bias is given to a backward"):
        native.attention(q, k, v, None, view, 1.0, None, (torch.empty(q.shape), *grads), q_bias=torch.zeros(1, 8))


NORMS = [  # rows, branch, scale and shift
    (torch.float32, None, None),
    (torch.float32, torch.bfloat16, None),
    (torch.bfloat16, None, None),
    (torch.float16, None, torch.float32),
    (torch.float64, None, None),
]


@pytest.mark.parametrize("dim", [1, 7, 19, 64, 130])
@pytest.mark.parametrize("dtype, branch_dtype, weight_dtype", NORMS)
def test_branch_bias(cpp, dtype, branch_dtype, weight_dtype, dim):
    x, branch, weight, bias = operands("cpp", 2, 5, dim, dtype, branch_dtype, weight_dtype)
    added, scale = torch.linspace(-3, 3, dim, dtype=torch.float64).to(dtype), row_scale("cpp", 2, 5)
    for skip in (False, True):
        got = cpp_steps.add_layer_norm_fwd(x, branch, weight, bias, scale, 1e-6, skip, branch_bias=added)
        exact, eager = (
            norm_oracle(*(t.to(d) for t in (x, branch.to(d) + added.to(d), weight, bias)), 1e-6, skip, scale)
            for d in (torch.float64, dtype)
        )
        for name, *trio in zip(("sum", "normed"), got, exact, eager, strict=True):
            assert_no_worse(name, *trio)


@dtypes
@pytest.mark.parametrize("dim", [7, 64, 130])
def test_results_over_operands(cpp, dim, dtype):
    """The sum over x, the norm over the branch or over x, GELU over its operand: the bits of other memory."""
    x, branch, weight, bias = operands("cpp", 2, 5, dim, dtype)
    for skip in (False, True):
        options = weight, bias, None, 1e-6, skip
        expected = cpp_steps.add_layer_norm_fwd(x, branch, *options, branch_bias=bias)
        total, normed = x.clone(), branch.clone()
        got = cpp_steps.add_layer_norm_fwd(total, normed, *options, branch_bias=bias, total=total, out=normed)
        assert got[0] is total and got[1] is normed
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    alone = cpp_steps.add_layer_norm_fwd(x, None, weight, bias, None, 1e-6, False)[1]
    assert torch.equal(
        cpp_steps.add_layer_norm_fwd(y := x.clone(), None, weight, bias, None, 1e-6, False, out=y)[1], alone
    )
    assert torch.equal(cpp_steps.bias_gelu_fwd(y := x.clone(), bias, out=y), cpp_steps.bias_gelu_fwd(x, bias))


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """Blocks that have run in place."""
    if not native.library()[0]:
        pytest.skip("no CPU library")
    seen, run = [], InPlace.run
    monkeypatch.setattr(InPlace, "run", lambda self, *args: (seen.append(self), run(self, *args))[1])
    return seen


def make(generator, kind="divided_space_time", dtype=torch.float64, **options):
    return randomise(TimeSformer(**{**TINY, "attention_type": kind, **options}).to(dtype), generator).eval()


OPTIONS = [{}, dict(qkv_bias=False), dict(qk_scale=0.4), dict(mlp_ratio=1.5, num_heads=2), dict(mlp_ratio=7)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_are_those_of_the_unfused_model(generator, runs, kind, options):
    model = make(generator, kind, **options)
    for shape in ((2, 4, 32, 32), (1, 3, 16, 24), (3, 1, 8, 8), (0, 2, 8, 8)):
        video = clip(generator, *shape)
        with torch.no_grad():
            exact = model.unfuse()(video)
            torch.testing.assert_close(model.fuse()(video), exact, **EXACT)
    assert len(runs) == 4 * len(model.blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_activations_in_parts(generator, runs, kind, monkeypatch):
    """Many rows pass through the MLP in parts, which fit where q, k and v were."""
    model, video = make(generator, kind, mlp_ratio=5), clip(generator)
    with torch.no_grad():
        exact = model.fuse()(video)
        monkeypatch.setattr(inplace, "ROWS", 16)
        rows, parts = [], InPlace._mlp
        monkeypatch.setattr(
            InPlace,
            "_mlp",
            lambda self, memory: (rows.append((memory.x.shape[1], memory.most)), parts(self, memory))[1],
        )
        torch.testing.assert_close(model(video), exact, **EXACT)
    (tokens, most), (last, _) = rows
    assert tokens > 1 and last == 1  # the last block's MLP sees the class row alone
    total = tokens * (8 if kind == "space_only" else 2)
    assert most == total * 3 // 5 and most > 16


def test_no_product_writes_a_bias(generator, runs):
    """All products of the blocks are plain; one with a bias is left, the head's."""
    model, video = make(generator).fuse(), clip(generator)
    with torch.no_grad():
        model(video)
        with profile() as trace:
            model(video)
    counts = {e.key: e.count for e in trace.key_averages()}
    assert counts["aten::addmm"] == 1 and counts["aten::mm"] >= 6 * len(model.blocks)


def test_memory_of_a_forward(generator, runs):
    """Three tensors for all blocks, however many there are: a block more takes less than half a token tensor."""

    def allocated(depth):
        model = make(generator, dtype=torch.float32, depth=depth, embed_dim=64).fuse()
        video = clip(generator, 4, 4, 32, 32, torch.float32)
        with torch.no_grad():
            model(video)
            with profile(profile_memory=True) as trace:
                model(video)
        return sum(max(0, e.cpu_memory_usage) for e in trace.events() if e.name.startswith("aten::empty"))

    one = 4 * (4 * 16 + 1) * 64 * 4  # bytes of x
    assert allocated(6) - allocated(2) < 4 * one / 2  # workspaces of the kernels


@pytest.mark.parametrize("part", ["", "temporal_norm1", "temporal_attn", "norm1", "attn.proj", "norm2", "mlp"])
def test_what_others_hold_is_not_written(generator, runs, part):
    """A hook in the middle makes its block an ordinary one: what it was given and gave stays as it was."""
    model, video, held = make(generator, depth=4).fuse(), clip(generator), []

    def keep(block, args, out):
        held.extend((t, t.clone()) for t in (args[0], out))

    with torch.no_grad():
        exact = model(video)
        model.blocks[1].get_submodule(part).register_forward_hook(keep)
        torch.testing.assert_close(model(video), exact, **EXACT)
    assert len(runs) == 4 + 3 and len(held) == 2
    assert all(torch.equal(t, before) for t, before in held)


def test_the_clip_and_the_parameters_are_not_written(generator, runs):
    model, video = make(generator, dtype=torch.float32).fuse(), clip(generator, dtype=torch.float32)
    before = [t.clone() for t in (video, *model.parameters())]
    with torch.inference_mode():
        first = model(video)
        assert torch.equal(model(video), first)
    assert all(torch.equal(a, b) for a, b in zip((video, *model.parameters()), before, strict=True)) and runs


@pytest.mark.parametrize("backend, count", [("auto", 2), ("cpp", 2), ("reference", 0)])
def test_a_backend_set_after_fuse(generator, runs, backend, count, monkeypatch):
    model, video = make(generator).fuse(), clip(generator)
    with torch.no_grad():
        exact = model(video)
        runs.clear()
        model.set_backend(backend)
        if backend == "reference":
            monkeypatch.setattr(native, "attention", None)  # which would be called
        torch.testing.assert_close(model(video), exact, **EXACT)
    assert len(runs) == count


class Recorder(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def test_where_it_does_not_serve(generator, runs):
    """With gradients, under autocast, and where somebody records operators or transforms: as any other block."""
    model, video = make(generator, dtype=torch.float32).fuse(), clip(generator, dtype=torch.float32)
    model(video)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(video)
        with Recorder() as recorder:
            model(video)
        torch.func.vmap(model)(video[:, None])
        assert not runs and "timesformer_kernels::attn_fwd" in recorder.seen
        model(video)
    assert len(runs) == 2


def test_memory_lies_where_the_clip_does(generator, runs):
    """Whatever the default device is."""
    model, video = make(generator).fuse(), clip(generator)
    with torch.no_grad():
        exact = model(video)
        with torch.device("meta"):
            got = model(video)
    assert torch.equal(got, exact) and len(runs) == 4
