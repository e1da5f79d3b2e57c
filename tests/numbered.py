# SPDX-License-Identifier: Apache-2.0
"""Videos whose frames show their number: which is which is read from the picture, never from timestamps."""

from fractions import Fraction

import av
import numpy as np

HEIGHT, WIDTH = 48, 64


def numbered(count, height=HEIGHT, width=WIDTH):
    """Frame i shows i as two base-16 digits, one in each half, 16 grey levels apart: readable after lossy coding."""
    frames = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        frames[index, :, : width // 2] = index // 16 * 16 + 8
        frames[index, :, width // 2 :] = index % 16 * 16 + 8
    return frames


def number(image):
    """The index shown by a frame of `numbered`; fails where a half is not one of the 16 levels."""
    middle = image.shape[1] // 2
    digits = []
    for half in (image[:, : middle - 8], image[:, middle + 8 :]):
        level = float(half.astype(np.float64).mean())
        digit = int(level // 16)
        assert abs(level - (digit * 16 + 8)) < 6, f"level {level} is not a digit"
        digits.append(digit)
    return digits[0] * 16 + digits[1]


def numbers(images):
    return [number(image) for image in images]


H264 = {"bf": "3", "g": "12", "crf": "12"}  # three B frames in a row, a keyframe every 12 frames


def encode(path, frames, pts, *, codec="h264", options=None, time_base=Fraction(1, 30), rate=30):
    """A file whose frames carry the given presentation times, in units of time_base."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=H264 if options is None else options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = time_base
        for image, time in zip(frames, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
