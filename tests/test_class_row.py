# SPDX-License-Identifier: Apache-2.0
"""The class row's attention without keys and values, against the oracle that has them."""

import blocks
import oracle
import pytest
import torch
from blocks import TINY, clip
from oracle import Case, assert_no_worse, with_weights
from torch.profiler import profile

from timesformer import DividedSTAttention, TimeSformer
from timesformer.attention import Attention, JointSTAttention
from timesformer.class_row import attend

HEADS, DIM = 3, 24
CASES = [
    Case("space", (3, 4, 5), "per_group"),
    Case("space", (1, 1, 1), "per_group"),
    Case("space", (2, 3, 1), "per_group", scale=-0.3),
    Case("joint", (2, 3, 4), "per_group"),
    with_weights(Case("space", (3, 4, 5), "per_group"), 2),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}{'-weighted' if c.weights is not None else ''}")


def operands(case, dtype=torch.float64):
    """z [B, S, D], weight [3 D, D], bias [3 D]."""
    gen = torch.Generator().manual_seed(0)
    shapes = (2, case.tokens, DIM), (3 * DIM, DIM), (3 * DIM,)
    z, weight, bias = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype) for x in (z, weight * 0.4, bias)]


def own(case, z, weight, bias):
    q_bias, _, v_bias = bias.chunk(3)
    scale = (DIM // HEADS) ** -0.5 if case.scale is None else case.scale
    options = dict(heads=HEADS, scale=scale, groups=case.groups, cls_weights=case.weights)
    return attend(z, weight, q_bias, v_bias, **options)


def exact(case, z, weight, bias):
    qkv = torch.nn.functional.linear(z, weight, bias).unflatten(2, (3, HEADS, -1))
    return oracle.attention(*qkv.unbind(2), case)[:, 0].flatten(1)


@cases
def test_values_and_gradients(case):
    results = []
    for run in (own, exact):
        leaves = [x.requires_grad_() for x in operands(case)]
        out = run(case, *leaves)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1])
def test_error_rule(case, dtype):
    inputs = operands(case, dtype)
    out = own(case, *inputs)
    assert out.dtype == dtype and torch.equal(out, own(case, *(x.float() for x in inputs)).to(dtype))
    assert_no_worse("out", out, exact(case, *(x.double() for x in inputs)), exact(case, *inputs))


def test_without_biases():
    z, weight, _ = operands(CASES[0])
    options = dict(heads=HEADS, scale=0.5, groups=5)
    zero = torch.zeros(DIM, dtype=z.dtype)
    assert torch.equal(attend(z, weight, None, None, **options), attend(z, weight, zero, zero, **options))


def test_second_order():
    """Plain operators: derivatives of any order."""
    case = Case("space", (2, 1, 3), "per_group")
    inputs = [x.requires_grad_() for x in operands(case)]
    assert torch.autograd.gradgradcheck(lambda *x: own(case, *x), inputs, fast_mode=True)


# --- in a model ------------------------------------------------------------------------------------------------------


def products_of_all_rows(model, video):
    """Products of [B * S, D] with a matrix of 3 D outputs: those of q, k and v."""
    rows = video.shape[0] * (video.shape[2] * 16 + 1)
    with profile(record_shapes=True) as trace, torch.no_grad():
        model(video)
    found = [e.input_shapes for e in trace.events() if e.name in ("aten::mm", "aten::addmm")]
    return sum([rows, 32] in shapes and [32, 96] in shapes for shapes in found)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make(generator, **options):
    return blocks.randomise(TimeSformer(**TINY, **options), generator).eval()


def test_where_it_serves(generator):
    """In the last block, unless somebody looks at a part of it, the reference is asked for, or autocast is on."""
    model, video = make(generator), clip(generator, dtype=torch.float32)
    served = 2 * TINY["depth"] - 1
    assert products_of_all_rows(model, video) == served
    assert products_of_all_rows(model.fuse(), video) == served
    model.unfuse()
    handle = model.blocks[-1].attn.qkv.register_forward_hook(lambda *_: None)
    assert products_of_all_rows(model, video) == served + 1
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert products_of_all_rows(model, video) == served + 1
    model.set_backend("reference")
    assert products_of_all_rows(model, video) == served + 1
    model.set_backend("auto")
    model.blocks[-1].attn.qkv.__class__ = type("Lora", (torch.nn.Linear,), {})
    assert products_of_all_rows(model, video) == served + 1


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["none", "light", "full"])
def test_training_with_and_without(generator, monkeypatch, mode, rate):
    """The same values and gradients, dropped frames included."""
    module = blocks.randomise(DividedSTAttention(16, 2, drop_path=rate).double(), generator)
    module.checkpoint = mode
    x = torch.randn(3, 41, 16, generator=generator, dtype=torch.float64)
    results = []
    for serves in (True, False):
        torch.manual_seed(5)
        monkeypatch.setattr(Attention, "_serves_class_row", lambda *_, serves=serves: serves)
        leaf = x.clone().requires_grad_()
        out = module(leaf, 4, class_row_only=True)
        assert out.shape == (3, 1, 16)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad(out, [leaf, *module.parameters()], dout)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


def test_a_named_backend_that_cannot_run_raises():
    """Although no kernel of it would be called."""
    module, x = JointSTAttention(16, 2, backend="cuda").eval(), torch.zeros(1, 9, 16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        module(x, 2, class_row_only=True)
