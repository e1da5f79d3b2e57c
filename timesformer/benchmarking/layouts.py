# SPDX-License-Identifier: Apache-2.0
"""From the packed product of a model to what stock attention takes, and back, with as few copies as torch has for it.

All start from [B, 1 + N*T, 3, H, D] in order b (h w t) with the class row first, and end in [B, 1 + N*T, H, D]. Between
lie documents, [B, M, 3, H, D]: rows in which every `length` consecutive ones are a sequence. In time that is a view
without the class row; in space the patches of each frame are gathered and the class row is repeated for every frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import Shape


def length(scheme: str, shape: Shape) -> int:
    """Rows of one sequence."""
    return shape.frames if scheme == "time" else 1 + shape.locations


def documents(packed: Tensor, scheme: str, shape: Shape) -> Tensor:
    """packed [B, S, 3, H, D] -> [B, M, 3, H, D], M = N*T or T*(1 + N)"""
    if scheme == "time":
        return packed[:, 1:]
    row = packed[:, None, :1].expand(-1, shape.frames, -1, -1, -1, -1)  # [B, T, 1, 3, H, D]
    patches = packed[:, 1:].unflatten(1, (-1, shape.frames)).transpose(1, 2)  # [B, T, N, 3, H, D]
    return torch.cat([row, patches], 2).flatten(1, 2)


def undocument(o: Tensor, scheme: str, shape: Shape) -> Tensor:
    """o [B, M, H, D] -> [B, S, H, D]: a zero class row in time, the mean of the frames' class rows in space."""
    if scheme == "time":
        return torch.cat([o.new_zeros(len(o), 1, *o.shape[2:]), o], 1)
    o = o.unflatten(1, (shape.frames, -1))  # [B, T, 1 + N, H, D]
    patches = o[:, :, 1:].transpose(1, 2).flatten(1, 2)  # [B, N*T, H, D]
    return torch.cat([o[:, :, 0].mean(1, keepdim=True), patches], 1)


class Grouped:
    """q, k, v [G, H, L, D]: a batch of sequences. packed: as many short ones in a row of L as fill 128."""

    def __init__(self, packed: bool = False):
        self.packed = packed

    def rows(self, scheme: str, shape: Shape) -> int:
        """L"""
        one = length(scheme, shape)
        groups = shape.locations if scheme == "time" else shape.frames
        fit = [n for n in range(1, 128 // one + 1) if groups % n == 0] if self.packed else []
        return one * max(fit, default=1)

    def arrange(self, packed, scheme, shape):
        x = documents(packed, scheme, shape).unflatten(1, (-1, self.rows(scheme, shape))).flatten(0, 1)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def restore(self, o, scheme, shape):
        o = o.transpose(1, 2).flatten(0, 1).unflatten(0, (shape.batch, -1))  # [B, M, H, D]
        return undocument(o, scheme, shape)


class Flat:
    """q, k, v [B, H, M, D]: all sequences of a clip in one, told apart by a mask."""

    def arrange(self, packed, scheme, shape):
        return documents(packed, scheme, shape).permute(2, 0, 3, 1, 4).unbind(0)

    def restore(self, o, scheme, shape):
        return undocument(o.transpose(1, 2), scheme, shape)


class Rows:
    """Sequences of rows, as flash-attn and xFormers take them.

    [G, L, 3, H, D] in one tensor, or, as one sequence, [G*L, 3, H, D] or q, k, v [1, G*L, H, D].
    """

    def __init__(self, form: str):
        self.form = form  # "batch", "flat" or "split"

    def arrange(self, packed, scheme, shape):
        x = documents(packed, scheme, shape)
        if self.form == "batch":
            return (x.unflatten(1, (-1, length(scheme, shape))).flatten(0, 1),)
        x = x.flatten(0, 1)
        return (x,) if self.form == "flat" else x[None].unbind(2)

    def restore(self, o, scheme, shape):
        return undocument(o.reshape(shape.batch, -1, *o.shape[-2:]), scheme, shape)


class InPlace:
    """The packed tensor itself."""

    def arrange(self, packed, scheme, shape):
        return (packed,)

    def restore(self, o, scheme, shape):
        return o
