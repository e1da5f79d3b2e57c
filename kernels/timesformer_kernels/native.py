# SPDX-License-Identifier: Apache-2.0
"""The native libraries: opens them and checks that they speak our ABI; runs the CPU one. `native_cuda` runs the other.

The core is plain C (csrc/abi.h) called through ctypes, so one build serves every Python and every torch. Its parameter
struct is mirrored here, once, as a format string: packing fifty numbers this way costs a microsecond.
"""

from __future__ import annotations

import ctypes
import json
import struct
from functools import cache, lru_cache
from pathlib import Path

import torch

from .grid import View

ABI_VERSION = 4
MAX_AXES = 3
HERE = Path(__file__).parent
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
CLS_CODES = {"none": 0, "exclude": 1, "per_group": 2, "key": 3, "global": 4}

# struct TskAttention, field for field: eight tensors {pointer, strides of batch, token, head}; groups and sequence,
# MAX_AXES pairs {size, step} each; batch, tokens, heads, head_dim; scale; cls_weights, q_bias, workspace, stats,
# max_threads; dtype and cls codes.
_PARAMS = struct.Struct("32q" + f"{4 * MAX_AXES}q" + "4q" + "d" + "5q" + "2i")
_NO_TENSOR = (0, 0, 0, 0)


@lru_cache(maxsize=1)
def build_info() -> dict:
    """What the build recorded: status, compiler, flags and instruction sets per library. Empty if nothing was built."""
    path = HERE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def open_library(path: Path, kind: str) -> tuple[ctypes.CDLL | None, str | None]:
    """(the library at path, None), or (None, the reason why it is missing or cannot be used). kind: "CPU" or "CUDA"."""
    if not path.exists():
        status = build_info().get(path.stem, {}).get("status", "no build record found")
        return None, f"the {kind} library was not built ({status})"
    try:
        lib = ctypes.CDLL(str(path))
        versions = lib.tsk_abi_version(), lib.tsk_attention_size()
    except (OSError, AttributeError) as error:
        return None, f"the {kind} library does not load ({error}); reinstall the package"
    if versions != (ABI_VERSION, _PARAMS.size):
        return (
            None,
            f"the {kind} library has ABI {versions}, this Python code needs {ABI_VERSION, _PARAMS.size}; reinstall",
        )
    lib.tsk_last_error.restype = ctypes.c_char_p
    return lib, None


@cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the CPU library, None), or (None, the reason why it is missing)."""
    lib, reason = open_library(HERE / "_cpu.so", "CPU")
    if lib is None:
        return None, reason
    lib.tsk_isa.restype = lib.tsk_isas.restype = ctypes.c_char_p
    lib.tsk_attn_workspace.restype = ctypes.c_int64
    lib.tsk_attn_workspace.argtypes = (ctypes.c_char_p, ctypes.c_int32)
    lib.tsk_attn_fwd.argtypes = lib.tsk_attn_bwd.argtypes = (ctypes.c_char_p,)
    _lend_threads(lib)
    return lib, None


def _lend_threads(lib) -> None:
    """Give the library torch's own threads: torch.set_num_threads is honoured, no second OpenMP runtime is loaded."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        try:
            pointer = ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue  # a torch without the symbol: the library then runs serially
        lib.tsk_set_parallel_for.argtypes = [ctypes.c_void_p]
        lib.tsk_set_parallel_for(pointer)


def _loaded() -> ctypes.CDLL:
    lib, reason = library()
    if lib is None:
        raise RuntimeError(reason)
    return lib


def isa() -> str:
    """The instruction set the CPU kernels use."""
    return _loaded().tsk_isa().decode()


def isas() -> tuple[str, ...]:
    """The instruction sets this machine can use, best first; () without the library."""
    lib, _ = library()
    return tuple(lib.tsk_isas().decode().split()) if lib else ()


def force_isa(name: str) -> None:
    """Use another of `isas()`: for tests and benchmarks. Raises ValueError for one this machine lacks."""
    if _loaded().tsk_force_isa(name.encode()):
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(isas())}")
    _workspace_bytes.cache_clear()


@lru_cache(maxsize=4096)
def _view_numbers(view: View, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, int]]:
    unused = (1, 0)
    pairs = [pair for axes in (view.groups, view.sequence) for pair in (*axes, *[unused] * (MAX_AXES - len(axes)))]
    return tuple(n for pair in pairs for n in pair), (DTYPE_CODES[dtype], CLS_CODES[view.cls])


def params(tensors, shape, dtype, view, scale, weights, q_bias, workspace, stats, threads) -> bytes:
    """struct TskAttention. tensors: q, k, v, out, dout, dq, dk, dv, or None. weights to stats: addresses."""
    axes, codes = _view_numbers(view, dtype)
    numbers = []
    for x in tensors:
        if x is None:
            numbers += _NO_TENSOR
        else:
            batch, token, head, _ = x.stride()
            numbers += (x.data_ptr(), batch, token, head)
    return _PARAMS.pack(*numbers, *axes, *shape, scale, weights, q_bias, workspace, stats, threads, *codes)


@lru_cache(maxsize=4096)
def _workspace_bytes(shape, dtype, view, threads, backward: bool) -> int:
    empty = params([None] * 8, shape, dtype, view, 1.0, 0, 0, 0, 0, threads)
    return _checked(_loaded().tsk_attn_workspace(empty, backward))


def _checked(status: int) -> int:
    if status < 0:
        raise RuntimeError(f"native attention failed with code {status}: {_loaded().tsk_last_error().decode()}")
    return status


def attention(q, k, v, out, view, scale, cls_weights, grads=None, q_bias=None) -> None:
    """Run the forward, which fills out, or with grads = (dout, dq, dk, dv) the backward, which fills the last three.

    q, k, v, out and the gradients are plain CPU tensors [B, S, H, D] of one dtype with a unit last stride. The forward
    adds q_bias [H, D], contiguous and of that dtype, to every query.
    """
    lib = _loaded()
    shape, dtype, threads = q.shape, q.dtype, torch.get_num_threads()
    nbytes = _workspace_bytes(shape, dtype, view, threads, grads is not None)
    workspace = q.new_empty(nbytes + 64, dtype=torch.uint8)
    start = -(-workspace.data_ptr() // 64) * 64
    weights, bias = (0 if x is None else x.data_ptr() for x in (cls_weights, q_bias))
    tensors = (q, k, v, out, *(grads or (None,) * 4))
    call = params(tensors, shape, dtype, view, scale, weights, bias, start, 0, threads)
    _checked(lib.tsk_attn_fwd(call) if grads is None else lib.tsk_attn_bwd(call))
