# SPDX-License-Identifier: Apache-2.0
"""The parts of a block that are not attention: patch embedding, MLP, stochastic depth, the residual sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """An int or (height, width) -> (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def residual(x: Tensor, branch: Tensor, scale: Tensor | None = None) -> Tensor:
    """x + branch * scale; x is left alone, `branch` is spent.

    Without autograd the sum lands in the branch's own memory. Not under autocast, where the branch is narrower than x.
    """
    if torch.is_grad_enabled() or branch.dtype != x.dtype:
        return x + (branch if scale is None else branch * scale)
    if scale is not None:
        branch.mul_(scale)
    return branch.add_(x)


def hooked(module: nn.Module) -> bool:
    """True when a forward hook may look at what `module` or a part of it takes and gives."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class DropPath(nn.Module):
    """Stochastic depth: drops rows of a residual branch in training, and scales the others by 1 / (1 - rate).

    What a row is differs from step to step (a location, a frame, a clip), so this module only draws the factors.
    Raises ValueError for a rate outside [0, 1).
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path: got {rate}, expected a rate in [0, 1)")
        self.rate = rate

    @property
    def active(self) -> bool:
        """True where rows are dropped now."""
        return self.training and self.rate > 0

    def draw(self, *shape: int, like: Tensor) -> Tensor:
        """Factors 0 or 1 / (1 - rate), one per row: a tensor of `shape` with dtype and device of `like`."""
        keep = 1.0 - self.rate
        return like.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))) with the exact (erf) GELU; x: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        # In place without autograd: the hidden activations are the largest tensor of an inference pass.
        x = F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
        x = self.fc2(F.dropout(x, self.drop, self.training))
        return F.dropout(x, self.drop, self.training)


class PatchEmbed(nn.Module):
    """Patches of every frame -> tokens, by one gather into token order and one matrix product.

    `proj` is the convolution of the original (kernel = stride = patch) and holds weight and bias; its arithmetic is
    that of a matrix product over [C * P * P], which leaves nothing to permute afterwards.
    """

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, video: Tensor, per_frame: bool = False) -> Tensor:
        """video [B, C, T, h*P, w*Q] -> [B, 1 + h*w*T, dim] in order b (h w t), or [B*T, 1 + h*w, dim] per frame.

        Row 0 is zero, where the class token goes; the bias is not added (`proj.bias` goes with the position table).
        """
        (p, q), (b, c, t, height, width) = self.proj.kernel_size, video.shape
        h, w = height // p, width // q
        pixels = video.unflatten(4, (w, q)).unflatten(3, (h, p))  # [B, C, T, h, P, w, Q]
        if per_frame:
            patches = video.new_empty(b * t, 1 + h * w, c * p * q)
            target = patches[:, 1:].unflatten(0, (b, t)).unflatten(2, (h, w)).unflatten(4, (c, p, q))
            target.copy_(pixels.permute(0, 2, 3, 5, 1, 4, 6))
        else:
            patches = video.new_empty(b, 1 + h * w * t, c * p * q)
            target = patches[:, 1:].unflatten(1, (h, w, t)).unflatten(4, (c, p, q))
            target.copy_(pixels.permute(0, 3, 5, 2, 1, 4, 6))
        patches[:, 0].zero_()
        return F.linear(patches, self.proj.weight.flatten(1))
