# SPDX-License-Identifier: Apache-2.0
"""How a call is timed: rows take turns, A/B/A/B, on cold or on warm caches, by CUDA events or the processor's clock.

Cold: on a GPU a buffer larger than its L2 cache is written and another one read before every call, so that the call
finds neither its operands nor lines that have yet to be written back; on a CPU the caches hold what the other rows of
the round left behind. Warm: the same call just ran.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLUSHED = 256 * 2**20  # bytes written, and read, to empty an L2 cache; more where the cache is more than half of it


@dataclass(frozen=True)
class Timed:
    """run(*setup()) is one call; `run` alone is timed.

    again: as run, but its operands can be used again; None where run spends none.
    """

    run: Callable
    setup: Callable[[], tuple] = tuple
    again: Callable | None = None

    def __call__(self):
        return self.run(*self.setup())


class CpuWatch:
    """Processor clock. number: calls per sample, for calls shorter than the clock can tell."""

    def __init__(self, number: int = 1, timer: Callable[[], float] = time.perf_counter):
        self.number, self.timer = number, timer

    def sample(self, call: Callable, cold: bool) -> Callable[[], float]:
        """One sample; the result gives seconds per call once `sync` was called."""
        if not cold:
            call()
        run, setup = (call.run, call.setup) if isinstance(call, Timed) else (call, tuple)
        operands, repeat = setup(), range(self.number)
        start = self.timer()
        for _ in repeat:
            run(*operands)
        seconds = (self.timer() - start) / self.number
        return lambda: seconds

    def sync(self) -> None:
        """Nothing is pending on a CPU."""


class CudaWatch:
    """CUDA events around each call. Samples of a round are enqueued without waiting for one another."""

    def __init__(self, device: torch.device | str = "cuda"):
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        size = max(2 * l2, FLUSHED) // 4
        self.written, self.read = (torch.zeros(size, dtype=torch.int32, device=device) for _ in range(2))

    def sample(self, call: Callable, cold: bool) -> Callable[[], float]:
        run, setup = (call.run, call.setup) if isinstance(call, Timed) else (call, tuple)
        if not cold:
            run(*setup())
        operands = setup()
        if cold:
            self.written.fill_(1)
            self.read.amax()  # evicts the lines just written: their way to memory must not fall into the window
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(*operands)
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def sync(self) -> None:
        torch.cuda.synchronize()


def watch_of(device: str):
    return CudaWatch() if device == "cuda" else CpuWatch()


def interleave(
    candidates: dict[str, Callable],
    *,
    seconds: float,
    watch: CpuWatch | CudaWatch | None = None,
    cold: bool = True,
    warmup: int = 3,
    least: int = 5,
    most: int = 60,
) -> dict[str, list[float]]:
    """Seconds per call of every candidate, a `Timed` or a plain callable, one sample per round.

    Rounds fill the budget of `seconds` as far as `least` and `most` allow. The order within a round is shuffled, so
    that no row always inherits the caches, or the temperature, of the same neighbour.
    """
    watch = watch or CpuWatch()
    order, shuffle = list(candidates), random.Random(0).shuffle
    for call in candidates.values():
        for _ in range(warmup):
            call()
    watch.sync()
    samples = {name: [] for name in order}
    rounds, done = least, 0
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        while done < rounds:
            shuffle(order)
            pending = [(name, watch.sample(candidates[name], cold)) for name in order]
            watch.sync()
            for name, result in pending:
                samples[name].append(result())
            done += 1
            if done == 1:
                rounds = min(max(int(seconds / max(time.perf_counter() - start, 1e-9)), least), most)
    finally:
        if enabled:
            gc.enable()
    return samples


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantiles and the least, in milliseconds."""
    ordered = sorted(times)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
    return {
        "median_ms": statistics.median(times) * 1e3,
        "q20_ms": at[0] * 1e3,
        "q80_ms": at[1] * 1e3,
        "min_ms": ordered[0] * 1e3,
        "rounds": len(times),
    }


def noise(once: list[float], again: list[float]) -> float:
    """By how much two measurements of the same row differ: 0.02 is 2 %. No difference between rows below it counts."""
    a, b = statistics.median(once), statistics.median(again)
    return abs(a - b) / min(a, b)


def capture(call: Callable):
    """(graph, outputs): `call` as a CUDA graph, and the tensors that each replay fills.

    What a `Timed` sets up is done once and stays outside. A backward runs on the stream of its forward, which therefore
    is that of the capture. Raises what the call itself raised first.
    """
    run, setup = (call.again or call.run, call.setup) if isinstance(call, Timed) else (call, tuple)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        operands = setup()
        for _ in range(3):  # the allocator, cuBLAS workspaces and run-time compilation come before the capture
            run(*operands)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, first = torch.cuda.CUDAGraph(), None
    try:
        with torch.cuda.graph(graph, stream=side):
            try:
                outputs = run(*operands)
            except Exception as error:
                first = error
                raise
    except Exception as last:  # the end of a spoilt capture has an error of its own, which says nothing of the cause
        if first is None:
            raise
        raise first from last
    graph.operands = operands  # replays read them
    return graph, tensors(outputs)


def replay_error(graph, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest relative L2 difference between a replay into poisoned outputs and `expected`, results of a plain call.

    A kernel that escaped the capture leaves the poison: NaN.
    """
    for x in outputs:
        x.fill_(float("nan"))
    graph.replay()
    return max(relative(x, y) for x, y in zip(outputs, expected, strict=True))


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in L2, NaN where either has one."""
    norm = expected.double().norm()
    return ((got.double() - expected.double()).norm() / torch.where(norm > 0, norm, torch.ones_like(norm))).item()


def tensors(outputs) -> tuple[Tensor, ...]:
    """None, one tensor, or a tuple of them, as a tuple."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return tuple(x for x in outputs if isinstance(x, Tensor))
