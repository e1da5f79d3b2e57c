# SPDX-License-Identifier: Apache-2.0
"""Triton kernels on NVIDIA and AMD GPUs: one source for every generation, compiled at the first call.

Importing this package does not import triton: it may be missing, slow to load, or broken. The first call does, or the
first question that only triton can answer. TRITON_INTERPRET=1, set before that, runs the same kernels in Triton's
interpreter on CPU tensors: thousands of times slower, for tests on machines without a GPU.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache

import torch

from ...registry import Backend
from .regimes import MAX_HEAD_DIM, stats_size

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_VERSION = (3, 6)
MIN_CAPABILITY = (8, 0)  # bfloat16 tensor cores


@cache
def _kernels():
    """The module that launches the kernels. Imports triton."""
    import triton

    version = re.match(r"(\d+)\.(\d+)", str(triton.__version__))
    if version is None or tuple(map(int, version.groups())) < MIN_VERSION:
        needed = ".".join(map(str, MIN_VERSION))
        raise ImportError(f"triton {triton.__version__} is installed, {needed} or later is needed")
    if bool(triton.knobs.runtime.interpret) == isinstance(triton.language.zeros, triton.runtime.JITFunction):
        raise ImportError("TRITON_INTERPRET changed after triton was imported; set it before")  # half and half breaks
    from . import attention

    return attention


def _interpreted() -> bool:
    """Whether the kernels run in the interpreter: settled once they are loaded, until then as triton would decide."""
    if _kernels.cache_info().currsize:
        return _kernels().INTERPRETED
    if "triton.knobs" in sys.modules:
        return bool(sys.modules["triton.knobs"].runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def forward(q, k, v, view, scale, cls_weights, stats=None):
    return _kernels().forward(q, k, v, view, scale, cls_weights, stats)


def backward(dout, q, k, v, view, scale, cls_weights, grads=None, saved=None):
    return _kernels().backward(dout, q, k, v, view, scale, cls_weights, grads, saved)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _no_gpu() -> str | None:
    """Why no GPU can run the kernels; None when all can."""
    try:
        torch.cuda.init()  # says why it cannot
        if torch.version.hip is None:
            for i in range(torch.cuda.device_count()):
                if (capability := torch.cuda.get_device_capability(i)) < MIN_CAPABILITY:
                    needed, got = (".".join(map(str, x)) for x in (MIN_CAPABILITY, capability))
                    name = torch.cuda.get_device_name(i)
                    return f"GPU {i} ({name}) has compute capability {got}, {needed} is needed; hide it to use others"
        import triton

        triton.runtime.driver.active.get_current_target()  # needs the driver, and a C compiler the first time
    except Exception as error:
        return f"no usable GPU: {_first_line(error)}"
    return None


def why_not(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"its kernels run on cuda, not on {device_type}"
    interpreted = _interpreted()
    if device_type == "cpu" and not interpreted:
        return "its kernels run on cuda, not on cpu; TRITON_INTERPRET=1 runs them on cpu, slowly"
    if device_type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set, so its kernels run in the interpreter, on cpu tensors only"
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"kernels for head_dim up to {MAX_HEAD_DIM}, got {head_dim}"
    try:
        _kernels()
    except Exception as error:  # a broken installation fails with anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "triton is not installed" if missing else f"its kernels do not import: {_first_line(error)}"
    return _no_gpu() if device_type == "cuda" else None


BACKEND = Backend("triton", forward, backward, why_not, stats_size, auto_skips=frozenset({"cpu"}))
