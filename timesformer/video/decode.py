# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file by index, and video files from frames, with PyAV.

Frame `i` is the i-th frame in presentation order. For a constant frame rate from time zero that is the frame with
`round(pts * time_base * fps) == i`; counting in presentation order also holds for a variable frame rate, a start
time other than zero and reordered (B) frames.
"""

from __future__ import annotations

import logging
import operator
import os
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

logger = logging.getLogger("timesformer")

# Decoding this many unwanted frames costs about as much as opening the file again and seeking.
SEEK_GAP = 64


class VideoError(ValueError):
    """A file that cannot serve as a video: missing, unreadable, empty, without a picture, or undecodable."""


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` found. Height and width in pixels as displayed, that is after the rotation."""

    path: str
    frames: int  # frames that can be read; damaged and truncated files count up to what decodes
    fps: Fraction  # frames per second, the average for a variable rate
    height: int
    width: int
    rotation: int  # degrees counter-clockwise that turn the stored picture upright: 0, 90, 180 or 270
    codec: str
    timestamps: tuple[int, ...] | None = field(repr=False, compare=False)  # pts of frame i, in the stream's time base
    keyframes: tuple[int, ...] = field(repr=False, compare=False)  # indices, ascending

    @property
    def duration(self) -> float:
        """Seconds."""
        return float(self.frames / self.fps)


def _av():
    try:
        import av
    except ImportError as error:
        raise ImportError('reading and writing video needs PyAV: pip install "timesformer-kernels[video]"') from error
    return av


def _line(error: BaseException) -> str:
    """PyAV's error as a phrase, without the path (it is named once, by the caller)."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _check_path(path) -> str:
    path = os.fspath(path)
    if not os.path.exists(path):
        raise VideoError(f"video {path!r}: no such file")
    if os.path.isdir(path):
        raise VideoError(f"video {path!r}: is a directory, expected a video file")
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise VideoError(f"video {path!r}: cannot be read: {error.strerror}") from error
    if empty:
        raise VideoError(f"video {path!r}: the file is empty (0 bytes)")
    return path


@contextmanager
def _open(path: str):
    """The container and its first stream of moving pictures, with threaded decoding."""
    av = _av()
    try:
        container = av.open(path)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(
            f"video {path!r}: cannot be opened, it is damaged, truncated or not a video file ({_line(error)})"
        ) from error
    with container:
        covers = av.stream.Disposition.attached_pic  # the cover picture of a sound file is a "video" stream too
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            kinds = ", ".join(stream.type for stream in container.streams) or "none"
            raise VideoError(f"video {path!r}: contains no video stream (streams: {kinds})")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _decode(container, stream) -> Iterator:
    """Every frame that can be decoded, in presentation order. Damaged packets are skipped."""
    FFmpegError = _av().error.FFmpegError
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError:  # the file ends in the middle of a packet
            packet = None
        try:
            # None drains the decoder; at a regular end of file the demuxer's last, empty packet has done so already
            frames = stream.codec_context.decode(None) if packet is None else packet.decode()
        except FFmpegError:
            frames = []
        yield from frames
        if packet is None:
            return


def _scan(container, stream):
    """(first frame that decodes or None, table or None) in one pass over the packets, without decoding the others.

    The table is (pts of every frame, pts of the keyframes), ascending; None where only decoding can tell.
    """
    FFmpegError = _av().error.FFmpegError
    stream.thread_type = "SLICE"  # threads that decode frames would want several before they give the first
    first, expected = None, stream.frames
    known = bool(expected)
    shown, keys, total = [], [], 0
    packets = container.demux(stream)
    packet = stream  # anything but the end
    while packet is not None and (first is None or known):
        try:
            packet = next(packets, None)
        except FFmpegError:
            packet, known = None, False
        if first is None:
            try:
                frames = stream.codec_context.decode(None) if packet is None else packet.decode()
            except FFmpegError:
                frames = []
            first = frames[0] if frames else None
        if packet is None or packet.size == 0:  # the end, or the demuxer's mark of it
            continue
        total += 1
        known = known and packet.pts is not None and not packet.is_corrupt
        if known and not packet.is_discard:  # outside the edit list: decoded, never shown
            shown.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    if not known or total != expected or len(set(shown)) != len(shown):
        return first, None
    return first, (sorted(shown), sorted(keys))


def _decode_table(path: str) -> tuple[int, list[int] | None, list[int]]:
    """(frames, their pts or None where they carry no usable pts, pts of the keyframes) by decoding the whole file."""
    times, keys = [], []
    with _open(path) as (container, stream):
        for frame in _decode(container, stream):
            times.append(frame.pts)
            if frame.key_frame:
                keys.append(frame.pts)
    if None in times or any(b <= a for a, b in pairwise(times)):
        return len(times), None, []
    return len(times), times, keys


def _rate(path: str, stream, times: list[int] | None) -> Fraction:
    """Frames per second. The header's average, unless the timestamps contradict it (a guess for a variable rate)."""
    stated = stream.average_rate or stream.guessed_rate
    if times is not None and len(times) > 1:
        span = (times[-1] - times[0]) * stream.time_base
        measured = (len(times) - 1) / span
        # a time base of milliseconds moves each end by up to half a tick
        if not stated or abs(measured / stated - 1) > Fraction(1, 100) + stream.time_base / span:
            return measured
    if not stated:
        raise VideoError(f"video {path!r}: has neither a frame rate nor timestamps")
    return Fraction(stated)


def _probe(path, decode_all: bool) -> VideoInfo:
    path = _check_path(path)
    with _open(path) as (container, stream):
        codec, packets = stream.codec_context.name, stream.frames
        frame, table = _scan(container, stream)
        if frame is None:
            raise VideoError(f"video {path!r}: not one frame can be decoded ({codec}); it is damaged or truncated")
        rotation = round(frame.rotation / 90) % 4 * 90
        if abs(frame.rotation - 90 * round(frame.rotation / 90)) > 1:  # whole degrees, cut off
            logger.warning("video %r: to be turned by some %d degrees, is by %d", path, frame.rotation % 360, rotation)
        height, width = frame.height, frame.width
        if table is not None and table[0] and not decode_all:
            times, keys = table
            frames = len(times)
        else:
            frames, times, keys = _decode_table(path)
            if packets and frames < packets:
                logger.warning("video %r: %d of %d frames can be decoded", path, frames, packets)
        fps = _rate(path, stream, times)
    if rotation % 180:
        height, width = width, height
    position = {pts: index for index, pts in enumerate(times or [])}
    keyframes = tuple(position[pts] for pts in keys if pts in position)
    return VideoInfo(
        path, frames, fps, height, width, rotation, codec, None if times is None else tuple(times), keyframes
    )


def probe(path) -> VideoInfo:
    """Look at a video file: number of frames, frame rate, displayed size, rotation.

    Reads the packets' timestamps (no decoding) where the container states its frame count and the packets confirm
    it; otherwise (webm, ts, truncated files) counts by decoding the whole file.
    Raises VideoError for a file that is missing, empty, unreadable, without video, or without a decodable frame.
    """
    return _probe(path, decode_all=False)


def _key_before(info: VideoInfo, index: int) -> int:
    place = bisect_right(info.keyframes, index)
    return info.keyframes[place - 1] if place else 0


def _image(frame, info: VideoInfo, convert) -> np.ndarray:
    """[height, width, 3] uint8 RGB, upright. convert: the reformat of one converter, whose tables serve all frames."""
    height, width = (info.width, info.height) if info.rotation % 180 else (info.height, info.width)
    image = convert(frame, width=width, height=height, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(image, info.rotation // 90))


def _read_run(info: VideoInfo, wanted: list[int], start: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index, image) of the wanted indices (ascending) that decode, seeking to keyframe `start` first.

    Yields nothing if the seek lands behind that keyframe: only from there on is every picture whole.
    """
    times = info.timestamps
    left = set(wanted)
    convert = _av().video.reformatter.VideoReformatter().reformat
    with _open(info.path) as (container, stream):
        position = {} if times is None else {times[index]: index for index in wanted}
        whole = start == 0
        if not whole:
            container.seek(times[start], stream=stream, backward=True)
        for count, frame in enumerate(_decode(container, stream)):
            if not whole:
                if frame.pts is None or frame.pts > times[start]:
                    return
                whole = frame.pts == times[start]
            index = count if times is None else position.get(frame.pts)
            if index in left:
                left.remove(index)
                yield index, _image(frame, info, convert)
            if not left:
                return


def _runs(info: VideoInfo, wanted: list[int]) -> list[list[int]]:
    """Split ascending indices where seeking to the next keyframe skips more than SEEK_GAP frames."""
    runs: list[list[int]] = []
    for index in wanted:
        if runs and _key_before(info, index) - runs[-1][-1] <= SEEK_GAP:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def iter_frames(path, indices: Iterable[int], *, info: VideoInfo | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, image) once for each distinct index, in no promised order, one image in memory at a time.

    indices: any order, repeats allowed; those past the end become the last frame, as in the original.
    image: [height, width, 3] uint8 RGB, rotated as displayed.
    info: what `probe(path)` returned, to spare a second look.
    A frame the decoder cannot restore is replaced by the nearest one before it, with a logged warning.
    """
    indices = [operator.index(index) for index in indices]
    if indices and min(indices) < 0:
        raise ValueError(f"indices: got {min(indices)}, expected frame numbers of 0 or more")
    info = info or probe(path)
    wanted = sorted({min(index, info.frames - 1) for index in indices})
    lost: list[int] = []
    for run in _runs(info, wanted):
        # A seek may land behind its target (reordered frames, ts files): then start earlier, at last from the front.
        starts = dict.fromkeys((_key_before(info, run[0]), _key_before(info, max(run[0] - SEEK_GAP, 0)), 0))
        for start in starts:
            done = set()
            for index, image in _read_run(info, run, start):
                done.add(index)
                yield index, image
            run = [index for index in run if index not in done]
            if not run:
                break
        lost += run
    if not lost:
        return
    intact = _probe(info.path, decode_all=True)
    if info.timestamps is None or intact.timestamps is None:
        substitutes = {index: min(index, intact.frames - 1) for index in lost}
    else:
        times = intact.timestamps
        substitutes = {index: max(bisect_right(times, info.timestamps[index]) - 1, 0) for index in lost}
    logger.warning("video %r: frames %s cannot be decoded; the ones before them are used", info.path, lost)
    images = dict(_read_run(intact, sorted(set(substitutes.values())), 0))
    for index in lost:
        if substitutes[index] not in images:
            raise VideoError(f"video {info.path!r}: frame {index} cannot be decoded")
        yield index, images[substitutes[index]]


def read_frames(path, indices: Iterable[int], *, info: VideoInfo | None = None) -> np.ndarray:
    """The frames of a video at a list of indices: [len(indices), height, width, 3] uint8 RGB, in the order given.

    Repeats and any order are allowed; indices past the end give the last frame. Raises VideoError as `probe` does,
    ValueError for a negative index, TypeError for one that is not an integer.
    """
    indices = [operator.index(index) for index in indices]
    info = info or probe(path)
    out = np.empty((len(indices), info.height, info.width, 3), np.uint8)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(min(index, info.frames - 1), []).append(place)
    for index, image in iter_frames(path, indices, info=info):
        out[places[index]] = image
    return out


def write_video(path, frames, fps, codec: str = "h264", *, options: dict[str, str] | None = None) -> None:
    """Encode frames [T, height, width, 3] uint8 RGB to a file whose suffix names the container (.mp4, .webm, ...).

    fps: frames per second. codec: an FFmpeg encoder, stored as yuv420p, so height and width must be even.
    options: for the encoder, for example {"crf": "18"}. The file appears whole or not at all.
    Raises ValueError for frames or a codec that cannot be encoded.
    """
    av = _av()
    path = Path(path)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames: got {frames.dtype} {frames.shape}, expected uint8 (T, height, width, 3), not empty")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames: got height x width {height} x {width}, expected even numbers (yuv420p)")
    rate = Fraction(fps).limit_denominator(100_000)
    if rate <= 0:
        raise ValueError(f"fps: got {fps}, expected more than 0")
    # the suffix stays last: it tells FFmpeg the container
    part = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        with av.open(str(part), "w") as container:
            stream = container.add_stream(codec, rate=rate, options=options or {})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
            container.mux(stream.encode())
        os.replace(part, path)
    except (av.error.FFmpegError, av.codec.codec.UnknownCodecError, ValueError) as error:
        raise ValueError(f"cannot write {str(path)!r} with codec {codec!r}: {_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)
