# SPDX-License-Identifier: Apache-2.0
"""out, dq, dk and dv of every backend and instruction set against the float64 oracle, by the rule of oracle.py."""

from dataclasses import replace

import pytest
import torch
from oracle import (
    DTYPES,
    Case,
    check,
    device_of,
    every_case,
    interpreted,
    make_dout,
    make_qkv,
    others_serve,
    same,
    with_weights,
)

from timesformer_kernels import grid_attention, space_attention, time_attention

LENGTHS = [  # frames; sequences of time attention
    pytest.param(1, id="T1"),  # softmax of one
    pytest.param(2, id="T2"),
    pytest.param(3, id="T3"),
    pytest.param(4, id="T4"),
    pytest.param(5, id="T5"),  # a vector of four and a tail of one
    pytest.param(7, id="T7"),
    pytest.param(8, id="T8-the-paper"),
    pytest.param(12, id="T12"),
    pytest.param(16, id="T16-high-resolution"),
    pytest.param(17, id="T17"),  # one past every small-length kernel
    pytest.param(24, id="T24"),
    pytest.param(31, id="T31"),
    pytest.param(32, id="T32"),
    pytest.param(48, id="T48"),
    pytest.param(64, id="T64"),
    pytest.param(96, id="T96-long"),
    pytest.param(97, id="T97"),
]
PATCHES = [
    pytest.param((1, 1), id="N1"),  # the class row and one patch
    pytest.param((2, 2), id="N4"),
    pytest.param((3, 3), id="N9"),
    pytest.param((7, 7), id="N49"),
    pytest.param((14, 14), id="N196-224px"),  # 197 keys with the class row
]
HEAD_DIMS = [1, 7, 8, 16, 20, 24, 32, 40, 48, 63, 64, 65, 72, 80, 96, 128, 160, 257]  # 7, 63, 65, 257: no vector fits
KINDS = ["large-logits", "constant-rows", "one-hot", "near-overflow"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def run(case, engine):
    return lambda q, k, v: grid_attention(q, k, v, **case.options(backend=engine))


@dtypes
@pytest.mark.parametrize("frames", LENGTHS)
def test_time_lengths(engine, frames, dtype):
    case = Case("time", (1, 3, frames), "exclude")
    check(run(case, engine), *case.qkv(engine, 2, 2, 16, dtype, seed=frames), case)


@dtypes
@pytest.mark.parametrize("patches", PATCHES)
def test_space_lengths(engine, patches, dtype):
    case = Case("space", (*patches, 2), "per_group")
    check(run(case, engine), *case.qkv(engine, 1, 2, 16, dtype), case)


@dtypes
@pytest.mark.parametrize("patches", PATCHES)
def test_joint_lengths(engine, patches, dtype):
    case = Case("joint", (*patches, 3), "per_group")
    check(run(case, engine), *case.qkv(engine, 1, 1, 8, dtype), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_joint_attention_of_a_whole_clip(engine, dtype):
    # 1569 keys: many tiles and a tail of one. The interpreter would take minutes: 321 keys.
    case = Case("joint", (8, 8, 5) if interpreted(engine) else (14, 14, 8), "per_group")
    check(run(case, engine), *case.qkv(engine, 1, 1, 4, dtype), case)


@dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda d: f"D{d}")
def test_head_dims_time(engine, head_dim, dtype):
    case = Case("time", (1, 2, 8), "exclude")
    check(run(case, engine), *case.qkv(engine, 1, 2, head_dim, dtype), case)


@dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda d: f"D{d}")
def test_head_dims_space(engine, head_dim, dtype):
    case = Case("space", (3, 7, 2), "per_group")
    check(run(case, engine), *case.qkv(engine, 1, 2, head_dim, dtype), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_scheme_class_mode_and_order(engine, case, dtype):
    check(run(case, engine), *case.qkv(engine, 2, 2, 8, dtype), case)


@dtypes
@pytest.mark.parametrize("case", [c for c in every_case() if c.cls == "per_group"], ids=str)
def test_class_row_weights(engine, case, dtype):
    case = with_weights(case, batch=2).on(engine)
    check(run(case, engine), *case.qkv(engine, 2, 2, 8, dtype), case)


@dtypes
@pytest.mark.parametrize("cls", ["per_group", "global"])
@pytest.mark.parametrize("frames", [1, 5, 16], ids=lambda t: f"T{t}")  # one frame, odd, and a long sum over groups
def test_class_row_of_long_grids(engine, frames, cls, dtype):
    case = Case("space", (5, 5, frames), cls)
    check(run(case, engine), *case.qkv(engine, 2, 1, 16, dtype), case)


@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [
        Case("time", (3, 3, 8), "exclude"),
        Case("space", (5, 7, 2), "per_group"),
        Case("space", (3, 3, 3), "global", "time_major"),
        Case("time", (2, 1, 41), "key"),
    ],
    ids=str,
)
def test_hard_inputs(engine, case, kind, dtype):
    if kind == "near-overflow":  # an exact scale: else rounding decides between equal scores, elsewhere otherwise
        case = replace(case, scale=0.25)
    check(run(case, engine), *case.qkv(engine, 1, 2, 20, dtype, kind=kind), case)  # 16 equal terms sum without error


@pytest.mark.parametrize("scale", [0, 0.0, -0.25, 2, 1e-3], ids=lambda s: f"scale{s!r}")
@pytest.mark.parametrize("scheme, cls", [("time", "exclude"), ("space", "per_group"), ("space", "global")])
def test_scales(engine, scheme, cls, scale):
    case = Case(scheme, (3, 3, 5), cls, scale=scale)
    check(run(case, engine), *case.qkv(engine, 2, 2, 16), case)


LAYOUTS = {  # q, k, v with the same values and other strides: reads in place, never a copy
    "contiguous": lambda x: x.contiguous(),
    "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch-inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every-second-row": lambda x: torch.stack([x, x + 9], 2).flatten(1, 2)[:, ::2],
    "sliced-head-dim": lambda x: torch.cat([x + 9, x, x + 9], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "chunk-of-three": lambda x: torch.cat([x + 9, x, x + 9], 2).chunk(3, 2)[1],
    "flipped-rows": lambda x: x.flip(1).clone().flip(1),
    "odd-offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place_and_bitwise_equal(engine, layout, dtype):
    for case in (Case("time", (2, 3, 8), "exclude"), Case("space", (5, 4, 3), "per_group")):
        packed = case.qkv(engine, 2, 3, 32, dtype)
        moved = [LAYOUTS[layout](x) for x in packed]
        assert all(torch.equal(a, b) for a, b in zip(packed, moved, strict=True))
        a, b = (run(case, engine)(*x) for x in (packed, moved))
        assert others_serve(engine, moved) or same(engine, a, b)
        assert a.is_contiguous() and b.is_contiguous()
        if interpreted(engine):  # slow: gradients of one case only
            case = Case("time", (1, 2, 8), "exclude")
            moved = [LAYOUTS[layout](x) for x in case.qkv(engine, 2, 2, 32, dtype)]
        check(run(case, engine), *moved, case)


def test_each_of_q_k_v_has_its_own_strides(engine):
    case = Case("space", (3, 5, 4), "global")
    q, k, v = case.qkv(engine, 2, 2, 24)
    check(run(case, engine), LAYOUTS["heads-first"](q), LAYOUTS["every-second-row"](k), v.contiguous(), case)


def test_public_functions_are_the_grid_operator(engine):
    q, k, v = make_qkv(2, 1 + 6 * 4, 2, 16, device=device_of(engine))
    for order in ("space_major", "time_major"):
        for function, scheme, cls in ((time_attention, "time", "exclude"), (space_attention, "space", "per_group")):
            case = Case(scheme, (2, 3, 4), cls, order)  # the defaults of cls are under test: not passed on
            got = function(q, k, v, frames=4, order=order, backend=engine)
            assert same(engine, got, run(case, engine)(q, k, v))
            check(lambda *x, f=function, o=order: f(*x, frames=4, order=o, backend=engine), q, k, v, case)


def test_space_attention_takes_class_weights(engine):
    case = with_weights(Case("space", (2, 3, 4), "per_group"), 2).on(engine)
    function = lambda *x: space_attention(*x, frames=4, backend=engine, cls_weights=case.weights)  # noqa: E731
    check(function, *case.qkv(engine, 2, 2, 16), case)


def test_gradients_of_other_layouts(engine):
    """The incoming gradient is normalised once, whatever its strides."""
    case = Case("space", (3, 3, 4), "per_group")
    q, k, v = case.qkv(engine, 2, 2, 16)
    for layout in LAYOUTS.values():
        check(run(case, engine), q, k, v, case, dout=layout(make_dout(q)))
    one = torch.ones((), device=q.device).expand(q.shape)  # y.sum().backward(): every stride is zero
    check(run(case, engine), q, k, v, case, dout=one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_stores_round_to_nearest_even(engine, dtype):
    """The mean of two values is exact in float32: a store that truncates is within the error bound, but not this."""
    if interpreted(engine) and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16; a GPU rounds")
    case = Case("time", (5, 7, 2), "none", scale=0.0)
    q, k, v = case.qkv(engine, 1, 2, 21, dtype)
    # Neighbours of one exponent have a mean of one bit more: every second one is a tie.
    pairs = v.float().unflatten(1, (35, 2))
    mean = pairs.mean(2, keepdim=True).expand_as(pairs).flatten(1, 2).to(dtype)
    assert torch.equal(run(case, engine)(q, k, v), mean)
