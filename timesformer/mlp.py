# SPDX-License-Identifier: Apache-2.0
"""The MLP of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timesformer_kernels.fused import bias_gelu

from .layers import plain, steps_of
from .recompute import Source, linear

# Rows at a time, without autograd, where a fused step does not write its result over its input: hidden activations are
# the largest tensor of an inference pass, and two of them at once would set its peak. Two parts of a clip of 8 frames
# at 224 pixels cost 1 to 3 % of an MLP in float32 (one thread), four of them 10 %: each product packs its weights anew.
ROWS = {"cpu": 1024, "cuda": 16384}


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))) with the exact (erf) GELU; x: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = drop

    def forward(self, x: Tensor, source: Source | None = None, backend: str = "auto") -> Tensor:
        """backend: that of the block. source: what x can be made of anew; with it, training keeps neither x nor
        the activations."""
        rows = x.numel() // x.shape[-1]
        most = ROWS.get(x.device.type, rows)
        # Compiled code asks nothing of a size: it would be compiled again for others.
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or rows <= most or steps_of(x, backend) is None
        if whole or not (plain(self.fc1) and plain(self.fc2)):  # whoever looks at a layer sees all rows at once
            return self._run(x, source, backend)
        size = -(-rows // -(-rows // most))  # parts of equal size
        out = [self._run(part, None, backend) for part in x.flatten(0, -2).split(size)]
        return torch.cat(out).view(*x.shape[:-1], -1)

    def _run(self, x: Tensor, source: Source | None, backend: str) -> Tensor:
        dropping = self.training and self.drop > 0
        x, source = self._activate(x, source, backend)
        if dropping:
            x, source = F.dropout(x, self.drop), None
        x = linear(self.fc2, x, source)
        return F.dropout(x, self.drop) if dropping else x

    def _activate(self, x: Tensor, source: Source | None, backend: str) -> tuple[Tensor, Source | None]:
        """GELU(fc1(x)), and what it can be made of anew."""
        fc1 = self.fc1
        steps = steps_of(x, backend) if plain(fc1) else None
        if steps is None or fc1.bias is None:
            x = linear(fc1, x, source)
            # In place without autograd: the hidden activations are the largest tensor of an inference pass.
            out = F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
            return out, source and Source(F.gelu, (x,))
        x, bias = linear(fc1, x, source, with_bias=False), fc1.bias
        return bias_gelu(x, bias, backend=steps), source and Source(_bias_gelu, (x, bias), (steps,))


def _bias_gelu(x, bias, steps):
    return bias_gelu(x, bias, backend=steps)
