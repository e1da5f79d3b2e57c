# SPDX-License-Identifier: Apache-2.0
"""Maps drawn over frames, and picture files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .files import whole

# From little to much: dark, violet, red, orange, light yellow. Ever lighter, so that it reads without colour too.
_COLOURS = np.array([(10, 5, 40), (90, 20, 110), (190, 55, 85), (245, 125, 20), (250, 245, 150)], np.float32)
_LEAST, _MOST = 0.55, 0.75  # share of the colour where the map is at its least and at its most
_GAP = 4  # pixels between pictures
_ROW = 8  # frames in a row of a sheet


def heat(maps: torch.Tensor) -> torch.Tensor:
    """[T, h, w] -> 0 at the least entry of the whole clip and 1 at the greatest; all 0 where all are equal."""
    maps = maps.double() - maps.min()
    return maps / maps.max().clamp_min(torch.finfo(torch.float64).tiny)


def colours(values: np.ndarray) -> np.ndarray:
    """[...] in [0, 1] -> [..., 3] float32 RGB in [0, 255]."""
    place = values * (len(_COLOURS) - 1)
    low = np.clip(place.astype(int), 0, len(_COLOURS) - 2)
    part = (place - low)[..., None].astype(np.float32)
    return _COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part


def overlay(frames: np.ndarray, maps: torch.Tensor) -> np.ndarray:
    """frames [T, height, width, 3] uint8 under maps [T, h, w], stretched to them bilinearly -> [T, height, width, 3].

    Colours run from the least to the greatest entry of the whole clip, so that frames can be compared.
    """
    if frames.shape[0] != maps.shape[0]:
        raise ValueError(f"maps: got {maps.shape[0]} frames, expected {frames.shape[0]}")
    size = frames.shape[1:3]
    shown = F.interpolate(heat(maps)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0].numpy()
    share = (_LEAST + (_MOST - _LEAST) * shown)[..., None].astype(np.float32)
    mixed = frames * (1 - share) + colours(shown) * share
    return (mixed + 0.5).clip(0, 255).astype(np.uint8)


def side_by_side(frames: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """[T, height, width, 3] twice -> [T, height, 2 * width + gap, 3], even sizes as video codecs want them."""
    count, height, width, _ = frames.shape
    out = np.full((count, height + height % 2, 2 * width + _GAP, 3), 255, np.uint8)
    out[:, :height, :width], out[:, :height, width + _GAP :] = frames, drawn
    return out


def sheet(frames: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """One picture of a clip: frames in rows of eight, the drawn ones below each -> [height, width, 3] uint8."""
    count, height, width, _ = frames.shape
    columns, rows = min(count, _ROW), -(-count // _ROW)
    out = np.full((rows * 2 * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for number in range(count):
        left = number % _ROW * (width + _GAP)
        for below, picture in enumerate((frames[number], drawn[number])):
            top = (2 * (number // _ROW) + below) * (height + _GAP)
            out[top : top + height, left : left + width] = picture
    return out


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write [height, width, 3] uint8 RGB. The file appears whole or not at all. Needs PyAV."""
    try:
        import av
    except ImportError as error:
        raise ImportError('writing PNG needs PyAV: pip install "timesformer-kernels[video]"') from error
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base, encoder.options = "rgb24", 1, {"compression_level": "9", "pred": "mixed"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    data = b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None)))
    with whole(Path(path)) as temporary:
        temporary.write_bytes(data)


def write_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays, compressed. The file appears whole or not at all."""
    with whole(Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
