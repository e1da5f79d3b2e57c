# SPDX-License-Identifier: Apache-2.0
"""Options, facts about the machine, and `compare`: rows of one group are timed in turn, A/B/A/B.

A machine that slows down for a second then slows every row alike, so that ratios hold on a busy one. pytest-benchmark's
own table times one row after the other; the figures of record are the medians of the interleaved rounds in extra_info.
"""

from __future__ import annotations

import ctypes
import gc
import random
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from timesformer_kernels import native

MIB = 2**20


def pytest_addoption(parser):
    group = parser.getgroup("timesformer benchmarks")
    group.addoption("--full", action="store_true", help="more shapes, and a training step of the model")
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


def interleave(
    candidates: dict[str, Callable],
    *,
    seconds: float,
    warmup: int = 3,
    least: int = 5,
    most: int = 60,
    number: int = 1,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every candidate, one sample of `number` calls per round; each round calls all once.

    Rounds fill the budget of `seconds` as far as `least` and `most` allow. The order within
    a round is shuffled, so that no row always inherits the caches of the same neighbour. Caches hold what another row
    left behind; in the sequential table of pytest-benchmark they hold a row's own tensors, and short rows look faster.
    """
    order, shuffle = list(candidates), random.Random(0).shuffle

    def sample(call):
        repeat = range(number)
        start = timer()
        for _ in repeat:
            call()
        return (timer() - start) / number

    for call in candidates.values():
        for _ in range(warmup):
            call()
    samples = {name: [] for name in order}
    rounds = least
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        done = 0
        while done < rounds:
            shuffle(order)
            for name in order:
                samples[name].append(sample(candidates[name]))
            done += 1
            if done == 1:
                rounds = min(max(int(seconds / (time.perf_counter() - start)), least), most)
    finally:
        if enabled:
            gc.enable()
    return samples


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
def machine(threads, allocator):
    """machine(dtype) -> what every row records: device, versions, and rates that a plain copy and a product reach."""
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark; takes a second

    facts = {
        "device": "cpu",
        "chip": get_cpu_info().get("brand_raw", "unknown"),
        "isa": native.isa() if native.library()[0] else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": threads,
        "allocator": allocator,
    }
    rates = {}

    def best(call, seconds):
        return min(interleave({"it": call}, seconds=seconds)["it"])

    def record(dtype):
        if "copy" not in rates:
            source = torch.randn(256 * MIB // 4)
            target = torch.empty_like(source)
            rates["copy"] = 2 * source.nbytes / best(lambda: target.copy_(source), 1.0) / 1e9
        if dtype not in rates:
            a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
            rates[dtype] = 2 * 1024**3 / best(lambda: a @ b, 0.5) / 1e9
        return {**facts, "peak_copy_256MiB_GBps": rates["copy"], "peak_matmul_1024_GFLOPps": rates[dtype]}

    return record


@pytest.fixture(scope="session")
def measured():
    """{group: {row: seconds per call}}: the first row of a group that runs times them all."""
    return {}


@pytest.fixture
def compare(benchmark, request, measured):
    """compare(row, candidates, dtype=, group=, grad=, info=, ...) times a group once and reports one of its rows.

    candidates() -> {row: callable}, called only where it is needed. Further options go to `interleave`. Returns the
    interleaved medians of the group in seconds, or None under --benchmark-disable, where the row is called once.
    """

    def run(row, candidates, *, dtype, group, grad, info, table_seconds=0.3, number=1, **options):
        benchmark.group = group
        tiny = request.config.getoption("--tiny", False)
        with torch.set_grad_enabled(grad):
            calls = candidates()
            if benchmark.disabled:
                benchmark.pedantic(calls[row])
                return None
            if group not in measured:
                if tiny:
                    options.update(seconds=0.0, warmup=1, least=2)
                measured[group] = interleave(calls, number=number, **options)
            samples = measured[group]
            medians = {name: statistics.median(times) for name, times in samples.items()}
            rounds = 1 if tiny else min(max(int(table_seconds / (medians[row] * number)), 1), 20)
            benchmark.pedantic(calls[row], rounds=rounds, iterations=number, warmup_rounds=int(table_seconds > 0))
        benchmark.extra_info.update(
            request.getfixturevalue("machine")(dtype),
            row=row,
            dtype=str(dtype).removeprefix("torch."),
            interleaved_median_ms=medians[row] * 1e3,
            interleaved_min_ms=min(samples[row]) * 1e3,
            interleaved_rounds=len(samples[row]),
            **info,
        )
        return medians

    return run
