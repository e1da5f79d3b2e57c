# SPDX-License-Identifier: Apache-2.0
"""warmup() runs what will be run, counts what was compiled, and leaves no trace."""

import copy
import random
import sys
import types

import pytest
import torch
from oracle import device_of
from torch import nn

from timesformer import DividedSTAttention
from timesformer_kernels import space_attention
from timesformer_kernels.warmup import warmup


class Seen(nn.Module):
    """A model with everything that a run may change; it notes how it was called."""

    def __init__(self, result=lambda y: y):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.result, self.notes = result, []
        self.norm.eval()  # a part that stays frozen while the rest is trained

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().sum()[None]
        self.notes.append((tuple(x.shape), x.dtype, self.training, self.norm.training, torch.is_grad_enabled()))
        return self.result(self.drop(self.norm(self.linear(x))))


def state(model):
    return (
        {name: x.detach().clone() for name, x in model.state_dict().items()},
        [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_the_model_is_as_it_was(train, mode):
    model = Seen().train(mode)
    model.norm.eval()
    model.linear.weight.grad = torch.full((4, 4), 3.0)
    kept = list(model.parameters()), list(model.buffers()), model.linear.weight.grad
    before = copy.deepcopy(state(model))
    assert warmup(model, [(2, 4), torch.ones(3, 4)], train=train) == 0
    assert model.notes == [(n, torch.float32, train, train, train) for n in ((2, 4), (3, 4))]
    assert same(before, state(model))
    after = list(model.parameters()), list(model.buffers()), model.linear.weight.grad
    assert all(x is y for a, b in zip(kept[:2], after[:2], strict=True) for x, y in zip(a, b, strict=True))
    assert after[2] is kept[2]


@pytest.mark.parametrize("train", [False, True])
def test_the_model_is_as_it_was_after_an_error(train):
    def fail(y):
        raise ArithmeticError("in the model")

    model = Seen(fail)
    before = copy.deepcopy(state(model))
    with pytest.raises(ArithmeticError, match="in the model"):
        warmup(model, [(2, 4)], train=train)
    assert same(before, state(model))


@pytest.mark.parametrize(
    "result",
    [
        lambda y: (y, None, "name"),
        lambda y: {"logits": [y], "number": 3},
        lambda y: (y.detach(), y),  # one that needs no gradient beside one that does
    ],
    ids=["tuple", "mapping", "mixed"],
)
def test_results_of_any_form_are_differentiated(result):
    model, reached = Seen(result), []
    model.linear.weight.register_hook(reached.append)
    warmup(model, [(2, 4)], train=True)
    assert len(reached) == 1 and reached[0].shape == (4, 4)


def test_frozen_parameters_and_hooks_of_gradients_are_left_alone():
    """An optimiser that steps inside the backward would train on zeros."""
    model = Seen()
    model.linear.bias.requires_grad_(False)
    model.linear.weight.register_post_accumulate_grad_hook(lambda p: pytest.fail("a gradient was accumulated"))
    warmup(model, [(2, 4)], train=True)
    assert model.linear.weight.grad is None


def test_dtype_and_autocast_are_the_models_own():
    model = Seen().double()
    warmup(model, [(2, 4)])
    assert model.notes[0][1] == torch.float64
    model, seen = Seen(), []
    model.linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        warmup(model, [(2, 4)], train=True)
    assert seen == [torch.bfloat16]


@pytest.mark.needs(dtype=torch.float32, head_dim=16)
def test_attention_of_every_backend(backend):
    """Forward and backward of the named backend run, in the interpreter too."""
    model = DividedSTAttention(32, num_heads=2, backend=backend).to(device_of(backend))
    reached = []
    model.attn.qkv.weight.register_hook(reached.append)

    class Clips(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = model

        def forward(self, x):
            return self.block(x, 2)

    clips = Clips()
    before = copy.deepcopy(state(clips))
    compiled = warmup(clips, [(1, 5, 32)])
    assert not reached
    compiled += warmup(clips, [(1, 5, 32)], train=True)
    if device_of(backend) == "cpu":
        assert compiled == 0
    assert len(reached) == 1 and not torch.isnan(reached[0]).any()
    assert same(before, state(clips))


def test_kernels_are_counted_and_the_own_hook_is_called(monkeypatch):
    """A stand-in for Triton that compiles at the first call of each length."""
    told, runtime = [], types.SimpleNamespace(jit_post_compile_hook=None)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(knobs=types.SimpleNamespace(runtime=runtime)))
    compiled = set()

    def compile_once(y):
        if len(y) not in compiled:
            compiled.add(len(y))
            runtime.jit_post_compile_hook(key="k", repr=f"kernel_{len(y)}", fn=None, compile={}, already_compiled=False)
        return y

    assert warmup(Seen(compile_once), [(2, 4), (3, 4), (2, 4)]) == 2
    assert runtime.jit_post_compile_hook is None
    runtime.jit_post_compile_hook = own = lambda **event: told.append(event["repr"])
    assert warmup(Seen(compile_once), [(2, 4), (5, 4)]) == 1
    assert told == ["kernel_5"] and runtime.jit_post_compile_hook is own
    with pytest.raises(ZeroDivisionError):
        warmup(Seen(lambda y: 1 / 0), [(2, 4)])
    assert runtime.jit_post_compile_hook is own


@pytest.mark.parametrize(
    "model, shapes, train, error",
    [
        (space_attention, [(2, 4)], False, (TypeError, "model: got function, expected a torch.nn.Module")),
        (Seen(), [], False, (ValueError, "shapes: got none, expected at least one")),
        (Seen(), torch.zeros(2, 4), False, (TypeError, "shapes: got Tensor, expected an iterable of shapes")),
        (Seen(), 4, False, (TypeError, "shapes: got int, expected an iterable of shapes")),
        (Seen(), (2, 4), False, (TypeError, "shapes: got an element 2, expected a shape such as")),
        (Seen(), ["24"], False, (TypeError, "shapes: got an element '24', expected a shape such as")),
        (Seen(), [(2, 4), (0, 4)], False, (ValueError, r"shapes: got \(0, 4\), expected positive integers")),
        (Seen(), [(2, 4.0)], False, (ValueError, r"shapes: got \(2, 4.0\), expected positive integers")),
        (nn.Identity(), [(2, 4)], False, (ValueError, "model: got no floating-point parameter to tell device")),
        (nn.Identity(), [torch.ones(2)], True, (ValueError, "model: got no parameter that requires a gradient")),
        (Seen(lambda y: y.detach()), [(2, 4)], True, (ValueError, "model: got a result that depends on no parameter")),
        (Seen().to("meta"), [(2, 4)], False, (ValueError, "model, shapes: got tensors on device meta")),
    ],
)
def test_bad_input_is_refused(model, shapes, train, error):
    with pytest.raises(error[0], match=f"^{error[1]}"):
        warmup(model, shapes, train=train)
    assert not getattr(model, "notes", None) or "depends on no" in error[1]


def test_a_model_without_parameters_takes_tensors():
    seen, x = [], torch.full((2, 3), random.random(), requires_grad=True)

    class Note(nn.Identity):
        def forward(self, x):
            seen.append(x)
            return x

    assert warmup(Note(), (y for y in [x])) == 0
    assert torch.equal(seen[0], x) and not seen[0].requires_grad
