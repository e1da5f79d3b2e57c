# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels at the borders of their regimes: every length bucket, tile, alignment and head dimension.

The tests over all backends run them too, on small shapes. These know how the kernels are cut up.
"""

import math

import pytest
import torch
from arena import REAL
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    CLASS_MODES,
    Case,
    attention,
    check,
    device_of,
    interpreted,
    make_dout,
    make_qkv,
    with_gradients,
    with_weights,
)

from timesformer_kernels import grid, grid_attention, grid_attention_qkvpacked
from timesformer_kernels.backends.triton import regimes

pytest.importorskip("triton")
DEVICE = device_of("triton")
HALF = torch.float16


@pytest.fixture(autouse=True)
def runs(need):
    need("triton", HALF, 16)


@pytest.fixture
def host():
    """The module that plans and launches, with nothing kept from other tests."""
    from timesformer_kernels.backends.triton import attention as host

    for kept in (host._forward_plan, host._backward_plan):
        kept.cache_clear()
    yield host
    for kept in (host._forward_plan, host._backward_plan):
        kept.cache_clear()


def run(case, **options):
    return lambda q, k, v: grid_attention(q, k, v, **case.options(backend="triton", **options))


def inputs(case, batch=1, heads=1, head_dim=16, dtype=HALF, **more):
    return make_qkv(batch, case.tokens, heads, head_dim, dtype, device=DEVICE, **more)


def space(members, cls, groups=2):
    """Sequences of that many members, the class row counted."""
    return Case("space", (members - (cls in ("per_group", "key", "global")), 1, groups), cls)


# --- regimes ---------------------------------------------------------------------------------------------------------

# Both sides of every border in configs.json and regimes.LONGEST, and the lengths of TimeSformer.
LENGTHS = (2, 3, 8, 9, 10, 11, 16, 17, 31, 32, 33, 50, 64, 65, 96, 97, 128, 129, 160, 161, 197, 208, 209, 257)


@pytest.mark.parametrize("members", LENGTHS)
def test_every_length_bucket(members):
    case = space(members, CLASS_MODES[members % 5], groups=3 if members < 64 else 2)
    check(run(case), *inputs(case), case)


@pytest.mark.parametrize("cls", CLASS_MODES)
@pytest.mark.parametrize("members", [7, 24, 70, 140, 230], ids=["packed", "one", "alone", "saved", "streaming"])
def test_every_class_mode_in_every_regime(members, cls):
    case = space(members, cls)
    check(run(case), *inputs(case), case)


@pytest.mark.parametrize("members", [7, 140, 230], ids=["packed", "saved", "streaming"])
def test_class_weights_in_every_regime(members):
    case = with_weights(space(members, "per_group"), 2)
    case = Case(**{**vars(case), "weights": case.weights.to(DEVICE)})
    check(run(case), *inputs(case, batch=2), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("members", [5, 40, 140, 230])
def test_every_dtype_in_every_regime(members, dtype):
    case = space(members, "per_group", groups=1)
    check(run(case), *inputs(case, dtype=dtype), case)


@pytest.mark.parametrize("scheme", ["local", "global"])
@pytest.mark.parametrize("size", [(4, 6, 2), (6, 8, 12), (8, 10, 22)], ids=["packed", "alone", "streaming"])
def test_views_of_several_axes(scheme, size):
    case = Case(scheme, size, "key")
    check(run(case), *inputs(case), case)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0), (7, 5), (13, 0), None])
@pytest.mark.parametrize("members", [10, 96, 197, 230])
def test_tiles_of_every_architecture(members, capability, host, monkeypatch):
    monkeypatch.setattr(host, "capability", lambda device: capability)
    case = space(members, "per_group", groups=1)
    check(run(case), *inputs(case), case)


@pytest.mark.parametrize("head_dim", [1, 7, 16, 20, 33, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("members", [5, 40, 140], ids=["packed", "alone", "saved or streaming"])
def test_head_dims(members, head_dim):
    case = space(members, "per_group", groups=1)
    check(run(case), *inputs(case, head_dim=head_dim), case)


@pytest.mark.parametrize("cls", ["per_group", "key", "global"])
def test_more_groups_than_the_class_row_is_summed_over_at_a_time(cls):
    case = Case("time", (37, 1, 3), cls)
    check(run(case), *inputs(case, batch=2, heads=2), case)


def test_class_row_alone_in_many_groups():
    case = Case("space", (0, 1, 3), "global")
    check(run(case), *inputs(case), case)


@pytest.mark.parametrize("members", [9, 140, 230])
@pytest.mark.parametrize("kind", ["large-logits", "constant-rows", "one-hot"])
def test_hostile_values(members, kind):
    case = space(members, "per_group", groups=1)
    check(run(case), *inputs(case, dtype=torch.float32, kind=kind), case)


@pytest.mark.parametrize("members", [9, 140, 230])
def test_rows_of_minus_infinity(members):
    """A key at -inf for every query counts nothing, in whatever block it lies; all keys so is NaN, as in torch."""
    case = space(members, "none", groups=2)
    q, k, v = inputs(case, dtype=torch.float32)
    q[..., 0] = 1.0
    k[:, ::3, :, 0] = -math.inf
    q[:, :, :, 1:].zero_()
    got, expected = run(case)(q, k, v), attention(q, k, v, case)
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


# --- NaN and infinity stay where they belong -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("cls", ["none", "exclude"])
def test_what_is_not_finite_stays_in_its_sequence(cls, which, value):
    """Several sequences share a tile; only the one with the bad number may differ from a run without it."""
    case = Case("time", (7, 1, 5), cls)
    q, k, v = inputs(case, heads=2, dtype=torch.float32)
    dout = make_dout(q)
    clean = with_gradients(run(case), q, k, v, dout)
    first = case.cls != "none"
    row = first + 2 * 5 + 3
    {"q": q, "k": k, "v": v, "dout": dout}[which][0, row, 1, 2] = value
    spoiled = with_gradients(run(case), q, k, v, dout)
    exact = with_gradients(lambda *x: attention(*x, case), q, k, v, dout)
    own = torch.zeros(case.tokens, dtype=torch.bool, device=DEVICE)
    own[first + 10 : first + 15] = True
    for name, before, after, oracle in zip(("out", "dq", "dk", "dv"), clean, spoiled, exact, strict=True):
        # The tile is then done one sequence at a time: the same products in smaller sums.
        torch.testing.assert_close(after[:, ~own], before[:, ~own], atol=1e-6, rtol=1e-5, msg=f"{name}, others")
        torch.testing.assert_close(after[:, own, 0], before[:, own, 0], atol=1e-6, rtol=1e-5, msg=f"{name}, other head")
        if math.isnan(value):
            assert torch.equal(after.isnan(), oracle.isnan()), name


# --- memory ----------------------------------------------------------------------------------------------------------


def units(host, *tensors):
    view = grid.view("time", (3, 1, 4), "none")
    return host._unit(host._layout(view, tensors, False, False))


def test_alignment_is_asserted_and_the_slower_path_is_right(host):
    case = Case("time", (3, 1, 4), "none")
    q, k, v = (x.contiguous() for x in inputs(case, heads=2))
    assert units(host, q, k, v) == 8
    assert units(host, *(x.float() for x in (q, k, v))) == 4
    odd = REAL["empty"](q.numel() + 1, dtype=HALF, device=DEVICE)[1:].view(q.shape).copy_(q)  # 2 bytes off
    wide = REAL["empty"](*q.shape[:3], 20, dtype=HALF, device=DEVICE)[..., :16].copy_(q)  # rows of 40 bytes
    straight = run(case)(q, k, v)
    for other in (odd, wide):
        assert units(host, other, k, v) == units(host, q, k, other) == 1
        torch.testing.assert_close(run(case)(other, k, v), straight, atol=1e-3, rtol=1e-3)
        check(run(case), other, k, v, case)


def test_offsets_beyond_32_bits(host):
    """Token rows 2^29 elements apart: the last one lies past 2^31."""
    case = Case("joint", (5, 1, 1), "none")
    q, k, v = inputs(case)
    step = 2**29
    try:
        far = REAL["empty"](4 * step + 16, dtype=HALF, device=DEVICE).as_strided(q.shape, (0, step, 16, 1))
    except RuntimeError as error:  # untouched pages cost nothing, but a system may refuse to promise them
        pytest.skip(f"no room for a tensor of 4 GiB: {error}")
    far.copy_(q)
    layout = host._layout(grid.view("joint", (5, 1, 1), "none"), (far, k, v), False, False)
    assert host._base(layout).WIDE and not host._base(layout._replace(strides=layout.strides[1:] * 2)).WIDE
    assert torch.equal(run(case)(far, k, v), run(case)(q.contiguous(), k, v))


@pytest.mark.parametrize("members", [5, 140, 230])
def test_gradients_of_any_layout(members):
    """Packed gradients, three of one layout; and three that differ."""
    case = space(members, "per_group", groups=1)
    q, k, v = inputs(case)
    packed = torch.stack([q, k, v], 2).requires_grad_()
    dout = make_dout(q)
    options = case.options(backend="triton")
    (dqkv,) = torch.autograd.grad(grid_attention_qkvpacked(packed, **options), packed, dout)
    _, *separate = with_gradients(run(case), q, k, v, dout)
    assert all(torch.equal(a, b) for a, b in zip(dqkv.unbind(2), separate, strict=True))

    from timesformer_kernels.backends.triton import attention as host

    view = grid.view(case.scheme, case.grid, case.cls)
    n = regimes.stats_size(q.shape, HALF, view)
    stats = torch.empty(n, device=DEVICE) if n else None
    out = host.forward(q, k, v, view, 0.25, None, stats)
    mixed = (torch.empty_like(dqkv).unbind(2)[0], torch.empty(q.shape, dtype=HALF, device=DEVICE), dqkv.unbind(2)[2])
    got = host.backward(dout, q, k, v, view, 0.25, None, mixed, (out, stats) if n else None)
    assert all(a is b for a, b in zip(got, mixed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, separate, strict=True))


@pytest.mark.parametrize(
    ("members", "saved"), [(8, False), (96, False), (128, False), (129, True), (197, True), (785, True)]
)
def test_what_the_backward_keeps(members, saved):
    """Short sequences need neither output nor log-sum-exp; longer ones two floats per query, beside an output that the
    projection keeps anyway."""
    view = grid.view("time", (4, 1, members), "exclude")
    shape = (2, 1 + 4 * members, 3, 64)
    assert regimes.stats_size(shape, torch.bfloat16, view) == (2 * 2 * 4 * members * 3 if saved else 0)
    if members < 200:
        q, k, v = (x.requires_grad_() for x in inputs(Case("time", (4, 1, members), "exclude")))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x.detach(), lambda x: x):
            out = run(Case("time", (4, 1, members), "exclude"))(q, k, v)
        assert any(x.data_ptr() == out.data_ptr() for x in kept) is saved
        assert len(kept) == (5 if saved else 3)


@pytest.mark.parametrize("members", [7, 140, 230])
@pytest.mark.parametrize("cls", ["per_group", "global"])
def test_same_bits_at_every_run(members, cls):
    case = space(members, cls)
    q, k, v = inputs(case, batch=2)
    dout = make_dout(q)
    first, second = (with_gradients(run(case), q, k, v, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- plans -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 272), st.sampled_from([16, 32, 64, 128]))
def test_blocks_hold_a_sequence_without_waste(m, largest):
    sizes = regimes.blocks(m, largest)
    assert all(16 <= size <= largest and size & (size - 1) == 0 for size in sizes)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert m <= sum(sizes) < m + max(16, largest // 2)
    assert sum(size < largest for size in sizes) <= 2


def test_a_frame_at_224_pixels_is_not_padded_to_256():
    """197 members are 208 rows, in every kernel that holds them."""
    for arch in ("sm_8x", "sm_9x", "sm_10x", "sm_12x"):
        for kernel in ("resident_forward", "resident_backward"):
            chosen = regimes.config(kernel, arch, "ieee", 2, 64, 197)
            assert sum(regimes.blocks(197, chosen.block_n)) == 208


@pytest.mark.parametrize(("frames", "per_tile"), [(8, 2), (4, 4), (16, 1), (1, 16), (10, 3)])
def test_short_sequences_share_a_tile(host, frames, per_tile):
    """As many as a tile of the table holds: of 16 rows, or of what was fastest on the GPU at hand."""
    arch = regimes.architecture(host.capability(-1 if host.INTERPRETED else 0))
    chosen = regimes.config("resident_forward", arch, "ieee", HALF.itemsize, 64, frames)
    if chosen.block_m != max(16, 1 << (per_tile * frames - 1).bit_length()):
        per_tile = chosen.block_m // frames
    q, k, v = inputs(Case("time", (7, 1, frames), "none"), head_dim=64)
    layout = host._layout(grid.view("time", (7, 1, frames), "none"), (q, k, v), False, False)
    main, finish = host._forward_plan(layout)
    assert (main.plan.PACK, main.programs, finish) == (per_tile, -(-7 // per_tile), None)


def test_no_launch_dimension_but_the_first(host, monkeypatch):
    """80,000 sequences: stock kernels put them on an axis of the grid that ends at 65,535."""
    started = []
    monkeypatch.setattr(host.Step, "run", lambda step, *rest: started.append(step.programs))
    q, k, v = REAL["empty"](1, 80_000 * 8, 3, 1, 16, dtype=HALF, device=DEVICE).unbind(2)
    host.forward(q, k, v, grid.view("time", (80_000, 1, 8), "none"), 1.0, None)
    assert started == [40_000]


def test_table_has_a_row_for_everything():
    for arch, kernels in regimes.table()["configs"].items():
        for kernel, kinds in kernels.items():
            for kind, dims in kinds.items():
                for head_dim, rows in dims.items():
                    limits = [row[0] for row in rows]
                    assert limits == sorted(limits), (arch, kernel, kind)
                    if kernel.startswith("resident"):
                        direction, itemsize = kernel.split("_")[1], 2 if kind == "bits16" else 4
                        assert limits[-1] == regimes.LONGEST[direction][itemsize][int(head_dim)], (arch, kernel, kind)
    assert regimes.architecture((8, 9)) == "sm_8x" and regimes.architecture((9, 0)) == "sm_9x"
    assert regimes.architecture((10, 3)) == "sm_10x" and regimes.architecture((12, 1)) == "sm_12x"
    assert regimes.architecture(None) == regimes.architecture((7, 5)) == "sm_8x"


def test_tf32_only_where_torch_allows_it(host):
    from timesformer_kernels.backends.triton.launch import float32_precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert float32_precision() == expected
            q, k, v = inputs(Case("time", (2, 1, 4), "none"), dtype=torch.float32)
            layout = host._layout(grid.view("time", (2, 1, 4), "none"), (q, k, v), False, False)
            assert host._forward_plan(layout)[0].plan.PRECISION == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert float32_precision() == "ieee"


@pytest.mark.skipif(not interpreted("triton"), reason="the interpreter's trouble alone")
def test_bfloat16_is_widened_in_the_interpreter_alone(host):
    q, k, v = inputs(Case("time", (2, 1, 4), "none"), dtype=torch.bfloat16)
    layout = host._layout(grid.view("time", (2, 1, 4), "none"), (q, k, v), False, False)
    assert host._base(layout).UPCAST and not host._base(layout._replace(dtype=HALF)).UPCAST
