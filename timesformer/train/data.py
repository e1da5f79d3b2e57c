# SPDX-License-Identifier: Apache-2.0
"""Clips for training: an endless, reproducible stream of micro-batches, from files or drawn.

Every random choice is a function of the seed and of the clip's place in the stream, and nothing else is remembered:
a stream that starts in the middle goes on exactly as one that came from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..presets import Preset
from ..video import VideoError, clip_views, kinetics, probe, read_frames, segments, uniform
from ..video.transforms import channels_first, normalise, train_clip
from .folders import Folder
from .tasks import NOISE, TASKS, draw, scene

RETRIES = 10  # other videos that are tried for one that cannot be read
SKIP = -1  # label of a clip that does not count
_ORDER, _CLIP, _MODEL, _VALIDATION = range(4)  # what a seed is for


def seed_of(*numbers: int) -> int:
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_model(seed: int, step: int, part: int) -> None:
    """Seed what the model draws (dropped paths) in one part of a step."""
    torch.manual_seed(seed_of(seed, _MODEL, step, part))


class Source(Protocol):
    """Labelled clips. train(index, seed) and validation(index) -> (clip [3, T, S, S] float32, label, problems)."""

    classes: tuple[str, ...]
    preset: Preset

    def __len__(self) -> int: ...  # clips of one epoch
    def train(self, index: int, seed: int) -> tuple[Tensor, int, list[str]]: ...
    def validation_length(self) -> int: ...
    def validation(self, index: int) -> tuple[Tensor, int, list[str]]: ...
    def facts(self) -> dict: ...  # what must be the same for a training to go on


@dataclass(frozen=True)
class VideoClips:
    """Videos of folders: sampled and transformed as the preset says. A video that cannot be read is reported and
    another one takes its place; with strict=True it raises VideoError."""

    folder: Folder
    preset: Preset
    held_out: Folder | None = None
    strict: bool = False
    rule: str = "original"  # of resizing; as the original trains

    @property
    def classes(self) -> tuple[str, ...]:
        return self.folder.classes

    def __len__(self) -> int:
        return len(self.folder.clips)

    def train(self, index: int, seed: int) -> tuple[Tensor, int, list[str]]:
        """Raises VideoError where no video can be read RETRIES times in a row."""
        generator = torch.Generator().manual_seed(seed)
        problems: list[str] = []
        for _ in range(RETRIES):
            path, label = self.folder.clips[index]
            try:
                return self._train_clip(path, generator), label, problems
            except VideoError as error:
                if self.strict:
                    raise
                problems.append(str(error))
            index = int(torch.randint(len(self), (), generator=generator))
        raise VideoError(f"{RETRIES} videos in a row cannot be read, the last one because of: {problems[-1]}")

    def _train_clip(self, path: str, generator: torch.Generator) -> Tensor:
        preset, info = self.preset, probe(path)
        if preset.sampler == "kinetics":
            indices = kinetics(info.frames, info.fps, preset.num_frames, preset.rate, generator=generator)
        elif preset.sampler == "segments":
            indices = segments(info.frames, preset.num_frames, generator=generator)
        else:
            indices = uniform(info.frames, preset.num_frames)
        frames = torch.from_numpy(read_frames(path, indices, info=info))
        return train_clip(
            frames, size=preset.img_size, mean=preset.mean, std=preset.std, channel_order=preset.channel_order,
            scale=preset.train_scale, inverse_scale=preset.train_inverse_scale, flip=preset.train_flip, rule=self.rule,
            generator=generator,
        )  # fmt: skip

    def validation_length(self) -> int:
        return len(self.held_out.clips) if self.held_out else 0

    def validation(self, index: int) -> tuple[Tensor, int, list[str]]:
        """The first test view, in the middle of the frame; zeros labelled SKIP for a video that cannot be read."""
        path, label = self.held_out.clips[index]
        try:
            return clip_views(path, replace(self.preset, clips=1, crops=1), rule=self.rule)[0], label, []
        except VideoError as error:
            if self.strict:
                raise
            return *filler(self.preset), [str(error)]

    def facts(self) -> dict:
        return {"classes": list(self.classes), "videos": len(self), "preset": repr(self.preset)}


@dataclass(frozen=True)
class DrawnClips:
    """Clips of a miniature task, no two alike. `length` is what is called an epoch."""

    task: str
    preset: Preset
    length: int = 3200
    held_out: int = 512

    @property
    def classes(self) -> tuple[str, ...]:
        return TASKS[self.task]

    def __len__(self) -> int:
        return self.length

    def _clip(self, seed: int) -> tuple[Tensor, int, list[str]]:
        preset, drawn = self.preset, scene(self.task, seed)
        frames = draw(drawn, preset.num_frames, preset.img_size, noise=NOISE, seed=seed)
        clip = normalise(channels_first(torch.from_numpy(frames), preset.channel_order), preset.mean, preset.std)
        return clip.transpose(0, 1).contiguous(), drawn.label, []

    def train(self, index: int, seed: int) -> tuple[Tensor, int, list[str]]:
        return self._clip(seed)

    def validation_length(self) -> int:
        return self.held_out

    def validation(self, index: int) -> tuple[Tensor, int, list[str]]:
        return self._clip(seed_of(_VALIDATION, index))

    def facts(self) -> dict:
        return {"task": self.task, "length": self.length, "preset": repr(self.preset)}


@dataclass(frozen=True)
class Batch:
    """clips [B, 3, T, S, S] float32, labels [B] int64; problems: what could not be read, a line each."""

    clips: Tensor
    labels: Tensor
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, items: list[tuple[Tensor, int, list[str]]]) -> Batch:
        clips, labels, problems = zip(*items, strict=True)
        return cls(torch.stack(clips), torch.tensor(labels), [line for lines in problems for line in lines])


class _Places(Sampler):
    """Places in the stream, in lists of one micro-batch: those of this process, from step `start` to `stop`."""

    def __init__(self, recipe, start: int, stop: int, rank: int, world: int):
        self.recipe, self.start, self.stop, self.rank, self.world = recipe, start, stop, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            for part in parts_of(self.recipe, self.rank, self.world):
                first = step * self.recipe.batch_size + part * self.recipe.micro_batch
                yield list(range(first, first + self.recipe.micro_batch))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.recipe.parts // self.world


class _Stream(Dataset):
    """Place in the stream -> (clip, label, problems)."""

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        self.orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of the clips."""
        if epoch not in self.orders:
            latest = {number: order for number, order in self.orders.items() if number == epoch - 1}
            random = np.random.default_rng((self.seed, _ORDER, epoch))
            self.orders = latest | {epoch: random.permutation(len(self.source))}
        return self.orders[epoch]

    def __getitem__(self, place: int) -> tuple[Tensor, int, list[str]]:
        epoch, position = divmod(place, len(self.source))
        return self.source.train(int(self.order(epoch)[position]), seed_of(self.seed, _CLIP, place))


def parts_of(recipe, rank: int, world: int) -> range:
    """The micro-batches of a step that process `rank` of `world` computes.

    Raises ValueError where they cannot be shared evenly.
    """
    if recipe.parts % world:
        raise ValueError(
            f"batch_size: {recipe.batch_size} clips in micro-batches of {recipe.micro_batch} are {recipe.parts} parts, "
            f"which {world} processes cannot share evenly"
        )
    share = recipe.parts // world
    return range(rank * share, (rank + 1) * share)


def stream(
    source: Source, recipe, start: int, stop: int, *, rank: int = 0, world: int = 1, workers: int = 0
) -> DataLoader:
    """The micro-batches of steps `start` to `stop`, as `Batch`, read ahead by worker processes."""
    return DataLoader(
        _Stream(source, recipe.seed),
        batch_sampler=_Places(recipe, start, stop, rank, world),
        num_workers=workers,
        collate_fn=Batch.of,
        generator=torch.Generator(),  # the loader's own draws must not move the model's
    )


def filler(preset: Preset) -> tuple[Tensor, int]:
    """A clip that does not count: every process runs the model equally often, as sharded models need it."""
    return torch.zeros(3, preset.num_frames, preset.img_size, preset.img_size), SKIP


class _Validation(Dataset):
    def __init__(self, source: Source, indices: range):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Tensor, int, list[str]]:
        index = self.indices[number]
        if index >= self.source.validation_length():
            return *filler(self.source.preset), []
        return self.source.validation(index)


def validation(source: Source, batch: int, *, rank: int = 0, world: int = 1, workers: int = 0) -> DataLoader:
    """`Batch`es of this process's share of the held-out clips; as many, with filler, on every process."""
    share = -(-source.validation_length() // world)
    indices = range(rank * share, (rank + 1) * share)
    return DataLoader(
        _Validation(source, indices), batch_size=batch, num_workers=workers, collate_fn=Batch.of,
        generator=torch.Generator(),
    )  # fmt: skip
