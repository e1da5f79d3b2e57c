# SPDX-License-Identifier: Apache-2.0
"""Frames to model input, with torch alone: resize, normalise, crop, flip.

Frames are [T, 3, height, width] until `crops`, which returns views [V, 3, T, size, size].

Two resize rules are named, because they give different numbers:
- "pil": on uint8, with antialiasing, then normalise. Equals Pillow and Hugging Face to one grey level; the default.
- "original": normalise first, then resize the floats without antialiasing, as the models were trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

RESIZE_RULES = ("pil", "original")
CHANNEL_ORDERS = ("RGB", "BGR")


def channels_first(frames: torch.Tensor, channel_order: str = "RGB") -> torch.Tensor:
    """[T, H, W, 3] RGB -> [T, 3, H, W] in the order asked for. A view where the order is RGB."""
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"channel_order: got {channel_order!r}, expected one of {', '.join(CHANNEL_ORDERS)}")
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames: got shape {tuple(frames.shape)}, expected (T, height, width, 3)")
    frames = frames.permute(0, 3, 1, 2)
    return frames if channel_order == "RGB" else frames.flip(1)


def normalise(frames: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """[T, 3, H, W] uint8 -> float32, (x / 255 - mean) / std by channel."""
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames: got dtype {frames.dtype}, expected torch.uint8")
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return frames.to(torch.float32).div_(255).sub_(mean).div_(std)  # in place: one copy is enough


def short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the short side at `size` and the long side at floor(long / short * size)."""
    if width < height:
        return height * size // width, size
    return size, width * size // height


def resize(frames: torch.Tensor, height: int, width: int, mean, std, rule: str = "pil") -> torch.Tensor:
    """[T, 3, H, W] uint8 -> [T, 3, height, width] float32, resized and normalised by the named rule.

    Bilinear, pixel centres at half integers (align_corners=False). Raises ValueError for another rule or dtype.
    """
    if rule not in RESIZE_RULES:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RESIZE_RULES)}")
    if rule == "pil":
        return normalise(F.interpolate(frames, (height, width), mode="bilinear", antialias=True), mean, std)
    return F.interpolate(normalise(frames, mean, std), (height, width), mode="bilinear", align_corners=False)


def crop_offsets(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    """(top, left) of the test crops: 1 the centre; 3 left, centre, right, or top, centre, bottom if taller than wide.

    The centre is rounded up, as in the original. Raises ValueError for another number or a crop larger than the frame.
    """
    if crops not in (1, 3):
        raise ValueError(f"crops: got {crops}, expected 1 or 3")
    if size > min(height, width):
        raise ValueError(f"size: got a crop of {size} pixels, expected at most the frame's {height} x {width}")
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if crops == 1:
        return [(top, left)]
    if height > width:
        return [(0, left), (top, left), (height - size, left)]
    return [(top, 0), (top, left), (top, width - size)]


def crops(frames: torch.Tensor, size: int, number: int) -> torch.Tensor:
    """[T, 3, H, W] -> [number, 3, T, size, size]: the test crops as views, in the order of `crop_offsets`."""
    offsets = crop_offsets(*frames.shape[-2:], size, number)
    views = [frames[:, :, top : top + size, left : left + size] for top, left in offsets]
    return torch.stack(views).transpose(1, 2).contiguous()


def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def random_short_side(low: int, high: int, *, inverse: bool = False, generator: torch.Generator | None = None) -> int:
    """A short side for training: round(U(low, high)), Kinetics; with `inverse` round(1 / U(1/high, 1/low)), SSv2."""
    if not 0 < low <= high:
        raise ValueError(f"low, high: got {low}, {high}, expected 0 < low <= high")
    return round(1 / _uniform(1 / high, 1 / low, generator) if inverse else _uniform(low, high, generator))


def random_crop(frames: torch.Tensor, size: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """[T, 3, H, W] -> [T, 3, size, size]: one place for all frames, uniform over every place that fits."""
    height, width = frames.shape[-2:]
    if size > min(height, width):
        raise ValueError(f"size: got a crop of {size} pixels, expected at most the frame's {height} x {width}")
    top = int(torch.randint(height - size + 1, (), generator=generator))
    left = int(torch.randint(width - size + 1, (), generator=generator))
    return frames[:, :, top : top + size, left : left + size]


def random_flip(frames: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Mirror all frames left to right with probability p."""
    return frames.flip(-1) if torch.rand((), generator=generator).item() < p else frames


def train_clip(
    frames: torch.Tensor,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "RGB",
    scale: tuple[int, int] = (256, 320),
    inverse_scale: bool = False,
    flip: float = 0.5,
    rule: str = "pil",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """[T, H, W, 3] uint8 RGB -> [3, T, size, size] float32: random scale, random crop, random flip.

    Kinetics: scale U[256, 320] (448 px: U[448, 512]), flip 0.5. SSv2: inverse_scale=True, flip=0.
    """
    frames = channels_first(frames, channel_order)
    side = random_short_side(*scale, inverse=inverse_scale, generator=generator)
    frames = resize(frames, *short_side(*frames.shape[-2:], side), mean, std, rule)
    frames = random_flip(random_crop(frames, size, generator=generator), flip, generator=generator)
    return frames.transpose(0, 1).contiguous()
