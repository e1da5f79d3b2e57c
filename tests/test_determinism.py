# SPDX-License-Identifier: Apache-2.0
"""Bitwise equal results, forward and backward, over repeats and over thread counts, without any flag."""

import pytest
import torch
from oracle import SCHEMES, Case, interpreted, make_dout, with_gradients, with_weights

from timesformer_kernels import grid_attention

# Large enough for the work to be split between threads: below some 10^6 products the library stays on one.
CASES = [
    *(Case(scheme, (6, 4, 8), "per_group") for scheme in SCHEMES),
    Case("time", (6, 4, 8), "exclude"),
    Case("space", (6, 4, 8), "key", "time_major"),
    Case("space", (6, 4, 8), "global"),
    with_weights(Case("space", (6, 4, 8), "per_group"), 2),
]
IDS = [f"{case}{'-weights' if case.weights is not None else ''}" for case in CASES]


def results(case, backend, dtype):
    # The interpreter runs one program after the other: nothing races, and the full size would take many minutes.
    batch, heads, head_dim = (2, 1, 16) if interpreted(backend) else (2, 4, 64)
    q, k, v, case = *case.qkv(backend, batch, heads, head_dim, dtype), case.on(backend)
    return with_gradients(lambda *x: grid_attention(*x, **case.options(backend=backend)), q, k, v, make_dout(q))


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def differences(case, backend, dtype, first, what):
    for name, a, b in zip(("out", "dq", "dk", "dv"), first, results(case, backend, dtype), strict=True):
        assert torch.equal(a, b), f"{name} differs: {what}"


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
cases = pytest.mark.parametrize("case", CASES, ids=IDS)


@dtypes
@cases
def test_bitwise_equal_over_repeats(fused, case, dtype):
    first = results(case, fused, dtype)
    for repeat in range(1, 2 if interpreted(fused) else 31):
        differences(case, fused, dtype, first, f"repeat {repeat}")


@dtypes
@cases
def test_bitwise_equal_over_thread_counts(isa, case, dtype, threads):
    threads(1)
    first = results(case, "cpp", dtype)
    for count in (2, 1, 3, 2):
        threads(count)
        differences(case, "cpp", dtype, first, f"{count} threads, {isa}")
