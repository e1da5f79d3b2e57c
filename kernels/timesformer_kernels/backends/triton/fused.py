# SPDX-License-Identifier: Apache-2.0
"""Launches of the fused steps' kernels: allocation, strides as numbers, and a configuration from the table below.

Operands arrive checked, [B, S, D] with a unit last stride; results are contiguous. Nothing is tuned at run time, waits
for the device or reads from it, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ...mounting import fresh
from . import fused_kernels as kernels
from .launch import launch

# Width of a program's tile: (rows, warps) in 16 bits; in float32 half the rows or twice the warps, so that a thread
# holds the same bytes. A row of LayerNorm is up to MAX_BLOCKS such blocks, all of them in registers; bias_gelu splits
# wider rows into tiles side by side.
TILES = {
    "add_layer_norm_fwd": {32: (32, 4), 64: (16, 4), 128: (8, 4), 256: (4, 4), 512: (2, 4), 1024: (1, 4), 2048: (1, 8)},
    "add_layer_norm_bwd": {32: (16, 4), 64: (8, 4), 128: (8, 4), 256: (4, 4), 512: (2, 4), 1024: (1, 4), 2048: (1, 8)},
    "bias_gelu_fwd": {32: (32, 4), 64: (32, 4), 128: (16, 4), 256: (8, 4), 512: (4, 4)},
    "bias_gelu_bwd": {32: (32, 4), 64: (16, 4), 128: (8, 4), 256: (4, 4), 512: (4, 4)},
}
MAX_BLOCKS = 4
REDUCE = (32, 32), {"num_warps": 4}  # parts and columns of a tile
# Partial sums of a backward: enough programs for every GPU, and the same number on each: results do not depend on it.
PARTS = 512
WIDE_ROWS = 2**31 - 2**16  # from here on row numbers take 64 bits


class Tile(NamedTuple):
    """What a program works on, and the options of its launch."""

    rows: int
    columns: int  # tiles side by side
    constants: tuple
    options: dict


@lru_cache(maxsize=1024)
def tile(step: str, D: int, itemsize: int, *flags) -> Tile:
    """The configuration of a step for rows of D elements of `itemsize` bytes; flags are the kernel's own constants."""
    table, whole_rows = TILES[step], step.startswith("add_layer_norm")
    least = max(min(D, 128), -(-D // MAX_BLOCKS)) if whole_rows else D
    width = next((width for width in table if width >= least), max(table))
    rows, warps = table[width]
    if itemsize == 4:
        rows, warps = (rows // 2, warps) if rows > 1 else (1, warps * 2)
    blocks = -(-D // width)
    if whole_rows:
        return Tile(rows, 1, (D, width, blocks, rows, *flags), {"num_warps": warps})
    return Tile(rows, blocks, (D, width, rows, *flags), {"num_warps": warps})


def _vec(D: int, *tensors) -> int:
    """Elements in 16 bytes where every row of every [B, S, D] tensor and of the results is aligned, else 1."""
    vec = 16 // min(x.element_size() for x in tensors)
    aligned = D % vec == 0 and all(x.stride(0) % vec == 0 and x.stride(1) % vec == 0 for x in tensors)
    return vec if aligned else 1


def _strides(x, vec: int) -> tuple[int, int]:
    """Of clip and token, in units of vec; 0 for None."""
    return (0, 0) if x is None else (x.stride(0) // vec, x.stride(1) // vec)


def _scale_strides(scale) -> tuple[int, int]:
    """row_scale is [B, S], or [B] for all tokens of a clip."""
    return (0, 0) if scale is None else (scale.stride(0), scale.stride(1) if scale.dim() == 2 else 0)


def _reduce(partial, first, second=None) -> None:
    D, (blocks, options) = first.shape[0], REDUCE
    width = D if second is None else 2 * D
    arguments = partial, first, second, partial.shape[0], D, *blocks
    launch(kernels.reduce_kernel, -(-width // blocks[1]), partial, arguments, options)


def add_layer_norm_fwd(x, branch, weight, bias, row_scale, eps: float, skip_cls: bool):
    """-> (sum [B, S, D], None without a branch; normed [B, S, D]), in the dtype of x."""
    B, S, D = x.shape
    rows = B * S
    total, out = None if branch is None else fresh(x), fresh(x)
    vec = _vec(D, x) if branch is None else _vec(D, x, branch)
    t = tile("add_layer_norm_fwd", D, x.element_size(), vec, rows > WIDE_ROWS, skip_cls)
    strides = *_strides(x, vec), *_strides(branch, vec), *_scale_strides(row_scale)
    arguments = x, branch, weight, bias, row_scale, total, out, *strides, rows, S, eps, *t.constants
    launch(kernels.add_layer_norm_fwd_kernel, -(-rows // t.rows), x, arguments, t.options)
    return total, out


def add_layer_norm_bwd(dsum, dnormed, total, weight, row_scale, eps: float, skip_cls: bool, branch_dtype):
    """-> (dx, dbranch, None without a branch_dtype; dweight, dbias). dsum may be None."""
    B, S, D = total.shape
    rows = B * S
    dx = fresh(total)
    dbranch = None if branch_dtype is None else total.new_empty(total.shape, dtype=branch_dtype)
    if rows == 0:
        return dx, dbranch, torch.zeros_like(weight), torch.zeros_like(weight)
    dweight, dbias = weight.new_empty(D), weight.new_empty(D)
    dsum, dnormed = None if dsum is None else dsum.contiguous(), dnormed.contiguous()  # sum().backward() expands one
    vec = _vec(D, total)
    t = tile("add_layer_norm_bwd", D, total.element_size(), vec, rows > WIDE_ROWS, skip_cls)
    tiles = -(-rows // t.rows)
    partial = total.new_empty(min(tiles, PARTS), 2, D, dtype=torch.float32)
    numbers = *_strides(total, vec), *_scale_strides(row_scale), rows, S, tiles, eps, *t.constants
    arguments = dsum, dnormed, total, weight, row_scale, dx, dbranch, partial, *numbers
    launch(kernels.add_layer_norm_bwd_kernel, partial.shape[0], total, arguments, t.options)
    _reduce(partial, dweight, dbias)
    return dx, dbranch, dweight, dbias


def bias_gelu_fwd(x, bias):
    """x [B, S, D] -> out [B, S, D]."""
    B, S, D = x.shape
    rows = B * S
    out, vec = fresh(x), _vec(D, x)
    t = tile("bias_gelu_fwd", D, x.element_size(), vec, rows > WIDE_ROWS)
    arguments = x, bias, out, *_strides(x, vec), rows, S, *t.constants
    launch(kernels.bias_gelu_fwd_kernel, -(-rows // t.rows) * t.columns, x, arguments, t.options)
    return out


def bias_gelu_bwd(dout, x, bias):
    """dout, x [B, S, D] -> (dx, dbias)."""
    B, S, D = x.shape
    rows = B * S
    dx = fresh(x)
    if rows == 0:
        return dx, torch.zeros_like(bias)
    dout, dbias, vec = dout.contiguous(), bias.new_empty(D), _vec(D, x)
    t = tile("bias_gelu_bwd", D, x.element_size(), vec, rows > WIDE_ROWS)
    tiles = -(-rows // t.rows)
    partial = x.new_empty(min(tiles, PARTS), D, dtype=torch.float32)
    arguments = dout, x, bias, dx, partial, *_strides(x, vec), rows, S, tiles, *t.constants
    launch(kernels.bias_gelu_bwd_kernel, partial.shape[0] * t.columns, x, arguments, t.options)
    _reduce(partial, dbias)
    return dx, dbias
