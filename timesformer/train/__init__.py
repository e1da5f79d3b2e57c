# SPDX-License-Identifier: Apache-2.0
"""Training: videos in folders or drawn clips in, a trained model out; stopped anywhere, it goes on exactly."""

from .data import DrawnClips, VideoClips
from .folders import read_folder
from .loop import Stopped, Trainer
from .processes import Processes
from .recipe import MINIATURE, Recipe

__all__ = ["MINIATURE", "DrawnClips", "Processes", "Recipe", "Stopped", "Trainer", "VideoClips", "read_folder"]
