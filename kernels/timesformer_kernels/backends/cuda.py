# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels on NVIDIA GPUs (csrc/cuda): strided operands in place, deterministic, no atomics."""

from __future__ import annotations

import torch

from .. import native_cuda
from ..mounting import fresh
from ..registry import Backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# Of 16 bits: the kernels on tensor cores, and up to how many members of a sequence a block holds it whole.
TENSOR_CORE_HEAD_DIMS = (32, 64, 128)
RESIDENT_MEMBERS = {32: 256, 64: 256, 128: 128}
HOPPER_BACK_LEAST = 128  # longer sequences, of head_dim 64, have a backward of their own on compute capability 9.0


def forward(q, k, v, view, scale, cls_weights, stats=None):
    out = fresh(q)
    native_cuda.attention(q, k, v, out, view, scale, _dense(cls_weights), stats)
    return out


def backward(dout, q, k, v, view, scale, cls_weights, grads=None, saved=None):
    if dout.stride(3) != 1 and dout.shape[3] > 1:  # y.sum().backward() hands in an expanded scalar
        dout = dout.contiguous()
    grads = grads or (fresh(q), fresh(q), fresh(q))
    out, stats = saved or (None, None)
    native_cuda.attention(q, k, v, out, view, scale, _dense(cls_weights), stats, (dout, *grads))
    return grads


def _dense(cls_weights):
    return None if cls_weights is None else cls_weights.contiguous()


def stats_size(shape, dtype: torch.dtype, view):
    """Numbers that the forward keeps: [B, H, G, M, 2], largest score and sum of exponentials of each member's row; for
    mode "per_group" and sequences that stream also [B, G, H, D], each group's own class output.

    None where tensor cores hold a sequence whole, whose backward makes them again, but where compute capability 9.0 has
    a faster one: the same on every device, as the result of an operator's shapes has to be. Where they turn out not to
    (rows that are not aligned) the generic backward makes them, too.
    """
    B, S, H, D = shape
    if dtype not in DTYPES or D > MAX_HEAD_DIM:
        return 0
    G, M = view.num_groups, view.members
    tensor_cores, outputs = dtype.itemsize == 2 and D in TENSOR_CORE_HEAD_DIMS, 0
    if view.cls == "global":
        if not G * view.length:
            G = M = 1
    elif tensor_cores:
        if M <= RESIDENT_MEMBERS[D] and not (D == 64 and M > HOPPER_BACK_LEAST):
            return 0
        if view.cls == "per_group":
            outputs = B * G * H * D
    return B * H * G * M * 2 + outputs


def _no_gpu(library: native_cuda.Library) -> str | None:
    """Why not every GPU can run the kernels; None when all can."""
    if torch.version.hip is not None:
        return "its kernels run on NVIDIA GPUs; this torch is for AMD's"
    try:
        torch.cuda.init()  # says why it cannot
    except Exception as error:
        return f"no usable GPU: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    for i in range(torch.cuda.device_count()):
        if reason := library.why_not(i):
            return f"GPU {i} ({torch.cuda.get_device_name(i)}): {reason}; hide it to use others"
    return None


def why_not(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device_type != "cuda":
        return f"its kernels run on cuda, not on {device_type}"
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"kernels for head_dim up to {MAX_HEAD_DIM}, got {head_dim}"
    library, reason = native_cuda.library()
    return _no_gpu(library) if reason is None else reason


BACKEND = Backend("cuda", forward, backward, why_not, stats_size)
