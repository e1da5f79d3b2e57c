# SPDX-License-Identifier: Apache-2.0
"""Products of a block that are one product in real arithmetic.

    temporal_fc(s * proj(o)) = s * (W' o + W_fc b_proj) + b_fc,  W' = W_fc W_proj    s: stochastic depth
    W (g * z + b) + c = (W diag(g)) z + (W b + c)           z: normalised; g, b: scale and shift of LayerNorm

The first is applied at every call where it pays, in training too (`fold`). `Folded` keeps the results of both for
inference; the parameters themselves never change, so that every checkpoint is that of the unfolded model.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inplace import InPlace, in_place
from .layers import hooked, hooked_everywhere, plain, watched
from .stream import Stream


def fold(proj: nn.Linear, fc: nn.Linear, with_bias: bool = True) -> tuple[Tensor, Tensor]:
    """(weight, bias) of fc(proj(x)), or but for fc's own bias. Autograd goes through them to all parameters:

    dW_fc = dW' W_proj^T + (sum dy) b_proj^T,  dW_proj = W_fc^T dW',  db_proj = W_fc^T sum dy,  with s * dy for dy.
    """
    return fc.weight @ proj.weight, F.linear(proj.bias, fc.weight, fc.bias if with_bias else None)


# A LayerNorm of a block and the product that follows it.
_PAIRS = {"temporal_norm1": "temporal_attn.qkv", "norm1": "attn.qkv", "norm2": "mlp.fc1"}


def refusal(block: nn.Module) -> str | None:
    """None where the layers of a block can be folded exactly, else which one cannot and why, in one line."""
    if hooked(block):
        return f"{_hooked_part(block)}: a hook looks at it"
    divided = hasattr(block, "temporal_fc")
    pairs = {norm: layer for norm, layer in _PAIRS.items() if divided or norm != "temporal_norm1"}
    wanted = [*((norm, nn.LayerNorm) for norm in pairs), *((layer, nn.Linear) for layer in pairs.values())]
    for name, kind in [*wanted, *([("temporal_attn.proj", nn.Linear), ("temporal_fc", nn.Linear)] if divided else [])]:
        layer = block.get_submodule(name)
        if not plain(layer, kind):
            how = "with another forward" if type(layer) is kind else "an adapter, a parametrised or a quantised layer?"
            return f"{name}: got {type(layer).__name__} ({how}), expected torch.nn.{kind.__name__} itself"
        for p in layer.parameters():
            if type(p) is not nn.Parameter or type(p.data) is not Tensor or not p.is_floating_point():
                return f"{name}: got a parameter of type {type(p.data).__name__}, expected a plain floating tensor"
            if p.is_inference():
                return f"{name}: got parameters made in inference mode, whose changes cannot be seen"
        if kind is nn.LayerNorm and (layer.weight is None or layer.bias is None):
            return f"{name}: got a LayerNorm without weight or bias, expected both"
    if divided and block.temporal_attn.proj.bias is None:
        return "temporal_attn.proj: got no bias, expected one"
    return None


def _hooked_part(block: nn.Module) -> str:
    return next((name for name, part in block.named_modules() if name and not plain(part, type(part))), "self")


class Folded:
    """The folded form of a block, for inference; made again when a parameter of the block has changed.

    Changes through `parameter.data` leave no trace: fold again after them.
    """

    def __init__(self, block: nn.Module):
        self._make(block)

    def _make(self, block: nn.Module) -> None:
        self._parts, self._form, self._in_place = [_part(m) for m in block.modules()], None, None
        if refusal(block) is None:
            with torch.no_grad():
                self._form = _form(block)
                self._in_place = in_place(self._form)

    def serving(self, block: nn.Module, stream: Stream) -> nn.Module | InPlace:
        """What serves the stream now: the folded form, on a CPU in place, or the block itself."""
        if torch.is_grad_enabled() or block.training or torch.compiler.is_compiling() or hooked_everywhere():
            return block
        seen = False
        for m, children, held in self._parts:  # plain loops: this runs at every call
            seen = seen or watched(m)
            if m._modules != children or _changed(m._parameters, held):
                self._make(block)
                return self.serving(block, stream)
        if seen or self._form is None:
            return block
        if self._in_place is not None and self._in_place.serves(stream.x, block.backend):
            return self._in_place
        self._form.backend = block.backend
        return self._form


def _part(m: nn.Module) -> tuple:
    """What tells whether a module and its parameters are the same as now."""
    held = [(name, p, p.data_ptr(), version_of(p)) for name, p in m._parameters.items() if p is not None]
    return m, dict(m._modules), held


def _changed(parameters: dict, held: list) -> bool:
    for name, p, address, version in held:
        if parameters.get(name) is not p or p.data_ptr() != address or version_of(p) != version:
            return True
    return False


def version_of(p: Tensor) -> int:
    """A number that grows with every change in place; a tensor made in inference mode does not count."""
    return 0 if p.is_inference() else p._version


def _form(block: nn.Module) -> nn.Module:
    """A block of the same class whose LayerNorms only normalise, and whose temporal_fc is part of proj."""
    parts = {"drop_path": _with(block.drop_path)}
    for norm, layer in _PAIRS.items():
        if hasattr(block, norm):
            owner, name = layer.split(".")
            parts[norm] = nn.LayerNorm(block.dim, getattr(block, norm).eps, elementwise_affine=False)
            folded = _after_norm(getattr(block, norm), block.get_submodule(layer))
            parts[owner] = _with(block.get_submodule(owner), **{name: folded})
    if hasattr(block, "temporal_fc"):
        joined = _linear(*fold(_wide(block.temporal_attn.proj), _wide(block.temporal_fc)), block.temporal_fc.weight)
        parts["temporal_attn"] = _with(parts["temporal_attn"], proj=joined)
        parts["temporal_fc"] = nn.Identity()
    return _with(block, **parts)


def _with(module: nn.Module, **children: nn.Module) -> nn.Module:
    """The module in evaluation mode with other children: everything else is shared, so that eval() would reach it."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {**module._modules, **children}
    return twin


def _after_norm(norm: nn.LayerNorm, layer: nn.Linear) -> nn.Linear:
    wide = _wide(layer)
    weight, bias = wide.weight * norm.weight.to(wide.weight.dtype), norm.bias.to(wide.weight.dtype)
    return _linear(weight, F.linear(bias, wide.weight, wide.bias), layer.weight)


def _wide(layer: nn.Linear) -> nn.Linear:
    """The layer in at least float32, so that what is folded is rounded once."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    return _linear(layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def _linear(weight: Tensor, bias: Tensor | None, like: Tensor | None = None) -> nn.Linear:
    """A layer of these constants, in the dtype of `like`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight if like is None else weight.to(like.dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias if like is None else bias.to(like.dtype), requires_grad=False)
    return layer
