# SPDX-License-Identifier: Apache-2.0
"""The block's other steps in one pass each: residual sum + LayerNorm, and bias + GELU.

They are bound by memory, so what counts is that every tensor is read and written once. The rules are those of `ops`:
the registered op where something watches or wraps the call, an autograd.Function in plain eager mode, the bare function
when no gradient is wanted, and one formula of the gradient under all of them. A named backend runs or raises;
backend="reference" is ordinary differentiable torch code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import backends as _backends  # noqa: F401  registers them
from . import fused_checks, native_steps, registry
from .backends import reference_steps
from .mounting import NAMESPACE, TAGS, needs_op

MAX_WIDTH = 8192  # of Triton's LayerNorm, which keeps a row in registers


# --- which backend runs ----------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """One implementation of the steps, on operands [B, S, D] already checked; all results are contiguous.

    add_layer_norm_fwd(x, branch, weight, bias, row_scale, eps, skip_cls) -> (sum, None without a branch; normed)
    add_layer_norm_bwd(dsum or None, dnormed, sum, weight, row_scale, eps, skip_cls, branch_dtype)
        -> (dx, dbranch, None without a branch_dtype; dweight, dbias)
    bias_gelu_fwd(x, bias) -> out;  bias_gelu_bwd(dout, x, bias) -> (dx, dbias)
    """

    add_layer_norm_fwd: Callable
    add_layer_norm_bwd: Callable
    bias_gelu_fwd: Callable
    bias_gelu_bwd: Callable


REFERENCE = Steps(*(getattr(reference_steps, name) for name in Steps._fields))


def _triton() -> Steps:
    from .backends.triton import fused

    return Steps(*(getattr(fused, name) for name in Steps._fields))


def _cpp() -> Steps:
    from .backends import cpp_steps

    return Steps(*(getattr(cpp_steps, name) for name in Steps._fields))


# In the order in which `auto` tries them. A backend of attention without these steps is not listed.
_LOADERS: dict[str, Callable[[], Steps]] = {"triton": _triton, "cpp": _cpp, "reference": lambda: REFERENCE}


def why_not(name: str, device_type: str, dtype: torch.dtype, width: int) -> str | None:
    """None when the backend has the fused steps for rows of `width` elements, else the reason in one line."""
    if name == "triton" and width > MAX_WIDTH:
        return f"kernels for rows of up to {MAX_WIDTH} elements, got {width}"
    reason = registry.get(name).why_not(device_type, dtype, 1)
    return native_steps.library()[1] if name == "cpp" and reason is None else reason


@lru_cache(maxsize=1024)
def resolve(name: str, device_type: str, dtype: torch.dtype, width: int) -> tuple[str, Steps]:
    """The backend that serves a call, by name; as `registry.resolve`."""
    if name == "auto":  # the reference, last in the list, runs anywhere
        wanted = (n for n in _LOADERS if device_type not in registry.get(n).auto_skips)
        name = next(n for n in wanted if why_not(n, device_type, dtype, width) is None)
    elif reason := why_not(name, device_type, dtype, width):
        raise RuntimeError(
            f"backend {name!r} cannot run: {reason}; `python -m timesformer_kernels.info` shows what can"
        )
    return name, _LOADERS[name]()


def beside(name: str, device_type: str, dtype: torch.dtype, width: int) -> str:
    """The backend of the steps beside attention on `name`: that one where it has them, else what `auto` takes."""
    if name in _LOADERS:
        try:
            return resolve(name, device_type, dtype, width)[0]  # kept, unlike the answer of why_not
        except RuntimeError:
            pass
    return resolve("auto", device_type, dtype, width)[0]


def _check_backend(backend) -> None:
    if backend != "auto" and backend not in _LOADERS:
        raise ValueError(f"backend: got {backend!r}, expected one of auto, {', '.join(_LOADERS)}")


def _steps(x: Tensor, width: int, backend: str) -> Steps:
    return resolve(backend, x.device.type, x.dtype, width)[1]


# --- the bare functions and mount 1: the registered ops --------------------------------------------------------------

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
LIBRARY.define(
    "add_layer_norm_fwd(Tensor x, Tensor? branch, Tensor weight, Tensor bias, Tensor? row_scale, float eps, "
    "bool skip_cls, str backend) -> (Tensor sum, Tensor normed)",
    tags=TAGS,
)
LIBRARY.define(
    "add_layer_norm_bwd(Tensor? dsum, Tensor dnormed, Tensor sum, Tensor weight, Tensor? row_scale, float eps, "
    "bool skip_cls, ScalarType? branch_dtype, str backend) -> (Tensor dx, Tensor dbranch, Tensor dw, Tensor db)",
    tags=TAGS,
)
LIBRARY.define("bias_gelu_fwd(Tensor x, Tensor bias, str backend) -> Tensor", tags=TAGS)
LIBRARY.define("bias_gelu_bwd(Tensor dout, Tensor x, Tensor bias, str backend) -> (Tensor, Tensor)", tags=TAGS)


def _norm_fwd(x, branch, weight, bias, row_scale, eps, skip_cls, backend):
    steps = _steps(x, x.shape[2], backend)
    return steps.add_layer_norm_fwd(x, branch, weight, bias, row_scale, eps, skip_cls)


def _norm_bwd(dsum, dnormed, total, weight, row_scale, eps, skip_cls, branch_dtype, backend):
    steps = _steps(total, total.shape[2], backend)
    return steps.add_layer_norm_bwd(dsum, dnormed, total, weight, row_scale, eps, skip_cls, branch_dtype)


def _gelu_fwd(x, bias, backend):
    return _steps(x, 1, backend).bias_gelu_fwd(x, bias)


def _gelu_bwd(dout, x, bias, backend):
    return _steps(x, 1, backend).bias_gelu_bwd(dout, x, bias)


def _without_none(bare):
    """An op has no optional results: empty where the bare function gives None."""

    def op(*args):
        like = next(x for x in args if x is not None)
        return tuple(like.new_empty(0) if x is None else x for x in bare(*args))

    return op


def _fake_norm_fwd(x, branch, *_):
    return x.new_empty(0) if branch is None else x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_norm_bwd(dsum, dnormed, total, weight, row_scale, eps, skip_cls, branch_dtype, backend):
    dbranch = total.new_empty(0) if branch_dtype is None else total.new_empty(total.shape, dtype=branch_dtype)
    return total.new_empty(total.shape), dbranch, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


for _name, _bare, _fake in (
    ("add_layer_norm_fwd", _without_none(_norm_fwd), _fake_norm_fwd),
    ("add_layer_norm_bwd", _without_none(_norm_bwd), _fake_norm_bwd),
    ("bias_gelu_fwd", _gelu_fwd, lambda x, bias, _: x.new_empty(x.shape)),
    ("bias_gelu_bwd", _gelu_bwd, lambda dout, x, bias, _: (x.new_empty(x.shape), bias.new_empty(bias.shape))),
):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _bare, _key)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
_OPS = torch.ops.timesformer_kernels


# --- the autograd formulas -------------------------------------------------------------------------------------------


def _setup_norm(ctx, inputs, output):
    x, branch, weight, bias, row_scale, eps, skip_cls, backend = inputs
    # The statistics are not saved: the backward holds the row in registers anyway, and they are two sums over it.
    ctx.save_for_backward(x if branch is None else output[0], weight, row_scale)
    ctx.has_branch = branch is not None
    ctx.shared = ctx.has_branch and row_scale is None and not skip_cls and branch.dtype == x.dtype  # dbranch is dx
    ctx.options = eps, skip_cls, branch.dtype if ctx.has_branch and not ctx.shared else None, backend
    ctx.set_materialize_grads(False)


def _norm_gradients(run, ctx, dsum, dnormed):
    total, weight, row_scale = ctx.saved_tensors
    if not ctx.has_branch:
        dsum = None  # of the op's empty result
    if dsum is None and dnormed is None:
        return (None,) * 8
    dnormed = torch.zeros_like(total) if dnormed is None else dnormed
    dx, dbranch, dweight, dbias = run(dsum, dnormed, total, weight, row_scale, *ctx.options)
    grads = dx, dx if ctx.shared else dbranch, dweight, dbias
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 4


def _setup_gelu(ctx, inputs, output):
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _gelu_gradients(run, ctx, dout):
    grads = run(dout, *ctx.saved_tensors, ctx.backend)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None


def _refuse(ctx, *grads):
    raise NotImplementedError(
        "double backward of a fused step is not implemented; backend='reference' supports derivatives of any order"
    )


for _name, _op_bwd, _gradients, _setup in (
    ("add_layer_norm", _OPS.add_layer_norm_bwd.default, _norm_gradients, _setup_norm),
    ("bias_gelu", _OPS.bias_gelu_bwd.default, _gelu_gradients, _setup_gelu),
):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}_fwd",
        lambda ctx, *douts, formula=_gradients, run=_op_bwd: formula(run, ctx, *douts),
        setup_context=_setup,
        lib=LIBRARY,
    )
    # Without a formula of its own the backward op would answer a double backward with a warning and wrong numbers.
    torch.library.register_autograd(f"{NAMESPACE}::{_name}_bwd", _refuse, lib=LIBRARY)


# --- mount 2: autograd.Functions over the bare functions -------------------------------------------------------------


class _Backward(torch.autograd.Function):
    """A bare backward where it might be differentiated again: refuses a second order."""

    forward = staticmethod(lambda bare, *args: bare(*args))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse)


def _apply(formula, bare, ctx, *douts):
    # Grad mode is on inside a backward only under create_graph or torch.func.
    run = (lambda *args: _Backward.apply(bare, *args)) if torch.is_grad_enabled() else bare
    return formula(run, ctx, *douts)


class AddLayerNorm(torch.autograd.Function):
    """forward(ctx, ...) on purpose: with a separate setup_context, apply() runs inspect.signature at every call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _norm_fwd(*inputs)
        _setup_norm(ctx, inputs, output)
        return output

    backward = staticmethod(lambda ctx, *douts: _apply(_norm_gradients, _norm_bwd, ctx, *douts))


class BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _setup_gelu(ctx, inputs, None)
        return _gelu_fwd(*inputs)

    backward = staticmethod(lambda ctx, dout: _apply(_gelu_gradients, _gelu_bwd, ctx, dout))


class _FuncAddLayerNorm(AddLayerNorm):
    """The form torch.func asks for."""

    forward = staticmethod(_norm_fwd)
    setup_context = staticmethod(_setup_norm)


class _FuncBiasGelu(BiasGelu):
    forward = staticmethod(_gelu_fwd)
    setup_context = staticmethod(_setup_gelu)


class _Step(NamedTuple):
    """The ways to one step."""

    forward: Callable  # of a backend's Steps
    op: Callable
    eager: type
    func: type


_NORM = _Step(lambda steps: steps.add_layer_norm_fwd, _OPS.add_layer_norm_fwd.default, AddLayerNorm, _FuncAddLayerNorm)
_GELU = _Step(lambda steps: steps.bias_gelu_fwd, _OPS.bias_gelu_fwd.default, BiasGelu, _FuncBiasGelu)


def _run(step: _Step, width: int, backend: str, tensors: tuple, *options):
    """The step on checked tensors, the first of which is there; None in place of others."""
    if backend == "reference":
        return step.forward(REFERENCE)(*tensors, *options)
    x, given = tensors[0], [t for t in tensors if t is not None]
    if needs_op(*given):
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            raise NotImplementedError("forward-mode AD of a fused step is not implemented; use backend='reference'")
        return step.op(*tensors, *options, backend)
    name, steps = resolve(backend, x.device.type, x.dtype, width)
    if steps is REFERENCE:
        return step.forward(steps)(*tensors, *options)
    if torch._C._are_functorch_transforms_active():
        return step.func.apply(*tensors, *options, name)
    # The Function has no jvp, so that it refuses forward-mode AD.
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return step.eager.apply(*tensors, *options, name)
    return step.forward(steps)(*tensors, *options)


# --- public ----------------------------------------------------------------------------------------------------------


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    skip_cls: bool = False,
    row_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual sum and LayerNorm in one pass: sum = x + row_scale * branch, normed = LayerNorm(sum) * weight + bias.

    x: [B, S, D] in float32, bfloat16, float16 or float64, any strides with a unit last one, read in place.
    branch: [B, S, D] likewise, in the dtype of x or, beside float32, in a 16-bit one; None leaves the LayerNorm of x
        alone, and sum is then x itself.
    weight, bias: [D] in the dtype of x, or float32 beside 16-bit activations.
    skip_cls: row 0 of each clip takes no residual, as in the time step of TimeSformer: sum[:, 0] is x[:, 0], the
        branch's row 0 is not read, whatever it holds, and its gradient is zero.
    row_scale: float32 [B] or [B, S], the factor of stochastic depth; a constant, without a gradient.
    backend: "auto", "triton", "cpp" or "reference"; a named one runs or raises.
    Returns (sum, normed) [B, S, D] in the dtype of x, contiguous. sum is rounded to it first, and the norm is that of
    the rounded sum; statistics and both gradients' sums over rows are float32 (float64 for float64). Raises TypeError,
    ValueError for bad arguments, RuntimeError where the named backend cannot run.
    """
    if not fused_checks.usual_norm(x, branch, weight, bias, eps, skip_cls, row_scale):
        fused_checks.check_norm(x, branch, weight, bias, eps, skip_cls, row_scale, backend)
    _check_backend(backend)
    tensors = x, branch, weight, bias, row_scale
    total, normed = _run(_NORM, x.shape[2], backend, tensors, float(eps), skip_cls)
    return x if branch is None else total, normed


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """The exact GELU of x + bias in one pass: u * P(N < u). The backward recomputes it from x, and saves nothing else.

    x: [..., D] in float32, bfloat16, float16 or float64 with a unit last stride and leading dimensions that merge into
        two without a copy. bias: [D] in the dtype of x, or float32 beside 16-bit activations.
    backend: "auto", "triton", "cpp" or "reference"; a named one runs or raises. Under torch.compile "auto" is plain
        torch code, which the compiler fuses into one pass itself.
    Returns the shape and dtype of x, contiguous. Raises TypeError, ValueError for bad arguments, RuntimeError where the
    named backend cannot run.
    """
    if not fused_checks.usual(x, bias):
        fused_checks.check_x(x, "(..., dim)")
        fused_checks.check_vector("bias", bias, x)
    _check_backend(backend)
    if backend == "reference" or (backend == "auto" and torch.compiler.is_compiling()):
        return REFERENCE.bias_gelu_fwd(x, bias)
    if x.dim() == 3:
        return _run(_GELU, 1, backend, (x, bias))
    return _run(_GELU, 1, backend, (fused_checks.merged(x), bias)).view(x.shape)
