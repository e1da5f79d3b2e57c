# SPDX-License-Identifier: Apache-2.0
"""Options, facts about the machine, and `compare`: rows of one group are timed in turn, A/B/A/B.

A machine that slows down for a second then slows every row alike, so that ratios hold on a busy one. pytest-benchmark's
own table times one row after the other; the figures of record are the medians of the interleaved rounds in extra_info.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import statistics
from functools import lru_cache, partial
from pathlib import Path

import peers
import pytest
import torch

from timesformer.benchmarking.cost import costs, reason_of
from timesformer.benchmarking.machine import Ceilings, shares
from timesformer.benchmarking.machine import facts as facts_of
from timesformer.benchmarking.run import AGAIN
from timesformer.benchmarking.timing import Timed, interleave, noise, summary, watch_of

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which measures memory, is chatty


def pytest_addoption(parser):
    group = parser.getgroup("timesformer benchmarks")
    group.addoption("--full", action="store_true", help="all shapes, peers and directions, and a training step")
    group.addoption("--train", action="store_true", help="a training step, too: some minutes")
    group.addoption("--tiny", action="store_true", help="tiny shapes only: tests the benchmarks, measures nothing")
    group.addoption("--threads", type=int, default=1, help="threads of torch and of the kernels (default: 1)")


def pytest_configure(config):
    threads = config.getoption("--threads", 1)
    if threads < 1:
        raise pytest.UsageError(f"--threads: got {threads}, expected at least 1")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # the file is published; the name of the host is nobody's business
    machine_info["command"] = command(config.invocation_params.args)


def command(args) -> str:
    """The command line, absolute paths shortened to their last part."""
    parts = []
    for arg in args:
        option, equals, value = str(arg).rpartition("=")
        parts.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return shlex.join(["pytest", *parts])


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    """The number of threads, set for the session and restored after it."""
    before, count = torch.get_num_threads(), request.config.getoption("--threads", 1)
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def allocator():
    """Let malloc keep what is freed, for every row alike, as torch's CUDA allocator does.

    By default glibc hands large blocks back to the kernel, and a fresh 5 MB output then costs a millisecond of page
    faults, or not, by what the rows before it have freed: more than the attention that is to be timed.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = bool(mallopt and mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))
    return "keeps freed memory" if kept else "default"


@pytest.fixture(scope="session")
def machine(request, threads, allocator):
    """machine(dtype, device) -> what every row records: device, versions, and the rates of a copy and of a product."""
    small = request.config.getoption("--tiny", False)
    facts, ceilings = lru_cache(facts_of), lru_cache(partial(Ceilings, small=small))

    def record(dtype, device="cpu"):
        return {**facts(device), "threads": threads, "allocator": allocator, **ceilings(device).rates(dtype)}

    return record


@pytest.fixture(scope="session")
def measured():
    """{group: {row: seconds per call}}: the first row of a group that runs times them all."""
    return {}


@pytest.fixture
def compare(benchmark, request, measured):
    """compare(row, candidates, dtype=, group=, grad=, info=, ...) times a group once and reports one of its rows.

    candidates() -> {row: callable or Timed}, called only where it is needed. Further options go to `interleave`.
    Returns the interleaved medians of the group in seconds, or None under --benchmark-disable, where the row is called
    once. The first row is timed twice in every round, as if it were another: their difference is the noise.
    """

    def run(row, candidates, *, dtype, group, grad, info, device="cpu", table_seconds=0.3, watch=None, **options):
        benchmark.group = group
        tiny = request.config.getoption("--tiny", False)
        watch = watch or watch_of(device)
        with torch.set_grad_enabled(grad):
            calls = candidates()
            if row not in calls:
                pytest.skip(f"{row}: fails when it is timed")
            if benchmark.disabled:
                benchmark.pedantic(calls[row])
                return None
            if group not in measured:
                if tiny:
                    options.update(seconds=0.0, warmup=1, least=2)
                first = next(iter(calls))
                measured[group] = first, interleave({**calls, AGAIN: calls[first]}, watch=watch, **options)
            first, samples = measured[group]
            medians = {name: statistics.median(times) for name, times in samples.items()}
            number = getattr(watch, "number", 1)
            rounds = 1 if tiny else min(max(int(table_seconds / (medians[row] * number)), 1), 20)
            warm = dict(rounds=rounds, iterations=number, warmup_rounds=int(table_seconds > 0))
            benchmark.pedantic(*synchronised(calls[row], watch), **warm)
        times = {f"interleaved_{name}": value for name, value in summary(samples[row]).items()}
        facts = request.getfixturevalue("machine")(dtype, device)
        rates = {name: value for name, value in facts.items() if name.startswith("peak_")}
        benchmark.extra_info.update(
            **facts,
            **times,
            **shares(medians[row] * 1e3, info.get("flops"), info.get("bytes"), rates),
            row=row,
            dtype=str(dtype).removeprefix("torch."),
            noise=noise(samples[first], samples[AGAIN]),
            **info,
        )
        return medians

    return run


def synchronised(call, watch):
    """(callable, arguments of `pedantic`) that ends when the device is done; what a `Timed` sets up is not timed."""
    if not isinstance(call, Timed):
        return (call,)

    def run(*operands):
        call.run(*operands)
        watch.sync()

    return (run,) if call.setup is tuple else (run, (), None, lambda: (call.setup(), {}))


@pytest.fixture
def measure(request, benchmark, compare, measured):
    """measure(problem, row, direction, ...): the gate, what the row costs, and its time beside the other rows'.

    A row of ours that fails is an error; a peer that cannot run here is a skip that says why. Options go to `compare`.
    """

    def run(problem, row, direction, **options):
        grad, group = direction != "forward", problem.group(direction)
        if reason := problem.why_not(row):
            pytest.skip(f"{row}: {reason}")
        with torch.set_grad_enabled(grad):
            try:
                errors = problem.check(row, direction)
            except AssertionError:
                raise  # it runs, and is wrong
            except Exception as error:
                if row in problem.ours:
                    raise
                pytest.skip(f"{row}: {reason_of(error)}")
            gradients = [error for name, error in errors.items() if name != "out"]
            info = dict(kind=problem.kind, op=problem.op, shape=str(problem.shape), direction=direction)
            info.update(flops=problem.flops(row, direction), bytes=problem.nbytes(row, direction))
            info.update(max_err=errors["out"], max_err_grad=max(gradients, default=None), **problem.facts(row))
            info.update(frames=problem.shape.frames, locations=problem.shape.locations, batch=problem.shape.batch)
            if not benchmark.disabled and row not in ("copy", "products"):
                info.update(costs(problem, row, direction))

        def candidates():
            if group in measured and row in measured[group][1]:  # timed with the others: not all of them once more
                return {row: problem.timed(row, direction)}
            every = problem.rows(peers.all_rows(request.config, problem.shape))
            return usable(problem, direction, [row] if benchmark.disabled else every)

        return compare(
            row,
            candidates,
            dtype=problem.dtype,
            device=problem.device,
            group=group,
            grad=grad,
            info=info,
            **options,
        )

    return run


def usable(problem, direction, rows) -> dict[str, Timed]:
    """Those of the rows that run; one that does not says so in its own test."""
    calls = {}
    for row in rows:
        if problem.why_not(row) is None:
            try:
                call = problem.timed(row, direction)
                call()
            except Exception:
                if row in problem.ours:
                    raise
                continue
            calls[row] = call
    return calls
