# SPDX-License-Identifier: Apache-2.0
"""Time and space attention from the packed product of a model back into its layout: ours, SDPA, eager, a plain copy.

Group = scheme, shape, dtype and direction; rows = `peers.ROWS`. Each row is checked against float64 before it is timed.
"""

from functools import lru_cache

import peers
import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16)


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    shapes = peers.TINY if option("--tiny", False) else peers.QUICK + peers.FULL * option("--full", False)
    cases = [
        pytest.param(
            (scheme, shape, dtype), direction, row, id=f"{scheme}-{shape.name}-{str(dtype)[6:]}-{direction}-{row}"
        )
        for shape in shapes
        for scheme in peers.CLS
        for dtype in DTYPES
        for direction in peers.DIRECTIONS
        for row in peers.ROWS
    ]
    metafunc.parametrize("spec, direction, row", cases)


problem = lru_cache(maxsize=1)(peers.Problem)  # one at a time: the exact results of a long clip are large


def test_attention(compare, spec, direction, row):
    scheme, shape, dtype = spec
    task = problem(*spec)
    if reason := task.why_not(row):
        pytest.skip(f"{row}: {reason}")
    errors = task.row(row, direction).check()
    compare(
        row,
        lambda: {name: task.row(name, direction).call for name in task.names()},
        dtype=dtype,
        group=f"{scheme}-attention {shape.name} {str(dtype)[6:]} {direction}",
        grad=direction != "forward",
        seconds=6.0,
        info=dict(
            kind="attention",
            op=f"{scheme} attention",
            shape=str(shape),
            direction=direction,
            flops=0 if row == "copy" else task.flops(direction),
            bytes=task.nbytes(direction),
            max_err=errors["out"],
            max_err_grad=errors.get("dqkv"),
        ),
    )
