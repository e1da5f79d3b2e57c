# SPDX-License-Identifier: Apache-2.0
"""Level 1, the attention core: from the packed product of a model back into its layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from timesformer_kernels import grid_attention_qkvpacked, registry

from . import shapes
from .peers import PEERS, compiled, sdpa_choice
from .problem import Problem, Task, errors_of, own_backends, sampled
from .shapes import CLS
from .timing import Timed

SUFFIX = "-no-copies"
QUICK = {
    "cpu": ("sdpa", "sdpa-no-copies", "sdpa-packed", "eager"),
    "cuda": (
        *("sdpa", "sdpa-no-copies", "sdpa-flash", "sdpa-flash-no-copies", "sdpa-efficient", "sdpa-efficient-no-copies"),
        *("sdpa-cudnn", "sdpa-cudnn-no-copies", "sdpa-packed-efficient", "sdpa-packed-cudnn", "eager"),
    ),
}
PAIRS = 24  # (clip, head) pairs whose exact result is computed


class AttentionProblem(Problem):
    """One scheme, shape and dtype. A plain copy of the bytes that a kernel must move is one of the rows."""

    kind = "attention"
    directions = shapes.DIRECTIONS

    def __init__(self, scheme: str, shape, dtype, device="cpu", judge=None, backend: str | None = None):
        """backend: the one of ours that is timed, all by default."""
        super().__init__(shape, dtype, device, judge)
        self.scheme, self.backend = scheme, backend
        self._pairs = sampled(shape.batch * shape.heads, PAIRS)

    @cached_property
    def packed(self) -> Tensor:
        """[B, S, 3, H, D]"""
        shape = self.shape
        return self.random(0, shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)

    @cached_property
    def dout(self) -> Tensor:
        """[B, S, H, D]"""
        shape = self.shape
        return self.random(1, shape.batch, shape.tokens, shape.heads, shape.head_dim)

    @property
    def op(self):
        return f"{self.scheme} attention"

    @cached_property
    def ours(self) -> dict[str, str | None]:
        """{backend: None or why not}"""
        found = own_backends(self.device, self.dtype, self.shape.head_dim)
        return {name: why for name, why in found.items() if self.backend in (None, name)}

    def rows(self, full=False):
        names = QUICK[self.device]
        if full:
            names = [n for name, peer in PEERS.items() for n in _both(name, peer)]
        return [*self.ours, *names, "copy"]

    def why_not(self, row):
        if row in self.ours:
            return self.ours[row]
        name = row.removesuffix(SUFFIX)
        return PEERS[name].why_not(self.scheme, self.shape, self.device) if name in PEERS else None

    def _build(self, row):
        if row.endswith(SUFFIX):
            return self._bare(row.removesuffix(SUFFIX))
        return Task(self._whole(row), (self.packed,), self.dout)

    def _whole(self, row: str) -> Callable[[Tensor], Tensor]:
        """packed [B, S, 3, H, D] -> [B, S, H, D]"""
        scheme, shape = self.scheme, self.shape
        if row in registry.available_backends():
            options = dict(grid=(shape.height, shape.width, shape.frames), scheme=scheme, cls=CLS[scheme], backend=row)
            return lambda packed: grid_attention_qkvpacked(packed, **options)
        peer = PEERS[row]
        core, layout = peer.core(scheme, shape, self.packed), peer.layout

        def run(packed):
            return layout.restore(core(*layout.arrange(packed, scheme, shape)), scheme, shape)

        return compiled(run, peer.mode) if peer.mode else run

    def _bare(self, row: str) -> Task:
        """The core alone on contiguous operands that lie ready, the gradient of its output included."""
        peer = PEERS[row]
        core = peer.core(self.scheme, self.shape, self.packed)
        operands = self._arranged(peer.layout)
        with torch.enable_grad():
            o = core(*operands).detach().requires_grad_()
            (do,) = torch.autograd.grad(peer.layout.restore(o, self.scheme, self.shape), o, self.dout)
        return Task(compiled(core, peer.mode) if peer.mode else core, operands, do.contiguous())

    def _arranged(self, layout) -> tuple[Tensor, ...]:
        """Peers of one layout share their operands."""
        if layout not in self._operands:
            self._operands[layout] = tuple(x.contiguous() for x in layout.arrange(self.packed, self.scheme, self.shape))
        return self._operands[layout]

    @cached_property
    def _operands(self) -> dict:
        return {}

    def timed(self, row, direction):
        if row != "copy":
            return super().timed(row, direction)
        pairs = self._copies(direction)

        def call():
            for target, part in pairs:
                target.copy_(part)

        return Timed(call)

    def _copies(self, direction: str) -> list[tuple[Tensor, Tensor]]:
        """Half of the bytes are read, half written. Reads the operands of the other rows: memory of its own would be
        colder than theirs, and a slow copy flatters every share of its bandwidth."""
        source, left = self.packed.flatten(), self.nbytes("copy", direction) // (2 * self.dtype.itemsize)
        pairs = []
        while left:  # the backward moves more than the operands hold: they are read again
            part = source[:left]
            pairs.append((torch.empty_like(part), part))
            left -= len(part)
        return pairs

    def check(self, row, direction):
        """A row without copies is checked with them: looked at through the rearrangements that it leaves out."""
        if row == "copy":
            pairs = self._copies(direction)
            for target, part in pairs:
                if not torch.equal(target.copy_(part), part):
                    raise RuntimeError("copy: the copy differs from its source")
            if 2 * sum(target.nbytes for target, _ in pairs) != self.nbytes(row, direction):
                raise RuntimeError("copy: moves another number of bytes than the kernels")
            return {"out": 0.0}
        task = self.task(row.removesuffix(SUFFIX))
        leaf = self.packed.detach().requires_grad_(direction != "forward")
        with torch.set_grad_enabled(direction != "forward"):
            got = {"out": task.run(leaf)}
            if direction != "forward":
                (got["dqkv"],) = torch.autograd.grad(got["out"], leaf, self.dout)
        if got["out"].shape != self.dout.shape:
            raise RuntimeError(f"{row}: shape {tuple(got['out'].shape)}, expected {tuple(self.dout.shape)}")
        for name, x in got.items():
            if not x.isfinite().all():
                raise RuntimeError(f"{row}: {name} is not finite")
        return errors_of(self.judge, {name: self._sample(x) for name, x in got.items()}, self.exact, lambda: self.plain)

    def _sample(self, x: Tensor) -> Tensor:
        """[B, S, ..., H, D] -> [pairs, S, ..., D]"""
        return torch.stack([x[pair // self.shape.heads, ..., pair % self.shape.heads, :] for pair in self._pairs])

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The judge's answer in float64: {"out": [pairs, S, D], "dqkv": [pairs, S, 3, D]}."""
        return self._truth(torch.float64)

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        """The same in the dtype under test: the error that plain torch makes."""
        return self._truth(self.dtype)

    def _truth(self, dtype: torch.dtype) -> dict[str, Tensor]:
        parts = []
        for b, h in (divmod(pair, self.shape.heads) for pair in self._pairs):
            # One at a time: the scores of all heads in float64 take gigabytes.
            q, k, v = self.packed[b : b + 1, :, :, h : h + 1].to(dtype).unbind(2)
            dout = self.dout[b : b + 1, :, h : h + 1].to(dtype)
            parts.append(self.judge.attention(q, k, v, dout, self.shape, self.scheme, CLS[self.scheme]))
        out, *grads = (torch.cat(part)[:, :, 0] for part in zip(*parts, strict=True))
        return {"out": out, "dqkv": torch.stack(grads, 2)}

    def flops(self, row, direction):
        return 0 if row == "copy" else shapes.attention_flops(self.shape, self.scheme, direction)

    def nbytes(self, row, direction):
        return shapes.attention_bytes(self.shape, direction, self.dtype.itemsize)

    def facts(self, row):
        """sdpa: the backend that torch chose."""
        if row.removesuffix(SUFFIX) != "sdpa":
            return {}
        return {"kernel": sdpa_choice(*self._arranged(PEERS["sdpa"].layout))}

    def drop(self, row):
        super().drop(row)
        if row.endswith(SUFFIX):
            super().drop(row.removesuffix(SUFFIX))


def _both(name: str, peer) -> tuple[str, ...]:
    """The row of a peer, and the one without copies where the layout makes any."""
    return (name,) if name == "sdpa-strided" else (name, name + SUFFIX)
