# SPDX-License-Identifier: Apache-2.0
"""From a call to a running kernel: the device's guard, its current stream, and what need not be asked twice."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from triton.compiler import CompiledKernel

INTERPRETED = bool(triton.knobs.runtime.interpret)
MAX_GRID = 2**31 - 1
MAX_BINARIES = 4096
_BINARIES: dict[tuple, CompiledKernel] = {}  # of `launch`, by all that a call says but where its tensors lie


@lru_cache(maxsize=64)
def capability(device: int) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for CPU tensors (-1) and other vendors."""
    if device < 0 or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def float32_precision() -> str:
    """ "tf32" where torch's own switch for products on the GPU allows it, else "ieee"."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
    return "tf32" if allowed else "ieee"


def launch(kernel, programs: int, like: torch.Tensor, args: tuple, options: dict) -> None:
    """Start `programs` programs of a kernel on the device of `like`, in that device's current stream.

    Triton launches on the current device, whatever device the tensors are on, and asks torch for its stream at every
    call. Nothing here waits for the device, allocates on it, or reads from it.
    """
    _on_device_of(like, _start, kernel, programs, args, options)


def _on_device_of(like: torch.Tensor, start, kernel, programs: int, *rest):
    if programs == 0:
        return None
    if programs > MAX_GRID:
        raise RuntimeError(f"{programs} blocks of work are more than a GPU takes in one launch ({MAX_GRID})")
    device = like.get_device()
    if device < 0 or device == torch.cuda.current_device():
        return start(kernel, programs, *rest)
    with torch.cuda.device(device):
        return start(kernel, programs, *rest)


def _start(kernel, programs: int, args: tuple, options: dict):
    """By triton's own way at the first call of a kind, then past its binder, as `Step` does.

    All that triton compiles for is in the key: types, alignments, and every number as it is, more than it looks at.
    """
    if INTERPRETED or torch.version.hip or _watched(kernel):
        return kernel[(programs,)](*args, **options)
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key = [kernel, device, *options.items()]
    for x in args:
        key.append((x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else (type(x), x))
    key = tuple(key)
    binary = _BINARIES.get(key)
    if binary is None:
        binary = kernel[(programs,)](*args, **options)
        if isinstance(binary, CompiledKernel):
            if len(_BINARIES) >= MAX_BINARIES:
                _BINARIES.clear()
            _BINARIES[key] = binary
        return binary
    stream = driver.get_current_stream(device)
    binary.run(programs, 1, 1, stream, binary.function, binary.packed_metadata, None, None, None, *args)
    return binary


def _watched(kernel) -> bool:
    """Whether someone is to be told of launches, or has asked for other code: triton's own way knows how to."""
    runtime = triton.knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", True)  # an empty chain is no hook
        or getattr(runtime.launch_exit_hook, "calls", True)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or triton.knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )


class Step:
    """One launch but for its tensors: all that is the same at every call over one layout.

    kernel: a @triton.jit function of tensors or None, `numbers`, floats, and `plan`, its one compile-time constant
    programs: how many of it
    numbers: integers, on whose values triton is told not to specialise
    options: of the compiler

    Of a step's arguments triton compiles for the types, for which pointers are None and which are aligned to 16 bytes.
    The binary is kept by these; from the second call on it goes straight to triton's launcher, past the binder of
    arguments, which costs more than all the rest of a call.
    """

    __slots__ = ("kernel", "programs", "numbers", "plan", "options", "binaries")

    def __init__(self, kernel, programs: int, numbers: tuple[int, ...], plan, options: dict):
        self.kernel, self.programs, self.numbers, self.plan, self.options = kernel, programs, numbers, plan, options
        self.binaries = {}

    def run(self, like: torch.Tensor, tensors: tuple[torch.Tensor | None, ...], *floats: float) -> None:
        """Launch on the device of `like`, in its current stream."""
        _on_device_of(like, self._start, self.kernel, self.programs, tensors, floats)

    def _start(self, kernel, programs: int, tensors: tuple, floats: tuple) -> None:
        args = (*tensors, *self.numbers, *map(float, floats), self.plan)  # triton compiles for the value of an int
        if INTERPRETED or torch.version.hip or _watched(kernel):  # HIP code depends on the sizes of tensors, too
            kernel[(programs,)](*args, **self.options)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (device, *[x if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors])
        binary = self.binaries.get(key)
        if binary is None:
            binary = kernel[(programs,)](*args, **self.options)
            if isinstance(binary, CompiledKernel):  # not one that is being compiled in the background
                self.binaries[key] = binary
            return
        stream = driver.get_current_stream(device)
        binary.run(programs, 1, 1, stream, binary.function, binary.packed_metadata, None, None, None, *args)
