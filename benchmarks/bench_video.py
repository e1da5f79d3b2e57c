# SPDX-License-Identifier: Apache-2.0
"""What comes before the model: a clip out of an H.264 file, decoded, resized and cropped, beside the model's forward.

"consecutive" takes 8 neighbouring frames, "spread" the published sampling, 8 frames 32 apart, for which the decoder
restores some 225. "convert" is the part of either that is not decoding: 8 frames resized, normalised and cropped.
"""

from dataclasses import replace

import pytest
import torch

from timesformer import TimeSformer
from timesformer.presets import find_preset

pytest.importorskip("av")

from timesformer.cli.demo import shapes
from timesformer.video import clip_indices, clip_views, probe, read_frames, write_video
from timesformer.video.transforms import channels_first, crops, resize, short_side

FRAMES, FPS = 264, 30  # as long as the published sampling needs
ROWS = ("consecutive", "spread", "convert", "model")


@pytest.fixture(scope="module")
def clip(request, tmp_path_factory):
    """(file, preset, size as displayed): 1920 x 1080, under --tiny 96 x 64."""
    tiny = request.config.getoption("--tiny", False)
    height, width = (64, 96) if tiny else (1080, 1920)
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, shapes(FRAMES, height, width), FPS, options={"preset": "veryfast"})
    preset = replace(find_preset("k400-base"), crops=1, img_size=32 if tiny else 224)
    return path, preset, (height, width)


def calls(path, preset, tiny):
    """{row: one clip}; the file's packets are looked at in every call, as for a file that was never seen."""
    near = replace(preset, rate=1)
    info = probe(path)
    images = torch.from_numpy(read_frames(path, clip_indices(info.frames, info.fps, near)[0], info=info))
    size = short_side(info.height, info.width, preset.img_size)

    def convert():
        frames = [channels_first(image[None], preset.channel_order) for image in images]
        frames = [resize(frame, *size, preset.mean, preset.std, "pil") for frame in frames]
        return crops(torch.cat(frames), preset.img_size, preset.crops)

    small = dict(patch_size=8, embed_dim=32, depth=2, num_heads=4) if tiny else {}
    model = TimeSformer(preset.img_size, num_frames=preset.num_frames, **small).eval().fuse()
    views = clip_views(path, near)
    assert torch.equal(views, convert()) and views.shape[2] == preset.num_frames
    assert not torch.equal(views, clip_views(path, preset))
    return {
        "consecutive": lambda: clip_views(path, near),
        "spread": lambda: clip_views(path, preset),
        "convert": convert,
        "model": lambda: model(views),
    }


@pytest.mark.parametrize("row", ROWS)
def test_video(request, compare, clip, row):
    path, preset, (height, width) = clip
    tiny = request.config.getoption("--tiny", False)
    compare(
        row,
        lambda: calls(path, preset, tiny),
        dtype=torch.float32,
        group=f"video {height}p",
        grad=False,
        seconds=20.0,
        warmup=1,
        least=4,
        table_seconds=0,
        info=dict(
            kind="video",
            op="a clip of a video",
            shape=f"{preset.num_frames} frames of {width}x{height} H.264, {FRAMES} frames in all",
            direction="forward",
            frames=preset.num_frames,
        ),
    )
