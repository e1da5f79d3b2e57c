# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video make a clip. Every sampler returns a plain list of frame indices.

Without a generator the samplers are deterministic (test time); a torch.Generator makes the random choices of
training. Arithmetic is exact (fractions), so that no index depends on floating-point rounding.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import torch

TARGET_FPS = 30  # the frame rate to which the original's sampling rates refer


def _check(frames: int, num_frames: int) -> None:
    for name, value in (("frames", frames), ("num_frames", num_frames)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")


def _positive(name: str, value) -> Fraction:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: got {value}, expected a finite number above 0")
    return Fraction(value)


def _linspace(start: Fraction, end: Fraction, num_frames: int, frames: int) -> list[int]:
    """trunc(clamp(., 0, frames - 1)) of num_frames points from start to end, both included."""
    step = (end - start) / (num_frames - 1) if num_frames > 1 else Fraction(0)
    return [int(min(max(start + k * step, 0), frames - 1)) for k in range(num_frames)]


def kinetics(
    frames: int,
    fps,
    num_frames: int,
    rate,
    *,
    clip: int = 0,
    num_clips: int = 1,
    generator: torch.Generator | None = None,
) -> list[int]:
    """The original's Kinetics clip: `num_frames` points over `rate * num_frames / 30` seconds of video.

    frames: number of frames in the video; fps: its frames per second; rate: frames apart at 30 frames per second.
    Test time: clip number `clip` of `num_clips` starts at delta * clip / num_clips, so a single clip starts at frame
    0. With a generator it starts anywhere in [0, delta]. delta is the room left in the video. The last point is the
    last source frame of the span, so "8 x 32" at 30 fps is 0, 36, 72, ..., 255: steps of 255 / 7, not of 32.
    A video shorter than the span repeats its last frame.
    Raises ValueError for sizes below 1, a rate or fps that is not positive, or a clip outside [0, num_clips).
    """
    _check(frames, num_frames)
    fps, rate = _positive("fps", fps), _positive("rate", rate)
    if num_clips < 1 or not 0 <= clip < num_clips:
        raise ValueError(f"clip: got {clip} of num_clips {num_clips}, expected 0 <= clip < num_clips")
    span = rate * num_frames / TARGET_FPS * fps  # source frames that the clip covers
    delta = max(frames - span, Fraction(0))
    if generator is None:
        start = delta * clip / num_clips
    else:
        start = delta * Fraction(torch.rand((), generator=generator, dtype=torch.float64).item())
    return _linspace(start, start + span - 1, num_frames, frames)


def segments(frames: int, num_frames: int, *, generator: torch.Generator | None = None) -> list[int]:
    """One frame from each of `num_frames` equal segments of the whole video (Something-Something v2, TSN style).

    Segment i runs from round(s * i) to round(s * (i + 1)) with s = (frames - 1) / num_frames, both ends included,
    halves rounded to even. Test time takes its middle, (a + b) // 2; with a generator any of its frames.
    Raises ValueError for sizes below 1.
    """
    _check(frames, num_frames)
    size = Fraction(frames - 1, num_frames)
    bounds = [round(size * i) for i in range(num_frames + 1)]
    if generator is None:
        return [(a + b) // 2 for a, b in pairwise(bounds)]
    return [int(torch.randint(a, b + 1, (), generator=generator)) for a, b in pairwise(bounds)]


def uniform(frames: int, num_frames: int) -> list[int]:
    """`num_frames` points over the whole video, first and last frame included: trunc(linspace(0, frames - 1)).

    This is pytorchvideo's uniform subsampling, not Hugging Face's `arange(num_frames) * frames // num_frames`.
    Raises ValueError for sizes below 1.
    """
    _check(frames, num_frames)
    return _linspace(Fraction(0), Fraction(frames - 1), num_frames, frames)
