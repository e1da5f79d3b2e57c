# SPDX-License-Identifier: Apache-2.0
"""The public attention functions, the registered operators, and the one autograd formula.

A call takes one of three ways to the same backend:

- the registered op `timesformer_kernels::attn_fwd`, where something watches or wraps the call (torch.compile, export,
  fake tensors, FLOP counters, selective checkpointing, tensor subclasses);
- an autograd.Function, in plain eager mode, where it costs a fraction of the op per call;
- the bare function, when no gradient is wanted.

`_gradients` is the only formula; op and Functions mount it. Forward-mode and double derivatives of the fused backends
are refused; backend="reference" is ordinary differentiable torch code and has them all.
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import backends as _backends  # noqa: F401  registers them
from . import grid, registry
from .backends import reference
from .grid import Scheme, View
from .mounting import NAMESPACE, TAGS, needs_op

FWD, BWD = f"{NAMESPACE}::attn_fwd", f"{NAMESPACE}::attn_bwd"
_QKV, _SAVED = "Tensor q, Tensor k, Tensor v", "Tensor? out, Tensor? stats"
_VIEW = "SymInt[] groups, SymInt[] sequence, str cls, float scale, str backend, Tensor? cls_weights"

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
LIBRARY.define(f"attn_fwd({_QKV}, {_VIEW}) -> (Tensor out, Tensor stats)", tags=TAGS)
LIBRARY.define(f"attn_bwd(Tensor dout, {_QKV}, {_SAVED}, {_VIEW}) -> (Tensor, Tensor, Tensor)", tags=TAGS)


# --- the bare functions: plain tensors in, plain tensors out ---------------------------------------------------------


def _backend(q: Tensor, name: str, view: View) -> registry.Backend:
    return registry.resolve(name, q.device, q.dtype, int(q.shape[3]), view)


def _new_stats(backend: registry.Backend, q: Tensor, shape, view: View) -> Tensor | None:
    """Room for what the backward needs of the forward beside its operands and result; None where that is nothing."""
    size = 0 if backend.stats_size is None else backend.stats_size(shape, q.dtype, view)
    return q.new_empty(size, dtype=torch.float32) if size > 0 else None


def _forward(q, k, v, view: View, scale: float, backend: str, cls_weights):
    """(out, stats), with the statistics that the backward needs, None where it needs none."""
    chosen = _backend(q, backend, view)
    stats = _new_stats(chosen, q, q.shape, view)
    return chosen.forward(q, k, v, view, scale, cls_weights, stats), stats


def _results(q, out, stats):
    """For an op or a transform, whose results are never None."""
    return out, q.new_empty(0, dtype=torch.float32) if stats is None else stats


def _backward(dout, q, k, v, out, stats, view: View, scale: float, backend: str, cls_weights, grads=None):
    saved = None if stats is None else (out, stats)
    return _backend(q, backend, view).backward(dout, q, k, v, view, scale, cls_weights, grads, saved)


# --- mount 1: the registered ops -------------------------------------------------------------------------------------


def _op_forward(q, k, v, groups, sequence, cls, scale, backend, cls_weights):
    return _results(q, *_forward(q, k, v, View.from_flat(groups, sequence, cls), scale, backend, cls_weights))


def _op_backward(dout, q, k, v, out, stats, groups, sequence, cls, scale, backend, cls_weights):
    return _backward(dout, q, k, v, out, stats, View.from_flat(groups, sequence, cls), scale, backend, cls_weights)


def _fake_forward(q, k, v, groups, sequence, cls, scale, backend, cls_weights):
    # A named backend is not asked whether it can run here: shapes may be wanted of a device that is not at hand.
    view = View.from_flat(groups, sequence, cls)
    chosen = _backend(q, backend, view) if backend == "auto" else registry.get(backend)
    stats = _new_stats(chosen, q, (*q.shape[:3], int(q.shape[3])), view)
    # new_empty, not empty_like: results are contiguous whatever the strides of q (the compiler relies on it).
    return _results(q, q.new_empty(q.shape), stats)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("attn_fwd", _op_forward, _key)
    LIBRARY.impl("attn_bwd", _op_backward, _key)
torch.library.register_fake(FWD, _fake_forward, lib=LIBRARY)
torch.library.register_fake(BWD, lambda dout, q, *_: tuple(q.new_empty(q.shape) for _ in range(3)), lib=LIBRARY)
ATTN_FWD, ATTN_BWD = torch.ops.timesformer_kernels.attn_fwd.default, torch.ops.timesformer_kernels.attn_bwd.default


def _gradients(run, ctx, dout):
    """The autograd formula: gradients of q, k, v by `run`, None where none is wanted and for everything else."""
    q, k, v, cls_weights, *saved = ctx.saved_tensors
    grads = run(dout, q, k, v, *(saved or (None, None)), *ctx.options, cls_weights)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * ctx.others


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.options, cls_weights = inputs
    ctx.others = len(inputs) - 3
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, cls_weights, *(output if output[1].numel() > 0 else ()))


def _refuse(ctx, *grads):
    raise NotImplementedError(
        "double backward of fused attention is not implemented; backend='reference' supports derivatives of any order"
    )


def _fold_batch(info, in_dims, *tensors):
    """Merge a vmapped dimension into the batch of each tensor; None stays None."""
    out = []
    for x, dim in zip(tensors, in_dims, strict=False):
        if x is not None:
            x = (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        out.append(x)
    return out


def _vmap(count, call, forward=None):
    """A vmap rule for `call(*tensors, *options, cls_weights)` whose first `count` arguments are tensors.

    forward: given for a backward, whose statistics are folded as the forward's rule split them. Where the forward ran
    outside of vmap they are of fewer clips, and only the backend knows how these lie: so they are made again.
    """

    def rule(info, in_dims, *args):
        tensors = _fold_batch(info, (*in_dims[:count], in_dims[-1]), *args[:count], args[-1])
        if forward is not None and args[5] is not None and in_dims[5] is None:
            tensors[4:6] = forward(*tensors[1:4], *args[count:-1], tensors[-1])
        out = call(*tensors[:-1], *args[count:-1], tensors[-1])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in out), (0,) * len(out)

    return rule


torch.library.register_autograd(
    FWD, lambda ctx, dout, dstats: _gradients(ATTN_BWD, ctx, dout), setup_context=_setup_context, lib=LIBRARY
)
# Without a formula of its own the backward op would answer a double backward with a warning and wrong numbers.
torch.library.register_autograd(BWD, _refuse, lib=LIBRARY)
torch.library.register_vmap(FWD, _vmap(3, ATTN_FWD), lib=LIBRARY)
torch.library.register_vmap(BWD, _vmap(6, ATTN_BWD, ATTN_FWD), lib=LIBRARY)


# --- mount 2: autograd.Functions over the bare functions -------------------------------------------------------------


class _Backward(torch.autograd.Function):
    """The backward where it might be differentiated or vmapped again: refuses a second order."""

    forward = staticmethod(lambda *inputs: _backward(*inputs))  # without grads, which apply() would fill in
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse)
    vmap = staticmethod(lambda *args: _vmap(6, _Backward.apply, _FuncAttention.apply)(*args))


class FusedAttention(torch.autograd.Function):
    """forward(ctx, ...) on purpose: with a separate setup_context, apply() runs inspect.signature at every call."""

    @staticmethod
    def forward(ctx, *inputs):
        q, k, v, *ctx.options, cls_weights = inputs
        ctx.others = len(inputs) - 3
        out, stats = _forward(*inputs)
        ctx.save_for_backward(q, k, v, cls_weights, *(() if stats is None else (out, stats)))
        return out

    @staticmethod
    def backward(ctx, dout, dstats=None):
        # Grad mode is on inside a backward only under create_graph or torch.func.
        return _gradients(_Backward.apply if torch.is_grad_enabled() else _backward, ctx, dout)


class _FuncAttention(FusedAttention):
    """The form torch.func asks for, where what the backward needs is a result."""

    forward = staticmethod(lambda q, *rest: _results(q, *_forward(q, *rest)))
    setup_context = staticmethod(_setup_context)
    vmap = staticmethod(lambda *args: _vmap(3, _FuncAttention.apply)(*args))


class PackedAttention(torch.autograd.Function):
    """As FusedAttention, for q, k and v in one tensor: their gradients are written into one as well. Autograd would
    otherwise put them together by a copy, six tensors' worth of traffic."""

    @staticmethod
    def forward(ctx, qkv, *rest):
        *ctx.options, cls_weights = rest
        out, stats = _forward(*qkv.unbind(2), *rest)
        ctx.save_for_backward(qkv, cls_weights, *(() if stats is None else (out, stats)))
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, cls_weights, *saved = ctx.saved_tensors
        inputs = (dout, *qkv.unbind(2), *(saved or (None, None)), *ctx.options, cls_weights)
        if torch.is_grad_enabled():
            dqkv = torch.stack(_Backward.apply(*inputs), 2)
        else:
            dqkv = qkv.new_empty(qkv.shape)
            _backward(*inputs, grads=dqkv.unbind(2))
        return dqkv, *[None] * (len(ctx.options) + 1)


# --- routing ---------------------------------------------------------------------------------------------------------


_FLOP_COUNTER = "torch.utils.flop_counter"
if _FLOP_COUNTER in sys.modules:
    from . import flops as _flops  # noqa: F401


def _watched() -> None:
    """Refuse, or warn, before an observer is told something wrong."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError("forward-mode AD of fused attention is not implemented; use backend='reference'")
    if _FLOP_COUNTER in sys.modules and f"{__package__}.flops" not in sys.modules:
        from . import flops  # noqa: F401  for the next counter

        if any("FlopCounter" in type(mode).__name__ for mode in _get_current_dispatch_mode_stack()):
            text = "this FlopCounterMode does not count attention: import timesformer_kernels.flops before opening one"
            warnings.warn(text, stacklevel=4)


def _checked(q, k, v, packed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype of autocast, where that is on, and checked. packed: all three lie in one tensor."""
    if isinstance(q, Tensor) and q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        narrow = (torch.float32, torch.bfloat16, torch.float16)
        q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.dtype in narrow else x for x in (q, k, v))
    grid.check_packed(q) if packed else grid.check_qkv(q, k, v)
    return q, k, v


def _attend(q, k, v, view: View, scale, backend: str, cls_weights=None, packed=None) -> Tensor:
    """packed: the tensor whose unbind(2) gave q, k and v, if there is one."""
    grid.check_cls_weights(cls_weights, q, view)
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}, expected a number or None")
    elif not -sys.float_info.max <= scale <= sys.float_info.max:  # the compiler knows no isfinite of a symbol
        raise ValueError(f"scale: got {scale}, expected a finite number")
    if backend != "auto":
        registry.get(backend)
    if backend == "reference":
        return reference.attend(q, k, v, view, scale, cls_weights)

    if cls_weights is not None and cls_weights.requires_grad:
        raise ValueError(
            "cls_weights: got a tensor that requires grad, expected a constant; backend='reference' has its gradient"
        )
    if needs_op(q, k, v):
        if not torch.compiler.is_compiling():
            _watched()
        return ATTN_FWD(q, k, v, *view.flat(), view.cls, scale, backend, cls_weights)[0]
    chosen = _backend(q, backend, view)
    if chosen is reference.BACKEND:
        return reference.attend(q, k, v, view, scale, cls_weights)
    if torch._C._are_functorch_transforms_active():
        return _FuncAttention.apply(q, k, v, view, scale, chosen.name, cls_weights)[0]
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if wants_grad and packed is not None and forward_ad._current_level < 0:
        return PackedAttention.apply(packed, view, scale, chosen.name, cls_weights)
    if wants_grad or forward_ad._current_level >= 0:  # the Function has no jvp, so that it refuses forward-mode AD
        return FusedAttention.apply(q, k, v, view, scale, chosen.name, cls_weights)
    return chosen.forward(q, k, v, view, scale, cls_weights)


# --- public ----------------------------------------------------------------------------------------------------------


def time_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frames: int,
    cls: str = "exclude",
    order: str = "space_major",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each patch attends to the patches at its own place in the other frames (paper, section 3, "T" of T+S).

    q, k, v: [B, S, heads, head_dim], any strides with a unit last one, S = N*frames (+ 1 with a class row); float32,
        bfloat16, float16 or float64. They are read in place.
    cls: what row 0 is: "none", "exclude" (TimeSformer), "key" (the paper's equation 13), "per_group", "global".
    order: "space_major" for b (h w t), TimeSformer's own; "time_major" for b (t h w).
    scale: factor of the scores, head_dim ** -0.5 by default.
    backend: "auto", or a name of `available_backends()`, which then runs or raises.
    Returns [B, S, heads, head_dim], contiguous. Raises TypeError, ValueError for bad arguments, RuntimeError where the
    named backend cannot run.
    """
    q, k, v = _checked(q, k, v)
    return _attend(q, k, v, grid.view_of_frames("time", q.shape[1], frames, cls, order), scale, backend)


def space_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frames: int,
    cls: str = "per_group",
    order: str = "space_major",
    scale: float | None = None,
    backend: str = "auto",
    cls_weights: Tensor | None = None,
) -> Tensor:
    """Each patch attends to the patches of its own frame (paper, equation 6 and section 3, "S" of T+S).

    As `time_attention`, and with cls="per_group" the class row is a key and a query of every frame and its output the
    mean over the frames. cls_weights [B, frames] float32 replaces that mean by a weighted sum (no gradient): stochastic
    depth per frame needs it.
    """
    q, k, v = _checked(q, k, v)
    return _attend(q, k, v, grid.view_of_frames("space", q.shape[1], frames, cls, order), scale, backend, cls_weights)


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int, int],
    scheme: str | Scheme,
    cls: str,
    order: str = "space_major",
    scale: float | None = None,
    backend: str = "auto",
    cls_weights: Tensor | None = None,
) -> Tensor:
    """Attention over any view of the token grid (paper, section 3: space, joint, divided, local-global, axial).

    grid: (height, width, frames). scheme: a name of `grid.SCHEMES` ("time", "space", "joint", "height", "width",
        "local", "global") or a `grid.Scheme` of one's own. The rest as in `time_attention` and `space_attention`.
    """
    q, k, v = _checked(q, k, v)
    view = _view(scheme, grid, cls, order)
    _check_grid(q.shape[1], grid, cls)
    return _attend(q, k, v, view, scale, backend, cls_weights)


_view, _check_grid = grid.view, grid.check_grid  # `grid` is an argument's name above


def grid_attention_qkvpacked(
    qkv: Tensor,
    *,
    grid: tuple[int, int, int],
    scheme: str | Scheme,
    cls: str,
    order: str = "space_major",
    scale: float | None = None,
    backend: str = "auto",
    cls_weights: Tensor | None = None,
) -> Tensor:
    """`grid_attention` of q, k and v packed as a projection leaves them: qkv [B, S, 3, heads, head_dim].

    The same result as from `qkv.unbind(2)`; in eager training the gradient is written packed, too, without a copy.
    """
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv: got {type(qkv).__name__}, expected a torch.Tensor")
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, expected (batch, tokens, 3, heads, head_dim)")
    q, k, v = _checked(*qkv.unbind(2), packed=True)
    view = _view(scheme, grid, cls, order)
    _check_grid(q.shape[1], grid, cls)
    packed = qkv if q.dtype == qkv.dtype else None  # autocast has made copies
    return _attend(q, k, v, view, scale, backend, cls_weights, packed)
