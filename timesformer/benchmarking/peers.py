# SPDX-License-Identifier: Apache-2.0
"""Attention as people write it today, each peer as its users would call it for this task.

A peer is a layout and a core. Its row holds the rearrangements of the layout; a second row, "NAME-no-copies", runs the
core alone on contiguous operands that lie ready.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .layouts import Flat, Grouped, InPlace, Rows, length

TILE = 128  # rows and columns of a block of FlexAttention's mask
COMPILE_MODES = {
    "compile": "default",
    "compile-max-autotune": "max-autotune",
    "compile-reduce-overhead": "reduce-overhead",
}
FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Peer:
    """layout: how operands are arranged and results restored. core(scheme, shape, like) -> function of the operands.

    why_not(scheme, shape, device) -> None or a reason known beforehand. full: needs a compilation of seconds or more.
    mode: torch.compile of the whole, in that mode.
    """

    layout: object
    core: Callable
    why_not: Callable[[str, object, str], str | None] = lambda scheme, shape, device: None
    full: bool = False
    mode: str | None = None


def eager_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v as two products and what lies between; [G, H, L, D] each."""
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


def _eager(scheme, shape, like):
    return eager_core


def _sdpa(name: str | None = None):
    """scaled_dot_product_attention, by its own choice or by the named backend."""
    if name is None:
        return lambda scheme, shape, like: F.scaled_dot_product_attention

    def core(q, k, v):
        with sdpa_kernel(FORCED[name]):
            return F.scaled_dot_product_attention(q, k, v)

    return lambda scheme, shape, like: core


def _sdpa_packed(name: str | None = None):
    """Several short sequences in one of up to 128 rows, kept apart by an additive block-diagonal mask."""

    def build(scheme, shape, like):
        rows = PACKED.rows(scheme, shape)
        sequence = torch.arange(rows, device=like.device) // length(scheme, shape)
        apart = sequence[:, None] != sequence
        mask = torch.zeros(rows, rows, dtype=like.dtype, device=like.device).masked_fill_(apart, float("-inf"))

        def core(q, k, v):
            if name is None:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            with sdpa_kernel(FORCED[name]):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(len(q), q.shape[1], -1, -1))

        return core

    return build


def _sdpa_strided(scheme, shape, like):
    """One call per clip on views of the packed tensor: nothing is copied but the result."""

    def core(packed):
        out = []
        for x in packed[:, 1:].unflatten(1, (-1, shape.frames)):  # [N, T, 3, H, D], a view
            o = F.scaled_dot_product_attention(*x.permute(2, 0, 3, 1, 4).unbind(0))
            out.append(o.transpose(1, 2).flatten(0, 1))
        return F.pad(torch.stack(out), (0, 0, 0, 0, 1, 0))

    return core


def block_diagonal(rows: int, one: int, device):
    """FlexAttention's BlockMask of sequences of `one` rows, blocks written down: the dense mask would not fit."""
    from torch.nn.attention.flex_attention import BlockMask

    first = torch.arange(0, rows, TILE, device=device)
    low = first // one * one // TILE  # the block of the first key that a block of queries sees
    last = (first + TILE - 1).clamp_max(rows - 1)
    high = ((last // one + 1) * one - 1).clamp_max(rows - 1) // TILE
    number = (high - low + 1).to(torch.int32)
    column = torch.arange(len(first), device=device)
    indices = (low[:, None] + column).remainder(len(first)).to(torch.int32)  # the rest of a row is not looked at
    return BlockMask.from_kv_blocks(
        number[None, None],
        indices[None, None].contiguous(),
        BLOCK_SIZE=TILE,
        mask_mod=lambda b, h, q, k: q // one == k // one,
        seq_lengths=(rows, rows),
    )


def _flex(scheme, shape, like):
    from torch.nn.attention.flex_attention import flex_attention

    one = length(scheme, shape)
    rows = one * (shape.locations if scheme == "time" else shape.frames)
    mask = block_diagonal(rows, one, like.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _flash_attn(scheme, shape, like):
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func


def _flash_attn_varlen(scheme, shape, like):
    from flash_attn import flash_attn_varlen_qkvpacked_func

    one = length(scheme, shape)
    rows = shape.batch * one * (shape.locations if scheme == "time" else shape.frames)
    starts = torch.arange(0, rows + 1, one, dtype=torch.int32, device=like.device)
    return lambda x: flash_attn_varlen_qkvpacked_func(x, starts, one)


def _xformers(scheme, shape, like):
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    one = length(scheme, shape)
    sequences = shape.batch * (shape.locations if scheme == "time" else shape.frames)
    bias = BlockDiagonalMask.from_seqlens([one] * sequences)
    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias)


def _needs_cuda(scheme, shape, device):
    return None if device == "cuda" else f"no kernel for {device}"


def _needs(package: str):
    def why_not(scheme, shape, device):
        return None if find_spec(package) else f"{package} is not installed"

    return lambda scheme, shape, device: why_not(scheme, shape, device) or _needs_cuda(scheme, shape, device)


def _packs(scheme, shape, device):
    one = length(scheme, shape)
    return None if PACKED.rows(scheme, shape) > one else f"no two sequences of {one} rows make one of up to {TILE}"


def _has_views(scheme, shape, device):
    return None if scheme == "time" else "the class row is a key of every frame: no view of the tensor has it"


PLAIN, PACKED = Grouped(), Grouped(packed=True)

PEERS = {
    "sdpa": Peer(PLAIN, _sdpa()),
    "sdpa-flash": Peer(PLAIN, _sdpa("flash")),
    "sdpa-efficient": Peer(PLAIN, _sdpa("efficient"), _needs_cuda),
    "sdpa-cudnn": Peer(PLAIN, _sdpa("cudnn"), _needs_cuda),
    "sdpa-math": Peer(PLAIN, _sdpa("math")),
    "sdpa-packed": Peer(PACKED, _sdpa_packed(), _packs),
    "sdpa-packed-efficient": Peer(
        PACKED, _sdpa_packed("efficient"), lambda *where: _packs(*where) or _needs_cuda(*where)
    ),
    "sdpa-packed-cudnn": Peer(PACKED, _sdpa_packed("cudnn"), lambda *where: _packs(*where) or _needs_cuda(*where)),
    "sdpa-strided": Peer(InPlace(), _sdpa_strided, _has_views),
    "eager": Peer(PLAIN, _eager),
    "flex-packed": Peer(Flat(), _flex, full=True),
    **{name: Peer(PLAIN, _eager, full=True, mode=mode) for name, mode in COMPILE_MODES.items()},
    "flash-attn": Peer(Rows("batch"), _flash_attn, _needs("flash_attn")),
    "flash-attn-varlen": Peer(Rows("flat"), _flash_attn_varlen, _needs("flash_attn")),
    "xformers": Peer(Rows("split"), _xformers, _needs("xformers")),
}


def compiled(function: Callable, mode: str) -> Callable:
    """torch.compile of one shape. In "reduce-overhead" a replay overwrites the result of the one before."""
    fast = torch.compile(function, mode=mode, dynamic=False)
    if mode == "default":
        return fast

    def call(*operands):
        torch.compiler.cudagraph_mark_step_begin()
        return fast(*operands)

    return call


def sdpa_choice(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that scaled_dot_product_attention picks for these operands."""
    return SDPBackend(torch._fused_sdp_choice(q, k, v)).name.lower()
