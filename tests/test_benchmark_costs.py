# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measures beside time: saved bytes, peak memory, determinism, floors, the largest batch."""

import pytest
import torch

from timesformer.benchmarking import cost, machine, shapes
from timesformer.benchmarking.half_block import HalfBlockProblem
from timesformer.benchmarking.problem import Task


def test_saved_bytes_are_whole_storages_beyond_the_operands():
    x = torch.randn(10, 100)
    assert cost.saved_bytes(Task(lambda x: x * x, (x,), x)) == 0  # its operand
    assert cost.saved_bytes(Task(lambda x: x.exp(), (x,), x)) == x.nbytes  # its result
    assert cost.saved_bytes(Task(lambda x: (2 * x)[:1].exp(), (x,), x[:1])) == x[:1].nbytes
    assert cost.saved_bytes(Task(lambda x: (2 * x)[:1] ** 2, (x,), x[:1])) == x.nbytes  # a view keeps its base


def test_peak_and_determinism():
    x = torch.randn(1000)
    assert cost.peak_bytes(lambda: (x + 1) + (x + 2), "cpu") == 3 * x.nbytes
    assert cost.is_deterministic(lambda: x + 1) and not cost.is_deterministic(lambda: torch.randn(8))


def test_shares_are_of_the_longer_floor():
    rates = {"peak_copy_GBps": 1000.0, "peak_matmul_GFLOPps": 1e6}
    found = machine.shares(0.02, flops=10**9, nbytes=10**7, rates=rates)
    assert found["floor_ms"] == pytest.approx(0.01) and found["floor_share"] == pytest.approx(0.5)
    assert found["matmul_share"] == pytest.approx(0.05)
    assert machine.shares(1.0, None, None, rates)["floor_ms"] is None


def test_nothing_of_a_measured_row_is_left_behind():
    """A graph that lives on holds its activations, and accumulators that tie a capture to the stream of this call."""
    problem = HalfBlockProblem(shapes.TINY, torch.float32)
    parameters = list(problem.module.parameters())
    row = problem.rows()[0]

    def marked():
        nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in parameters]
        return ["measured" in node.metadata for node in nodes]

    def mark(out):
        for p in parameters:
            torch.autograd.graph.get_gradient_edge(p).node.metadata["measured"] = True
        return out

    with torch.enable_grad():
        task = problem.task(row)
        problem._tasks[row] = Task(lambda x: mark(task.run(x)), task.operands, task.dout, task.parameters)
        held = problem._tasks[row].run(problem.x)
        assert all(marked())  # the mark is seen while a graph lives
        del held
        assert not any(marked())
        found = cost.costs(problem, row, "forward+backward")
        assert found["saved_bytes"] > 0 and not any(marked())


def test_the_largest_batch():
    def attempt(n):
        if n > 20:
            raise RuntimeError("out of memory\nat length")

    assert cost.largest(attempt, "cpu", 64) == (16, "RuntimeError: out of memory")
    assert cost.largest(attempt, "cpu", 16) == (16, None)
