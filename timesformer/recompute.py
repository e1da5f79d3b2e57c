# SPDX-License-Identifier: Apache-2.0
"""What training does not keep for the backward, but makes anew there.

A LayerNorm's result and a GELU's cost one pass each over memory, and what they are made of is saved for their own
backward. Kept as well, they would be 7 of 22 token tensors of a block: `linear` never keeps them. `segment` does
without more, at the price of computing it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timesformer_kernels.mounting import needs_op

from .layers import plain, weights


class Source(NamedTuple):
    """What a tensor can be made of anew: make(*tensors, *options) gives it."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    options: tuple = ()


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


class _Linear(torch.autograd.Function):
    """F.linear(x, weight, bias) that keeps the source of x, which it may lose; differentiable again."""

    @staticmethod
    def forward(ctx, x, weight, bias, make, options, *tensors):
        ctx.save_for_backward(weight, *tensors)
        ctx.make, ctx.options, ctx.dtype = make, options, x.dtype
        return F.linear(_as(x, weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, dy):
        weight, *tensors = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = dy.flatten(0, -2)
        dx = dweight = dbias = None
        if need_weight:  # first, and x is gone before dx comes
            dweight = rows.mT @ _as(ctx.make(*tensors, *ctx.options), weight.dtype).flatten(0, -2)
        if need_bias:
            dbias = rows.sum(0)
        if need_x:
            dx = _as(dy @ weight, ctx.dtype)
        return dx, dweight, dbias, None, None, *[None] * len(tensors)


def linear(layer: nn.Module, x: Tensor, source: Source | None, with_bias: bool = True) -> Tensor:
    """layer(x); in plain eager training without keeping x where it has a source.

    The compiler decides itself what to make anew, and a transform or a subclass sees ordinary operators.
    with_bias=False leaves the bias of a plain layer to the step that follows.
    """
    if not plain(layer):
        return layer(x)
    weight, bias = weights(layer)
    return product(x, weight, bias if with_bias else None, source)


def _ordinary(t: Tensor | None) -> bool:
    """No subclass, such as a distributed one."""
    return t is None or type(t) is Tensor or type(t) is nn.Parameter


def product(x: Tensor, weight: Tensor, bias: Tensor | None, source: Source | None) -> Tensor:
    """F.linear(x, weight, bias), under the same rule."""
    if (
        source is None
        or not (torch.is_grad_enabled() and weight.requires_grad)
        or needs_op(x)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not _ordinary(weight)
        or not all(map(_ordinary, source.tensors))
    ):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, source.make, source.options, *source.tensors)


def segment(light: bool, run: Callable[..., Tensor], *tensors: Tensor, random: bool = False) -> Tensor:
    """run(*tensors); where `light`, training keeps the tensors alone and makes anew what lies between.

    random: run draws random numbers, which must be the same again.
    """
    if not light or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return run(*tensors)
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=random)
