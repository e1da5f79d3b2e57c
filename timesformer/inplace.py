# SPDX-License-Identifier: Apache-2.0
"""A folded block on a CPU, in memory taken once per forward and without a pass of its own for any bias.

A product with a bias writes that bias into every row of its result first, and a result in fresh memory is cleared by
the system before. Here three tensors serve all blocks,

    x   [B, S, D]        the residual stream
    n   [B, S, D]        what a step reads: normalised rows, then the attention output
    w   [>= B * S * 3 D] what a product of n gives: q, k and v, then the projection; or the hidden activations

and every bias is where it costs nothing. In real arithmetic

    softmax_j(q_i . (k_j + b_k)) = softmax_j(q_i . k_j)           the key's is the same for every j and cancels
    W sum_j(P_ij (v_j + b_v)) + b = W sum_j(P_ij v_j) + (W b_v + b)     rows of P sum to 1: the value's joins proj's

so that the query's alone is left to attention, which adds it where it reads q. Those of proj and fc2 are added with
the residual, that of fc1 with GELU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timesformer_kernels import fused, registry
from timesformer_kernels.grid import view
from timesformer_kernels.mounting import needs_op

from . import class_row
from .layers import steps_of
from .stream import Stream, identity

# Rows whose hidden activations may be larger than q, k and v; more go in parts that fit where those were.
ROWS = 2048


class Memory:
    """What a forward works in, for x [B, S, D]."""

    def __init__(self, like: Tensor, hidden: int):
        batch, tokens, dim = like.shape
        rows = batch * tokens
        self.x, self.n = like.new_empty(like.shape), like.new_empty(like.shape)
        self.most = max(1, rows if rows <= ROWS else max(ROWS, rows * 3 * dim // hidden))
        self.w = like.new_empty(max(rows * 3 * dim, self.most * hidden))

    def wide(self, rows: int, width: int) -> Tensor:
        """w as [rows, width]"""
        return self.w[: rows * width].view(rows, width)


class _Attention(NamedTuple):
    """One attention step: products [inputs, outputs], and where the biases went."""

    eps: float
    qkv: Tensor
    q_bias: Tensor | None  # [H, head_dim]
    proj: Tensor
    bias: Tensor  # of the branch
    heads: int
    scale: float
    scheme: str
    cls: str


def _attention(norm: nn.LayerNorm, attn: nn.Module, scheme: str, cls: str) -> _Attention:
    """Of folded layers."""
    weight, bias, proj = attn.qkv.weight, attn.proj.bias, attn.proj.weight
    dim = proj.shape[1]
    q_bias, _, v_bias = attn.qkv.bias.view(3, attn.num_heads, -1).contiguous().unbind()
    wide = torch.promote_types(weight.dtype, torch.float32)
    joined = F.linear(v_bias.reshape(dim).to(wide), proj.to(wide), None if bias is None else bias.to(wide))
    return _Attention(
        norm.eps, weight.t(), q_bias, proj.t(), joined.to(weight.dtype), attn.num_heads, attn.scale, scheme, cls
    )


class InPlace:
    """The block of a folded form (`folding.Folded`), for streams that it `serves`."""

    def __init__(self, form: nn.Module):
        row = bool(getattr(form, "class_token", True))
        self.steps = []
        if hasattr(form, "temporal_attn"):
            time = _attention(form.temporal_norm1, form.temporal_attn, "time", "exclude" if row else "none")
            space = _attention(form.norm1, form.attn, "space", "per_group" if row else "none")
            self.steps = [time, space]
        else:
            self.steps = [_attention(form.norm1, form.attn, "joint", "per_group")]
        fc1, fc2 = form.mlp.fc1, form.mlp.fc2
        self.eps, self.fc1, self.fc1_bias, self.fc2, self.fc2_bias = (
            form.norm2.eps, fc1.weight.t(), fc1.bias, fc2.weight.t(), fc2.bias,
        )  # fmt: skip
        self.head_dims = tuple(form.get_submodule(n).head_dim for n in ("temporal_attn", "attn") if hasattr(form, n))

    def serves(self, x: Tensor, backend: str) -> bool:
        """True where x is in plain CPU memory, nobody watches, and the C++ kernels would run anyway."""
        return (
            x.device.type == "cpu"
            and x.dtype is self.fc1.dtype
            and not needs_op(x)
            and not torch.is_autocast_enabled("cpu")
            and steps_of(x, backend) == "cpp"
            and all(registry.resolve(backend, x.device, x.dtype, d).name == "cpp" for d in self.head_dims)
        )

    def run(self, stream: Stream, frames: int, class_row_only: bool = False) -> None:
        """As the block's own `run`: the last branch is left pending, with its bias."""
        for step in self.steps:
            memory = self._norm(stream, step.eps)
            n, x = memory.n, stream.x
            if class_row_only and step is self.steps[-1]:
                options = dict(heads=step.heads, scale=step.scale, groups=1 if step.scheme == "joint" else frames)
                row = class_row.attend(n, step.qkv.t(), step.q_bias, None, **options)
                branch = (row @ step.proj)[:, None]
                stream.x, stream.memory = x[:, :1], None  # the rest has other memory
            else:
                self._attend(memory, step, frames)
                out = memory.wide(x.shape[0] * x.shape[1], x.shape[2])
                branch = torch.mm(n.flatten(0, 1), step.proj, out=out).view(x.shape)
            stream.add(branch, skip_cls=step.cls == "exclude", bias=step.bias)
        memory = self._norm(stream, self.eps)
        self._mlp(memory)
        stream.add(memory.n, bias=self.fc2_bias)

    def _steps(self) -> fused.Steps:
        return fused.resolve("cpp", "cpu", self.fc1.dtype, self.fc1.shape[0])[1]

    def _norm(self, stream: Stream, eps: float) -> Memory:
        """The sum, which becomes x, and its LayerNorm in n."""
        x, branch = stream.x, stream.branch
        if stream.memory is None:
            stream.memory = Memory(x, self.fc1.shape[1])
        memory = stream.memory
        vectors = identity(x.shape[2], x.dtype, x.device)
        skips, total = branch is not None and stream.skip_cls, None if branch is None else memory.x
        options = dict(branch_bias=stream.bias, total=total, out=memory.n)
        total, _ = self._steps().add_layer_norm_fwd(x, branch, *vectors, None, eps, skips, **options)
        stream.x, stream.branch, stream.bias = x if total is None else total, None, None
        return memory

    def _attend(self, memory: Memory, step: _Attention, frames: int) -> None:
        """n becomes the attention output before its projection."""
        n = memory.n
        batch, tokens, dim = n.shape
        packed = torch.mm(n.flatten(0, 1), step.qkv, out=memory.wide(batch * tokens, 3 * dim))
        q, k, v = packed.view(batch, tokens, 3, step.heads, dim // step.heads).unbind(2)
        grid = (tokens - int(step.cls != "none")) // frames, 1, frames
        shown = view(step.scheme, grid, step.cls, "space_major")
        registry.get("cpp").forward(q, k, v, shown, step.scale, None, out=n.view(q.shape), q_bias=step.q_bias)

    def _mlp(self, memory: Memory) -> None:
        """n becomes fc2(GELU(fc1(n))), but for fc2's bias."""
        rows = memory.n.flatten(0, 1)
        parts, steps = max(1, -(-len(rows) // memory.most)), self._steps()
        for part in rows.tensor_split(parts):  # of equal size, or one row less
            hidden = torch.mm(part, self.fc1, out=memory.wide(len(part), self.fc1.shape[1]))
            steps.bias_gelu_fwd(hidden[None], self.fc1_bias, out=hidden[None])
            torch.mm(hidden, self.fc2, out=part)


def in_place(form: nn.Module | None) -> InPlace | None:
    """The same block in place, where its weights are on a CPU and there are C++ kernels for them."""
    if form is None or form.norm2.weight is not None:
        return None
    weight = form.mlp.fc1.weight
    if weight.device.type != "cpu" or fused.why_not("cpp", "cpu", weight.dtype, weight.shape[1]):
        return None
    return InPlace(form)
