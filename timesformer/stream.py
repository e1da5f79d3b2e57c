# SPDX-License-Identifier: Apache-2.0
"""The residual stream of a block and of a model: every sum merges with the LayerNorm that follows it."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timesformer_kernels.fused import add_layer_norm

from .layers import plain, residual, steps_of, weights
from .recompute import Source


class Stream:
    """x [B, S, D] and a branch that is not added to it yet: the sum is x + row_scale * (branch + bias).

    A step takes the LayerNorm of the sum and leaves its own branch behind, so that sum and LayerNorm are one pass,
    within a block and from block to block. The stream changes in place: no frame up the stack keeps what is spent.
    """

    def __init__(self, x: Tensor, sources: bool = True):
        """sources: whether training may make LayerNorms anew in the backward; not where it makes all anew anyway."""
        self.x, self.sources = x, sources and torch.is_grad_enabled()
        self.branch: Tensor | None = None
        self.row_scale: Tensor | None = None
        self.bias: Tensor | None = None
        self.skip_cls = False
        self.memory = None  # of `inplace`, which x and branch may lie in

    def add(
        self, branch: Tensor, row_scale: Tensor | None = None, skip_cls: bool = False, bias: Tensor | None = None
    ) -> None:
        """Leave a branch [B, S, D] of the present x behind; it is spent. The branch before it has been added.

        row_scale: [B] or [B, S], the factors of stochastic depth. skip_cls: row 0 of each clip takes no residual.
        bias: [D], which the branch still lacks; without autograd alone.
        """
        self.branch, self.row_scale, self.skip_cls, self.bias = branch, row_scale, skip_cls, bias

    def _complete(self) -> None:
        """For those who know nothing of `inplace`: the branch has its bias, and nobody will write over either again."""
        self.memory = None
        if self.bias is not None:
            self.branch.add_(self.bias)
            self.bias = None

    def sum(self) -> Tensor:
        """The sum, [B, S, D]; nothing is pending then."""
        self._complete()
        branch, scale = self.branch, self.row_scale
        if branch is not None:
            if self.skip_cls:
                branch[:, 0].zero_()
            if scale is not None:
                scale = scale.to(self.x.dtype).view(self.x.shape[0], -1, 1)
            self.branch = None
            self.x = residual(self.x, branch, scale)
        return self.x

    def norm(self, norm: nn.LayerNorm, backend: str) -> tuple[Tensor, Source | None]:
        """The sum, which becomes x, and its LayerNorm [B, S, D], with what the latter can be made of anew."""
        if not plain(norm, nn.LayerNorm):
            return norm(self.sum()), None
        self._complete()
        steps, branch, scale = steps_of(self.x, backend), self.branch, self.row_scale
        (weight, bias), eps = weights(norm), norm.eps
        if steps is not None and weight is None and bias is None:  # folded into the product that follows
            weight, bias = identity(self.x.shape[2], self.x.dtype, self.x.device)
        if steps is None or weight is None or bias is None or weight.dtype not in (self.x.dtype, torch.float32):
            normed = norm(self.sum())
        else:
            self.branch = None
            self.x, normed = add_layer_norm(
                self.x, branch, weight, bias, eps=eps, backend=steps,
                skip_cls=branch is not None and self.skip_cls,
                row_scale=None if branch is None or scale is None else scale.float(),
            )  # fmt: skip
        return normed, Source(_norm_again, (self.x, weight, bias), (eps, steps)) if self.sources else None


@lru_cache(maxsize=16)
def identity(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift of a LayerNorm that only normalises."""
    with torch.inference_mode(False):
        return torch.ones(width, dtype=dtype, device=device), torch.zeros(width, dtype=dtype, device=device)


def _norm_again(x, weight, bias, eps, steps):
    if steps is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return add_layer_norm(x, None, weight, bias, eps=eps, backend=steps)[1]
