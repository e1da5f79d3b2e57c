# SPDX-License-Identifier: Apache-2.0
"""Attention by Triton kernels: which kernel, over what grid, with which numbers. Arguments arrive checked.

All that depends on shapes, strides and the device's kind alone is worked out once and kept (`_forward_plan`,
`_backward_plan`); a call then allocates its results and launches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ...grid import View
from ...mounting import fresh
from . import class_row, regimes, resident, streaming
from .launch import INTERPRETED, Step, capability, float32_precision
from .regimes import CLS, Plan


class Layout(NamedTuple):
    """What the kernels are told of the tensors of a call; the key of everything that is kept."""

    view: View
    shape: tuple
    dtype: torch.dtype
    strides: tuple  # (batch, token, head) of q, k, v; for the backward also of dout and of the gradients
    aligned: bool
    weights: bool
    stats: bool
    precision: str
    device: int


def _unit(layout: Layout) -> int:
    """Elements in 16 bytes where every row of every tensor starts at a multiple of them, else 1."""
    vec = 16 // layout.dtype.itemsize
    numbers = (layout.shape[3], *(n for strides in layout.strides for n in strides))
    return vec if layout.aligned and all(n % vec == 0 for n in numbers) else 1


def _base(layout: Layout) -> Plan:
    B, S, H, D = layout.shape
    view = layout.view
    reach = max(abs(s) * S + D for _, s, _ in (*layout.strides, (0, H * D, 0)))
    return Plan(
        D=D,
        BLOCK_D=regimes.block_d(D),
        CLS=CLS[view.cls],
        FIRST=view.first,
        GROUP_AXES=len(view.groups),
        SEQ_AXES=len(view.sequence),
        VEC=_unit(layout),
        WIDE=reach >= 2**31,
        FULL=layout.dtype == torch.float32,
        UPCAST=INTERPRETED and layout.dtype == torch.bfloat16,
        PRECISION=layout.precision,
        STATS=False,
        SAVED=False,
        WEIGHTS=layout.weights,
    )


def _axes(view: View) -> tuple[tuple[int, ...], ...]:
    """(sizes of the second and third axis, steps of the three) of the groups, then of the sequence."""
    out = []
    for pairs in (view.groups, view.sequence):
        padded = (*pairs, (1, 0), (1, 0), (1, 0))
        out.append((padded[1][0], padded[2][0], *(step for _, step in padded[:3])))
    return tuple(out)


def _step(layout: Layout, base: Plan, name: str) -> Step:
    """The launch of the attention kernel of that name."""
    B, S, H, D = layout.shape
    G, M = layout.view.num_groups, layout.view.members
    arch = regimes.architecture(capability(layout.device))
    chosen = regimes.config(name, arch, layout.precision, layout.dtype.itemsize, D, M)
    groups, sequence = _axes(layout.view)
    strides = tuple(n // base.VEC for triple in layout.strides for n in triple)
    options = dict(num_warps=chosen.num_warps, num_stages=chosen.num_stages)
    if layout.dtype == torch.float32 and D <= 64:  # wider rows spill without
        # A score is rounded before the maximum is taken off, and in the backward as in the forward. Fused into one
        # instruction here and not there, at scores of 1e5 the probabilities would be 1 % apart.
        options["enable_fp_fusion"] = False
    if name.startswith("resident"):
        plan = regimes.resident_plan(base, layout.view, chosen)
        tiles = -(-G // plan.PACK)
        numbers = (*strides, S, H, G, tiles, *groups, *sequence[2:])
        return Step(getattr(resident, name), B * tiles * H, numbers, plan, options)
    plan = regimes.streaming_plan(base, chosen)
    owned = (M, plan.BLOCK_N) if name.endswith("kv") else (M - plan.SKIP, plan.BLOCK_M)
    tiles = -(-owned[0] // owned[1])
    numbers = (*strides, S, H, M, tiles, G, *groups, *sequence)
    return Step(getattr(streaming, name), B * G * H * tiles, numbers, plan, options)


def _kind(direction: str, layout: Layout) -> str:
    M = layout.view.members
    fits = regimes.resident(direction, M, layout.dtype.itemsize, layout.shape[3])
    return f"{'resident' if fits else 'streaming'}_{direction}"


def _saves(layout: Layout) -> bool:
    M = layout.view.members
    return not regimes.resident("alone", M, layout.dtype.itemsize, layout.shape[3])


@lru_cache(maxsize=4096)
def _forward_plan(layout: Layout) -> tuple[Step, Step | None]:
    """The attention kernel, and where the class row is shared by the groups the kernel that puts it together."""
    B, S, H, D = layout.shape
    main = _step(layout, _base(layout)._replace(STATS=layout.stats and _saves(layout)), _kind("forward", layout))
    if main.plan.CLS < 2:
        return main, None
    plan = _class_plan(main.plan)._replace(STATS=layout.stats)
    return main, Step(class_row.class_forward, B * H, (S, H, layout.view.num_groups), plan, dict(num_warps=4))


@lru_cache(maxsize=4096)
def _backward_plan(layout: Layout) -> tuple[tuple[Step, ...], Step | None]:
    B, S, H, D = layout.shape
    base, name = _base(layout)._replace(SAVED=_saves(layout)), _kind("backward", layout)
    names = (name,) if name.startswith("resident") else (name + "_q", name + "_kv")
    main = tuple(_step(layout, base, name) for name in names)
    if base.CLS == 0:
        return main, None
    gb, _, gh = (n // base.VEC for n in layout.strides[4])
    finish = Step(
        class_row.class_backward, B * H, (H, layout.view.num_groups, gb, gh), _class_plan(base), dict(num_warps=4)
    )
    return main, finish


def _class_plan(plan: Plan) -> Plan:
    """Only what the kernels of the class row read, so that one compilation serves many views."""
    unread = dict(GROUP_AXES=0, SEQ_AXES=0, FIRST=1, WIDE=False, UPCAST=False, PRECISION="", STATS=False, SAVED=False)
    return plan._replace(**unread, **Plan._field_defaults)


def _layout(view: View, tensors, weights: bool, stats: bool) -> Layout:
    q = tensors[0]
    address = 0
    for x in tensors:
        address |= x.data_ptr()
    precision = float32_precision() if q.dtype == torch.float32 else "ieee"
    strides = tuple(x.stride()[:3] for x in tensors)
    return Layout(view, tuple(q.shape), q.dtype, strides, address % 16 == 0, weights, stats, precision, q.get_device())


def _parts(stats: torch.Tensor | None, q: torch.Tensor, view: View):
    """The three parts of stats (regimes.stats_parts), None for what is not there."""
    if stats is None:
        return None, None, None
    sizes = regimes.stats_parts(q.shape, q.dtype, view)
    return tuple(part if part.numel() else None for part in stats.split(sizes))


def forward(q, k, v, view: View, scale: float, cls_weights, stats=None) -> torch.Tensor:
    B, S, H, D = q.shape
    out = fresh(q)
    if out.numel() == 0:
        return out
    view = _not_empty(view)
    if view is None:
        return out.zero_()
    main, finish = _forward_plan(_layout(view, (q, k, v), cls_weights is not None, stats is not None))
    cls_sums, sums, cls_out = _parts(stats, q, view)
    top = None
    if finish is not None:
        G = view.num_groups
        if cls_out is None:
            cls_out = q.new_empty(B * G * H * D, dtype=torch.float32)
        if view.cls == "global":
            top = q.new_empty(2 * B * G * H, dtype=torch.float32)
    main.run(q, (q, k, v, out, cls_out, top, sums), scale)
    if finish is not None:
        finish.run(q, (out, cls_out, top, _dense(cls_weights), cls_sums))
    return out


def backward(dout, q, k, v, view: View, scale: float, cls_weights, grads=None, saved=None):
    B, S, H, D = q.shape
    results = grads or (fresh(q), fresh(q), fresh(q))
    if q.numel() == 0:
        return results
    view = _not_empty(view)
    if view is None:
        for x in results:
            x.zero_()
        return results
    if dout.stride(3) != 1 and D > 1:  # y.sum().backward() hands in an expanded scalar
        dout = dout.contiguous()
    dq, dk, dv = results
    if not dq.stride() == dk.stride() == dv.stride():  # the kernels know one layout for all three
        dq, dk, dv = fresh(q), fresh(q), fresh(q)
    layout = _layout(view, (q, k, v, dout, dq, dk, dv), cls_weights is not None, False)
    main, finish = _backward_plan(layout._replace(strides=layout.strides[:5]))
    weights = _dense(cls_weights)
    out, stats = saved or (None, None)
    cls_sums, sums, cls_out = _parts(stats, q, view)
    parts = None
    if finish is not None:
        parts = q.new_empty(B * view.num_groups * H * 3 * D, dtype=torch.float32)
    if len(main) == 1:
        main[0].run(q, (q, k, v, dout, out, dq, dk, dv, cls_out, parts, weights, cls_sums, sums), scale)
    else:
        delta = q.new_empty(sums.numel() // 2, dtype=torch.float32)
        main[0].run(q, (q, k, v, dout, out, dq, cls_out, parts, weights, cls_sums, sums, delta), scale)
        main[1].run(q, (q, k, v, dout, dk, dv, parts, weights, cls_sums, sums, delta), scale)
    if finish is not None:
        finish.run(q, (dq, dk, dv, parts))
    if dq is not results[0]:
        for to, x in zip(results, (dq, dk, dv), strict=True):
            to.copy_(x)
    return results


def _dense(cls_weights):
    return None if cls_weights is None else cls_weights.contiguous()


def _not_empty(view: View) -> View | None:
    """The view itself where it has sequences with members; None where no row attends to anything.

    Without patches a class row still attends to itself in mode "global", once: as one group with no patch.
    """
    if view.cls == "global" and not view.num_groups * view.length:
        return View((), ((0, 1),), "global")
    return view if view.num_groups and view.members else None
