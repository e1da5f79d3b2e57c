# SPDX-License-Identifier: Apache-2.0
"""Products that are one in real arithmetic: exact in float64, gradients included, and only where nobody looks on."""

import copy
import io

import blocks
import pytest
import torch
from blocks import TINY, clip
from oracle import assert_no_worse
from torch import nn
from torch.profiler import profile

from timesformer import DividedSTAttention, TimeSformer
from timesformer.folding import fold

EXACT = dict(rtol=1e-10, atol=1e-11)
KINDS = ("divided_space_time", "joint_space_time", "space_only")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make(generator, kind="divided_space_time", dtype=torch.float64, **options):
    return blocks.randomise(TimeSformer(**{**TINY, "attention_type": kind, **options}).to(dtype), generator).eval()


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- proj with temporal_fc, at every call ----------------------------------------------------------------------------


def test_gradients_are_those_of_the_factored_form(generator):
    """dW_fc = dW' W_p^T + (sum dy) b_p^T, dW_p = W_fc^T dW', db_p = W_fc^T sum dy, db_fc = sum dy, written out."""
    proj, fc = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
    o, dy = randn(generator, 20, 6), randn(generator, 20, 6)
    nn.functional.linear(o, *fold(proj, fc)).backward(dy)
    joined = dy.T @ o
    expected = {
        fc.weight: joined @ proj.weight.T + torch.outer(dy.sum(0), proj.bias),
        proj.weight: fc.weight.T @ joined,
        proj.bias: fc.weight.T @ dy.sum(0),
        fc.bias: dy.sum(0),
    }
    for p, grad in expected.items():
        torch.testing.assert_close(p.grad, grad, **EXACT)


def step(module, x, frames, dout):
    """[out, dx, gradients of the parameters]."""
    x = x.clone().requires_grad_()
    out = module(x, frames)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], dout)]


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no-cls"])
def test_training_with_and_without_the_fold(generator, rate, cls, monkeypatch):
    """The same values and gradients, dropped rows with the bias of temporal_fc included."""
    module = blocks.randomise(DividedSTAttention(16, 2, drop_path=rate, class_token=cls).double(), generator)
    x, dout = (randn(generator, 3, cls + 40, 16) for _ in range(2))
    results = []
    for folds in (True, False):
        torch.manual_seed(5)
        if not folds:
            monkeypatch.setattr(DividedSTAttention, "_folds", lambda self, x: False)
        else:
            assert module._folds(x)
        results.append(step(module, x, 4, dout))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_fold_keeps_the_error_rule(generator, dtype):
    """Values and gradients against float64, within the rule's factor of plain torch in the same dtype."""
    module = blocks.randomise(DividedSTAttention(32, 2), generator)
    x, dout = randn(generator, 4, 41, 32).to(dtype), randn(generator, 4, 41, 32).to(dtype)
    low = copy.deepcopy(module).to(dtype)
    names = ["out", "dx", *(name for name, _ in low.named_parameters())]

    def oracle(dtype):
        p = {name: q.detach().to(dtype).requires_grad_() for name, q in low.named_parameters()}
        y = x.to(dtype).requires_grad_()
        out = blocks.divided(p, "", y, 4, 2)
        return [out.detach(), *torch.autograd.grad(out, [y, *p.values()], dout.to(dtype))]

    for name, *trio in zip(names, step(low, x, 4, dout), oracle(torch.float64), oracle(dtype), strict=True):
        assert_no_worse(name, *trio)


def products(call):
    with profile() as trace:
        call()
    return sum(e.count for e in trace.key_averages() if e.key in ("aten::mm", "aten::addmm"))


def test_one_product_in_the_place_of_two(generator):
    """Forward and backward: three products of all rows less, six of weights and biases alone more."""
    module = blocks.randomise(DividedSTAttention(64, 2), generator)
    x = torch.randn(8, 41, 64, generator=generator, requires_grad=True)
    rows = 8 * 41

    def sizes():
        with profile(record_shapes=True) as trace:
            module(x, 4).sum().backward()
        found = [e.input_shapes for e in trace.events() if e.name in ("aten::mm", "aten::addmm")]
        return [any([rows in shape for shape in shapes if shape]) for shapes in found]

    seen = sizes()
    module.temporal_fc.register_forward_hook(lambda *_: None)
    apart = sizes()
    assert sum(seen) == sum(apart) - 3 and len(seen) == len(apart) + 3


def test_not_where_someone_looks(generator):
    module = blocks.randomise(DividedSTAttention(16, 2).double(), generator)
    x = randn(generator, 2, 41, 16)
    assert module._folds(x) and not module._folds(x[:1, :13])  # too few rows to pay
    for part in (module.temporal_attn, module.temporal_attn.proj, module.temporal_fc):
        for handle in (
            part.register_forward_hook(lambda *_: None),
            part.register_forward_pre_hook(lambda *_: None),
            part.register_full_backward_hook(lambda *_: None),
        ):
            assert not module._folds(x)
            handle.remove()
        forward = part.forward
        part.forward = lambda *args, f=forward, **options: f(*args, **options)
        assert not module._folds(x)
        del part.forward
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not module._folds(x)
    everywhere.remove()
    assert module._folds(x)
    nn.utils.parametrize.register_parametrization(module.temporal_fc, "weight", nn.Identity())
    assert not module._folds(x)


# --- fuse and unfuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, dict(qkv_bias=False, qk_scale=0.4, layer_norm_eps=1e-3)], ids=["", "options"])
def test_fused_logits(generator, kind, options):
    model, video = make(generator, kind, **options), clip(generator)
    with torch.no_grad():
        exact = model(video)
        assert not model.fused and model.fuse() is model and model.fused
        got = model(video)
        torch.testing.assert_close(got, exact, **EXACT)
        assert not torch.equal(got, exact)  # other products
        few = clip(generator, 1, 1, 8, 8)
        torch.testing.assert_close(model(few), model.unfuse()(few), **EXACT)
        assert torch.equal(model(video), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_products(generator, kind):
    """All of a fused block's products are of its rows: none of weights with weights is left."""
    model, video = make(generator, kind), clip(generator)
    per_block = {"divided_space_time": 6}.get(kind, 4)  # both qkv, joined proj, proj, fc1, fc2
    last = per_block - 1  # the class row alone needs no qkv of all rows
    with torch.no_grad():
        model.fuse()
        assert products(lambda: model(video)) == per_block + last + 2  # and patches, head


def test_checkpoints_are_unfused(generator, tmp_path):
    pytest.importorskip("safetensors")
    model, video = make(generator, dtype=torch.float32), clip(generator, dtype=torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "apart")
    with torch.no_grad():
        exact = model(video)
        model.fuse()
        model(video)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path / "fused")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("apart", "fused")]
    assert files[0] == files[1]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert not twin.fused and model.fused
        with torch.no_grad():
            assert torch.equal(twin(video), exact)


def test_fuse_in_training_mode_changes_no_mode(generator):
    """What the folded form shares with the model is not put into evaluation mode by the way."""
    model = make(generator, drop_path_rate=0.5).train().fuse()
    assert all(m.training for m in model.modules())
    assert all(block.drop_path.active for block in model.blocks[1:])


@pytest.mark.parametrize("change", ["in place", "load", "dtype", "another parameter"])
def test_a_changed_parameter_is_seen(generator, change):
    model, other, video = make(generator), make(generator), clip(generator)
    model.fuse()
    with torch.no_grad():
        model(video)
        if change == "in place":
            model.blocks[0].norm2.bias.add_(1)
            model.blocks[1].temporal_attn.proj.weight.mul_(2)
        elif change == "load":
            model.load_state_dict(other.state_dict())
        elif change == "dtype":
            model.bfloat16().double()
        else:
            model.blocks[1].mlp.fc1.weight = nn.Parameter(torch.zeros(128, 32, dtype=torch.float64))
        got = model(video)
        torch.testing.assert_close(got, model.unfuse()(video), **EXACT)


def test_training_and_gradients_use_the_parameters(generator):
    model, video = make(generator), clip(generator)
    exact = torch.autograd.grad(model(video).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(model.fuse()(video).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    with torch.no_grad():
        torch.manual_seed(0)
        one = model.train()(video)
        torch.manual_seed(0)
        assert torch.equal(model.unfuse()(video), one)


def test_a_hook_after_fuse_sees_every_layer(generator):
    model, video, seen = make(generator).fuse(), clip(generator), []
    model.blocks[0].temporal_fc.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with torch.no_grad():
        got = model(video)
        torch.testing.assert_close(got, model.unfuse()(video), **EXACT)
    assert len(seen) == 2


class Lora(nn.Linear):
    """An adapter as libraries write it: a Linear with something added."""

    def forward(self, x):
        return super().forward(x) + 1


def replaced(model):
    model.blocks[1].attn.qkv.__class__ = Lora


def wrapped(model):
    model.blocks[1] = nn.Sequential(model.blocks[1])


def parametrised(model):
    nn.utils.parametrize.register_parametrization(model.blocks[0].mlp.fc1, "weight", nn.Identity())


@pytest.mark.parametrize(
    "change, words",
    [
        (replaced, ["blocks.1.attn.qkv", "Lora", "torch.nn.Linear"]),
        (parametrised, ["blocks.0.mlp.fc1", "ParametrizedLinear"]),
        (wrapped, ["blocks.1", "Sequential"]),
        (lambda m: m.blocks[0].norm2.register_forward_hook(lambda *_: None), ["blocks.0.norm2", "hook"]),
        (lambda m: m.blocks[0].register_forward_hook(lambda *_: None), ["blocks.0", "hook"]),
        (lambda m: setattr(m.blocks[1], "norm1", nn.LayerNorm(32, bias=False)), ["blocks.1.norm1", "without"]),
        (lambda m: setattr(m.blocks[1].temporal_fc, "forward", lambda x: x), ["blocks.1.temporal_fc", "forward"]),
    ],
    ids=["adapter", "parametrised", "wrapper", "hooked-layer", "hooked-block", "no-shift", "forward"],
)
def test_a_model_that_cannot_be_folded_says_why(generator, change, words):
    model = make(generator, dtype=torch.float32)
    fused = make(generator, dtype=torch.float32).fuse()
    for changed in (model, fused):
        change(changed)
        before = dict(changed.named_parameters()), dict(changed.named_modules()), changed._folded
        with pytest.raises(RuntimeError) as caught:
            changed.fuse()
        assert str(caught.value).startswith("fuse: ") and all(word in str(caught.value) for word in words), caught.value
        after = dict(changed.named_parameters()), dict(changed.named_modules()), changed._folded
        assert all(a is b for a, b in zip(before[0].values(), after[0].values(), strict=True))
        assert all(a is b for a, b in zip(before[1].values(), after[1].values(), strict=True))
        assert before[2] is after[2]
    assert not model.fused and fused.fused
