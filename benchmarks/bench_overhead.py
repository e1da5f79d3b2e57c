# SPDX-License-Identifier: Apache-2.0
"""Host cost of one call: a tensor so small that nothing but Python, dispatch and autograd is left.

Processor time of the calling thread, per call; backward of a CPU graph runs on that thread, too. The SDPA row is a
single call on operands that lie ready, as are ours.
"""

import time

import peers
import pytest
import torch

from timesformer.benchmarking import core, layouts, shapes
from timesformer.benchmarking.timing import CpuWatch
from timesformer_kernels import space_attention, time_attention

SHAPE = shapes.Shape("2x32", 2, 1, 2, heads=1, head_dim=8)
MODES = ("no grad", "grad forward", "grad forward+backward")
CALLS = {"no grad": 1000, "grad forward": 500, "grad forward+backward": 300}
ROWS = ("cpp", "reference", "sdpa-no-copies")

PUBLIC = {"time": time_attention, "space": space_attention}


def calls(task, mode):
    """{row: one call}; what is timed with grad builds the graph and, in the last mode, runs it backwards."""
    backward = mode.endswith("backward")
    out = {}
    for name in (row for row in ROWS if not task.why_not(row)):
        if name == "sdpa-no-copies":
            operands = [x.contiguous() for x in layouts.Grouped().arrange(task.packed, task.scheme, SHAPE)]
            attend, options = torch.nn.functional.scaled_dot_product_attention, {}
        else:
            operands = task.packed.unbind(2)
            attend, options = PUBLIC[task.scheme], {"frames": SHAPE.frames, "backend": name}
        leaves = [x.detach().requires_grad_(mode != "no grad") for x in operands]
        out[name] = one_call(attend, leaves, options, backward)
    return out


def one_call(attend, leaves, options, backward):
    q, k, v = leaves
    if not backward:
        return lambda: attend(q, k, v, **options)
    dout = torch.randn_like(attend(q, k, v, **options))
    return lambda: torch.autograd.grad(attend(q, k, v, **options), leaves, dout)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", PUBLIC)
def test_overhead(compare, scheme, mode, row):
    task = core.AttentionProblem(scheme, SHAPE, torch.float32, judge=peers.OracleJudge())
    if reason := task.why_not(row):
        pytest.skip(f"{row}: {reason}")
    errors = task.check(row, "forward+backward" if mode.endswith("backward") else "forward")
    compare(
        row,
        lambda: calls(task, mode),
        dtype=torch.float32,
        group=f"overhead {scheme}-attention float32 {mode}",
        grad=mode != "no grad",
        seconds=2.0,
        most=40,
        warmup=50,
        table_seconds=0.2,
        watch=CpuWatch(CALLS[mode], time.thread_time),
        info=dict(
            kind="overhead",
            op=f"overhead of {scheme} attention",
            shape=str(SHAPE),
            direction=mode,
            max_err=errors["out"],
            max_err_grad=errors.get("dqkv"),
        ),
    )
