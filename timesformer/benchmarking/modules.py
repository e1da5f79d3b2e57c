# SPDX-License-Identifier: Apache-2.0
"""What the levels above the core share: random modules, rows of ours, of eager PyTorch and of its compiler."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timesformer_kernels import registry
from timesformer_kernels.grid import view

from . import shapes
from .peers import COMPILE_MODES, compiled
from .problem import Problem, Task, errors_of, own_backends, sampled
from .timing import Timed

OURS = "ours"


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, qkv weights large enough that softmax has clear winners; in evaluation mode.

    Freshly initialised, a model ignores time, and near-uniform attention forgives a wrong grouping of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                noise = 0.3 * noise + ("norm" in name and name.endswith("weight"))
            elif p.dim() in (2, 4):
                noise = noise * p[0].numel() ** -0.5 * (2.0 if "qkv" in name else 1.0)
            p.copy_(noise)
    return module.eval()


class ModuleProblem(Problem):
    """Base of the levels above the core: a module of ours against the same in plain PyTorch, on the same parameters.

    Row "ours" is backend="auto", "ours-NAME" a backend that it did not choose for all attention, "ours-compile" the
    first by torch.compile. "products" are the Linear layers alone. As written, x [B, S, dim] -> the same shape.
    """

    kind = "module"
    directions = shapes.DIRECTIONS
    depth = 1
    differentiate = True  # whether the backward gives the gradient of x, too

    def __init__(self, shape, dtype, device="cpu", judge=None, backend: str | None = None):
        """backend: the one of ours that is timed, all by default."""
        super().__init__(shape, dtype, device, judge)
        self.backend = backend
        # The rows of two clips are compared. Where the gradient is zero for the others, the weights' is made of them.
        self.clips = sampled(shape.batch, 2)

    @cached_property
    def module(self) -> nn.Module:
        """Ours, whose parameters every row uses."""
        return randomise(self.build()).to(device=self.device, dtype=self.dtype)

    @cached_property
    def x(self) -> Tensor:
        return self.random(1, *self.in_shape)

    @cached_property
    def dout(self) -> Tensor:
        return self.random(2, *self.out_shape)

    @cached_property
    def masked(self) -> Tensor:
        masked = torch.zeros_like(self.dout)
        masked[self.clips] = self.dout[self.clips]
        return masked

    @cached_property
    def _truths(self) -> dict:
        return {}

    # what a level says

    def build(self) -> nn.Module:
        """Ours."""
        raise NotImplementedError

    def peers(self, full: bool) -> list[str]:
        raise NotImplementedError

    def peer(self, row: str) -> Callable[[Tensor], Tensor]:
        """x -> out for a row that is not ours, on the parameters of `module`."""
        raise NotImplementedError

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.shape.batch, self.shape.tokens, self.shape.dim)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.in_shape

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x, self.shape.frames)

    def set_backend(self, module: nn.Module, name: str) -> None:
        module.backend = name

    def prepare(self, module: nn.Module) -> None:
        """What a user would do to ours before a run, once."""

    def products(self) -> list[tuple[Tensor, int]]:
        """(weight [outputs, inputs], rows) of every product but those of attention."""
        rows = self.shape.batch * self.shape.tokens
        return [(m.weight, rows) for m in self.module.modules() if isinstance(m, nn.Linear)]

    # the rows

    @property
    def op(self):
        return self.level

    @cached_property
    def ours(self) -> dict[str, tuple[str, str | None]]:
        """{row: (backend, None or why not)}"""
        found = own_backends(self.device, self.dtype, self.shape.head_dim)
        if self.backend is not None:
            return {f"{OURS}-{self.backend}": (self.backend, found[self.backend])}
        sizes = (self.shape.height, self.shape.width, self.shape.frames)
        views = (view(scheme, sizes, cls) for scheme, cls in shapes.CLS.items())
        taken = {registry.resolve("auto", self.device, self.dtype, self.shape.head_dim, v).name for v in views}
        chosen = taken.pop() if len(taken) == 1 else "auto"  # one for time, another for space
        others = {f"{OURS}-{name}": (name, why) for name, why in found.items() if name != chosen}
        return {OURS: (chosen, None), **others}

    def rows(self, full=False):
        return [*self.ours, *([f"{OURS}-compile"] if full else []), *self.peers(full), "products"]

    def why_not(self, row):
        return self.ours[row][1] if row in self.ours else None

    def facts(self, row):
        return {"backend": self.ours[row][0]} if row in self.ours else {}

    def _build(self, row):
        wanted = tuple(self.module.parameters())
        if row == "products":
            return Task(self._forward_products, (self.x,), self.dout, wanted, self.differentiate)
        if row in self.ours:
            run = self._own(self.ours[row][0])
        elif row == f"{OURS}-compile":
            run = compiled(self._own("auto"), "default")
        else:
            run = self.peer(row)
        return Task(run, (self.x,), self.dout, wanted, self.differentiate)

    def _own(self, backend: str) -> Callable[[Tensor], Tensor]:
        """Ours around the same parameters, set to a backend for good."""
        module = copy.deepcopy(self.module, {id(p): p for p in self.module.parameters()})
        self.set_backend(module, backend)
        self.prepare(module)
        return lambda x: self.apply(module, x)

    def timed(self, row, direction):
        if row == "products" and direction != "forward":
            return Timed(self._backward_products(direction))
        return super().timed(row, direction)

    def _inputs_of_products(self) -> dict[tuple[int, int], Tensor]:
        """{(rows, width): random [rows, width]} for the inputs of all products."""
        sizes = {(rows, w.shape[1]) for w, rows in self.products()}
        return {size: self.random(3, *size) for size in sorted(sizes)}

    @cached_property
    def _forward_products(self):
        inputs, weights = self._inputs_of_products(), [(w.detach(), rows) for w, rows in self.products()]

        def run(x):
            for w, rows in weights:
                F.linear(inputs[rows, w.shape[1]], w)

        return run

    def _backward_products(self, direction: str):
        """The two products of each Linear's backward, and its forward where that is asked for."""
        inputs, weights = self._inputs_of_products(), [(w.detach(), rows) for w, rows in self.products()]
        grads = {size: self.random(4, *size) for size in sorted({(rows, len(w)) for w, rows in weights})}

        def run():
            for w, rows in weights:
                x, grad = inputs[rows, w.shape[1]], grads[rows, len(w)]
                if direction != "backward":
                    F.linear(x, w)
                torch.mm(grad, w)
                torch.mm(grad.mT, x)

        return run

    # the gate

    def check(self, row, direction):
        if row == "products":
            return {"out": 0.0}  # computes nothing that could be wrong
        task, grad = self.task(row), direction != "forward"
        leaves, wanted = task.leaves()
        with torch.set_grad_enabled(grad):
            out = task.run(*(leaves if grad else task.operands))
            if out.shape != self.dout.shape:
                raise RuntimeError(f"{row}: shape {tuple(out.shape)}, expected {tuple(self.dout.shape)}")
            if not out.isfinite().all():
                raise RuntimeError(f"{row}: its output is not finite")
            got = {"out": out.detach()[self.clips]}
            if grad:
                grads = list(torch.autograd.grad(out, wanted, self.masked))
                if self.differentiate:
                    got["dx"] = grads.pop(0)[self.clips]
                got["dweights"] = _vector(grads)
        return errors_of(self.judge, got, self._truth(torch.float64, grad), lambda: self._truth(self.dtype, grad))

    def _truth(self, dtype: torch.dtype, grad: bool) -> dict[str, Tensor]:
        """The judge's answer, clip by clip: {"out", "dx": [clips, ...], "dweights": [1, all of them]}."""
        if (dtype, grad) not in self._truths:
            run, exact = self.judge.module(self.level, self.module, dtype, self.shape)
            parameters = [exact[name] for name, _ in self.module.named_parameters()]
            found: dict[str, list] = {"out": [], "dx": [], "dweights": []}
            for clip in self.clips:
                x = self.x[clip : clip + 1].to(dtype).requires_grad_(grad and self.differentiate)
                with torch.set_grad_enabled(grad):
                    out = run(x)
                    found["out"].append(out.detach())
                if grad:
                    wanted = [*([x] if self.differentiate else []), *parameters]
                    grads = list(torch.autograd.grad(out, wanted, self.dout[clip : clip + 1].to(out)))
                    if self.differentiate:
                        found["dx"].append(grads.pop(0))
                    found["dweights"].append(_vector(grads))
            joined = {name: torch.cat(parts) for name, parts in found.items() if parts}
            if "dweights" in joined:
                joined["dweights"] = joined["dweights"].sum(0, keepdim=True)
            self._truths[dtype, grad] = {name: x.to(self.device) for name, x in joined.items()}
        return self._truths[dtype, grad]

    # the floor

    def flops(self, row, direction):
        """A Linear's backward is two products."""
        linear = sum(2 * rows * w.numel() for w, rows in self.products())
        linear *= {"forward": 1, "backward": 2, "forward+backward": 3}[direction]
        attention = sum(shapes.attention_flops(self.shape, scheme, direction) for scheme in shapes.CLS)
        return linear + (0 if row == "products" else self.depth * attention)

    def nbytes(self, row, direction):
        """Forward: x and the weights in, the output out. Backward: x, the weights and the output's gradient in, the
        gradients of x and of the weights out."""
        weights = sum(w.numel() for w, _ in self.products())
        x, out = math.prod(self.in_shape), math.prod(self.out_shape)
        forward = x + weights + out
        backward = (1 + self.differentiate) * x + 2 * weights + out
        total = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]
        return total * self.dtype.itemsize


def _vector(grads) -> Tensor:
    return torch.cat([g.flatten() for g in grads])[None]


def compiled_peer(row: str, run: Callable) -> Callable:
    """`run` by torch.compile in the mode that the row names."""
    return compiled(run, COMPILE_MODES[row])
