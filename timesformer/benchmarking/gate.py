# SPDX-License-Identifier: Apache-2.0
"""The gate: what a row computes is compared with float64 before it is timed.

`Judge` knows the exact results and when to accept. This one needs nothing but the package: its reference backend, run
in float64. The benchmarks of the source tree put the tests' oracle in its place, which shares no code with the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from timesformer_kernels import grid_attention

# Largest error of any one row of the last axis, relative to the root mean square row of the exact result. A key too
# many or too few among 197 moves a row by 7 % at least; the arithmetic of a dtype stays well below its limit.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

FACTOR, WRONG = 3.0, 0.3  # a multiple of plain torch's error; nothing that large is rounding


class WrongResult(RuntimeError):
    """A row whose numbers are wrong; it is not timed."""


def row_error(got: Tensor, exact: Tensor) -> float:
    """Largest L2 error of a row of the last axis over the root mean square L2 norm of the exact rows."""
    if exact.numel() == 0:
        return 0.0
    got, exact = (x.reshape(-1, x.shape[-1]).double() for x in (got, exact))
    scale = exact.square().sum(-1).mean().sqrt()
    return ((got - exact).norm(dim=-1).max() / torch.where(scale > 0, scale, torch.ones_like(scale))).item()


class Judge:
    """Exact results by the package's own reference in float64, and LIMITS."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shape, scheme: str, cls: str) -> list[Tensor]:
        """[out, dq, dk, dv] in the dtype of the inputs, [B, S, H, D] each."""
        options = dict(grid=(shape.height, shape.width, shape.frames), scheme=scheme, cls=cls, backend="reference")
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = grid_attention(*leaves, **options)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def module(
        self, level: str, module: nn.Module, dtype: torch.dtype, shape
    ) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
        """(run, parameters): run(x) -> the exact output of `module`, by parameters of its names in `dtype`.

        level: "half-block" and "block" run tokens [B, S, dim], "model" and "train" a video.
        """
        exact = copy.deepcopy(module).to(dtype)
        for part in exact.modules():
            if hasattr(part, "backend"):
                part.backend = "reference"
        run = exact if level in ("model", "train") else lambda x: exact(x, shape.frames)
        return run, dict(exact.named_parameters())

    def accept(self, name: str, got: Tensor, exact: Tensor, plain: Callable[[], Tensor]) -> None:
        """Raises WrongResult where `got` is wrong. plain(): the same by plain torch in the dtype of `got`.

        Many layers add up their roundings: beyond the limit of one step, plain torch's own error decides.
        """
        limit, error = LIMITS[got.dtype], row_error(got, exact)
        if error > limit:
            limit = min(max(limit, FACTOR * row_error(plain(), exact)), WRONG)
        if not error <= limit:  # NaN fails too
            raise WrongResult(f"{name} is off by {error:.1e} of its scale, limit {limit:.1e}")
