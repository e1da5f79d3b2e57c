# SPDX-License-Identifier: Apache-2.0
"""The trained model in the box: what happens in a small drawn video, which of four shapes moves where or follows which.

Its weights lie beside this file; training.json holds the command that made them, which takes minutes on a CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

TASK = "scenes"
SIZE, FRAMES, FPS = 128, 64, 30  # of a fresh video; the model sees 8 of its frames at 32 x 32


def folder() -> Path:
    """Where the weights are, for `TimeSformer.from_pretrained`."""
    return Path(__file__).parent


def write_clip(path: str | os.PathLike, seed: int) -> str:
    """Draw the clip of that seed into an H.264 file. -> what happens in it, a class of the model."""
    from ..train.tasks import NOISE, TASKS, draw, scene
    from ..video import write_video

    drawn = scene(TASK, seed)
    write_video(path, draw(drawn, FRAMES, SIZE, noise=NOISE, seed=seed), FPS)
    return TASKS[TASK][drawn.label]


@dataclass(frozen=True)
class Answer:
    """What the model sees in a video, with its probability, and what comes second."""

    name: str
    probability: float
    second: str
    second_probability: float


class Namer:
    """The trained model, ready to name what happens in video files."""

    def __init__(self, backend: str = "auto"):
        from .. import TimeSformer
        from ..presets import find_preset

        self.model = TimeSformer.from_pretrained(folder(), backend=backend)
        self.preset = find_preset(self.model.config.preset)

    def __call__(self, path: str | os.PathLike) -> Answer:
        """Decode a video file and name it. Raises VideoError for a file that cannot be read."""
        from ..evaluation import aggregate, predict
        from ..video import clip_views

        views: torch.Tensor = clip_views(path, self.preset)  # [1, 3, 8, 32, 32]
        best = aggregate(predict(self.model, views)).topk(2)
        names = [self.model.config.id2label[index] for index in best.indices.tolist()]
        values = best.values.tolist()
        return Answer(names[0], values[0], names[1], values[1])
