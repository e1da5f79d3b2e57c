# SPDX-License-Identifier: Apache-2.0
"""The CUDA library: its functions, and how tensors and a stream reach them. Loading and the ABI are `native`'s.

Every call queues kernels on torch's current stream and returns; memory is torch's.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import native
from .grid import View


class Library:
    """The C functions of one CUDA library. Raises OSError where it cannot be used."""

    def __init__(self, path: Path):
        lib, reason = native.open_library(path, "CUDA")
        if lib is None:
            raise OSError(reason)
        lib.tsk_cuda_why_not.restype = lib.tsk_cuda_regime.restype = ctypes.c_char_p
        lib.tsk_cuda_workspace.restype = ctypes.c_int64
        lib.tsk_cuda_workspace.argtypes = (ctypes.c_char_p, ctypes.c_int32)
        lib.tsk_cuda_regime.argtypes = (ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32)
        lib.tsk_cuda_fwd.argtypes = lib.tsk_cuda_bwd.argtypes = (ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p)
        self.c = lib

    def error(self) -> str:
        """Text of the last failure: a kernel's name and the CUDA error, or what is wrong with a call."""
        return self.c.tsk_last_error().decode()

    def why_not(self, device: int) -> str | None:
        """Why no kernel of this library can run on the GPU of that number; None when they can."""
        reason = self.c.tsk_cuda_why_not(device)
        return None if reason is None else reason.decode()

    def checked(self, status: int) -> int:
        """The status of a call, or RuntimeError with the text of its failure."""
        if status:
            raise RuntimeError(f"CUDA attention failed with code {status}: {self.error()}")
        return status


@cache
def library() -> tuple[Library | None, str | None]:
    """(the CUDA library, None), or (None, the reason why it is missing)."""
    try:
        return Library(native.HERE / "_cuda.so"), None
    except OSError as error:
        return None, str(error)


def _loaded() -> Library:
    lib, reason = library()
    if lib is None:
        raise RuntimeError(reason)
    return lib


def where(x: Tensor) -> tuple[int, int]:
    """(device number, address of torch's current stream on it) for kernels on x."""
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)  # current_stream() makes an object first, microseconds


def _call(tensors, view: View, scale: float, weights: int, workspace: int, stats: int) -> bytes:
    q = tensors[0]
    return native.params(tensors, q.shape, q.dtype, view, scale, weights, 0, workspace, stats, 1)


def regime(q, k, v, out, view: View, stats=None, grads=None, scale: float = 1.0) -> str:
    """Name of the kernels that serve such a call on the device of its tensors: arguments as for `attention`."""
    lib = _loaded()
    tensors = (q, k, v, out, *(grads or (None,) * 4))
    call = _call(tensors, view, scale, 0, 0, 0 if stats is None else stats.data_ptr())
    name = lib.c.tsk_cuda_regime(call, grads is not None, where(q)[0])
    if name is None:
        raise RuntimeError(lib.error())
    return name.decode()


def attention(q, k, v, out, view: View, scale: float, cls_weights, stats=None, grads=None) -> None:
    """Run the forward, which fills out and, where given, stats, or with grads = (dout, dq, dk, dv) the backward, which
    fills the last three.

    q, k, v, out and the gradients are CUDA tensors [B, S, H, D] of one dtype with a unit last stride, cls_weights
    contiguous; stats float32, as many numbers as backends.cuda.stats_size() says. The backward reads out where it
    reads stats.
    """
    lib = _loaded()
    device, stream = where(q)
    tensors = (q, k, v, out, *(grads or (None,) * 4))
    weights, kept = (0 if x is None else x.data_ptr() for x in (cls_weights, stats))
    call = _call(tensors, view, scale, weights, 0, kept)
    nbytes = lib.c.tsk_cuda_workspace(call, grads is not None)
    if nbytes:
        lib.checked(min(nbytes, 0))
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=q.device)
        call = _call(tensors, view, scale, weights, workspace.data_ptr(), kept)
    lib.checked((lib.c.tsk_cuda_fwd if grads is None else lib.c.tsk_cuda_bwd)(call, device, stream))
