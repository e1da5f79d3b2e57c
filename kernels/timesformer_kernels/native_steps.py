# SPDX-License-Identifier: Apache-2.0
"""The CPU library's fused steps: struct TskStepCall of csrc/abi.h, packed and called."""

from __future__ import annotations

import ctypes
import struct
from functools import cache, lru_cache

import torch

from . import native
from .native import DTYPE_CODES

ADD_LAYER_NORM_FWD, ADD_LAYER_NORM_BWD, BIAS_GELU_FWD, BIAS_GELU_BWD = range(4)  # enum TskStep

# struct TskStepCall, field for field: x, branch, dout, dsum as {pointer, strides of batch and token}; weight, bias,
# branch_bias, row_scale, its two strides; sum, out, dx, dbranch, dweight, dbias; workspace; eps; batch, tokens, dim,
# max_threads; codes of the dtypes of rows, branch, weight and bias; skip_cls; padding.
_CALL = struct.Struct("12q" + "6q" + "6q" + "q" + "d" + "4q" + "6i")
_NO_ROWS = (0, 0, 0)


@cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the CPU library, None), or (None, the reason why it has no fused steps)."""
    lib, reason = native.library()
    if lib is None:
        return None, reason
    try:
        size = lib.tsk_step_size()
    except AttributeError:
        size = 0
    if size != _CALL.size:
        return None, f"the CPU library's fused steps take {size} bytes, this Python code packs {_CALL.size}; reinstall"
    lib.tsk_step_workspace.restype = ctypes.c_int64
    lib.tsk_step_workspace.argtypes = lib.tsk_step_run.argtypes = (ctypes.c_char_p, ctypes.c_int32)
    return lib, None


def _rows(x) -> tuple[int, int, int]:
    return _NO_ROWS if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _scale(scale) -> tuple[int, int, int]:
    """[B, S], or [B] for all tokens of a clip."""
    return (
        _NO_ROWS if scale is None else (scale.data_ptr(), scale.stride(0), scale.stride(1) if scale.dim() == 2 else 0)
    )


def _address(x) -> int:
    return 0 if x is None else x.data_ptr()


def run(
    step: int,
    x: torch.Tensor,
    *,
    branch=None,
    dout=None,
    dsum=None,
    weight=None,
    bias=None,
    branch_bias=None,
    row_scale=None,
    total=None,
    out=None,
    dx=None,
    dbranch=None,
    dweight=None,
    dbias=None,
    eps: float = 0.0,
    skip_cls: bool = False,
) -> None:
    """Run one of the steps above on plain CPU tensors, which fills its results.

    x, branch, dout, dsum: [B, S, D] with a unit last stride; vectors [D] and results contiguous, branch_bias in the
    dtype of x. Raises RuntimeError where the library is missing or refuses the call.
    """
    lib, reason = library()
    if lib is None:
        raise RuntimeError(reason)
    narrow = dbranch if branch is None else branch
    first, second = dweight if weight is None else weight, dbias if bias is None else bias
    codes = tuple([DTYPE_CODES[x.dtype if t is None else t.dtype] for t in (x, narrow, first, second)])
    shape, threads = x.shape, torch.get_num_threads()
    nbytes = _workspace_bytes(step, shape, threads, codes)
    workspace = x.new_empty(nbytes + 64, dtype=torch.uint8)
    call = _CALL.pack(
        *_rows(x), *_rows(branch), *_rows(dout), *_rows(dsum),
        _address(weight), _address(bias), _address(branch_bias), *_scale(row_scale), _address(total), _address(out),
        _address(dx), _address(dbranch), _address(dweight), _address(dbias),
        -(-workspace.data_ptr() // 64) * 64, eps, *shape, threads, *codes, skip_cls, 0,
    )  # fmt: skip
    _check(lib, lib.tsk_step_run(call, step))


@lru_cache(maxsize=4096)
def _workspace_bytes(step: int, shape: torch.Size, threads: int, codes: tuple[int, ...]) -> int:
    lib = library()[0]
    return _check(lib, lib.tsk_step_workspace(_CALL.pack(*[0] * 25, 0.0, *shape, threads, *codes, 0, 0), step))


def _check(lib, status: int) -> int:
    if status < 0:
        raise RuntimeError(f"native step failed with code {status}: {lib.tsk_last_error().decode()}")
    return status
