# SPDX-License-Identifier: Apache-2.0
"""Drawn clips: what the labels promise, and that divided attention learns what a set of frames cannot tell."""

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")

from training import metrics, train

from timesformer import TimeSformer
from timesformer.presets import find_preset
from timesformer.train import DrawnClips
from timesformer.train.tasks import DIRECTIONS, SHAPES, TASKS, draw, scene
from timesformer.video.transforms import channels_first, normalise

SEEDS = range(60)


def bright(frame):
    """[(x, y)] of the pixels of the shape, in parts of the side: far brighter than any background."""
    size = frame.shape[0]
    y, x = np.nonzero(frame.min(-1) > 0.5 * 255)
    return np.stack([x + 0.5, y + 0.5], -1) / size


@pytest.mark.parametrize("task", TASKS)
def test_every_class_is_drawn_and_seeds_decide(task):
    labels = [scene(task, seed).label for seed in range(40 * len(TASKS[task]))]
    counts = np.bincount(labels, minlength=len(TASKS[task]))
    assert len(counts) == len(TASKS[task]) and 15 < counts.min() and counts.max() < 80
    for seed in range(5):
        clips = [draw(scene(task, seed), 8, 32, noise=0.04, seed=seed) for _ in range(2)]
        assert np.array_equal(*clips)
    assert not np.array_equal(draw(scene(task, 0), 8, 32), draw(scene(task, 1), 8, 32))


@pytest.mark.parametrize("task", ["direction", "scenes"])
def test_shapes_move_where_the_label_says(task):
    """By the pixels: the centre of what is bright goes along one axis, the right way, a third of the frame or more."""
    for seed in SEEDS:
        drawn = scene(task, seed)
        name = TASKS[task][drawn.label]
        if " then " in name:
            continue
        centres = np.array([(points.min(0) + points.max(0)) / 2 for points in map(bright, draw(drawn, 8, 64))])
        moved = centres[-1] - centres[0]
        along = moved @ np.array(DIRECTIONS[name.split()[-1]])
        assert 0.3 < along < 0.55 and abs(moved).sum() - along < 0.05, (seed, name, moved)
        assert np.allclose(np.diff(centres, axis=0), moved / 7, atol=0.03)  # evenly


def filled(points, size=64):
    """Which shape it is, from what it covers: part of the bounding box, and whether the middle and the corner are."""
    low, high = points.min(0), points.max(0)
    cover = len(points) / np.prod((high - low) * size + 1)
    middle = (np.abs(points - (low + high) / 2).max(1) < 1.5 / size).any()
    corner = (np.abs(points - low).max(1) < 1.5 / size).any()
    if corner:
        return "square"
    return "ring" if not middle else "disc" if cover > 0.65 else "cross"


def test_shapes_are_what_the_label_says_in_that_order():
    for seed in SEEDS:
        drawn = scene("scenes", seed)
        words = TASKS["scenes"][drawn.label].split()
        seen = [filled(bright(frame)) for frame in draw(drawn, 8, 64)]
        if "then" not in words:
            assert seen == [words[0]] * 8, seed
            continue
        change = seen.index(words[2])
        assert 2 <= change <= 6 and seen == [words[0]] * change + [words[2]] * (8 - change), seed


@pytest.mark.parametrize("task", ["direction", "order", "scenes"])
def test_the_reversed_clip_is_the_opposite_class(task):
    """Frame by frame the same pictures backwards, and never the same label: what the ceiling of 50 % rests on."""
    for seed in SEEDS:
        drawn = scene(task, seed)
        back = drawn.reverse(task)
        assert np.array_equal(draw(back, 8, 32), draw(drawn, 8, 32)[::-1])
        assert back.label != drawn.label and back.reverse(task).label == drawn.label


def test_unknown_task():
    with pytest.raises(ValueError, match="task: got 'chess', expected one of shape, direction, order, scenes"):
        scene("chess", 0)


def test_drawn_clips_never_repeat():
    source = DrawnClips("shape", find_preset("miniature"))
    clips = {source.train(0, seed)[0].numpy().tobytes() for seed in range(10)}
    clips |= {source.validation(index)[0].numpy().tobytes() for index in range(10)}
    assert len(clips) == 20
    assert set(SHAPES) == set(source.classes)


# learning


def both_ways(task, number, frames, size):
    """[2, number, 3, T, S, S] and labels [2, number]: fresh clips, and the same clips backwards."""
    preset = find_preset("miniature")
    clips, labels = [], []
    for seed in range(number):
        drawn = scene(task, seed)
        pictures = draw(drawn, frames, size)
        for way, label in ((pictures, drawn.label), (pictures[::-1].copy(), drawn.reverse(task).label)):
            clip = normalise(channels_first(torch.from_numpy(way)), preset.mean, preset.std)
            clips.append(clip.transpose(0, 1))
            labels.append(label)
    return torch.stack(clips).unflatten(0, (number, 2)).transpose(0, 1), torch.tensor(labels).view(number, 2).T


def accuracy(model, clips, labels):
    with torch.inference_mode():
        answers = model(clips.flatten(0, 1)).argmax(1)
    return (answers == labels.flatten()).double().mean().item()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The same brief training, divided and space-only: folders of the trained models."""
    folder = tmp_path_factory.mktemp("learnt")
    argv = ["--task", "direction", "--frames", 4, "--img-size", 24, "--epochs", 1, "--threads", 1]
    for kind, clips in (("divided_space_time", 9600), ("space_only", 16000)):
        assert train(*argv, "--clips", clips, "--attention", kind, "--out", folder / kind, "--log-every", 50) == 0
    return folder


def test_divided_attention_learns_direction_and_space_only_cannot(learnt):
    """A few hundred steps. Space-only gives a clip and its reverse one answer: right for one of the two at most."""
    clips, labels = both_ways("direction", 128, 4, 24)
    divided = TimeSformer.from_pretrained(learnt / "divided_space_time" / "model")
    space_only = TimeSformer.from_pretrained(learnt / "space_only" / "model")
    assert accuracy(divided, clips, labels) >= 0.95
    assert accuracy(space_only, clips, labels) <= 0.5
    assert accuracy(space_only, clips, labels) >= 0.34  # chance is 0.25: it does learn the axis
    with torch.inference_mode():
        forward, backward = space_only(clips[0]), space_only(clips[1])
    assert (forward - backward).abs().max() < 1e-4 * forward.abs().max()


def test_what_was_learnt_is_in_the_time_attention(learnt):
    """Backwards a clip is another one to the divided model: it calls it the opposite class."""
    clips, labels = both_ways("direction", 64, 4, 24)
    divided = TimeSformer.from_pretrained(learnt / "divided_space_time" / "model")
    wrong = labels.flip(0)  # the clip backwards has the other label
    assert accuracy(divided, clips, wrong) <= 0.05
    losses = [line["loss"] for line in metrics(learnt / "divided_space_time") if "loss" in line]
    assert losses[0] > 1.0 > 0.3 > losses[-1]
