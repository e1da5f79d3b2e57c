# SPDX-License-Identifier: Apache-2.0
"""Arguments of the fused steps: one error each, before any work, that names what came and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from .grid import DTYPES

_LEAST_EPS = torch.finfo(torch.float32).tiny
_PLAIN = (Tensor, Parameter)


def usual(x, *vectors) -> bool:
    """True where x [..., D] and the vectors [D] are beyond doubt: contiguous, of one dtype and device. It costs a third
    of the checks below, which say what is wrong, or allow what is less usual."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype not in DTYPES or not x.is_contiguous():
        return False
    width, dtype, device = x.shape[-1:], x.dtype, x.device
    if width == (0,) or width == ():
        return False
    for t in vectors:
        if type(t) not in _PLAIN or t.shape != width or t.dtype is not dtype or t.device != device:
            return False
        if not t.is_contiguous():
            return False
    return True


def _same(t, x: Tensor) -> bool:
    like = type(t) is Tensor and t.shape == x.shape and t.dtype is x.dtype and t.device == x.device
    return like and t.is_contiguous()


def usual_norm(x, branch, weight, bias, eps, skip_cls, row_scale) -> bool:
    """The same of the arguments of `add_layer_norm`."""
    return (
        usual(x, weight, bias)
        and x.dim() == 3
        and row_scale is None
        and type(skip_cls) is bool
        and (not skip_cls if branch is None else _same(branch, x))
        and type(eps) is float
        and _LEAST_EPS <= eps < math.inf
    )


def check_norm(x, branch, weight, bias, eps, skip_cls, row_scale, backend: str) -> None:
    check_x(x, "(batch, tokens, dim)")
    if x.dim() != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected 3 dimensions (batch, tokens, dim)")
    if branch is not None:
        check_branch(branch, x)
    elif skip_cls or row_scale is not None:
        name = "skip_cls" if skip_cls else "row_scale"
        raise ValueError(f"{name}: given with branch=None, expected a branch for it to act on")
    check_vector("weight", weight, x)
    check_vector("bias", bias, x)
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias: got dtype {bias.dtype}, expected the dtype of weight, {weight.dtype}")
    if row_scale is not None:
        check_row_scale(row_scale, x, backend)
    check_options(eps, skip_cls)


def check_tensor(name: str, t, device: torch.device | None = None) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a torch.Tensor")
    if device is not None and t.device != device:
        raise ValueError(f"{name}: got device {t.device}, expected the device of x, {device}")
    if t.dim() and t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(
            f"{name}: got stride {t.stride(-1)} in the last dimension, expected 1; rows must be contiguous in memory"
        )


def check_x(x, dims: str) -> None:
    check_tensor("x", x)
    if x.dtype not in DTYPES:
        raise ValueError(f"x: got dtype {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected {dims} with a last dimension of at least 1")


def check_vector(name: str, t, x: Tensor) -> None:
    """A parameter over the last dimension of x, in its dtype or, beside 16-bit activations, in float32."""
    check_tensor(name, t, x.device)
    if tuple(t.shape) != (x.shape[-1],):
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {(x.shape[-1],)}, the width of x")
    if t.dtype != x.dtype and not (t.dtype == torch.float32 and x.dtype.itemsize == 2):
        wide = " or torch.float32" if x.dtype.itemsize == 2 else ""
        raise ValueError(f"{name}: got dtype {t.dtype}, expected the dtype of x, {x.dtype}{wide}")


def check_branch(branch, x: Tensor) -> None:
    check_tensor("branch", branch, x.device)
    if branch.shape != x.shape:
        raise ValueError(f"branch: got shape {tuple(branch.shape)}, expected the shape of x, {tuple(x.shape)}")
    if branch.dtype != x.dtype and not (x.dtype == torch.float32 and branch.dtype in DTYPES[1:3]):
        narrow = " or a 16-bit float" if x.dtype == torch.float32 else ""
        raise ValueError(f"branch: got dtype {branch.dtype}, expected the dtype of x, {x.dtype}{narrow}")


def check_row_scale(row_scale, x: Tensor, backend: str) -> None:
    if not isinstance(row_scale, Tensor):
        raise TypeError(f"row_scale: got {type(row_scale).__name__}, expected a torch.Tensor or None")
    expected = tuple(x.shape[:1]), tuple(x.shape[:2])
    if tuple(row_scale.shape) not in expected or row_scale.dtype != torch.float32 or row_scale.device != x.device:
        raise ValueError(
            f"row_scale: got shape {tuple(row_scale.shape)}, {row_scale.dtype} on {row_scale.device}, expected "
            f"{expected[0]} (batch) or {expected[1]} (batch, tokens), torch.float32 on {x.device}"
        )
    if row_scale.requires_grad and backend != "reference":
        raise ValueError(
            "row_scale: got a tensor that requires grad, expected a constant; backend='reference' has its gradient"
        )


def check_options(eps, skip_cls) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {type(eps).__name__}, expected a number")
    if not _LEAST_EPS <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a finite number of at least {_LEAST_EPS:.2g}")
    if not isinstance(skip_cls, bool):
        raise TypeError(f"skip_cls: got {type(skip_cls).__name__}, expected True or False")


def merged(x: Tensor) -> Tensor:
    """x [..., D] as [B, S, D], without a copy."""
    if x.dim() < 3:
        return x[(None,) * (3 - x.dim())]
    shape, strides, last = x.shape, x.stride(), x.dim() - 1
    # Dimension i continues dimension i - 1 where one step there is a whole walk here.
    joins = [shape[i] == 1 or shape[i - 1] == 1 or strides[i - 1] == strides[i] * shape[i] for i in range(1, last)]
    breaks = [i + 1 for i, join in enumerate(joins) if not join]
    if len(breaks) > 1 and x.numel():
        raise ValueError(
            f"x: got shape {tuple(shape)} with strides {strides}, expected leading dimensions that merge into two "
            "without a copy"
        )
    cut = breaks[0] if breaks else 1
    return x.view(math.prod(shape[:cut]), math.prod(shape[cut:last]), shape[last])
