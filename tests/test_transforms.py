# SPDX-License-Identifier: Apache-2.0
"""Transforms against loops and formulas that share no code with them."""

import math

import pytest
import torch

from timesformer.video.transforms import (
    channels_first,
    crop_offsets,
    crops,
    normalise,
    random_crop,
    random_flip,
    random_short_side,
    resize,
    short_side,
    train_clip,
)

MEAN, STD = (0.45, 0.5, 0.4), (0.225, 0.25, 0.2)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalised(frames):
    """In float64, channel by channel."""
    out = frames.double() / 255
    for channel in range(3):
        out[:, channel] = (out[:, channel] - MEAN[channel]) / STD[channel]
    return out


def bilinear_matrix(old, new, antialias):
    """[new, old] weights of triangle interpolation with pixel centres at half integers, widened if antialiased."""
    scale = old / new
    support = max(scale, 1.0) if antialias else 1.0
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for target in range(new):
        centre = (target + 0.5) * scale
        for source in range(-2, old + 2):  # beyond the edge counts for the edge pixel where not antialiased
            weight = max(0.0, 1 - abs(source + 0.5 - centre) / support)
            inside = 0 <= source < old
            if inside or not antialias:
                matrix[target, min(max(source, 0), old - 1)] += weight
    return matrix / matrix.sum(1, keepdim=True)


def resampled(frames, height, width, antialias):
    rows = bilinear_matrix(frames.shape[-2], height, antialias)
    columns = bilinear_matrix(frames.shape[-1], width, antialias)
    return torch.einsum("yh,tchw,xw->tcyx", rows, frames.double(), columns)


def test_channels_first():
    frames = noise(2, 4, 5, 3)
    rgb, bgr = channels_first(frames), channels_first(frames, "BGR")
    assert rgb.shape == (2, 3, 4, 5)
    assert rgb[1, 0, 2, 3] == frames[1, 2, 3, 0] == bgr[1, 2, 2, 3]
    assert rgb[1, 1, 2, 3] == bgr[1, 1, 2, 3] == frames[1, 2, 3, 1]
    with pytest.raises(ValueError, match="channel_order: got 'rgb', expected one of RGB, BGR"):
        channels_first(frames, "rgb")
    with pytest.raises(ValueError, match="frames: got shape"):
        channels_first(frames.permute(0, 3, 1, 2))


def test_normalise():
    frames = noise(2, 3, 6, 7)
    out = normalise(frames, MEAN, STD)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), normalised(frames), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="dtype"):
        normalise(frames.float(), MEAN, STD)


@pytest.mark.parametrize("height, width, size, expected", [
    (1080, 1920, 224, (224, 398)),  # floor(398.2)
    (1920, 1080, 224, (398, 224)),
    (256, 340, 224, (224, 297)),  # floor(297.5)
    (240, 240, 448, (448, 448)),
    (224, 300, 224, (224, 300)),
])  # fmt: skip
def test_short_side(height, width, size, expected):
    assert short_side(height, width, size) == expected


@pytest.mark.parametrize("height, width", [(40, 53), (20, 61), (17, 23)])
def test_resize_original(height, width):
    """Floats, no antialiasing, after normalising."""
    frames = noise(2, 3, 40, 53)
    out = resize(frames, height, width, MEAN, STD, "original")
    assert out.dtype == torch.float32
    expected = resampled(normalised(frames), height, width, False)
    # positions up to 53 in float32 are off by up to 4e-6, times a step of up to 5 between neighbouring pixels
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize("height, width", [(40, 53), (20, 61), (17, 23)])
def test_resize_pil(height, width):
    """uint8, antialiased, before normalising: within one grey level, for the rounding of each of the two passes."""
    frames = noise(2, 3, 40, 53)
    out = resize(frames, height, width, MEAN, STD, "pil")
    grey = torch.stack([out[:, c] * STD[c] + MEAN[c] for c in range(3)], 1).double() * 255
    assert (grey - grey.round()).abs().max() < 1e-3  # it was rounded to grey levels
    assert (grey - resampled(frames, height, width, True)).abs().max() <= 1.01


def test_the_two_rules_differ():
    frames = noise(1, 3, 60, 60)
    difference = (resize(frames, 20, 20, MEAN, STD, "pil") - resize(frames, 20, 20, MEAN, STD, "original")).abs()
    assert difference.mean() > 0.2
    with pytest.raises(ValueError, match="rule: got 'nearest', expected one of pil, original"):
        resize(frames, 20, 20, MEAN, STD, "nearest")


@pytest.mark.parametrize("height, width, size, number, expected", [
    (224, 398, 224, 3, [(0, 0), (0, 87), (0, 174)]),
    (398, 224, 224, 3, [(0, 0), (87, 0), (174, 0)]),
    (224, 297, 224, 3, [(0, 0), (0, 37), (0, 73)]),  # ceil(36.5)
    (224, 224, 224, 3, [(0, 0), (0, 0), (0, 0)]),
    (224, 297, 224, 1, [(0, 37)]),
    (5, 5, 2, 1, [(2, 2)]),  # ceil(1.5)
])  # fmt: skip
def test_crop_offsets(height, width, size, number, expected):
    assert crop_offsets(height, width, size, number) == expected


def test_crop_errors():
    with pytest.raises(ValueError, match="crops: got 2, expected 1 or 3"):
        crop_offsets(10, 10, 5, 2)
    with pytest.raises(ValueError, match="size: got a crop of 11 pixels"):
        crop_offsets(10, 20, 11, 3)


@pytest.mark.parametrize("height, width", [(6, 11), (11, 6)])
def test_crops(height, width):
    frames = torch.arange(4 * 3 * height * width).view(4, 3, height, width)
    views = crops(frames, 6, 3)
    assert views.shape == (3, 3, 4, 6, 6) and views.is_contiguous()
    for view, start in enumerate([0, 3, 5]):
        top, left = (start, 0) if height > width else (0, start)
        for time in range(4):
            for channel in range(3):
                expected = frames[time, channel, top : top + 6, left : left + 6]
                assert (views[view, channel, time] == expected).all()


def test_random_short_side_rules():
    generator = torch.Generator().manual_seed(0)
    plain = [random_short_side(256, 320, generator=generator) for _ in range(3000)]
    inverse = [random_short_side(256, 320, inverse=True, generator=generator) for _ in range(3000)]
    for sizes in (plain, inverse):
        assert min(sizes) == 256 and max(sizes) == 320
    # expectations: the middle, and (high * low / (high - low)) * ln(high / low) for 1 / U
    assert sum(plain) / 3000 == pytest.approx(288, abs=1.5)
    assert sum(inverse) / 3000 == pytest.approx(256 * 320 / 64 * math.log(320 / 256), abs=1.5)
    with pytest.raises(ValueError, match="low, high"):
        random_short_side(320, 256)


def test_random_crop_reaches_every_place():
    frames = torch.arange(2 * 3 * 5 * 7).view(2, 3, 5, 7)
    generator = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(300):
        crop = random_crop(frames, 4, generator=generator)
        top, left = divmod(int(crop[0, 0, 0, 0]), 7)
        assert (crop == frames[:, :, top : top + 4, left : left + 4]).all()
        places.add((top, left))
    assert places == {(top, left) for top in range(2) for left in range(4)}
    with pytest.raises(ValueError, match="size: got a crop of 6"):
        random_crop(frames, 6)


def test_random_flip():
    frames = noise(2, 3, 4, 5)
    assert (random_flip(frames, 1.0)[..., 0] == frames[..., 4]).all()
    assert (random_flip(frames, 0.0) == frames).all()
    generator = torch.Generator().manual_seed(0)
    flipped = sum(bool((random_flip(frames, generator=generator) != frames).any()) for _ in range(400))
    assert flipped == pytest.approx(200, abs=40)


@pytest.mark.parametrize("rule", ["pil", "original"])
def test_train_clip(rule):
    """One crop, one scale and one flip for all frames of the clip; equal seeds give equal clips."""
    frames = noise(1, 60, 80, 3).expand(4, -1, -1, -1)
    make = {"size": 32, "mean": MEAN, "std": STD, "scale": (40, 50), "rule": rule}
    clip = train_clip(frames, **make, generator=torch.Generator().manual_seed(3))
    assert clip.shape == (3, 4, 32, 32) and clip.dtype == torch.float32
    assert all((clip[:, 0] == clip[:, time]).all() for time in range(1, 4))
    assert (clip == train_clip(frames, **make, generator=torch.Generator().manual_seed(3))).all()
    assert not (clip == train_clip(frames, **make, generator=torch.Generator().manual_seed(4))).all()


def test_train_clip_without_room_is_the_normalised_frame():
    """Scale, crop and frame of one size, no flip: nothing is left but normalising and the channel order."""
    frames = noise(2, 32, 32, 3)
    clip = train_clip(frames, size=32, mean=MEAN, std=STD, scale=(32, 32), flip=0.0, channel_order="BGR")
    expected = normalised(frames.permute(0, 3, 1, 2).flip(1))
    torch.testing.assert_close(clip.double(), expected.transpose(0, 1), rtol=0, atol=1e-6)
