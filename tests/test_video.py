# SPDX-License-Identifier: Apache-2.0
"""Decoding real files made here: which frame is which is read from the picture, never from timestamps."""

import logging
import math
import re
import struct
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av")

import av
from numbered import H264, HEIGHT, WIDTH, encode, number, numbered, numbers

from timesformer.presets import Preset
from timesformer.video import clip_indices, clip_views, iter_frames, probe, read_frames, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def clip(folder):
    """100 frames of H.264 with B frames, 30 frames per second."""
    path = folder / "clip.mp4"
    write_video(path, numbered(100), 30, options=H264)
    return path


def test_the_test_file_has_reordered_frames(clip):
    with av.open(str(clip)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert times != sorted(times)


def test_probe(clip):
    info = probe(clip)
    assert (info.frames, info.fps, info.height, info.width) == (100, 30, HEIGHT, WIDTH)
    assert (info.rotation, info.codec) == (0, "h264")
    assert info.duration == pytest.approx(100 / 30)


def test_every_frame_by_its_index(clip):
    images = read_frames(clip, range(100))
    assert images.shape == (100, HEIGHT, WIDTH, 3) and images.dtype == np.uint8
    assert numbers(images) == list(range(100))


@pytest.mark.parametrize("indices", [
    pytest.param([0], id="first"),
    pytest.param([99], id="last"),
    pytest.param([50], id="one"),
    pytest.param([70, 3, 70, 69, 3], id="unsorted-repeated"),
    pytest.param([11, 12, 13, 23, 24, 25], id="around-keyframes"),
    pytest.param([0, 97], id="far-apart"),  # a second seek
    pytest.param([98, 99, 100, 1000], id="past-the-end"),
    pytest.param([], id="none"),
])  # fmt: skip
def test_index_lists(clip, indices):
    images = read_frames(clip, indices)
    assert images.shape[1:] == (HEIGHT, WIDTH, 3)
    assert numbers(images) == [min(index, 99) for index in indices]


def test_indices_are_checked(clip):
    with pytest.raises(ValueError, match="indices: got -1"):
        read_frames(clip, [3, -1])
    with pytest.raises(TypeError):
        read_frames(clip, [0.5])


def test_iter_frames_gives_each_index_once(clip):
    seen = [(index, number(image)) for index, image in iter_frames(clip, [5, 90, 5, 5, 300])]
    assert sorted(seen) == [(5, 5), (90, 90), (99, 99)]


def test_colours_are_rgb(folder):
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    frames[...] = (200, 40, 90)
    write_video(folder / "red.mp4", frames, 10, options={"crf": "1"})
    assert np.abs(read_frames(folder / "red.mp4", [0, 1]).astype(int) - (200, 40, 90)).max() <= 4


@pytest.mark.parametrize("name, codec, options", [
    pytest.param("clip.webm", "libvpx-vp9", {"crf": "10", "b": "0", "deadline": "realtime"}, id="webm"),
    pytest.param("clip.ts", "h264", H264, id="ts"),  # time starts at 1.4 s or so
    pytest.param("clip.mkv", "h264", H264, id="mkv"),
    pytest.param("clip.avi", "mpeg4", {"g": "10", "q": "2"}, id="avi"),
    pytest.param("clip.h264", "h264", H264, id="no-timestamps"),
])  # fmt: skip
def test_containers(folder, name, codec, options):
    path = folder / name
    write_video(path, numbered(60), 30, codec, options=options)
    assert probe(path).frames == 60
    wanted = [59, 0, 17, 18, 40, 40, 2]
    assert numbers(read_frames(path, wanted)) == wanted
    assert numbers(read_frames(path, [47, 48])) == [47, 48]


def test_unknown_frame_count_is_counted(folder):
    path = folder / "uncounted.webm"
    write_video(path, numbered(25), 25, "libvpx-vp9", options={"deadline": "realtime"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    info = probe(path)
    assert (info.frames, info.fps) == (25, 25)


def test_start_time_is_not_zero(folder):
    path = folder / "late.mkv"
    encode(path, numbered(40), range(300, 340))
    with av.open(str(path)) as container:
        assert container.streams.video[0].start_time > 0
    assert probe(path).frames == 40
    assert numbers(read_frames(path, [0, 13, 39])) == [0, 13, 39]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(folder, suffix):
    """Frames count in presentation order; the rate is the average of the timestamps."""
    path = folder / f"variable.{suffix}"
    gaps = [1, 1, 5, 2, 9, 1, 1, 1, 30, 1] * 4
    encode(path, numbered(40), np.cumsum([0] + gaps[:-1]).tolist(), options={"bf": "0", "g": "12"})
    info = probe(path)
    assert info.frames == 40
    assert float(info.fps) == pytest.approx(40 / sum(gaps) * 30, rel=0.06)
    wanted = [0, 2, 3, 8, 9, 21, 39]
    assert numbers(read_frames(path, wanted)) == wanted


def test_ntsc_rate_is_exact(folder):
    write_video(folder / "ntsc.mp4", numbered(12), 30000 / 1001)
    assert probe(folder / "ntsc.mp4").fps == Fraction(30000, 1001)


def test_single_frame(folder):
    path = folder / "single.mp4"
    write_video(path, numbered(1), 30)
    info = probe(path)
    assert (info.frames, info.fps) == (1, 30)
    assert numbers(read_frames(path, [0, 0, 7])) == [0, 0, 0]


def test_long_jumps_seek_and_do_not_decode_everything(folder, monkeypatch):
    import timesformer.video.decode as decode

    path = folder / "long.mp4"
    write_video(path, numbered(250), 30, options=H264)
    info = probe(path)
    decoded = []
    whole = decode._decode

    def counted(container, stream):
        for frame in whole(container, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, "_decode", counted)
    assert numbers(read_frames(path, [10, 130, 249], info=info)) == [10, 130, 249]
    assert len(decoded) < 60


def test_seek_that_lands_too_late_starts_earlier(folder, clip, monkeypatch):
    """Forget all but a wrong keyframe: the seek goes there, the frame is found all the same."""
    import dataclasses

    info = probe(clip)
    wrong = dataclasses.replace(info, keyframes=(0, 29))  # frame 29 is no keyframe: the file has one at 24
    assert 29 not in info.keyframes
    assert numbers(read_frames(clip, [31, 40], info=wrong)) == [31, 40]


class Container:
    """A container whose seek lands `late` ticks behind its target, or whose packets end with an error."""

    def __init__(self, container, late=0, packets=None):
        self.container, self.late, self.packets = container, late, packets

    def seek(self, offset, **options):
        self.container.seek(offset + self.late, **options)

    def demux(self, stream):
        for count, packet in enumerate(self.container.demux(stream)):
            if count == self.packets:
                raise av.error.InvalidDataError(1, "the file ends here")
            yield packet


def test_seek_behind_the_target_starts_earlier(clip, monkeypatch, caplog):
    import timesformer.video.decode as decode

    info, whole = probe(clip), decode._open
    ticks = info.timestamps[1] - info.timestamps[0]

    @contextmanager
    def late(path):
        with whole(path) as (container, stream):
            yield Container(container, late=20 * ticks), stream

    monkeypatch.setattr(decode, "_open", late)
    with caplog.at_level(logging.WARNING, "timesformer"):
        assert numbers(read_frames(clip, [26, 30, 95], info=info)) == [26, 30, 95]
    assert not caplog.records  # found by an earlier seek, not counted as lost


def test_a_broken_end_still_gives_the_frames_in_the_decoder(clip):
    import timesformer.video.decode as decode

    with decode._open(str(clip)) as (container, stream):
        images = [
            frame.to_ndarray(format="rgb24") for frame in decode._decode(Container(container, packets=48), stream)
        ]
    assert numbers(images) == list(range(48))


@pytest.mark.parametrize("lacks", ["packets", "a time", "nothing"])
def test_a_table_that_does_not_say_all_is_none(clip, lacks):
    """Packets that end early without an error, or come without a time: only decoding tells the frames then."""
    import timesformer.video.decode as decode

    class Lacking(Container):
        def demux(self, stream):
            for count, packet in enumerate(self.container.demux(stream)):
                if lacks == "packets" and count == 48:
                    return
                if lacks == "a time" and count == 48:
                    packet.pts = None
                yield packet

    with decode._open(str(clip)) as (container, stream):
        first, table = decode._scan(Lacking(container), stream)
    assert number(first.to_ndarray(format="rgb24")) == 0
    if lacks == "nothing":
        assert table == (list(probe(clip).timestamps), [probe(clip).timestamps[i] for i in probe(clip).keyframes])
    else:
        assert table is None


def rotate(path, degrees):
    """Write a display matrix into an mp4: `degrees` clockwise, as phones do."""
    data = bytearray(path.read_bytes())
    a, b = (round(turn(math.radians(degrees)) * (1 << 16)) for turn in (math.cos, math.sin))
    c, d = -b, a
    place = data.index(b"tkhd") + 4 + 40  # version 0: the 3 x 3 matrix follows 40 bytes of header
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(folder, degrees, caplog):
    path = folder / f"rotated{degrees}.mp4"
    frames = np.full((3, 48, 64, 3), 20, np.uint8)
    frames[:, :16, :16] = 230  # a mark in the stored picture's top left corner
    write_video(path, frames, 30)
    rotate(path, degrees)
    info = probe(path)
    image = read_frames(path, [1])[0]
    assert image.shape[:2] == (info.height, info.width) == ((64, 48) if degrees != 180 else (48, 64))
    # turning clockwise carries the top left corner to top right, bottom right, bottom left
    corner = {90: image[:8, -8:], 180: image[-8:, -8:], 270: image[-8:, :8]}[degrees]
    assert corner.mean() > 200 and image.mean() < 80 and not caplog.records


@pytest.mark.parametrize("degrees, nearest", [(10, 0), (100, 90), (350, 0)])
def test_an_angle_that_is_not_right(folder, caplog, degrees, nearest):
    """Read turned by the nearest right angle, and said."""
    path = folder / f"tilted{degrees}.mp4"
    frames = np.full((3, 48, 64, 3), 20, np.uint8)
    frames[:, :16, :16] = 230
    write_video(path, frames, 30)
    rotate(path, degrees)
    with caplog.at_level(logging.WARNING, "timesformer"):
        info = probe(path)
    (told,) = re.findall(r"to be turned by some (\d+) degrees, is by (\d+)", caplog.text)
    assert abs(int(told[0]) - (360 - degrees)) <= 1 and int(told[1]) == -nearest % 360  # counter-clockwise
    assert (info.height, info.width) == ((64, 48) if nearest else (48, 64))
    image = read_frames(path, [1], info=info)[0]
    assert (image[:8, -8:] if nearest else image[:8, :8]).mean() > 200


# Writing


def test_write_video_checks_its_input(tmp_path):
    path = tmp_path / "out.mp4"
    for frames, what in [
        (np.zeros((2, 48, 63, 3), np.uint8), "even"),
        (np.zeros((2, 48, 64, 3), np.float32), "expected uint8"),
        (np.zeros((48, 64, 3), np.uint8), "expected uint8"),
        (np.zeros((0, 48, 64, 3), np.uint8), "not empty"),
    ]:
        with pytest.raises(ValueError, match=f"frames: got .*{what}"):
            write_video(path, frames, 30)
    with pytest.raises(ValueError, match="fps: got 0"):
        write_video(path, numbered(2), 0)
    with pytest.raises(ValueError, match="codec 'nonsense'"):
        write_video(path, numbered(2), 30, "nonsense")
    assert list(tmp_path.iterdir()) == []


def test_write_video_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"before")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, numbered(3), 30)
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_bytes() == b"before"


# Views


PRESET = Preset("tiny", 32, 4, "kinetics", 10, 5)


def test_clip_views(clip):
    """Every view shows the sampled frames, in order, at the crop's place."""
    views = clip_views(clip, PRESET)
    assert views.shape == (3, 3, 4, 32, 32) and views.is_floating_point()
    indices = clip_indices(100, 30, PRESET)
    assert indices == [[0, 13, 26, 39]]
    levels = (views * 0.225 + 0.45) * 255
    for time, index in enumerate(indices[0]):
        left, right = index // 16 * 16 + 8, index % 16 * 16 + 8
        assert abs(levels[0, :, time, :, :16].mean() - left) < 5  # the left crop's left part
        assert abs(levels[2, :, time, :, 16:].mean() - right) < 5


def test_clip_views_of_several_clips(clip):
    import dataclasses

    preset = dataclasses.replace(PRESET, clips=2, crops=1)
    assert clip_indices(100, 30, preset) == [[0, 13, 26, 39], [30, 43, 56, 69]]
    views = clip_views(clip, preset)
    assert views.shape == (2, 3, 4, 32, 32)
    assert (views[0] == clip_views(clip, dataclasses.replace(PRESET, crops=1))[0]).all()


def test_short_video_repeats_its_last_frame(folder):
    write_video(folder / "short.mp4", numbered(3), 30)
    views = clip_views(folder / "short.mp4", PRESET)
    assert clip_indices(3, 30, PRESET) == [[0, 2, 2, 2]]
    assert (views[:, :, 1] == views[:, :, 3]).all()
    assert not (views[:, :, 0] == views[:, :, 1]).all()


@pytest.mark.parametrize("sampler, expected", [("segments", [12, 37, 62, 86]), ("uniform", [0, 33, 66, 99])])
def test_samplers_by_preset(clip, sampler, expected):
    preset = Preset("tiny", 32, 4, sampler, None, 5, crops=1)
    assert clip_indices(100, 30, preset) == [expected]


def test_channel_order_of_views(folder):
    import dataclasses

    frames = np.zeros((2, 32, 32, 3), np.uint8)
    frames[...] = (200, 40, 90)
    write_video(folder / "colour.mp4", frames, 30)
    preset = dataclasses.replace(PRESET, num_frames=1, crops=1)
    rgb = clip_views(folder / "colour.mp4", preset)
    bgr = clip_views(folder / "colour.mp4", dataclasses.replace(preset, channel_order="BGR"))
    assert (rgb.flip(1) == bgr).all() and rgb[0, 0].mean() > rgb[0, 2].mean() > rgb[0, 1].mean()
