# SPDX-License-Identifier: Apache-2.0
"""Where tokens live: views against einops strings, merging of axes, and every shape check at the door."""

import pytest
import torch
from einops import rearrange
from oracle import ORDERS, SCHEMES, every_case

from timesformer_kernels import grid

# Every scheme written once more as a whole einops string, to the groups and the members of each group.
PATTERNS = {
    ("time", "space_major"): "(h w t) -> (h w) t",
    ("time", "time_major"): "(t h w) -> (h w) t",
    ("space", "space_major"): "(h w t) -> t (h w)",
    ("space", "time_major"): "(t h w) -> t (h w)",
    ("joint", "space_major"): "(h w t) -> 1 (h w t)",
    ("joint", "time_major"): "(t h w) -> 1 (h w t)",
    ("height", "space_major"): "(h w t) -> (w t) h",
    ("height", "time_major"): "(t h w) -> (w t) h",
    ("width", "space_major"): "(h w t) -> (h t) w",
    ("width", "time_major"): "(t h w) -> (h t) w",
    ("local", "space_major"): "(gh h gw w t) -> (gh gw) (h w t)",
    ("local", "time_major"): "(t gh h gw w) -> (gh gw) (h w t)",
    ("global", "space_major"): "(h gh w gw t gt) -> (gh gw gt) (h w t)",
    ("global", "time_major"): "(t gt h gh w gw) -> (gh gw gt) (h w t)",
}
SPLIT = {"local": dict(gh=2, gw=2), "global": dict(gh=2, gw=2, gt=2)}


@pytest.mark.parametrize("size", [(2, 4, 6), (6, 4, 2), (4, 2, 8), (2, 2, 2)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_match_einops(scheme, order, size):
    view = grid.view(scheme, size, "none", order)
    parts = SPLIT.get(scheme, {})
    sizes = {axis: n // parts.get("g" + axis, 1) for axis, n in zip("hwt", size, strict=True)}
    expected = rearrange(torch.arange(size[0] * size[1] * size[2]), PATTERNS[scheme, order], **sizes, **parts)
    # The order inside a sequence is free (softmax does not mind); that of the groups is not (cls_weights).
    assert torch.equal(view.rows().sort(-1).values, expected.sort(-1).values)
    assert (view.num_groups, view.length) == tuple(expected.shape)


@pytest.mark.parametrize("case", every_case(), ids=str)
def test_each_patch_is_in_exactly_one_group(case):
    view = grid.view(case.scheme, case.grid, case.cls, case.order)
    first = int(case.cls != "none")
    assert view.rows().flatten().sort().values.tolist() == list(range(first, case.tokens))
    assert view.num_groups == case.groups
    assert hash(view) == hash(grid.view(case.scheme, case.grid, case.cls, case.order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", ["time", "space", "joint"])
def test_the_model_schemes_reach_a_kernel_as_one_axis_each(scheme, order):
    view = grid.view(scheme, (7, 5, 3), "exclude", order)
    assert len(view.groups) <= 1 and len(view.sequence) <= 1


@pytest.mark.parametrize("order", ORDERS)
def test_local_and_global_survive_flattening(order):
    for scheme in SCHEMES:
        view = grid.view(scheme, (4, 2, 6), "key", order)
        assert grid.View.from_flat(*view.flat(), view.cls) == view


def test_a_scheme_of_ones_own():
    """Three temporal thirds within each column: nothing in the table of names does this."""
    scheme = grid.Scheme(grid.ATTENDED, grid.GROUPED, grid.blocks(3))
    got = grid.view(scheme, (4, 2, 6), "none").rows().sort(-1).values
    assert torch.equal(got, rearrange(torch.arange(48), "(h w g t) -> (w g) (h t)", h=4, w=2, g=3).sort(-1).values)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        pytest.param(("diagonal", (2, 2, 2), "none"), ValueError, ["scheme", "'diagonal'", "time, space"], id="scheme"),
        pytest.param(("time", (2, 2, 2), "first"), ValueError, ["cls", "'first'", "per_group"], id="cls"),
        pytest.param(("time", (2, 2, 2), "none", "chw"), ValueError, ["order", "'chw'", "time_major"], id="order"),
        pytest.param(("time", (2, 2), "none"), TypeError, ["grid", "(2, 2)", "three"], id="two-sizes"),
        pytest.param(("time", (2, 2.0, 2), "none"), TypeError, ["grid", "2.0", "integers"], id="float-size"),
        pytest.param(("time", (2, -1, 2), "none"), TypeError, ["grid", "-1", "non-negative"], id="negative-size"),
        pytest.param(("local", (3, 2, 2), "none"), ValueError, ["height", "3", "2"], id="odd-height-local"),
        pytest.param(("global", (2, 2, 5), "none"), ValueError, ["time", "5", "2"], id="odd-frames-global"),
    ],
)
def test_bad_views_name_argument_got_and_expected(arguments, error, words):
    with pytest.raises(error) as caught:
        grid.view(*arguments)
    for word in words:
        assert word in str(caught.value)
