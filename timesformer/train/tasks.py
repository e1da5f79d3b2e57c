# SPDX-License-Identifier: Apache-2.0
"""Miniature tasks: clips drawn by formula, endless, that a model of 150 thousand parameters learns in CPU minutes.

shape       which of four shapes is seen; one frame is enough
direction   where a shape moves; the reversed clip is the opposite class
order       which shape comes first and which second; the reversed clip is the pair the other way round
scenes      a shape and where it moves, or two shapes one after the other: 16 + 12 classes, the demo model's task

A model that treats frames as a set gives a clip and its reverse one answer. Both are equally likely and their labels
differ, so it cannot be right in more than half of the clips of `direction` and `order`, whatever it learns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

SHAPES = ("square", "ring", "cross", "disc")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up"}
PLACES = 8  # of a shape that hops, in equal parts of the clip
NOISE = 0.04  # deviation of the pixels, black to white being 1

MODEL = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "drop_path_rate": 0.0}

_MOVES = tuple((shape, direction) for shape in SHAPES for direction in DIRECTIONS)
_PAIRS = tuple((first, second) for first in SHAPES for second in SHAPES if first != second)
_MOVE_NAMES = tuple(f"{shape} moves {direction}" for shape, direction in _MOVES)
_PAIR_NAMES = tuple(f"{first} then {second}" for first, second in _PAIRS)
TASKS = {
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "order": _PAIR_NAMES,
    "scenes": _MOVE_NAMES + _PAIR_NAMES,
}


@dataclass(frozen=True)
class Scene:
    """What happens in one clip, in units of the frame's side and of the clip's duration.

    label: index into the task's classes. shapes: the first and the last one. change: when the second one takes over.
    places: [2, 2], (x, y) of the centre at the start and at the end of a straight path, or [PLACES, 2], hops.
    """

    label: int
    shapes: tuple[str, str]
    change: float
    places: np.ndarray
    radius: float
    colour: np.ndarray  # [3] in [0, 1]
    background: np.ndarray  # [3, 3]: the colour, and what it gains to the right and downwards

    def centres(self, times: np.ndarray) -> np.ndarray:
        """[T, 2] at times in [0, 1]."""
        if len(self.places) == 2:
            start, end = self.places
            return start + times[:, None] * (end - start)
        return self.places[np.minimum((times * len(self.places)).astype(int), len(self.places) - 1)]

    def reverse(self, task: str) -> Scene:
        """The scene that runs backwards, with its own label."""
        name = TASKS[task][self.label]
        if " then " in name:
            name = " then ".join(reversed(name.split(" then ")))
        else:
            name = " ".join(REVERSED.get(word, word) for word in name.split())
        label = TASKS[task].index(name)
        places = self.places[::-1]
        return Scene(label, self.shapes[::-1], 1 - self.change, places, self.radius, self.colour, self.background)


def scene(task: str, seed: int | tuple[int, ...]) -> Scene:
    """The scene of that seed; every class equally likely. Raises ValueError for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")
    random = np.random.default_rng(seed)
    label = int(random.integers(len(TASKS[task])))
    name = TASKS[task][label]
    radius = random.uniform(0.13, 0.17)
    if " then " in name:
        first, _, second = name.split()
        change = int(random.integers(2, PLACES - 1)) / PLACES  # at least two places each
        places = random.uniform(radius, 1 - radius, (PLACES, 2))
    else:
        words = name.split()
        first = second = words[0] if words[0] in SHAPES else str(random.choice(SHAPES))
        direction = words[-1] if words[-1] in DIRECTIONS else str(random.choice(list(DIRECTIONS)))
        change = 0.5
        travel = random.uniform(0.35, 0.5) * np.array(DIRECTIONS[direction])
        middle = random.uniform(radius + abs(travel) / 2, 1 - radius - abs(travel) / 2)
        places = np.stack([middle - travel / 2, middle + travel / 2])
    colour = random.uniform(0.6, 1.0, 3)
    background = np.concatenate([random.uniform(0.05, 0.25, (1, 3)), random.uniform(0.0, 0.15, (2, 3))])
    return Scene(label, (first, second), change, places, radius, colour, background)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the shape's edge, negative inside, at offsets x, y from its centre."""
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * radius
    if shape == "cross":
        arm = 0.3 * radius
        return np.minimum(np.maximum(abs(x) - arm, abs(y) - radius), np.maximum(abs(x) - radius, abs(y) - arm))
    length = np.hypot(x, y)
    return length - radius if shape == "disc" else abs(length - 0.75 * radius) - 0.25 * radius


def draw(scene: Scene, frames: int, size: int, *, noise: float = 0.0, seed: int | tuple[int, ...] = 0) -> np.ndarray:
    """[frames, size, size, 3] uint8 RGB: the scene at `frames` equally spaced times, first and last included.

    noise: deviation of the Gaussian noise in each pixel, drawn from `seed`.
    """
    times = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    grid = (np.arange(size) + 0.5) / size
    centres = scene.centres(times)  # [T, 2]
    x = grid[None, None, :] - centres[:, 0, None, None]  # [T, 1, S]
    y = grid[None, :, None] - centres[:, 1, None, None]  # [T, S, 1]
    late = times >= scene.change
    distance = np.empty((frames, size, size))
    for shape, chosen in zip(scene.shapes, (~late, late), strict=True):
        distance[chosen] = _distance(shape, x[chosen], y[chosen], scene.radius)
    cover = np.clip(0.5 - distance * size, 0, 1)[..., None]  # one pixel of soft edge
    level, right, down = scene.background
    ground = level + grid[None, :, None] * right + grid[:, None, None] * down  # [S, S, 3]
    image = ground + cover * (scene.colour - ground)
    if noise:
        image += noise * np.random.default_rng(seed).standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def initialise(model: nn.Module, table_std: float = 1.0) -> None:
    """Random weights for a model 64 wide, from torch's global generator: matrices Xavier's, position and time tables
    with deviation table_std.

    The original's 0.02 is made for a width of 768; here it would leave positions and times so faint that the model
    spends most of a short training on a plateau where it knows the axis of a motion and not its sense. temporal_fc
    stays zero, as in the original.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_embed"):
                parameter.normal_(std=table_std)
            elif parameter.ndim == 2 and "temporal_fc" not in name and not name.startswith("head"):
                nn.init.xavier_uniform_(parameter)
