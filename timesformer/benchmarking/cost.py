# SPDX-License-Identifier: Apache-2.0
"""What a call costs beside time: memory, what it saves, whether it repeats bit by bit, how large it may get."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .problem import Problem, Task
from .timing import tensors

LOST = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")


def peak_bytes(call: Callable, device: str) -> int:
    """The most bytes that torch's allocator holds at once during a call that has run before, beyond what it held then.

    On a CPU from the trace of the profiler, not from the resident set: ru_maxrss never falls, so that the building of a
    model hides a forward, and pages that malloc keeps for reuse look free or taken as history has it. The trace repeats
    to the byte, includes the workspaces of our kernels (they are tensors), and leaves out what MKL and oneDNN take
    inside a product.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):  # stable: events of one instant stay in their order
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    if peak <= 0:
        raise RuntimeError("the profiler recorded no allocation")
    return peak


def saved_bytes(task: Task) -> int:
    """Bytes of memory that a forward keeps for its backward, beyond its operands and parameters.

    Whole storages, each counted once: a view keeps all that it looks into.
    """
    leaves, _ = task.leaves()
    known = {x.untyped_storage().data_ptr() for x in (*leaves, *task.known())}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        # Not x: a node whose result keeps the node would never be freed, and its graph would keep the parameters'
        # accumulators, whose stream (that of the call that made them) a capture on another stream may not touch.
        return x.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = task.run(*leaves)  # alive until the end: an address freed and used again would count once for two
    del out
    return sum(kept.values())


def is_deterministic(call: Callable, times: int = 2) -> bool:
    """The same bits from every call."""
    first = [x.clone() for x in tensors(call())]
    return all(all(torch.equal(x, y) for x, y in zip(first, tensors(call()), strict=True)) for _ in range(times - 1))


def costs(problem: Problem, row: str, direction: str) -> dict:
    """peak_bytes of a call, saved_bytes of its forward, deterministic; each where it means something.

    To be called under the grad mode of `direction`. The peak of a backward alone would hold its forward's.
    """
    call = problem.timed(row, direction)
    call()
    found = {}
    if direction != "backward":
        found["peak_bytes"] = peak_bytes(call, problem.device)
    if direction in ("backward", "forward+backward"):
        found["saved_bytes"] = saved_bytes(problem.task(row))
    if direction != "step":
        found["deterministic"] = is_deterministic(call)
    return found


def release(device: str) -> None:
    """Hand freed memory back, so that one row's leftovers are not another row's failure."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def device_lost(error: BaseException, device: str) -> bool:
    """True after an error from which a CUDA context does not recover: every later call of the process fails."""
    if device != "cuda":
        return False
    if any(text in str(error) for text in LOST):
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def largest(attempt: Callable[[int], object], device: str, most: int) -> tuple[int, str | None]:
    """(largest power of two for which attempt(batch) succeeds, 0 if none; why twice as much does not, None at `most`).

    Raises what ended the device, with the batch in `error.batch`.
    """
    best, batch = 0, 1
    while batch <= most:
        try:
            attempt(batch)
        except Exception as error:
            if device_lost(error, device):
                error.batch = batch
                raise
            reason = reason_of(error)
        else:
            reason = None
        release(device)  # after the handler: the error holds the frames, and they the tensors
        if reason is not None:
            return best, reason
        best, batch = batch, 2 * batch
    return best, None


def reason_of(error: BaseException) -> str:
    """The first line of an error that says something, and its type; at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
