# SPDX-License-Identifier: Apache-2.0
"""Native state dicts into a model: strictly, after every check, with named rules for tables of another size."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import differences, grid_of, raise_differences
from .names import to_native

logger = logging.getLogger("timesformer")

POS_RULES = ("nearest", "nearest1d_legacy", "bilinear", "bicubic", "error")
TIME_RULES = ("nearest", "linear", "error")
CLASS_RULES = ("error", "reinit")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def _interpolate(table: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """table: (1, D, *source) -> (1, D, *size), half-pixel centres, no antialiasing, dtype kept."""
    if mode == "nearest":
        return F.interpolate(table, size=size, mode=mode)
    # Weighted sums of 16-bit values would round at every step.
    wide = table if table.dtype == torch.float64 else table.float()
    return F.interpolate(wide, size=size, mode=mode, align_corners=False).to(table.dtype)


def resize_pos_embed(table: Tensor, source: tuple[int, int], target: tuple[int, int], rule: str = "nearest") -> Tensor:
    """Resize a position table (1, 1 + h*w, D) from the grid `source` (h, w) to `target`; row 0, the class token, stays.

    "nearest": 2-D nearest, as the original resizes at run time. "nearest1d_legacy": nearest over the flattened h*w
    rows, as the original resizes when it loads a checkpoint; this scrambles the rows of a grid of another width.
    "bilinear", "bicubic": 2-D, half-pixel centres, no antialiasing.
    """
    _check_choice("rule", rule, POS_RULES[:-1])
    if table.ndim != 3 or table.shape[:2] != (1, 1 + source[0] * source[1]):
        expected = f"(1, {1 + source[0] * source[1]}, D) for the grid {tuple(source)}"
        raise ValueError(f"table: got {tuple(table.shape)}, expected {expected}")
    cls, grid = table[:, :1], table[:, 1:].transpose(1, 2)  # [1, 1, D], [1, D, h*w]
    if rule == "nearest1d_legacy":
        resized = _interpolate(grid, (target[0] * target[1],), "nearest")
    else:
        resized = _interpolate(grid.unflatten(2, source), target, rule).flatten(2)
    return torch.cat((cls, resized.transpose(1, 2)), 1)


def resize_time_embed(table: Tensor, frames: int, rule: str = "nearest") -> Tensor:
    """Resize a time table (1, T, D) to (1, frames, D): 1-D "nearest", as the original, or "linear"."""
    _check_choice("rule", rule, TIME_RULES[:-1])
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[1] == 0:
        raise ValueError(f"table: got {tuple(table.shape)}, expected (1, T, D)")
    return _interpolate(table.transpose(1, 2), (frames,), rule).transpose(1, 2).contiguous()


def _square(tokens: int) -> tuple[int, int] | None:
    side = math.isqrt(max(tokens, 0))
    return (side, side) if tokens > 0 and side * side == tokens else None


def _fit_positions(
    loaded: dict[str, Tensor], like: Tensor, source: tuple[int, int] | None, target: tuple[int, int], rule: str
) -> list[str]:
    """Resize loaded["pos_embed"] in place of the entry. -> reasons why it cannot be done, as hints."""
    table = loaded.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != like.shape[2]:
        return []
    tokens = table.shape[1] - 1
    if source is not None and source[0] * source[1] != tokens:
        return [f"source_grid {tuple(source)} does not hold the {tokens} positions of pos_embed"]
    if source is None and table.shape == like.shape:
        return []
    source = tuple(source) if source is not None else _square(tokens)
    if source == target:
        return []
    if rule == "error":
        return [f"pos_resize='error': pos_embed is for the grid {source}, the model's is {target}"]
    if source is None:
        return [f"pos_embed holds {tokens} positions, not a square grid: pass source_grid=(height, width) to resize it"]
    loaded["pos_embed"] = resize_pos_embed(table, source, target, rule)
    logger.info("pos_embed resized from grid %s to %s (%s)", source, target, rule)
    return []


def _fit_time(loaded: dict[str, Tensor], like: Tensor, rule: str) -> list[str]:
    table = loaded.get("time_embed")
    if table is None or table.ndim != 3 or not table.shape[1] or table.shape[::2] != like.shape[::2]:
        return []
    if table.shape[1] == like.shape[1]:
        return []
    if rule == "error":
        return [f"time_resize='error': time_embed is for {table.shape[1]} frames, the model's is for {like.shape[1]}"]
    loaded["time_embed"] = resize_time_embed(table, like.shape[1], rule)
    logger.info("time_embed resized from %d to %d frames (%s)", table.shape[1], like.shape[1], rule)
    return []


def _fresh_head(weight: Tensor) -> dict[str, Tensor]:
    """A head as at initialisation: truncated normal, std 0.02 cut at +-2, bias 0. weight: (C, D) to be like."""
    fresh = torch.empty(weight.shape, dtype=torch.float32)
    nn.init.trunc_normal_(fresh, std=0.02, a=-2.0, b=2.0)
    return {"head.weight": fresh, "head.bias": torch.zeros(weight.shape[0])}


def _fit_head(loaded: dict[str, Tensor], target: Mapping[str, Tensor], rule: str) -> tuple[list[str], bool]:
    """-> (hints, whether the head must be initialised afresh). Takes a head of another class count out of `loaded`."""
    held, wanted = loaded.get("head.weight"), target.get("head.weight")
    if held is not None and held.ndim != 2 or (held is None) != ("head.bias" not in loaded):
        return [], False
    classes = 0 if held is None else held.shape[0]
    expected = 0 if wanted is None else wanted.shape[0]
    wrong_width = held is not None and wanted is not None and held.shape[1] != wanted.shape[1]
    if classes == expected or wrong_width:
        return [], False
    if rule == "error":
        return [
            f"the checkpoint has {classes} classes, the model {expected}; a new head is started only on request"
        ], False
    loaded.pop("head.weight", None)
    loaded.pop("head.bias", None)
    return [], expected > 0


def _load(
    model: nn.Module,
    loaded: dict[str, Tensor],
    *,
    num_classes_change: str,
    pos_resize: str,
    time_resize: str,
    source_grid: tuple[int, int] | None,
    what: str,
) -> None:
    """The one place that writes to a model: everything is checked and computed before the first write."""
    _check_choice("num_classes_change", num_classes_change, CLASS_RULES)
    _check_choice("pos_resize", pos_resize, POS_RULES)
    _check_choice("time_resize", time_resize, TIME_RULES)
    target = model.state_dict()
    meta = [key for key, value in target.items() if value.is_meta]
    if meta:
        raise ValueError(f"model: {len(meta)} parameter(s) on the meta device; call model.to_empty(device=...) first")
    held_classes = len(loaded["head.weight"]) if "head.weight" in loaded and loaded["head.weight"].ndim else 0
    hints, fresh = _fit_head(loaded, target, num_classes_change)
    if "pos_embed" in target:
        grid = grid_of(model.config.to_dict())
        hints += _fit_positions(loaded, target["pos_embed"], source_grid, grid, pos_resize)
    if "time_embed" in target:
        hints += _fit_time(loaded, target["time_embed"], time_resize)
    expected = {key: tuple(value.shape) for key, value in target.items()}
    if fresh:
        loaded |= _fresh_head(target["head.weight"])
    lines = differences(loaded, expected)
    raise_differences(f"{what} does not fit the model; nothing was loaded", lines + hints)
    model.load_state_dict(loaded, strict=True)
    if fresh:
        held = f"; the checkpoint's, with {held_classes} classes, is not used" if held_classes else ""
        logger.warning("head re-initialised: %d classes, untrained%s", len(target["head.weight"]), held)
    elif held_classes and "head.weight" not in target:
        logger.warning("the checkpoint's head, with %d classes, is not used: the model has no head", held_classes)


def load_into(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    num_classes_change: str = "error",
    pos_resize: str = "nearest",
    time_resize: str = "nearest",
    source_grid: tuple[int, int] | None = None,
) -> None:
    """Copy a native state dict into `model`, all of it or nothing, in the model's dtype and on its device.

    num_classes_change: "error", or "reinit" to start a new head (truncated normal, std 0.02; bias 0) where the class
    counts differ, with a logged line. pos_resize: "nearest", "nearest1d_legacy", "bilinear", "bicubic" (see
    `resize_pos_embed`) or "error". time_resize: "nearest", "linear" or "error".
    source_grid: (height, width) of the checkpoint's patch grid, `Checkpoint.grid`. None takes a table of the model's
    own length as it is and any other as a square grid.

    Raises CheckpointError listing every missing, unexpected and wrongly shaped key; the model is then untouched.
    """
    _load(
        model,
        to_native(state_dict, "timesformer"),
        num_classes_change=num_classes_change,
        pos_resize=pos_resize,
        time_resize=time_resize,
        source_grid=source_grid,
        what="the checkpoint",
    )


def inflate_vit(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    *,
    keep_head: bool = False,
    pos_resize: str = "nearest",
    source_grid: tuple[int, int] | None = None,
) -> None:
    """Start a video model from an image ViT (timm names), as the original does.

    temporal_attn <- attn, temporal_norm1 <- norm1, temporal_fc = 0 in all blocks, time_embed = 0, and a new head; on a
    static clip the model then computes what the image model computes. keep_head=True keeps the image model's head,
    whose class count must be the model's. Everything else is as strict as `load_into`.
    """
    if not isinstance(keep_head, bool):
        raise TypeError(f"keep_head: expected a bool, got {type(keep_head).__name__}")
    loaded = to_native(state_dict, "vit")
    target = model.state_dict()
    if not keep_head:
        loaded = {key: value for key, value in loaded.items() if not key.startswith("head.")}
    for key, like in target.items():
        block, mark, name = key.partition(".temporal_")
        if key == "time_embed" or mark and name.startswith("fc."):
            loaded[key] = torch.zeros(like.shape, dtype=like.dtype)
        elif mark and f"{block}.{name}" in loaded:
            loaded[key] = loaded[f"{block}.{name}"]
    _load(
        model,
        loaded,
        num_classes_change="error" if keep_head else "reinit",
        pos_resize=pos_resize,
        time_resize="error",
        source_grid=source_grid,
        what="the image ViT",
    )
