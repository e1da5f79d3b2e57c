# SPDX-License-Identifier: Apache-2.0
"""Samplers against index lists worked out by hand and against the formulas written another way."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from timesformer.presets import PRESETS, SAMPLERS, Preset, find_preset, preset_of_checkpoint
from timesformer.video import kinetics, segments, uniform


@pytest.mark.parametrize("frames, fps, num_frames, rate, expected", [
    # "8 x 32" at 30 fps covers 256 frames in 7 steps of 255 / 7 = 36.43
    pytest.param(300, 30, 8, 32, [0, 36, 72, 109, 145, 182, 218, 255], id="8x32"),
    pytest.param(256, 30, 8, 32, [0, 36, 72, 109, 145, 182, 218, 255], id="8x32-exact-fit"),
    # 16 x 16 covers 256 frames in 15 steps of exactly 17
    pytest.param(300, 30, 16, 16, list(range(0, 256, 17)), id="16x16"),
    # at 15 fps the span is 128 frames: steps of 127 / 7 = 18.14
    pytest.param(300, 15, 8, 32, [0, 18, 36, 54, 72, 90, 108, 127], id="15fps"),
    # at 25 fps: span 640 / 3, steps of exactly 91 / 3, where floating-point rounding could lose the 91 and the 182
    pytest.param(300, 25, 8, 32, [0, 30, 60, 91, 121, 151, 182, 212], id="25fps"),
    # shorter than the clip: the last frame repeats
    pytest.param(100, 30, 8, 32, [0, 36, 72, 99, 99, 99, 99, 99], id="short"),
    pytest.param(1, 30, 4, 32, [0, 0, 0, 0], id="one-frame"),
    pytest.param(300, 30, 1, 32, [0], id="one-frame-clip"),
    pytest.param(90, 30, 2, 30, [0, 59], id="two"),
])  # fmt: skip
def test_kinetics_by_hand(frames, fps, num_frames, rate, expected):
    assert kinetics(frames, fps, num_frames, rate) == expected


def test_kinetics_large():
    """96 x 4 covers 384 frames: steps of 383 / 95 = 4.03."""
    indices = kinetics(400, 30, 96, 4)
    assert indices[:4] == [0, 4, 8, 12] and indices[-2:] == [378, 383] and len(indices) == 96


def test_kinetics_clips():
    """Room 300 - 256 = 44 frames, over 4 clips: starts 0, 11, 22, 33. The last clip does not reach the end."""
    starts = [kinetics(300, 30, 8, 32, clip=clip, num_clips=4)[0] for clip in range(4)]
    assert starts == [0, 11, 22, 33]
    assert kinetics(300, 30, 8, 32, clip=3, num_clips=4)[-1] == 33 + 255


def test_kinetics_in_a_short_video_has_no_room():
    assert kinetics(100, 30, 8, 32, clip=2, num_clips=3) == kinetics(100, 30, 8, 32)


@pytest.mark.parametrize("fps", [10, 23.976, Fraction(24000, 1001), 29.97, 50, 59.94])
@pytest.mark.parametrize("num_frames, rate", [(8, 32), (16, 16), (96, 4), (5, 7)])
def test_kinetics_equals_linspace(fps, num_frames, rate):
    span = rate * num_frames / 30 * float(fps)
    points = np.linspace(0, span - 1, num_frames)
    near_integer = np.abs(points - np.round(points)) < 1e-6  # there numpy's rounding decides, not the formula
    expected = np.clip(points, 0, 199).astype(int)
    actual = np.array(kinetics(200, fps, num_frames, rate))
    assert (actual == expected)[~near_integer].all()
    assert (np.abs(actual - expected) <= 1).all()


def test_kinetics_training_start():
    """Uniform over the room, the same for the same seed, and the clip keeps its shape."""
    generator = torch.Generator().manual_seed(0)
    clips = [kinetics(300, 30, 8, 32, generator=generator) for _ in range(400)]
    starts = [clip[0] for clip in clips]
    assert set(starts) == set(range(44))
    assert np.mean(starts) == pytest.approx(21.5, abs=2)
    assert all(254 <= clip[-1] - clip[0] <= 255 for clip in clips)
    again = kinetics(300, 30, 8, 32, generator=torch.Generator().manual_seed(0))
    assert again == clips[0]


def test_segments_by_hand():
    # 8 segments of 10 frames: bounds 0, 10, ..., 80
    assert segments(81, 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    # halves go to the even number: bounds 0, 2.5 -> 2, 5, 7.5 -> 8, 10
    assert segments(11, 4) == [1, 3, 6, 9]
    # fewer frames than segments: frames repeat. Bounds 0, 0.5 -> 0, 1, 1.5 -> 2, 2
    assert segments(3, 4) == [0, 0, 1, 2]
    assert segments(1, 8) == [0] * 8


@pytest.mark.parametrize("frames, num_frames", [(37, 8), (100, 16), (250, 64), (12, 8)])
def test_segments_against_numpy(frames, num_frames):
    bounds = np.rint((frames - 1) / num_frames * np.arange(num_frames + 1)).astype(int)
    assert segments(frames, num_frames) == ((bounds[:-1] + bounds[1:]) // 2).tolist()


def test_segments_training_takes_both_ends():
    generator = torch.Generator().manual_seed(1)
    drawn = np.array([segments(11, 4, generator=generator) for _ in range(300)])
    for column, (low, high) in enumerate([(0, 2), (2, 5), (5, 8), (8, 10)]):
        assert set(drawn[:, column]) == set(range(low, high + 1))
    first = segments(100, 8, generator=torch.Generator().manual_seed(5))
    assert first == segments(100, 8, generator=torch.Generator().manual_seed(5))


def test_uniform_by_hand():
    assert uniform(100, 4) == [0, 33, 66, 99]
    assert uniform(10, 8) == [0, 1, 2, 3, 5, 6, 7, 9]
    assert uniform(3, 5) == [0, 0, 1, 1, 2]
    assert uniform(50, 1) == [0]


@pytest.mark.parametrize("call, message", [
    (lambda: kinetics(0, 30, 8, 32), "frames: got 0"),
    (lambda: kinetics(10, 30, 0, 32), "num_frames: got 0"),
    (lambda: kinetics(10, 0, 8, 32), "fps: got 0"),
    (lambda: kinetics(10, float("nan"), 8, 32), "fps: got nan"),
    (lambda: kinetics(10, 30, 8, -1), "rate: got -1"),
    (lambda: kinetics(10, 30, 8, 32, clip=2, num_clips=2), "clip: got 2 of num_clips 2"),
    (lambda: segments(0, 8), "frames: got 0"),
    (lambda: uniform(8, -1), "num_frames: got -1"),
])  # fmt: skip
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types():
    with pytest.raises(TypeError, match="frames: got 10.0"):
        uniform(10.0, 8)


def test_indices_are_plain_integers():
    for indices in (kinetics(300, 29.97, 8, 32), segments(300, 8), uniform(300, 8)):
        assert all(type(index) is int for index in indices)


# Presets: the table of released models


@pytest.mark.parametrize("name, img_size, num_frames, sampler, rate, num_classes, order, clips", [
    ("k400-base", 224, 8, "kinetics", 32, 400, "RGB", 1),
    ("k400-hr", 448, 16, "kinetics", 16, 400, "RGB", 1),
    ("k400-large", 224, 96, "kinetics", 4, 400, "RGB", 1),
    ("k600-base", 224, 8, "kinetics", 32, 600, "RGB", 1),
    ("k600-hr", 448, 16, "kinetics", 16, 600, "RGB", 1),
    ("k600-large", 224, 96, "kinetics", 4, 600, "RGB", 1),
    ("ssv2-base", 224, 8, "segments", None, 174, "BGR", 1),
    ("ssv2-hr", 448, 16, "segments", None, 174, "BGR", 1),
    ("ssv2-large", 224, 64, "segments", None, 174, "BGR", 1),
    ("howto100m-8", 224, 8, "kinetics", 32, 1059, "RGB", 48),
    ("howto100m-32", 224, 32, "kinetics", 32, 1059, "RGB", 12),
    ("howto100m-64", 224, 64, "kinetics", 32, 1059, "RGB", 6),
    ("howto100m-96", 224, 96, "kinetics", 32, 1059, "RGB", 4),
])  # fmt: skip
def test_presets(name, img_size, num_frames, sampler, rate, num_classes, order, clips):
    preset = find_preset(name)
    assert preset.name == name
    assert (preset.img_size, preset.num_frames, preset.sampler, preset.rate) == (img_size, num_frames, sampler, rate)
    assert (preset.num_classes, preset.channel_order, preset.clips) == (num_classes, order, clips)
    assert (preset.mean, preset.std, preset.crops) == ((0.45,) * 3, (0.225,) * 3, 3)
    assert preset.attention_type == "divided_space_time"
    assert preset.train_scale == ((448, 512) if img_size == 448 else (256, 320))
    assert (preset.train_inverse_scale, preset.train_flip) == ((True, 0.0) if "ssv2" in name else (False, 0.5))


def test_unknown_preset_lists_the_names():
    with pytest.raises(ValueError) as caught:
        find_preset("k700")
    assert "got 'k700'" in str(caught.value) and all(name in str(caught.value) for name in PRESETS)


def test_presets_check_their_values():
    for values, message in [
        (("x", 224, 8, "random", 1, 4), "sampler: got 'random'"),
        (("x", 224, 8, "kinetics", None, 4), "rate: got None"),
        (("x", 224, 0, "uniform", None, 4), "num_frames: got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Preset(*values)
    with pytest.raises(ValueError, match="crops: got 2"):
        Preset("x", 224, 8, "uniform", None, 4, crops=2)
    assert {preset.sampler for preset in PRESETS.values()} <= set(SAMPLERS)


def test_preset_of_checkpoint():
    assert preset_of_checkpoint("facebook/timesformer-base-finetuned-k400") == find_preset("k400-base")
    assert preset_of_checkpoint("facebook/timesformer-hr-finetuned-ssv2") == find_preset("ssv2-hr")
    assert preset_of_checkpoint("fcakyon/timesformer-large-finetuned-k600") == find_preset("k600-large")
    assert preset_of_checkpoint("someone/else") is None
