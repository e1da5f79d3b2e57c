# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves a view, and with what constants. Imports no Triton: the registered ops ask it for sizes.

Two kinds of kernel. *Resident*: all members of a sequence on chip at once, short ones several to a tile. *Streaming*:
keys and values pass by. A backward holds more than a forward, the gradients of the keys beside the keys: it streams
earlier, and before that it no longer has room for all scores of a row. From there on the forward keeps for it what
a row needs, its maximum and sum.

Tile sizes, warps and stages are in `configs.json`, by architecture, dtype, head dimension and length;
`scripts/tune_triton.py` makes it. Nothing is tuned at run time, so a call can be captured in a CUDA graph, and
the same inputs always meet the same code.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from ...grid import View

MAX_HEAD_DIM = 128
CLS = {"none": 0, "exclude": 0, "key": 1, "per_group": 2, "global": 3}
# Longest sequence, class row counted, that a resident kernel serves: by bytes of an element, then padded head_dim.
# "alone" is a resident backward that needs nothing of the forward.
LONGEST = {
    "forward": {2: {64: 208, 128: 128}, 4: {64: 32, 128: 32}},
    "backward": {2: {64: 208, 128: 128}, 4: {64: 32, 128: 32}},
    "alone": {2: {64: 128, 128: 64}, 4: {64: 32, 128: 32}},
}
PACKED = 32  # sequences up to this length share a tile
TABLE = Path(__file__).with_name("configs.json")


class Plan(NamedTuple):
    """What a kernel is compiled for. Kernels read it as one compile-time constant."""

    D: int  # head dimension
    BLOCK_D: int  # the power of two that holds it
    CLS: int  # role of the class row, see device.py
    FIRST: int  # token row of the first patch
    GROUP_AXES: int
    SEQ_AXES: int
    VEC: int  # elements in the unit of all strides
    WIDE: bool  # offsets within a clip need 64 bits
    FULL: bool  # float32
    UPCAST: bool  # the interpreter, with bfloat16
    PRECISION: str  # of float32 products, "ieee" or "tf32"
    STATS: bool  # the forward keeps what the backward needs
    SAVED: bool  # the backward has it
    WEIGHTS: bool  # the class row's groups are weighted, not averaged
    BLOCK_M: int = 0  # queries of a tile
    BLOCK_N: int = 0  # keys of a block, streaming kernels
    M: int = 0  # members of a sequence, resident kernels; from here on
    SEQ: tuple[int, int, int] = (1, 1, 1)  # sizes of its axes
    PACK: int = 1  # sequences of a tile
    SKIP: int = 0  # first place that asks
    ROWS: int = 0  # rows of a tile
    BLOCKS: tuple[int, ...] = ()  # sizes of the blocks of keys
    STARTS: tuple[int, ...] = ()  # and where they begin


class Config(NamedTuple):
    """Tile sizes and compiler options of one launch."""

    block_m: int  # queries of a tile, rows of a packed one
    block_n: int  # keys of a block; resident: of the largest
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """Power of two, at least 16 (the least that matrix units take), that holds a row of one head."""
    return max(16, 1 << (head_dim - 1).bit_length())


def resident(direction: str, m: int, itemsize: int, head_dim: int) -> bool:
    """Whether sequences of m members fit a resident kernel: direction "forward", "backward" or "alone"."""
    return m <= LONGEST[direction][itemsize][max(64, block_d(head_dim))]


def stats_size(shape, dtype: torch.dtype, view: View):
    """Number of float32 that the forward keeps for the backward: see `stats_parts`."""
    if dtype.itemsize not in LONGEST["backward"] or shape[3] > MAX_HEAD_DIM:
        return 0
    return sum(stats_parts(shape, dtype, view))


def stats_parts(shape, dtype: torch.dtype, view: View):
    """Sizes of the three parts of stats.

    [B, H, 2] maximum and sum of the exponentials of the class row where it has one softmax over all groups ("global");
    then, where the backward needs them, [B, H, G, M, 2] those of every query, and [B, G, H, D] the class row's output
    in each group ("per_group").
    """
    B, S, H, D = shape
    G, M = view.num_groups, view.members
    saves = not resident("alone", M, dtype.itemsize, D)
    return (
        B * H * 2 if view.cls == "global" else 0,
        B * H * G * M * 2 if saves else 0,
        B * H * G * D if saves and view.cls == "per_group" else 0,
    )


def blocks(m: int, largest: int) -> tuple[int, ...]:
    """Powers of two from 16 to `largest` that hold m rows, largest first, at most two of them smaller.

    For `largest` = 128: 197 -> 128, 64, 16.
    """
    rows, out, smaller = -(-m // 16) * 16, [], 0
    while rows > 0:
        size = min(largest, 1 << (rows.bit_length() - 1))
        smaller += size < largest
        if smaller == 2 and size < rows:  # the last one takes all that is left
            size *= 2
        out.append(size)
        rows -= size
    return tuple(out)


@lru_cache(maxsize=1)
def table() -> dict:
    return json.loads(TABLE.read_text())


def architecture(capability: tuple[int, int] | None) -> str:
    """The name in the table for a compute capability; None, or one that is not there, is served by the nearest."""
    major = capability[0] if capability else 8
    return f"sm_{max((m for m in (8, 9, 10, 12) if m <= major), default=8)}x"


@lru_cache(maxsize=1024)
def config(kernel: str, arch: str, precision: str, itemsize: int, head_dim: int, m: int) -> Config:
    """The row of the table: the first whose length holds m, or the last."""
    kind = "bits16" if itemsize == 2 else precision
    rows = table()["configs"][arch][kernel][kind][str(max(64, block_d(head_dim)))]
    return Config(*next((row[1:] for row in rows if m <= row[0]), rows[-1][1:]))


def resident_plan(base: Plan, view: View, chosen: Config) -> Plan:
    """`base` completed for a resident kernel."""
    M = view.members
    pack = max(1, chosen.block_m // M) if M <= PACKED else 1
    sizes = tuple(size for size, _ in view.sequence)
    held = (chosen.block_m,) if pack > 1 else blocks(M, chosen.block_n)
    return base._replace(
        BLOCK_M=chosen.block_m,
        M=M,
        SEQ=(*sizes, 1, 1, 1)[:3],
        PACK=pack,
        SKIP=1 if base.CLS == 1 and pack == 1 else 0,
        ROWS=chosen.block_m if pack > 1 else M,
        BLOCKS=held,
        STARTS=tuple(sum(held[:i]) for i in range(len(held))),
    )


def streaming_plan(base: Plan, chosen: Config) -> Plan:
    """`base` completed for a streaming kernel."""
    return base._replace(BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, SKIP=1 if base.CLS == 1 else 0)
