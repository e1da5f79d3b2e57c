# SPDX-License-Identifier: Apache-2.0
"""The test views of many videos, decoded ahead by worker processes; a bad file is an answer, not an exception."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from ..presets import Preset
from .decode import VideoError, VideoInfo, probe
from .views import clip_views


@dataclass(frozen=True)
class Loaded:
    """One video: its views [clips * crops, 3, T, size, size] and what `probe` found, or the error that stopped it."""

    path: str
    views: torch.Tensor | None = None
    info: VideoInfo | None = None
    error: str | None = None
    seconds: float = 0.0  # of decoding and transforming


class _Videos(Dataset):
    def __init__(self, videos: Sequence[str | VideoInfo], preset: Preset, rule: str):
        self.videos, self.preset, self.rule = list(videos), preset, rule

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Loaded:
        start, video = time.perf_counter(), self.videos[index]
        path = video.path if isinstance(video, VideoInfo) else video
        try:
            info = video if isinstance(video, VideoInfo) else probe(path)
            views = clip_views(path, self.preset, rule=self.rule, info=info)
            return Loaded(path, views, info, seconds=time.perf_counter() - start)
        except VideoError as error:
            return Loaded(path, error=str(error))


def load_views(
    videos: Sequence[str | VideoInfo], preset: Preset, *, rule: str = "pil", workers: int = 0
) -> Iterator[Loaded]:
    """The views of every video in order, see `clip_views`; with workers, that many processes decode ahead.

    videos: paths, or what `probe` found, to spare a second look.
    A file that cannot be read comes as a `Loaded` with its error. Other exceptions pass through.
    """
    yield from DataLoader(
        _Videos(videos, preset, rule),
        batch_size=None,
        num_workers=min(workers, len(videos)),
        generator=torch.Generator(),  # the loader's own draw must not move the caller's
    )
