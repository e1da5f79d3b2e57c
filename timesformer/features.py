# SPDX-License-Identifier: Apache-2.0
"""What a TimeSformer holds after any of its layers: tokens as maps, or one feature for clip, patch or frame."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import TimeSformer

KINDS = ("cls", "patch", "frame")
FORMATS = ("NCTHW", "NLC")


def layer_number(model: TimeSformer, layer: int, name: str = "layer") -> int:
    """The layer counted from 0; negative numbers count from the last one, which is -1. Raises ValueError."""
    depth = len(model.blocks)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"{name}: got {layer!r}, expected an integer")
    if not -depth <= layer < depth:
        raise ValueError(f"{name}: got {layer}, expected one of the {depth} layers, {-depth} to {depth - 1}")
    return layer % depth


def layer_outputs(model: TimeSformer, video: Tensor, last: int | None = None) -> Iterator[Tensor]:
    """The tokens that go into the first layer, then those that come out of every layer up to number `last`.

    video: [B, C, T, height, width]. Tokens: [B, 1 + N*T, dim], or [B*T, 1 + N, dim] of space-only models.
    """
    model._check(video)
    frames = 1 if model.config.attention_type == "space_only" else video.shape[2]
    x = model._embed(video).sum()
    yield x
    for block in model.blocks if last is None else model.blocks[: last + 1]:
        x = block(x, frames)
        yield x


def _wanted(model: TimeSformer, indices: int | Sequence[int] | None) -> list[int]:
    depth = len(model.blocks)
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices: got {indices}, expected a number of last layers from 1 to {depth}, or a list")
        return list(range(depth - indices, depth))
    wanted = [layer_number(model, index, "indices") for index in indices]
    if not wanted:
        raise ValueError("indices: got an empty list, expected at least one layer")
    return wanted


def _split(model: TimeSformer, x: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a layer -> (class rows [B, 1, dim], or [B, T, dim] of space-only models; patches [B, h, w, T, dim])."""
    (p, q), (frames, height, width) = model.patch_embed.proj.kernel_size, video.shape[2:]
    grid = height // p, width // q
    if model.config.attention_type == "space_only":
        x = x.unflatten(0, (-1, frames))  # [B, T, 1 + N, dim]
        return x[:, :, 0], x[:, :, 1:].unflatten(2, grid).movedim(1, 3)
    return x[:, :1], x[:, 1:].unflatten(1, (*grid, frames))


def forward_intermediates(
    model: TimeSformer,
    video: Tensor,
    indices: int | Sequence[int] | None = None,
    *,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCTHW",
    intermediates_only: bool = False,
):
    """The patch tokens after chosen layers, in the manner of timm: (tokens after the last LayerNorm, intermediates).

    video: [B, C, T, height, width] of the model's dtype. indices: layers from 0, negative ones from the end; a number
    n means the last n; None means all. Intermediates come in the order of `indices`, each [B, dim, T, h, w] for
    "NCTHW" or [B, h*w*T, dim] in the model's token order for "NLC"; with return_prefix_tokens each is a pair of that
    and the class rows [B, 1, dim] ([B, T, dim] of space-only models, one for each frame).

    norm: pass intermediates through the model's last LayerNorm. stop_early: run no layer after the last one asked for;
    the first result is then its tokens, normalised. intermediates_only: return the list alone.
    Autograd goes through everything. Raises ValueError for other indices, formats or videos.
    """
    if output_fmt not in FORMATS:
        raise ValueError(f"output_fmt: got {output_fmt!r}, expected one of {', '.join(FORMATS)}")
    wanted = _wanted(model, indices)
    found = {}
    for number, x in enumerate(layer_outputs(model, video, max(wanted) if stop_early else None), -1):
        if number in wanted:
            prefix, patches = _split(model, model.norm(x) if norm else x, video)
            shown = patches.flatten(1, 3) if output_fmt == "NLC" else patches.movedim(4, 1).movedim(4, 2)
            found[number] = (shown, prefix) if return_prefix_tokens else shown
    intermediates = [found[number] for number in wanted]
    return intermediates if intermediates_only else (model.norm(x), intermediates)


def features(model: TimeSformer, video: Tensor, layer: int = -1, kind: str = "cls", norm: bool | None = None) -> Tensor:
    """What the model knows of a clip after one layer; layers that follow it do not run.

    video: [B, C, T, height, width] of the model's dtype. kind: "cls", the class token [B, dim], of space-only models
    the mean over frames; "patch", every patch [B, T, h, w, dim]; "frame", the mean over each frame's patches
    [B, T, dim]. norm: pass tokens through the model's last LayerNorm, by default after the last layer only, where
    kind "cls" equals `model.forward_features(video)`. Raises ValueError for other layers, kinds or videos.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    number = layer_number(model, layer)
    if norm is None:
        norm = number == len(model.blocks) - 1
    x = deque(layer_outputs(model, video, number), maxlen=1).pop()  # the last one, and no other is kept
    prefix, patches = _split(model, x, video)
    if kind == "cls":
        prefix = prefix.mean(1)  # over frames, before the LayerNorm, as the classifier takes it
        return model.norm(prefix) if norm else prefix
    patches = patches.movedim(3, 1)  # [B, T, h, w, dim]
    if norm:
        patches = model.norm(patches)
    return patches.contiguous() if kind == "patch" else patches.flatten(2, 3).mean(2)


@torch.inference_mode()
def features_of_views(model: TimeSformer, views: Tensor, batch_size: int, **options) -> Tensor:
    """`features` of [V, C, T, height, width] views on any device, `batch_size` at a time -> CPU [V, ...]."""
    weight = model.patch_embed.proj.weight
    parts = views.split(batch_size)
    return torch.cat([features(model, part.to(weight.device, weight.dtype), **options).cpu() for part in parts])
