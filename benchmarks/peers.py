# SPDX-License-Identifier: Apache-2.0
"""The rows of the attention benchmarks: ours, what people write today, and a plain copy of the same bytes.

All start from the packed product of a model, [B, 1 + N*T, 3, H, D] in order b (h w t) with the class row first, and end
in that layout, [B, 1 + N*T, H, D]. Stock attention needs each group as a sequence of its own: `arrange_*` and
`restore_*` are those rearrangements, written with as few copies as torch has for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor

from timesformer_kernels import grid_attention_qkvpacked, registry

CLS = {"time": "exclude", "space": "per_group"}  # the class-token modes of TimeSformer
DIRECTIONS = ("forward", "forward+backward")
ROWS = ("cpp", "reference", "sdpa", "sdpa-no-copies", "eager", "copy")


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; height and width count patches. name: frames x pixels, as the README calls it."""

    name: str
    frames: int
    height: int
    width: int
    heads: int = 12
    head_dim: int = 64
    batch: int = 1

    @property
    def locations(self) -> int:
        """N of the paper."""
        return self.height * self.width

    def __str__(self):
        heads = f"{self.heads} head{'s' if self.heads != 1 else ''} of {self.head_dim}"
        return f"{self.name}: B={self.batch}, N={self.locations}, T={self.frames}, {heads}"


QUICK = (Shape("8x224", 8, 14, 14),)
FULL = (*(Shape(f"{frames}x224", frames, 14, 14) for frames in (16, 32, 96)), Shape("16x448", 16, 28, 28))
# Nothing divides a vector or a tile, and a batch of 2 makes every flatten below a real copy.
TINY = (Shape("tiny", 3, 2, 5, heads=2, head_dim=8, batch=2),)


def arrange_time(packed: Tensor, frames: int) -> tuple[Tensor, ...]:
    """packed [B, 1 + N*T, 3, H, D] -> q, k, v [B*N, H, T, D] without the class row; a view where B = 1."""
    x = packed[:, 1:].unflatten(1, (-1, frames)).flatten(0, 1)  # [B*N, T, 3, H, D]
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def restore_time(o: Tensor, batch: int, frames: int) -> Tensor:
    """o [B*N, H, T, D] -> [B, 1 + N*T, H, D] with a zero class row."""
    o = o.transpose(1, 2).flatten(0, 1).unflatten(0, (batch, -1))  # [B, N*T, H, D]
    return torch.cat([o.new_zeros(batch, 1, *o.shape[2:]), o], 1)


def arrange_space(packed: Tensor, frames: int) -> tuple[Tensor, ...]:
    """packed [B, 1 + N*T, 3, H, D] -> q, k, v [B*T, H, 1 + N, D], the class row repeated for every frame."""
    row = packed[:, None, :1].expand(-1, frames, -1, -1, -1, -1)  # [B, T, 1, 3, H, D]
    patches = packed[:, 1:].unflatten(1, (-1, frames)).transpose(1, 2)  # [B, T, N, 3, H, D]
    return torch.cat([row, patches], 2).flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)


def restore_space(o: Tensor, batch: int, frames: int) -> Tensor:
    """o [B*T, H, 1 + N, D] -> [B, 1 + N*T, H, D], the class rows of the frames averaged."""
    o = o.transpose(1, 2).unflatten(0, (batch, frames))  # [B, T, 1 + N, H, D]
    patches = o[:, :, 1:].transpose(1, 2).flatten(1, 2)  # [B, N*T, H, D]
    return torch.cat([o[:, :, 0].mean(1, keepdim=True), patches], 1)


LAYOUT = {"time": (arrange_time, restore_time), "space": (arrange_space, restore_space)}


def eager_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v as two products and what lies between; [G, H, L, D] each."""
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


CORES = {"sdpa": F.scaled_dot_product_attention, "eager": eager_core}


@dataclass(frozen=True)
class Row:
    """call: what is timed, without arguments. check: asserts that its numbers are right, returns {tensor: max error}.

    Errors are absolute, against float64. The check of "sdpa-no-copies" looks through the rearrangements it leaves out.
    """

    call: Callable[[], object]
    check: Callable[[], dict[str, float]]


class Problem:
    """One scheme, shape and dtype: inputs, exact results, and a `Row` for each name in ROWS."""

    def __init__(self, scheme: str, shape: Shape, dtype: torch.dtype):
        self.scheme, self.shape, self.dtype = scheme, shape, dtype
        tokens = 1 + shape.locations * shape.frames
        q, k, v = oracle.make_qkv(shape.batch, tokens, shape.heads, shape.head_dim, dtype)
        self.packed = torch.stack([q, k, v], 2)  # [B, S, 3, H, D]
        self.dout = oracle.make_dout(q)  # [B, S, H, D]
        self.case = oracle.Case(scheme, (shape.height, shape.width, shape.frames), CLS[scheme])

    def why_not(self, row: str) -> str | None:
        """The backend's own reason for which a row cannot run here, else None."""
        if row not in registry.available_backends():
            return None
        return registry.get(row).why_not("cpu", self.dtype, self.shape.head_dim)

    def names(self) -> list[str]:
        """The rows that can run."""
        return [row for row in ROWS if not self.why_not(row)]

    def flops(self, direction: str) -> int:
        """Two products of 2*D FLOP per query-key pair; the backward has five such products (scores once more)."""
        shape = self.shape
        pairs = {
            "time": shape.locations * shape.frames**2,
            "space": shape.frames * (1 + shape.locations) ** 2,
        }[self.scheme]
        forward = 4 * shape.batch * shape.heads * shape.head_dim * pairs
        return forward if direction == "forward" else forward * 7 // 2

    def nbytes(self, direction: str) -> int:
        """The least a kernel moves: q, k, v in and out; the backward reads q, k, v, dout and writes three gradients."""
        return self.dout.nbytes * (4 if direction == "forward" else 11)

    def row(self, name: str, direction: str) -> Row:
        """To be called under no_grad for "forward", with grad for "forward+backward"."""
        if name == "copy":
            return self._copy(direction)
        run = self._whole(name.removesuffix("-no-copies"))
        check = partial(self._check, run, direction)
        if name.endswith("-no-copies"):
            return Row(self._bare(CORES[name.removesuffix("-no-copies")], direction), check)
        return Row(_timed(run, (self.packed,), self.dout, direction), check)

    def _whole(self, name: str) -> Callable[[Tensor], Tensor]:
        """packed [B, S, 3, H, D] -> [B, S, H, D]"""
        frames, batch = self.shape.frames, self.shape.batch
        if name in CORES:
            arrange, restore = LAYOUT[self.scheme]
            return lambda packed: restore(CORES[name](*arrange(packed, frames)), batch, frames)
        options = dict(grid=self.case.grid, scheme=self.scheme, cls=CLS[self.scheme], backend=name)
        return lambda packed: grid_attention_qkvpacked(packed, **options)

    def _bare(self, core: Callable, direction: str) -> Callable[[], object]:
        """The core alone on contiguous operands that lie ready, gradient of its output included."""
        arrange, restore = LAYOUT[self.scheme]
        operands = [x.contiguous() for x in arrange(self.packed, self.shape.frames)]
        with torch.enable_grad():
            o = core(*operands).detach().requires_grad_()
            (do,) = torch.autograd.grad(restore(o, self.shape.batch, self.shape.frames), o, self.dout)
        return _timed(core, operands, do.contiguous(), direction)

    def _copy(self, direction: str) -> Row:
        """Half of the bytes are read, half written. Reads the operands of the other rows: memory of its own would be
        colder than theirs, and a slow copy flatters every share of its bandwidth."""
        source, left = self.packed.flatten(), self.nbytes(direction) // (2 * self.dtype.itemsize)
        pairs = []
        while left:  # the backward moves more than the operands hold: they are read again
            part = source[:left]
            pairs.append((torch.empty_like(part), part))
            left -= len(part)

        def call():
            for target, part in pairs:
                target.copy_(part)

        def check():
            call()
            assert all(torch.equal(target, part) for target, part in pairs)
            assert 2 * sum(target.nbytes for target, _ in pairs) == self.nbytes(direction)
            return {"out": 0.0}

        return Row(call, check)

    def _check(self, run: Callable, direction: str) -> dict[str, float]:
        leaf = self.packed.detach().requires_grad_(direction != "forward")
        with torch.set_grad_enabled(direction != "forward"):
            got = {"out": run(leaf)}
            if direction != "forward":
                (got["dqkv"],) = torch.autograd.grad(got["out"], leaf, self.dout)
        errors = {}
        for name, x in got.items():
            oracle.assert_no_worse(f"{name} of {self.case}", x.detach(), self.exact[name], self.yardstick[name])
            errors[name] = (x.detach().double() - self.exact[name]).abs().max().item()
        return errors

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The oracle in float64."""
        return self._oracle(torch.float64)

    @cached_property
    def yardstick(self) -> dict[str, Tensor]:
        """The oracle in the dtype under test: the error that plain torch makes."""
        return self._oracle(self.dtype)

    def _oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """{"out": [B, S, H, D], "dqkv": [B, S, 3, H, D]}"""
        heads = []
        for head in range(self.shape.heads):  # one at a time: the scores of all heads in float64 take gigabytes
            q, k, v = self.packed[:, :, :, head : head + 1].to(dtype).unbind(2)
            dout = self.dout[:, :, head : head + 1].to(dtype)
            with torch.enable_grad():
                heads.append(oracle.with_gradients(lambda *x: oracle.attention(*x, self.case), q, k, v, dout))
        out, *grads = (torch.cat(parts, 2) for parts in zip(*heads, strict=True))
        return {"out": out, "dqkv": torch.stack(grads, 2)}


def _timed(run: Callable, operands, dout: Tensor, direction: str) -> Callable[[], object]:
    if direction == "forward":
        return lambda: run(*operands)
    leaves = [x.detach().requires_grad_() for x in operands]
    return lambda: torch.autograd.grad(run(*leaves), leaves, dout)
