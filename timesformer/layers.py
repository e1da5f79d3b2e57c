# SPDX-License-Identifier: Apache-2.0
"""The small parts of a model: stochastic depth, the residual sum; who looks at a layer, and what serves its steps."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
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


def watched(m: nn.Module) -> bool:
    """True when a hook looks at this very module."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def hooked_everywhere() -> bool:
    """True when a hook looks at every module of the process."""
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def hooked(module: nn.Module) -> bool:
    """True when a hook may look at what `module` or a part of it takes and gives, or at the gradients of that."""
    return hooked_everywhere() or any(watched(m) for m in module.modules())


def plain(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """True where the layer's parameters say all: of that very class (no adapter, not parametrised, not quantised), with
    its own forward, and without hooks."""
    return type(layer) is kind and "forward" not in layer.__dict__ and not watched(layer) and not hooked_everywhere()


def weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a Linear or LayerNorm: looked up where they are, five times as fast as by attribute."""
    held = layer._parameters
    if len(held) == 2 and not torch.compiler.is_compiling():
        return held["weight"], held["bias"]
    return layer.weight, layer.bias


def steps_of(x: Tensor, backend: str) -> str | None:
    """The backend of the block's fused steps beside attention on `backend`; None where plain torch code serves.

    It does under torch.compile, which fuses the steps itself, and where a transform or a subclass wants operators.
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
