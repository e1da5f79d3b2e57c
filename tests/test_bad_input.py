# SPDX-License-Identifier: Apache-2.0
"""Every bad input is one error, before any work, that names the argument, what came and what was expected."""

from dataclasses import replace

import pytest
import torch
from oracle import device_of, make_qkv

from timesformer_kernels import available_backends, grid_attention, registry, space_attention, time_attention

S, FRAMES = 1 + 6 * 4, 4


def tensors(*shape, dtype=torch.float32):
    return [torch.zeros(*(shape or (2, S, 2, 8)), dtype=dtype) for _ in range(3)]


def swapped(at, x):
    out = tensors()
    out[at] = x
    return out


TURNED = torch.zeros(2, S, 8, 2).transpose(2, 3)  # last stride 2
ONE_BAD_TENSOR = [  # q, k, v, error, words of the message
    pytest.param(
        tensors(2, S - 1, 2, 8), ValueError, ["q", "24", "frames = 4", "class row"], id="tokens-without-class-row"
    ),
    pytest.param(tensors(2, 0, 2, 8), ValueError, ["q", "0 tokens", "class row"], id="no-rows"),
    pytest.param(tensors(2, S, 16), ValueError, ["q", f"(2, {S}, 16)", "4 dimensions"], id="rank-3"),
    pytest.param(tensors(1, 2, S, 2, 8), ValueError, ["q", f"(1, 2, {S}, 2, 8)", "4 dimensions"], id="rank-5"),
    pytest.param(swapped(1, torch.zeros(2, S, 16)), ValueError, ["k", f"(2, {S}, 16)", "4 dim"], id="rank-of-k"),
    pytest.param(swapped(1, torch.zeros(2, S, 2, 16)), ValueError, ["k", "16)", "shape of q"], id="shape-of-k"),
    pytest.param(
        swapped(2, torch.zeros(1, S, 2, 8)), ValueError, ["v", f"(1, {S}, 2, 8)", "shape of q"], id="shape-of-v"
    ),
    pytest.param(swapped(1, tensors()[0].half()), ValueError, ["k", "float16", "float32"], id="11-mixed-dtypes"),
    pytest.param(swapped(2, tensors()[0].to("meta")), ValueError, ["v", "meta", "cpu"], id="12-mixed-devices"),
    pytest.param(tensors(dtype=torch.int64), ValueError, ["q", "int64", "float"], id="11-int"),
    pytest.param(tensors(dtype=torch.bool), ValueError, ["q", "bool", "float"], id="11-bool"),
    pytest.param(tensors(dtype=torch.complex64), ValueError, ["q", "complex64", "float"], id="11-complex"),
    pytest.param(tensors(dtype=torch.float8_e4m3fn), ValueError, ["q", "float8_e4m3fn", "bfloat16"], id="11-float8"),
    pytest.param(tensors(2, S, 2, 0), ValueError, ["q", f"(2, {S}, 2, 0)", "head_dim"], id="03-head-dim-0"),
    pytest.param(swapped(0, TURNED), ValueError, ["q", "stride 2", "1"], id="last-stride-of-q"),
    pytest.param(swapped(1, TURNED), ValueError, ["k", "stride 2", "1"], id="last-stride-of-k"),
    pytest.param(swapped(2, TURNED), ValueError, ["v", "stride 2", "1"], id="last-stride-of-v"),
    pytest.param(swapped(0, [[1.0]]), TypeError, ["q", "list", "Tensor"], id="list-as-q"),
    pytest.param(swapped(1, None), TypeError, ["k", "NoneType", "Tensor"], id="none-as-k"),
    pytest.param(swapped(2, tensors()[0].numpy()), TypeError, ["v", "ndarray", "Tensor"], id="numpy-as-v"),
]
ONE_BAD_OPTION = [
    pytest.param(dict(frames=5), ValueError, ["q", "25 tokens", "frames = 5"], id="frames-that-do-not-divide"),
    pytest.param(dict(frames=0), ValueError, ["frames = 0"], id="01-no-frames"),
    pytest.param(dict(frames=-4), ValueError, ["frames", "-4"], id="negative-frames"),
    pytest.param(dict(frames=4.0), (TypeError, ValueError), ["frames", "4.0", "integer"], id="float-frames"),
    pytest.param(dict(frames="4"), (TypeError, ValueError), ["frames", "'4'", "integer"], id="string-frames"),
    pytest.param(dict(cls="first"), ValueError, ["cls", "'first'", "per_group"], id="cls"),
    pytest.param(dict(cls=None), (TypeError, ValueError), ["cls", "None", "per_group"], id="cls-none"),
    pytest.param(dict(order="b (h w t)"), ValueError, ["order", "'b (h w t)'", "space_major"], id="order"),
    pytest.param(dict(backend="cudnn"), ValueError, ["backend", "'cudnn'", "auto", "reference"], id="backend"),
    pytest.param(dict(backend=None), (TypeError, ValueError), ["backend", "None", "auto"], id="backend-none"),
    pytest.param(dict(scale="big"), TypeError, ["scale", "str", "number"], id="20-scale-string"),
    pytest.param(dict(scale=torch.tensor(0.5)), TypeError, ["scale", "Tensor", "number"], id="20-scale-tensor"),
    pytest.param(dict(scale=True), TypeError, ["scale", "bool", "number"], id="20-scale-bool"),
    pytest.param(dict(scale=1j), TypeError, ["scale", "complex", "number"], id="20-scale-complex"),
    pytest.param(dict(scale=float("nan")), ValueError, ["scale", "nan", "finite"], id="20-scale-nan"),
    pytest.param(dict(scale=float("inf")), ValueError, ["scale", "inf", "finite"], id="20-scale-inf"),
]
WEIGHTS = [
    pytest.param(torch.ones(2), "per_group", ValueError, ["cls_weights", "(2,)", "(2, 4)"], id="rank"),
    pytest.param(torch.ones(2, 6), "per_group", ValueError, ["cls_weights", "(2, 6)", "(2, 4)"], id="groups"),
    pytest.param(torch.ones(1, 4), "per_group", ValueError, ["cls_weights", "(1, 4)", "(2, 4)"], id="batch"),
    pytest.param(torch.ones(2, 4).double(), "per_group", ValueError, ["cls_weights", "float64", "float32"], id="dtype"),
    pytest.param(torch.ones(2, 4).to("meta"), "per_group", ValueError, ["cls_weights", "meta", "cpu"], id="device"),
    pytest.param([1.0] * 4, "per_group", TypeError, ["cls_weights", "list", "Tensor"], id="list"),
    pytest.param(torch.ones(2, 4), "global", ValueError, ["cls_weights", "'global'", "per_group"], id="cls"),
]
functions = pytest.mark.parametrize("function", [time_attention, space_attention])


def expect(error, words, call, monkeypatch):
    """One error with all the words, and no backend was entered before it."""
    entered = []
    for name in available_backends():
        backend = registry.get(name)
        enter = lambda *a, name=name: entered.append(name)  # noqa: E731
        spy = replace(backend, forward=enter, backward=enter)
        monkeypatch.setitem(registry._BACKENDS, name, spy)
    registry.resolve.cache_clear()
    try:
        with pytest.raises(error) as caught:
            call()
    finally:
        monkeypatch.undo()
        registry.resolve.cache_clear()
    assert not entered
    for word in words:
        assert word in str(caught.value), str(caught.value)


@functions
@pytest.mark.parametrize("qkv, error, words", ONE_BAD_TENSOR)
def test_bad_tensor(function, qkv, error, words, monkeypatch):
    expect(error, words, lambda: function(*qkv, frames=FRAMES), monkeypatch)


@functions
@pytest.mark.parametrize("options, error, words", ONE_BAD_OPTION)
def test_bad_option(function, options, error, words, monkeypatch):
    expect(error, words, lambda: function(*tensors(), **{"frames": FRAMES, **options}), monkeypatch)


@pytest.mark.parametrize("weights, cls, error, words", WEIGHTS)
def test_bad_class_weights(weights, cls, error, words, monkeypatch):
    call = lambda: space_attention(*tensors(), frames=FRAMES, cls=cls, cls_weights=weights)  # noqa: E731
    expect(error, words, call, monkeypatch)


@pytest.mark.parametrize(
    "options, error, words",
    [
        pytest.param(dict(scheme="diagonal"), ValueError, ["scheme", "'diagonal'", "joint"], id="scheme"),
        pytest.param(dict(grid=(2, 3, 5)), ValueError, ["25", "31", "2 x 3 x 5"], id="tokens-unlike-grid"),
        pytest.param(dict(grid=(2, 3, 4), cls="none"), ValueError, ["25", "24"], id="a-class-row-too-many"),
        pytest.param(dict(grid=(6, 4)), (TypeError, ValueError), ["grid", "(6, 4)", "three"], id="two-sizes"),
        pytest.param(dict(grid=24), (TypeError, ValueError), ["grid", "24", "three"], id="grid-of-one-number"),
        pytest.param(dict(scheme="local"), ValueError, ["width", "3"], id="odd-width"),
        pytest.param(dict(scheme="global", grid=(3, 2, 4)), ValueError, ["height", "3"], id="odd-height"),
        pytest.param(dict(scheme=("t", "g", "g")), (TypeError, ValueError), ["scheme"], id="scheme-of-letters"),
    ],
)
def test_bad_grid(options, error, words, monkeypatch):
    options = {"grid": (2, 3, 4), "scheme": "space", "cls": "key", **options}
    expect(error, words, lambda: grid_attention(*tensors(), **options), monkeypatch)


def test_a_forced_backend_never_falls_back(fused, monkeypatch):
    backend = registry.get(fused)
    unwilling = replace(backend, why_not=lambda *a: "the library went missing")
    monkeypatch.setitem(registry._BACKENDS, fused, unwilling)
    registry.resolve.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=f"backend '{fused}' cannot run: the library went missing") as caught:
            time_attention(*(x.to(device_of(fused)) for x in tensors()), frames=FRAMES, backend=fused)
        assert "timesformer_kernels.info" in str(caught.value)
        q, k, v = make_qkv(2, S, 2, 8, device=device_of(fused))
        got = time_attention(q, k, v, frames=FRAMES)  # auto takes the next one
        torch.testing.assert_close(got, time_attention(q, k, v, frames=FRAMES, backend="reference"))
    finally:
        monkeypatch.undo()
        registry.resolve.cache_clear()


@functions
def test_options_are_keyword_only(function):
    with pytest.raises(TypeError):
        function(*tensors(), FRAMES)
    with pytest.raises(TypeError, match="heads"):
        function(*tensors(), frames=FRAMES, heads=2)
