# SPDX-License-Identifier: Apache-2.0
"""Divided space-time attention as a module, and its undivided sibling: parameters and a few calls.

Paper: "Is Space-Time Attention All You Need for Video Understanding?", arXiv 2102.05095, section 3. The semantics are
those of the released TimeSformer, which differs from the paper's equation 13: the class token takes no part in time
attention, and its outputs of the frames are averaged in space attention.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timesformer_kernels import grid_attention_qkvpacked
from timesformer_kernels.backends import reference
from timesformer_kernels.grid import view
from timesformer_kernels.registry import resolve

from . import class_row
from .folding import fold
from .layers import DropPath, plain
from .recompute import Source, linear, segment
from .stream import Stream


class Attention(nn.Module):
    """Parameters of one attention step, `qkv` and `proj`, and the step over a view of the token grid.

    qk_scale: factor of the scores, head_dim ** -0.5 by default. attn_drop drops probabilities and proj_drop projected
    outputs, in training. Raises ValueError where num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim = {dim}")
        for name, rate in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name}: got {rate}, expected a rate in [0, 1)")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        scheme: str,
        frames: int,
        cls: str,
        backend: str,
        cls_weights: Tensor | None = None,
        class_row_only: bool = False,
        source: Source | None = None,
        light: bool = False,
    ) -> Tensor:
        """x [B, S, dim], normalised -> the projected attention output [B, S, dim], or its row 0 alone [B, 1, dim].

        source: what x can be made of anew, so that training need not keep it. light: training keeps q, k and v, and
        makes the attention output anew.
        """
        if self.drops:
            out = self._with_dropout(x, scheme, frames, cls, backend, cls_weights)
            return out[:, :1] if class_row_only else out
        step = scheme, frames, cls, backend, cls_weights
        if class_row_only and self._serves_class_row(x, cls, backend):
            run = partial(self._class_row, groups=frames if scheme == "space" else 1, cls_weights=cls_weights)
            return linear(self.proj, segment(light, run, x), None)
        qkv = self.packed(x, source)
        if light:
            return segment(light, lambda qkv: self.proj(self._rows(qkv, step, class_row_only)), qkv)
        return linear(self.proj, self._rows(qkv, step, class_row_only), None)

    def _rows(self, qkv: Tensor, step: tuple, class_row_only: bool) -> Tensor:
        out = self.attend(qkv, *step)
        return out[:, :1] if class_row_only else out

    def _serves_class_row(self, x: Tensor, cls: str, backend: str) -> bool:
        """Whether the class row is served without a key or a value: on a CPU, where arithmetic is all that counts, and
        not under autocast, which would round the scores. The reference stays as the paper has it."""
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        if not torch.compiler.is_compiling():
            resolve(backend, x.device, x.dtype, self.head_dim)  # a named backend that cannot run raises here, too
        return cls == "per_group" and backend != "reference" and plain(self.qkv)

    def _class_row(self, x: Tensor, groups: int, cls_weights: Tensor | None) -> Tensor:
        q_bias, _, v_bias = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        options = dict(heads=self.num_heads, scale=self.scale, groups=groups, cls_weights=cls_weights)
        return class_row.attend(x, self.qkv.weight, q_bias, v_bias, **options)[:, None]

    @property
    def drops(self) -> bool:
        """True where dropout acts now."""
        return self.training and (self.attn_drop > 0 or self.proj_drop > 0)

    def packed(self, x: Tensor, source: Source | None = None) -> Tensor:
        """x [B, S, dim] -> q, k and v [B, S, 3, heads, head_dim], a view of one product."""
        qkv = linear(self.qkv, x, source)  # [B, S, 3 * dim]
        return qkv.view(*qkv.shape[:2], 3, self.num_heads, self.head_dim)

    def attend(self, qkv, scheme, frames, cls, backend, cls_weights=None) -> Tensor:
        """q, k and v, packed -> the attention output before its projection [B, S, dim], without dropout."""
        # None where that says the same: under torch.compile(dynamic=True) an attribute would be a symbol.
        scale = None if self.scale == self.head_dim**-0.5 else self.scale
        options = dict(scheme=scheme, cls=cls, scale=scale, backend=backend, cls_weights=cls_weights)
        return grid_attention_qkvpacked(qkv, grid=_grid(qkv, frames, cls), **options).flatten(2)

    def _with_dropout(self, x, scheme, frames, cls, backend, cls_weights) -> Tensor:
        """Training with dropout needs the probabilities, and each group's own class row: the reference has them."""
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"backend {backend!r} cannot run: attn_drop = {self.attn_drop:g} and proj_drop = {self.proj_drop:g} in "
                "training need the attention probabilities and the class row of every group, which a fused kernel "
                "does not form; use backend='auto' or 'reference', or set both rates to 0"
            )
        shown = view(scheme, _grid(x, frames, cls), cls, "space_major")
        per_group = cls == "per_group"
        out = reference.attend(
            *self.packed(x).unbind(2), shown, self.scale, dropout_p=self.attn_drop, average_cls=not per_group
        )
        if not per_group:
            return F.dropout(self.proj(out.flatten(2)), self.proj_drop)
        out, rows = (F.dropout(self.proj(o.flatten(2)), self.proj_drop) for o in out)  # [B, S, dim], [B, G, dim]
        weights = rows.new_full(rows.shape[:2], 1 / rows.shape[1]) if cls_weights is None else cls_weights
        out[:, 0] = torch.einsum("bg,bgd->bd", weights.to(rows.dtype), rows)
        return out


def _grid(x: Tensor, frames: int, cls: str) -> tuple[int, int, int]:
    return (x.shape[1] - int(cls != "none")) // frames, 1, frames


def _check(x: Tensor, frames: int, dim: int, class_token: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (batch, tokens, {dim})")
    rows = int(class_token)
    if not isinstance(frames, (int, torch.SymInt)) or isinstance(frames, bool) or frames < 1:
        raise ValueError(f"frames: got {frames!r}, expected a positive integer")
    if x.shape[1] < rows or (x.shape[1] - rows) % frames:
        row = " + 1 class row (class_token=True)" if class_token else " (class_token=False)"
        raise ValueError(f"x: got {x.shape[1]} tokens, expected a multiple of frames = {frames}{row}")


class DividedSTAttention(nn.Module):
    """Time attention, then space attention, each with LayerNorm and residual: the half-block of TimeSformer.

        x_p += temporal_fc(DropPath(temporal_attn(temporal_norm1(x_p))))      every location along time; x_c unchanged
        x   += DropPath(attn(norm1(x)))                                       every frame; x_c gets the frames' mean

    where x_c is the class row and x_p are the patches. Parameter names are the original's. Nothing between input and
    output is permuted, repeated or concatenated: q, k and v of both steps are views of one packed product over all
    tokens, and as `proj` is linear the class row's outputs are averaged before it.

    drop_path acts per location in time, before `temporal_fc` (a dropped row still receives that layer's bias), and per
    frame in space. With attn_drop or proj_drop above 0 training runs on the reference backend, which alone has the
    probabilities; any other named backend then raises RuntimeError.

    class_token=False serves models without a class row. backend: "auto" or a name of
    `timesformer_kernels.available_backends()`, which then runs or raises. As in the original, `temporal_fc` starts at
    zero, so that time attention is learnt gradually.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-6,
        class_token: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        attention = (dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.temporal_norm1 = nn.LayerNorm(dim, layer_norm_eps)
        self.temporal_attn = Attention(*attention)
        self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, layer_norm_eps)
        self.attn = Attention(*attention)
        self.drop_path = DropPath(drop_path)
        self.dim, self.class_token, self.backend, self.checkpoint = dim, class_token, backend, "none"
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, x: Tensor, frames: int, class_row_only: bool = False) -> Tensor:
        """x: [B, S, dim] in order b (h w t), S = N * frames (+ 1 with a class row) -> same shape.

        class_row_only=True returns row 0 alone, [B, 1, dim], for a last layer whose patches nobody reads.
        Raises ValueError where S does not fit `frames`, or dim the module's.
        """
        _check(x, frames, self.dim, self.class_token)
        stream = Stream(x, sources=self.checkpoint != "full")
        self.run(stream, frames, class_row_only)
        return stream.sum()

    def run(self, stream: Stream, frames: int, class_row_only: bool = False) -> None:
        """The same on a stream, which is left with the last branch pending."""
        self._time(stream, frames)
        self._space(stream, frames, class_row_only)

    def _time(self, stream: Stream, frames: int) -> None:
        mode = "exclude" if self.class_token else "none"
        attn, light = self.temporal_attn, self.checkpoint == "light"
        normed, source = stream.norm(self.temporal_norm1, self.backend)
        step = "time", frames, mode, self.backend
        if self._folds(normed):
            fc, dropping = self.temporal_fc, self.drop_path.active
            folded = fold(attn.proj, fc, with_bias=not dropping)
            run = lambda qkv, *folded: F.linear(attn.attend(qkv, *step), *folded)  # noqa: E731
            branch = segment(light, run, attn.packed(normed, source), *folded)
            if dropping:  # rows that are dropped still receive the bias of temporal_fc
                scale = self._locations(stream.x, frames).to(branch.dtype)[..., None]
                branch = torch.addcmul(fc.bias.to(branch.dtype), branch, scale)
        else:
            branch = attn(normed, *step, source=source, light=light)
            if self.drop_path.active:
                branch = branch * self._locations(stream.x, frames).to(branch.dtype)[..., None]
            branch = linear(self.temporal_fc, branch, None)
        # The biases of proj and temporal_fc must not reach the class row.
        stream.add(branch, skip_cls=self.class_token)

    def _folds(self, x: Tensor) -> bool:
        """True where proj and temporal_fc are applied as one product: nobody looks at or has replaced either, nothing
        but stochastic depth comes between them, and x [B, S, dim] has more rows than the product of the matrices."""
        if x.shape[0] * x.shape[1] <= self.dim:
            return False
        attn = self.temporal_attn
        return (
            not attn.drops
            and plain(attn, Attention)
            and all(plain(layer) and layer.bias is not None for layer in (attn.proj, self.temporal_fc))
        )

    def _locations(self, x: Tensor, frames: int) -> Tensor:
        """The factors of stochastic depth in time, one per location: [B, S]."""
        locations = (x.shape[1] - int(self.class_token)) // frames
        return self._per_token(self.drop_path.draw(x.shape[0], locations, 1, like=x), x, frames)

    def _space(self, stream: Stream, frames: int, class_row_only: bool) -> None:
        mode = "per_group" if self.class_token else "none"
        normed, source = stream.norm(self.norm1, self.backend)
        x, scale, weights = stream.x, None, None
        if self.drop_path.active:
            kept = self.drop_path.draw(x.shape[0], frames, like=x)  # [B, T], 0 or 1 / keep
            scale = self._per_token(kept[:, None], x, frames)
            if self.class_token:
                # The sum over frames of kept / T * (proj(o) + bias) is the mean of `kept` times the projection of a
                # convex combination. A clip that lost every frame has weights and scale 0; any other sum is above 1.
                scale[:, 0] = kept.mean(1)
                weights = kept.float()
                weights = weights / weights.sum(1, keepdim=True).clamp_min(1.0)
        light = self.checkpoint == "light"
        branch = self.attn(normed, "space", frames, mode, self.backend, weights, class_row_only, source, light)
        if class_row_only:
            stream.x, scale = x[:, :1], None if scale is None else scale[:, :1]
        stream.add(branch, scale)

    def _per_token(self, rows: Tensor, x: Tensor, frames: int) -> Tensor:
        """rows [B, N, 1] or [B, 1, T] -> [B, S]: the factor of every token, 1 for the class row."""
        scale = rows.new_ones(x.shape[0], x.shape[1])
        first = int(self.class_token)
        scale[:, first:].unflatten(1, ((x.shape[1] - first) // frames, frames)).copy_(rows)
        return scale


class JointSTAttention(nn.Module):
    """Every token attends to every token (paper, equations 5 to 7, "ST"), with LayerNorm and residual.

    The same module serves the space-only model ("S"), whose frames are a batch of one-frame clips. drop_path acts per
    row of the batch. Arguments and errors as in `DividedSTAttention`; the class row is always there.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-6,
        backend: str = "auto",
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, layer_norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.drop_path = DropPath(drop_path)
        self.dim, self.backend, self.checkpoint = dim, backend, "none"

    def forward(self, x: Tensor, frames: int, class_row_only: bool = False) -> Tensor:
        """x: [B, 1 + N * frames, dim] -> same shape, or row 0 alone [B, 1, dim]."""
        _check(x, frames, self.dim, True)
        stream = Stream(x, sources=self.checkpoint != "full")
        self.run(stream, frames, class_row_only)
        return stream.sum()

    def run(self, stream: Stream, frames: int, class_row_only: bool = False) -> None:
        """The same on a stream, which is left with the branch pending."""
        normed, source = stream.norm(self.norm1, self.backend)
        options = dict(class_row_only=class_row_only, source=source, light=self.checkpoint == "light")
        branch = self.attn(normed, "joint", frames, "per_group", self.backend, **options)
        stream.add(branch, self.drop_path.per_clip(stream.x))
        if class_row_only:
            stream.x = stream.x[:, :1]
