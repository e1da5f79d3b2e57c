# SPDX-License-Identifier: Apache-2.0
"""Where a TimeSformer looks: attention maps of a layer, and rollout of the class token.

Fused kernels form no probabilities. The model runs as always; the packed q, k and v of the layer asked for are caught
as its projection gives them, and the probabilities are made again from them, a few groups at a time.

Rollout follows Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), equation 1: with
A = (P + I) / 2 of every attention step, the first layer's rightmost, the class token's row of their product says how
much of each patch has reached it. The product of square matrices over all 1 + N*T tokens is out of reach for long
clips; its row needs only r <- r A, from the last layer down, at T*N^2 for space and N*T^2 for time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from timesformer_kernels.grid import View, view

from .features import layer_number, layer_outputs

if TYPE_CHECKING:
    from .model import DividedBlock, JointBlock, TimeSformer

FUSIONS = ("mean", "max", "min")
_TILE = 1 << 23  # probabilities formed at a time


class AttentionMaps(NamedTuple):
    """Probabilities of one layer, float32 (float64 of float64 models); rows are queries, columns are keys.

    time: [B, N, heads, T, T], None where the model has no time attention. space: [B, T, heads, 1 + N, 1 + N] with the
    class token first; of joint models [B, 1, heads, 1 + N*T, 1 + N*T] over all tokens, in order b (h w t). Without
    the heads' axis where one head or a fusion was asked for. None where it was not asked for.
    """

    time: Tensor | None
    space: Tensor | None


class _Step(NamedTuple):
    """One attention step of a block with the q, k and v that it used: [B, S, 3, heads, head_dim]."""

    qkv: Tensor
    view: View
    scale: float


@contextmanager
def _caught(attention: torch.nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect what the qkv projection of an attention step gives while the block runs."""
    caught: list[Tensor] = []
    if attention is None:
        yield caught
        return
    handle = attention.qkv.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def _steps(block: DividedBlock | JointBlock, x: Tensor, frames: int) -> dict[str, _Step]:
    """Run a block on its input and return its attention steps by name, "time" and "space", in that order."""
    divided = getattr(block, "temporal_attn", None)
    with _caught(divided) as time, _caught(block.attn) as space:
        block(x, frames, class_row_only=True)  # nobody reads the patches: projection and MLP of one row are enough
    grid = (x.shape[1] - 1) // frames, 1, frames
    scheme = "joint" if divided is None else "space"
    found = {} if divided is None else {"time": (time, view("time", grid, "exclude", "space_major"), divided)}
    found["space"] = space, view(scheme, grid, "per_group", "space_major"), block.attn
    return {
        name: _Step(qkv[0].unflatten(2, (3, attention.num_heads, attention.head_dim)), shown, attention.scale)
        for name, (qkv, shown, attention) in found.items()
    }


def _rows(step: _Step) -> Tensor:
    """Token row of every member of every group, the class row first where it is a member: [G, L]."""
    rows = step.view.rows(step.qkv.device)
    return torch.cat([rows.new_zeros(len(rows), 1), rows], 1) if step.view.cls == "per_group" else rows


def _fuse(p: Tensor, head: int | str | None) -> Tensor:
    """p [B, g, heads, l, L] -> without the heads' axis, unless head is None."""
    if head is None:
        return p
    if isinstance(head, int):
        return p[:, :, head]
    return {"mean": p.mean, "max": p.amax, "min": p.amin}[head](2)


def _tiles(step: _Step, rows: Tensor, head: int | str | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """(groups, queries, their probabilities [B, g, heads, l, L], fused as asked), `_TILE` numbers at a time or so."""
    q, k, _ = step.qkv.unbind(2)  # [B, S, heads, head_dim]
    if isinstance(head, int):
        q, k, head = q[:, :, head : head + 1], k[:, :, head : head + 1], 0
    groups, length = rows.shape
    per_query = q.shape[0] * q.shape[2] * length
    queries = min(length, max(1, _TILE // per_query))
    count = max(1, _TILE // (per_query * length)) if queries == length else 1
    dtype = torch.promote_types(q.dtype, torch.float32)
    for group in range(0, groups, count):
        keys = k[:, rows[group : group + count]].to(dtype)  # [B, g, L, heads, head_dim]
        for query in range(0, length, queries):
            asked = q[:, rows[group : group + count, query : query + queries]].to(dtype)
            with torch.autocast(q.device.type, enabled=False):  # it would narrow the product again
                p = (torch.einsum("bglhd,bgmhd->bghlm", asked, keys) * step.scale).softmax(-1)
            yield slice(group, group + count), slice(query, query + queries), _fuse(p, head)


def _map(step: _Step, head: int | str | None) -> Tensor:
    """The probabilities of a step [B, G, heads, L, L], or fused [B, G, L, L]."""
    rows, out = _rows(step), None
    for groups, queries, p in _tiles(step, rows, head):
        if out is None:
            out = p.new_empty(len(p), len(rows), *p.shape[2:-2], rows.shape[1], rows.shape[1])
        out[:, groups, ..., queries, :] = p
    return out


def _check_model(model: TimeSformer) -> None:
    if model.training:
        raise ValueError("model: got one in training mode, expected model.eval()")


def _check_head(head: int | str | None, heads: int) -> None:
    if head is None or isinstance(head, str) and head in FUSIONS:
        return
    if not isinstance(head, int) or isinstance(head, bool):
        raise ValueError(f"head: got {head!r}, expected None, {', '.join(FUSIONS)} or the number of a head")
    if not 0 <= head < heads:
        raise ValueError(f"head: got {head}, expected one of the {heads} heads, 0 to {heads - 1}")


@torch.no_grad()
def attention_maps(
    model: TimeSformer,
    video: Tensor,
    layer: int = -1,
    *,
    head: int | str | None = None,
    which: tuple[str, ...] = ("time", "space"),
) -> AttentionMaps:
    """The time and space maps of one layer, see `AttentionMaps`.

    video: [B, C, T, height, width] of the model's dtype; the model is in evaluation mode. layer: from 0, negative ones
    from the end. head: one head's number, or "mean", "max" or "min" over the heads; None keeps them apart. which:
    leave out the map that is not needed. Probabilities of other layers are never formed, and of this one only what
    is returned and a tile of it. Raises ValueError for other layers, heads or videos.
    """
    kind = model.config.attention_type
    _check_model(model)
    _check_head(head, model.config.num_heads)
    if not which or set(which) - {"time", "space"}:
        raise ValueError(f"which: got {which!r}, expected some of time, space")
    if set(which) == {"time"} and kind != "divided_space_time":
        raise ValueError(f"which: got {which!r}, but a model with attention_type {kind!r} has no time attention")
    number = layer_number(model, layer)
    x = deque(layer_outputs(model, video, number - 1), maxlen=1).pop()  # what goes into the layer
    space_only, frames = kind == "space_only", video.shape[2]
    steps = _steps(model.blocks[number], x, 1 if space_only else frames)
    maps = {name: _map(step, head) for name, step in steps.items() if name in which}
    if space_only and "space" in maps:
        maps["space"] = maps["space"].squeeze(1).unflatten(0, (-1, frames))
    return AttentionMaps(maps.get("time"), maps.get("space"))


def _through(r: Tensor, step: _Step, fusion: str, discard: float) -> Tensor:
    """r A for a row vector r [B, S] over the tokens: A = (P + I) / 2, the class row's the mean over the groups.

    Where P's rows do not sum to one, by max, min or discarding, those of P + I are divided by their sum.
    """
    rows, out = _rows(step), torch.zeros_like(r)
    if step.view.cls == "exclude":
        out[:, 0] = r[:, 0]  # the class token takes no part in time attention: its row is the identity's
    share = r[:, rows]  # [B, G, L]
    if step.view.cls == "per_group":
        share[:, :, 0] /= len(rows)
    for groups, queries, p in _tiles(step, rows, fusion):
        if discard:
            p = _discard(p, discard)
        weight = share[:, groups, queries] / (p.sum(-1) + 1)  # [B, g, l]
        reached = (weight[:, :, None] @ p).squeeze(2)  # [B, g, L]
        out.index_add_(1, rows[groups].flatten(), reached.flatten(1))
        out.index_add_(1, rows[groups, queries].flatten(), weight.flatten(1))  # the identity
    return out


def _discard(p: Tensor, share: float) -> Tensor:
    """Set the smallest `share` of every row's probabilities to zero: p [..., L]."""
    least = p.topk(max(1, round((1 - share) * p.shape[-1])), -1).values[..., -1:]
    return p.where(p >= least, p.new_zeros(()))


@torch.no_grad()
def rollout(model: TimeSformer, video: Tensor, *, fusion: str = "mean", discard: float = 0.0) -> Tensor:
    """How much of each patch reaches the class token through all layers' attention: [B, T, h, w].

    video: [B, C, T, height, width] of the model's dtype; the model is in evaluation mode. fusion of the heads: "mean",
    "max" or "min". discard: share in [0, 1) of every row's smallest probabilities that are set to zero first. Entries
    are shares of a whole: what they lack to 1 is what the class token kept of itself. With space-only models the
    frames' class tokens count equally, as the classifier averages them.

    Keeps the input of every layer and runs each layer once more on the way down, so that no more than one layer's q
    and k are held and no square matrix over all tokens of divided models. Raises ValueError for other arguments.
    """
    _check_model(model)
    if fusion not in FUSIONS:
        raise ValueError(f"fusion: got {fusion!r}, expected one of {', '.join(FUSIONS)}")
    if not 0 <= discard < 1:
        raise ValueError(f"discard: got {discard}, expected a share in [0, 1)")
    inputs = list(layer_outputs(model, video, len(model.blocks) - 2))
    batch, _, frames, height, width = video.shape
    space_only = model.config.attention_type == "space_only"
    x = inputs[-1]
    r = x.new_zeros(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    r[:, 0] = 1 / frames if space_only else 1
    for block in reversed(model.blocks):
        steps = _steps(block, inputs.pop(), 1 if space_only else frames)
        for step in reversed(steps.values()):  # space acts after time
            r = _through(r, step, fusion, discard)
    p, q = model.patch_embed.proj.kernel_size
    grid = height // p, width // q
    patches = r[:, 1:]
    if space_only:
        return patches.unflatten(0, (batch, frames)).unflatten(2, grid)
    return patches.unflatten(1, (*grid, frames)).movedim(3, 1).contiguous()
