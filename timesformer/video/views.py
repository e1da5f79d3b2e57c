# SPDX-License-Identifier: Apache-2.0
"""A video file to the model's test views, by a preset."""

from __future__ import annotations

import torch

from ..presets import Preset
from .decode import VideoInfo, iter_frames, probe
from .sampling import kinetics, segments, uniform
from .transforms import channels_first, crops, resize, short_side


def clip_indices(frames: int, fps, preset: Preset) -> list[list[int]]:
    """The frame indices of every test clip, [clips][num_frames], for a video of `frames` frames at `fps`."""
    if preset.sampler == "kinetics":
        return [
            kinetics(frames, fps, preset.num_frames, preset.rate, clip=clip, num_clips=preset.clips)
            for clip in range(preset.clips)
        ]
    sampler = {"segments": segments, "uniform": uniform}[preset.sampler]
    return [sampler(frames, preset.num_frames)]


def clip_views(path, preset: Preset, *, rule: str = "pil", info: VideoInfo | None = None) -> torch.Tensor:
    """The test views of a video: [clips * crops, 3, num_frames, img_size, img_size] float32, crops varying fastest.

    rule: the resize rule of `transforms`, "pil" or "original". info: what `probe(path)` returned, to spare a second
    look. Each source frame is decoded once and kept only at its final size. A video shorter than the clip repeats
    its last frame. Raises VideoError for a file that cannot be read.
    """
    info = info or probe(path)
    clips = clip_indices(info.frames, info.fps, preset)
    height, width = short_side(info.height, info.width, preset.img_size)
    images = {}
    for index, image in iter_frames(path, {index for clip in clips for index in clip}, info=info):
        frame = channels_first(torch.from_numpy(image)[None], preset.channel_order)
        images[index] = resize(frame, height, width, preset.mean, preset.std, rule)
    return torch.cat(
        [crops(torch.cat([images[index] for index in clip]), preset.img_size, preset.crops) for clip in clips]
    )
