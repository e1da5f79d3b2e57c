# SPDX-License-Identifier: Apache-2.0
"""Where a video token lives, and which tokens attend to one another.

The tokens of a clip lie on a grid of height x width x time and are stored as rows of one tensor
``[B, (1 +) H*W*T, heads, head_dim]``. Row 0 may be the class token; the patches follow in one of two orders:

    space_major   b (h w t)   row = cls + (y*W + x)*T + t     TimeSformer
    time_major    b (t h w)   row = cls + (t*H + y)*W + x     Frozen-in-Time, LaViLa, lucidrains

A *scheme* says for each grid axis whether it is attended (part of a sequence), grouped (enumerates independent
sequences) or split between the two. Every attention of the TimeSformer paper (arXiv 2102.05095, section 3 and
figure 2) is such a scheme, and every kernel sees only its *view*: two short lists of (size, step), one that
enumerates the groups and one that walks a sequence, with steps counted in token rows. Axes whose steps fit together
are merged, so time and space attention reach a kernel as one axis each.

This is the only file that knows any of this, and the only one that checks shapes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ORDERS = ("space_major", "time_major")
CLS_MODES = ("none", "exclude", "per_group", "key", "global")
AXES = ("height", "width", "time")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Axis(NamedTuple):
    """What one grid axis contributes: `groups` independent parts, each an attended run over the rest.

    groups=1 attends the whole axis and groups=None none of it. With groups=n, part i is the i-th block of size/n
    neighbours, or with `strided` every n-th position starting at i.
    """

    groups: int | None
    strided: bool = False


ATTENDED = Axis(1)
GROUPED = Axis(None)


def blocks(n: int) -> Axis:
    """n blocks of neighbours; attention stays within a block."""
    return Axis(n)


def every(n: int) -> Axis:
    """n interleaved combs: attention joins positions that are n apart."""
    return Axis(n, strided=True)


class Scheme(NamedTuple):
    """How each axis of the grid takes part in attention."""

    height: Axis
    width: Axis
    time: Axis


SCHEMES = {
    "time": Scheme(GROUPED, GROUPED, ATTENDED),
    "space": Scheme(ATTENDED, ATTENDED, GROUPED),
    "joint": Scheme(ATTENDED, ATTENDED, ATTENDED),
    "height": Scheme(ATTENDED, GROUPED, GROUPED),
    "width": Scheme(GROUPED, ATTENDED, GROUPED),
    # Sparse local-global (paper, section 3, "L+G"), read as partitions: neighbouring F x H/2 x W/2 patches, then
    # the patches two apart on every axis. The paper leaves the alignment open; CHANGELOG states this reading.
    "local": Scheme(blocks(2), blocks(2), ATTENDED),
    "global": Scheme(every(2), every(2), every(2)),
}


class View(NamedTuple):
    """A scheme applied to a grid: all that a kernel needs to know of video.

    groups, sequence: up to three (size, step) pairs each, outermost first, steps in token rows. Their sizes multiply
    to G independent sequences of L tokens. cls: one of CLS_MODES; patches start at row 0 for "none", else at row 1.
    """

    groups: tuple[tuple[int, int], ...]
    sequence: tuple[tuple[int, int], ...]
    cls: str

    @property
    def first(self) -> int:
        """Row of the first patch."""
        return 0 if self.cls == "none" else 1

    @property
    def num_groups(self) -> int:
        """G, the number of independent sequences in a clip."""
        return _product(self.groups)

    @property
    def length(self) -> int:
        """L, the number of patches in a sequence (the class token not counted)."""
        return _product(self.sequence)

    @property
    def members(self) -> int:
        """M: the patches of a sequence, and the class row where it takes part."""
        return self.length + int(self.cls not in ("none", "exclude"))

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Token row of every member of every sequence: [G, L] int64."""
        offsets = [torch.zeros(1, dtype=torch.int64, device=device)] * 2
        for i, pairs in enumerate((self.groups, self.sequence)):
            for size, step in pairs:
                offsets[i] = (offsets[i][:, None] + torch.arange(size, device=device) * step).flatten()
        return self.first + offsets[0][:, None] + offsets[1]

    def flat(self) -> tuple[list[int], list[int]]:
        """The pairs as two flat lists, the form an operator schema can carry."""
        return [n for pair in self.groups for n in pair], [n for pair in self.sequence for n in pair]

    @classmethod
    def from_flat(cls, groups: list[int], sequence: list[int], mode: str) -> View:
        """Inverse of `flat`."""
        return cls(*(tuple(zip(x[::2], x[1::2], strict=True)) for x in (groups, sequence)), mode)


def _product(pairs):
    n = 1
    for size, _ in pairs:
        n = n * size
    return n


def _merged(pairs):
    """Drop axes of size 1 and join an axis to the next inner one where their steps make one longer walk."""
    out = []
    for size, step in pairs:
        if size == 1:
            continue
        if out and out[-1][1] == size * step:
            out[-1] = (out[-1][0] * size, step)
        else:
            out.append((size, step))
    return tuple(out)


def make_view(scheme: Scheme, grid: tuple[int, int, int], cls: str, order: str = "space_major") -> View:
    """The view of `scheme` on `grid` = (height, width, frames), arguments unchecked, sizes possibly symbolic."""
    height, width, frames = grid
    steps = (width * frames, frames, 1) if order == "space_major" else (width, 1, height * width)
    groups, sequence = [], []
    for axis, size, step in zip(scheme, grid, steps, strict=True):
        if axis.groups is None:
            groups.append((size, step))
            continue
        run = size // axis.groups
        if axis.strided:
            groups.append((axis.groups, step))
            sequence.append((run, step * axis.groups))
        else:
            groups.append((axis.groups, step * run))
            sequence.append((run, step))
    # Softmax does not mind the order of the keys, so a sequence is walked as it lies in memory and merges more often.
    # The groups keep the order (height, width, time): cls_weights are given in it.
    if order == "time_major" and scheme.time.groups is not None:
        sequence = [sequence[-1], *sequence[:-1]]
    return View(_merged(groups), _merged(sequence), cls)


def view(scheme: str | Scheme, grid: tuple[int, int, int], cls: str, order: str = "space_major") -> View:
    """The view of `scheme` on `grid` = (height, width, frames), every argument checked.

    Raises ValueError for an unknown scheme, class mode or order and for an axis that its split does not divide;
    TypeError for a grid that is not three integers.
    """
    usual = type(grid) is tuple and len(grid) == 3 and type(scheme) is type(cls) is type(order) is str
    if usual and not torch.compiler.is_compiling():  # symbolic sizes cannot be a cache key
        height, width, frames = grid
        if type(height) is type(width) is type(frames) is int:
            return _kept_view(scheme, grid, cls, order)
    return _checked_view(scheme, grid, cls, order)


def _checked_view(scheme, grid, cls, order) -> View:
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: got {scheme!r}, expected one of {', '.join(SCHEMES)} or a grid.Scheme")
        scheme = SCHEMES[scheme]
    elif not (isinstance(scheme, Scheme) and all(isinstance(axis, Axis) for axis in scheme)):
        raise TypeError(f"scheme: got {scheme!r}, expected one of {', '.join(SCHEMES)} or a grid.Scheme of grid.Axis")
    if cls not in CLS_MODES:
        raise ValueError(f"cls: got {cls!r}, expected one of {', '.join(CLS_MODES)}")
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}, expected one of {', '.join(ORDERS)}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 3 or not all(_is_count(n) for n in grid):
        raise TypeError(f"grid: got {grid!r}, expected three non-negative integers (height, width, frames)")
    for name, axis, size in zip(AXES, scheme, grid, strict=True):
        if axis.groups is not None and axis.groups != 1 and size % axis.groups:
            raise ValueError(f"grid: {name} = {size} cannot be split evenly into {axis.groups}, as the scheme asks")
    return make_view(scheme, tuple(grid), cls, order)


_kept_view = lru_cache(maxsize=4096)(_checked_view)


def _is_count(n) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= 0


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k, v must be tensors of one shape [B, S, heads, head_dim], dtype and device with a unit last stride."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rows(name, x)
        if x is q:
            continue
        if x.shape != q.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected the shape of q, {tuple(q.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got dtype {x.dtype}, expected the dtype of q, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: got device {x.device}, expected the device of q, {q.device}")
    _check_kind(q)


def check_packed(q: Tensor) -> None:
    """The same of q alone, whose sizes, strides, dtype and device are those of k and v."""
    _check_rows("q", q)
    _check_kind(q)


def _check_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected 4 dimensions (batch, tokens, heads, head_dim)")
    if x.stride(3) != 1 and x.shape[3] > 1:
        raise ValueError(
            f"{name}: got stride {x.stride(3)} in the last dimension, expected 1; "
            "the head dimension must be contiguous in memory, every other one may lie anywhere"
        )


def _check_kind(q: Tensor) -> None:
    if q.shape[3] == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected head_dim of at least 1")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: got dtype {q.dtype}, expected one of {', '.join(map(str, DTYPES))}")


def view_of_frames(scheme: str, tokens: int, frames: int, cls: str, order: str) -> View:
    """The view of "time" or "space" when only the number of frames is known: the grid is then N x 1 x T."""
    if cls not in CLS_MODES:
        raise ValueError(f"cls: got {cls!r}, expected one of {', '.join(CLS_MODES)}")
    if not _is_count(frames):
        raise ValueError(f"frames: got {frames!r}, expected a non-negative integer")
    patches = tokens - int(cls != "none")  # torch 2.11 takes no bool from a symbol
    if patches < 0 or (patches if frames == 0 else patches % frames):
        row = "" if cls == "none" else f" + 1 class row (cls={cls!r})"
        raise ValueError(f"q: got {tokens} tokens, expected a multiple of frames = {frames}{row}")
    return view(scheme, (patches // frames if frames else 0, 1, frames), cls, order)


def check_grid(tokens: int, grid: tuple[int, int, int], cls: str) -> None:
    """The number of tokens must be that of the grid, with the class row where the mode has one."""
    height, width, frames = grid
    expected = height * width * frames + int(cls != "none")
    if tokens != expected:
        row = "" if cls == "none" else f" + 1 class row (cls={cls!r})"
        raise ValueError(f"q: got {tokens} tokens, expected {expected} = {height} x {width} x {frames}{row}")


def check_cls_weights(weights: Tensor | None, q: Tensor, v: View) -> None:
    """cls_weights must be a float32 tensor [B, G] on the device of q, for class mode "per_group" alone."""
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"cls_weights: got {type(weights).__name__}, expected a torch.Tensor or None")
    if v.cls != "per_group":
        raise ValueError(f"cls_weights: given with cls={v.cls!r}, expected cls='per_group'")
    expected = (q.shape[0], v.num_groups)
    if tuple(weights.shape) != expected or weights.dtype != torch.float32 or weights.device != q.device:
        raise ValueError(
            f"cls_weights: got shape {tuple(weights.shape)}, {weights.dtype} on {weights.device}, "
            f"expected {expected} (batch, groups), torch.float32 on {q.device}"
        )
