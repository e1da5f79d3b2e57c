# SPDX-License-Identifier: Apache-2.0
"""Video files in, model input out: decoding, frame sampling, transforms and views."""

from .decode import VideoError, VideoInfo, iter_frames, probe, read_frames, write_video
from .sampling import kinetics, segments, uniform
from .views import clip_indices, clip_views

__all__ = [
    "VideoError",
    "VideoInfo",
    "clip_indices",
    "clip_views",
    "iter_frames",
    "kinetics",
    "probe",
    "read_frames",
    "segments",
    "uniform",
    "write_video",
]
