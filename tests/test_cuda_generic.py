# SPDX-License-Identifier: Apache-2.0
"""The plain CUDA kernels, executed on the CPU: rows read 16 bytes at a time and one element at a time."""

import pytest
import torch
from cuda_sim import checked, dtypes, run
from oracle import Case, make_dout, make_qkv, with_gradients

CASES = [Case("time", (1, 3, 8), "exclude"), Case("space", (5, 7, 2), "per_group"), Case("space", (5, 7, 2), "global")]


def odd(x):
    """The same values in rows that start anywhere."""
    return torch.cat([x, x[..., :1]], -1)[..., :-1]


@dtypes
@pytest.mark.parametrize("head_dim", [8, 24, 40, 72, 136, 256])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ways_of_reading_agree_to_the_last_bit(simt, case, head_dim, dtype):
    inputs = (
        *make_qkv(2, case.tokens, 2, head_dim, dtype),
        make_dout(torch.empty(2, case.tokens, 2, head_dim).to(dtype)),
    )
    wide, narrow = with_gradients(run(case), *inputs), with_gradients(run(case), *map(odd, inputs))
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


@dtypes
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_tensor_of_odd_rows(simt, case, which, dtype):
    inputs = [*make_qkv(2, case.tokens, 2, 40, dtype)]
    inputs.append(make_dout(inputs[0]))
    inputs[which] = odd(inputs[which])
    q, k, v, dout = inputs
    checked(simt, case, q, k, v, "generic", dout=dout)


@pytest.mark.parametrize("cls", ["exclude", "key", "per_group", "global"])
@pytest.mark.parametrize("scheme, grid", [("time", (2, 3, 8)), ("space", (14, 14, 1))])
def test_float32_at_the_sizes_of_a_model(simt, scheme, grid, cls):
    case = Case(scheme, grid, cls)
    checked(simt, case, *make_qkv(1, case.tokens, 2, 64, torch.float32), "generic")


@pytest.mark.parametrize("size", [1e4, 1e5])
@pytest.mark.parametrize("scheme, cls", [("time", "exclude"), ("space", "per_group"), ("space", "global")])
def test_a_score_is_the_same_number_in_both_directions(simt, scheme, cls, size):
    """At scores of 1e5 the rounding of one is a hundredth of a probability; here one key has all the weight."""
    case = Case(scheme, (2, 3, 5), cls)
    q, k, v = make_qkv(2, case.tokens, 2, 8, torch.float32)
    checked(simt, case, q, k * size, v, "generic")
