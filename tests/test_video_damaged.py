# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged or no videos at all: what can be read is, everything else is one error with its reason."""

import logging

import numpy as np
import pytest

pytest.importorskip("av")

import av
from numbered import H264, number, numbered, numbers

from timesformer.video import VideoError, probe, read_frames, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """100 frames of H.264 with B frames, 30 frames per second."""
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    write_video(path, numbered(100), 30, options=H264)
    return path


def test_missing_file(tmp_path):
    with pytest.raises(VideoError, match="gone.mp4.*no such file"):
        probe(tmp_path / "gone.mp4")
    with pytest.raises(VideoError, match="is a directory"):
        probe(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match="empty"):
        read_frames(tmp_path / "empty.mp4", [0])


@pytest.mark.parametrize("name", ["noise.mp4", "noise.avi", "noise.ts", "noise.txt"])
def test_garbage_file(tmp_path, name):
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(20_000))
    with pytest.raises(VideoError, match=name):
        probe(tmp_path / name)


def sound(container):
    stream = container.add_stream("aac", rate=16000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def test_audio_only_file(tmp_path):
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        sound(container)
    with pytest.raises(VideoError, match="no video stream .streams: audio"):
        probe(tmp_path / "sound.m4a")


def test_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp3"), "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "rgb24"
        stream = container.add_stream("libmp3lame", rate=16000)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "song.mp3")) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(VideoError, match="no video stream"):
        probe(tmp_path / "song.mp3")


def test_truncated_mp4_without_its_index(clip, tmp_path):
    """The index of a plain mp4 is at its end: nothing can be read."""
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:-2000])
    with pytest.raises(VideoError, match="damaged, truncated"):
        probe(tmp_path / "cut.mp4")


def faststart(path, frames):
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("h264", rate=30, options=H264)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_truncated_mp4_with_its_index(tmp_path, caplog):
    """With the index in front, what is there decodes; indices past it repeat the last good frame."""
    path = tmp_path / "cut.mp4"
    faststart(path, numbered(100))
    data = path.read_bytes()
    media = data.index(b"mdat")
    path.write_bytes(data[: media + (len(data) - media) // 2])
    with caplog.at_level(logging.WARNING, "timesformer"):
        info = probe(path)
    assert 10 < info.frames < 90
    assert f"{info.frames} of 100 frames can be decoded" in caplog.text
    good = info.frames - 1
    assert numbers(read_frames(path, [0, good // 2])) == [0, good // 2]
    images = read_frames(path, [good, 99])
    assert np.array_equal(images[0], images[1])


@pytest.mark.parametrize("name, codec", [("cut.ts", "h264"), ("cut.webm", "libvpx-vp9")])
def test_truncated_stream(tmp_path, name, codec):
    path = tmp_path / name
    write_video(path, numbered(60), 30, codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    info = probe(path)
    assert 5 < info.frames < 55
    assert numbers(read_frames(path, range(info.frames - 2))) == list(range(info.frames - 2))


def test_nothing_decodes(tmp_path):
    path = tmp_path / "header.mp4"
    faststart(path, numbered(30))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 8])
    with pytest.raises(VideoError, match="not one frame can be decoded"):
        probe(path)


def test_damage_in_the_middle(tmp_path, caplog):
    """Frames the decoder loses are replaced by earlier ones, all others are themselves."""
    path = tmp_path / "hole.mkv"
    write_video(path, numbered(60), 30, options={"bf": "0", "g": "12"})
    info = probe(path)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        place, size = packets[30].pos, packets[30].size
    data = bytearray(path.read_bytes())
    start = data.index(bytes(packets[30]), place)
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "timesformer"):
        images = read_frames(path, [0, 20, 30, 59], info=info)
    assert numbers(images[[0, 1, 3]]) == [0, 20, 59]
    assert number(images[2]) == 29
    assert "[30] cannot be decoded" in caplog.text


def test_no_pyav(monkeypatch, clip):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "timesformer-kernels\[video\]"'):
        probe(clip)
