# SPDX-License-Identifier: Apache-2.0
"""The small parts of a model: patch embedding, stochastic depth, the residual sum; and who looks at a layer."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from timesformer_kernels import fused


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


def _watched(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def hooked_everywhere() -> bool:
    """True when a hook looks at every module of the process."""
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def hooked(module: nn.Module) -> bool:
    """True when a hook may look at what `module` or a part of it takes and gives, or at the gradients of that."""
    return hooked_everywhere() or any(_watched(m) for m in module.modules())


def plain(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """True where the layer's parameters say all: of that very class (no adapter, not parametrised, not quantised), with
    its own forward, and without hooks."""
    return type(layer) is kind and "forward" not in layer.__dict__ and not _watched(layer) and not hooked_everywhere()


def steps_of(x: Tensor, backend: str) -> str | None:
    """The backend of the block's fused steps beside attention on `backend`; None where plain torch code serves.

    It does under torch.compile, which fuses the steps itself, and where a transform or a subclass wants plain operators.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.device.type not in ("cpu", "cuda")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return None
    name = fused.beside(backend, x.device.type, x.dtype, x.shape[-1])
    return None if name == "reference" else name


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
        """Factors 0 or 1 / (1 - rate), one per row: a tensor of `shape` on the device of `like`, in its dtype or, where
        that is a 16-bit one, in float32."""
        keep, dtype = 1.0 - self.rate, torch.promote_types(like.dtype, torch.float32)
        return like.new_empty(shape, dtype=dtype).bernoulli_(keep).div_(keep)

    def per_clip(self, x: Tensor) -> Tensor | None:
        """Factors for whole clips, [B]; None where none is dropped."""
        return self.draw(x.shape[0], 1, 1, like=x).flatten() if self.active else None

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


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
