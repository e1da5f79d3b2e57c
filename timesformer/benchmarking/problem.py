# SPDX-License-Identifier: Apache-2.0
"""A problem: inputs, rows that do the same task on them, and the exact results that each row must reproduce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from timesformer_kernels import registry

from .gate import Judge
from .shapes import Shape
from .timing import Timed


@dataclass(frozen=True)
class Task:
    """What a row does: run(*operands) -> out.

    Its backward gives the gradients of `parameters`, and of the operands where `differentiate`.
    """

    run: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    dout: Tensor
    parameters: tuple[Tensor, ...] = ()
    differentiate: bool = True

    def timed(self, direction: str) -> Timed:
        """To be called, and run, under no_grad for "forward", with grad for the other directions."""
        run = self.run
        if direction == "forward":
            operands = self.operands
            return Timed(lambda: run(*operands))
        leaves, wanted = self.leaves()
        if direction == "backward":
            return Timed(
                lambda out: torch.autograd.grad(out, wanted, self.dout),
                setup=lambda: (run(*leaves),),
                again=lambda out: torch.autograd.grad(out, wanted, self.dout, retain_graph=True),
            )
        return Timed(lambda: torch.autograd.grad(run(*leaves), wanted, self.dout))

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """(operands for a forward with a graph, tensors whose gradients its backward gives)"""
        leaves = [x.detach().requires_grad_(self.differentiate) for x in self.operands]
        return leaves, [*(leaves if self.differentiate else ()), *self.parameters]

    def known(self) -> list[Tensor]:
        """What exists before a call: not counted as saved by it."""
        return [*self.operands, *self.parameters]


class Problem:
    """Base of the levels. A subclass has `kind`, `directions`, `_build` and `check`, and says which rows there are.

    Inputs, exact results and tasks come into being when they are asked for, and go with `close`.
    """

    kind: str
    directions: tuple[str, ...]

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cpu", judge: Judge | None = None):
        self.shape, self.dtype, self.device, self.judge = shape, dtype, device, judge or Judge()
        self._tasks: dict[str, Task] = {}

    def random(self, seed: int, *size: int) -> Tensor:
        """Normal numbers in the problem's dtype, on its device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)

    @property
    def op(self) -> str:
        """What is computed, as a table's caption calls it."""
        raise NotImplementedError

    def group(self, direction: str) -> str:
        """The name of a table."""
        return f"{self.op.replace(' ', '-')} {self.shape.label} {str(self.dtype)[6:]} {direction}"

    def rows(self, full: bool = False) -> list[str]:
        """Names of all rows, whether or not they can run; full: those that must be compiled first, too."""
        raise NotImplementedError

    def why_not(self, row: str) -> str | None:
        """The reason, known beforehand, for which a row cannot run here."""
        raise NotImplementedError

    def task(self, row: str) -> Task:
        """Built once. Raises what the row's library raises."""
        if row not in self._tasks:
            self._tasks[row] = self._build(row)
        return self._tasks[row]

    def _build(self, row: str) -> Task:
        raise NotImplementedError

    def drop(self, row: str) -> None:
        """Forget a row's operands and what was compiled for it."""
        self._tasks.pop(row, None)

    def timed(self, row: str, direction: str) -> Timed:
        return self.task(row).timed(direction)

    def check(self, row: str, direction: str) -> dict[str, float]:
        """Runs the row; {tensor: largest absolute error} against float64. Raises where it is wrong.

        The key "out" is the result, every other one a gradient.
        """
        raise NotImplementedError

    def flops(self, row: str, direction: str) -> int | None:
        raise NotImplementedError

    def nbytes(self, row: str, direction: str) -> int | None:
        """The least that must move through memory."""
        raise NotImplementedError

    def facts(self, row: str) -> dict:
        """What else the record of a row says, such as the backend that ran."""
        return {}

    def close(self) -> None:
        """Forget tensors, tasks and compiled code: another shape would count against the limit of recompilations."""
        if any("compile" in row or row.startswith("flex") for row in self._tasks):
            torch.compiler.reset()
        self._tasks.clear()
        for owner in type(self).__mro__:
            for name in [name for name, value in vars(owner).items() if isinstance(value, cached_property)]:
                self.__dict__.pop(name, None)


def own_backends(device: str, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """{backend: None or why it cannot be timed here}, in the order in which `auto` tries them."""
    reasons = {}
    for name in registry.available_backends():
        backend = registry.get(name)
        reasons[name] = backend.why_not(device, dtype, head_dim)
        if reasons[name] is None and device in backend.auto_skips:
            reasons[name] = f"runs on {device} in an interpreter, whose time says nothing about the kernels"
    return reasons


def sampled(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def errors_of(judge: Judge, got: dict[str, Tensor], exact: dict[str, Tensor], plain: Callable[[], dict[str, Tensor]]):
    """{name: largest absolute error}, every tensor accepted by the judge and finite."""
    errors = {}
    for name, x in got.items():
        judge.accept(name, x.detach(), exact[name], lambda name=name: plain()[name])
        errors[name] = (x.detach().double() - exact[name]).abs().max().item()
    return errors
