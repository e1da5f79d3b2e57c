# SPDX-License-Identifier: Apache-2.0
"""The other steps, one pass each: residual sum + LayerNorm, the embedding with its first LayerNorm, bias + GELU.

"torch" are PyTorch's own operations one after the other, "copy" moves as many bytes as the step must. "embedding" is
the sum of a table that all clips share with the products of the patches; at one clip it is the first step.
"""

import peers
import pytest
import torch
import torch.nn.functional as F

from timesformer.benchmarking import shapes
from timesformer_kernels import fused

EPS = 1e-6
OWN = tuple(name for name in fused._LOADERS if name != "reference")
ROWS = (*OWN, "torch", "copy")
DIRECTIONS = ("forward", "forward+backward")
STEPS = ("add-layer-norm", "embedding", "bias-gelu")


class Step:
    """Operands of one step [B, S, D] and its rows: a function of `leaves`, which are those with a gradient."""

    def __init__(self, name, dtype, tiny):
        clip = shapes.TINY_SQUARE if tiny else shapes.clip(8, 224, batch=8 if peers.DEVICE == "cuda" else 1)
        generator = torch.Generator().manual_seed(0)
        self.name, self.dtype, self.shape = name, dtype, clip
        self.batch, self.rows = clip.batch, clip.tokens
        self.width = clip.dim * (4 if name == "bias-gelu" else 1)

        def draw(*size):
            return torch.randn(*size, generator=generator).to(device=peers.DEVICE, dtype=dtype).requires_grad_()

        first = 1 if name == "embedding" else self.batch
        self.leaves = [draw(first, self.rows, self.width), draw(self.width)]
        if name != "bias-gelu":
            self.leaves += [draw(self.batch, self.rows, self.width), draw(self.width)]
        results = 1 if name == "bias-gelu" else 2
        self.douts = [draw(self.batch, self.rows, self.width).detach() for _ in range(results)]

    def run(self, row, leaves):
        if self.name == "bias-gelu":
            x, bias = leaves
            return (F.gelu(x + bias) if row == "torch" else fused.bias_gelu(x, bias, backend=row),)
        x, weight, branch, bias = leaves
        if row == "torch":
            total = x + branch
            return total, F.layer_norm(total, (self.width,), weight, bias, EPS)
        return fused.add_layer_norm(x.expand(self.batch, -1, -1), branch, weight, bias, eps=EPS, backend=row)

    def differentiated(self, row, leaves, douts):
        out = self.run(row, leaves)
        return [*out, *torch.autograd.grad(out, leaves, douts)]

    def call(self, row, direction):
        if row == "copy":
            count = self.nbytes(direction) // (2 * self.dtype.itemsize)
            source = torch.randn(count, device=peers.DEVICE).to(self.dtype)
            return lambda: torch.empty_like(source).copy_(source)  # into fresh memory, as the steps'
        if direction == "forward":
            return lambda: self.run(row, self.leaves)
        return lambda: self.differentiated(row, self.leaves, self.douts)

    def nbytes(self, direction):
        """Every operand read once, every result written once; what the backward needs of the forward is read again."""
        size, shared = self.batch * self.rows * self.width, self.rows * self.width
        first = shared if self.name == "embedding" else size
        forward = 2 * size if self.name == "bias-gelu" else first + 3 * size
        # x (or the sum), gradients in and out; the gradients of both summands are one tensor.
        backward = 3 * size if self.name == "bias-gelu" else 4 * size
        backward += size + shared if self.name == "embedding" and self.batch > 1 else 0  # the sum over clips
        return (forward + (backward if direction != "forward" else 0)) * self.dtype.itemsize

    def check(self, row, direction):
        """Largest errors (of results, of gradients) against float64, by the rule of the tests."""
        if row == "copy":
            return None, None
        wide, douts = [x.detach().double().requires_grad_() for x in self.leaves], [d.double() for d in self.douts]
        exact = self.differentiated("torch", wide, douts)
        plain = self.differentiated("torch", self.leaves, self.douts)
        got = self.differentiated(row, self.leaves, self.douts)
        results = len(self.douts)
        for i, (g, e, p) in enumerate(zip(got, exact, plain, strict=True)):
            if row != "torch":
                peers.oracle.assert_no_worse(f"{self.name} {row} result {i}", g.cpu(), e.cpu(), p.cpu())
        errors = [(g.double() - e).abs().max().item() for g, e in zip(got, exact, strict=True)]
        return max(errors[:results]), max(errors[results:]) if direction != "forward" else None


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", peers.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", STEPS)
def test_step(request, compare, name, dtype, direction, row):
    step = Step(name, dtype, request.config.getoption("--tiny", False))

    def why_not(row):
        return fused.why_not(row, peers.DEVICE, dtype, step.width) if row in OWN else None

    if reason := why_not(row) or (peers.DEVICE == "cpu" and row == "triton" and "the interpreter measures nothing"):
        pytest.skip(f"{row}: {reason}")
    errors = step.check(row, direction)
    usable = [name for name in ROWS if not (why_not(name) or (peers.DEVICE == "cpu" and name == "triton"))]
    compare(
        row,
        lambda: {name: step.call(name, direction) for name in usable},
        dtype=dtype,
        device=peers.DEVICE,
        group=f"{name} {step.shape.label} {str(dtype)[6:]} {direction}",
        grad=direction != "forward",
        seconds=4.0,
        warmup=3,
        info=dict(
            kind="step",
            op=name.replace("-", " "),
            shape=f"{step.shape.label}: {step.batch} x {step.rows} rows of {step.width}",
            direction=direction,
            bytes=step.nbytes(direction),
            max_err=errors[0],
            max_err_grad=errors[1],
        ),
    )
