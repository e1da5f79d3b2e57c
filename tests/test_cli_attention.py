# SPDX-License-Identifier: Apache-2.0
"""`timesformer attention` on tiny models and real H.264 files: the numbers, and what is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import broken_video, call, fails, full_disk, make_model, make_video, views_of
from einops import rearrange

pytest.importorskip("av")
pytest.importorskip("safetensors")

import av

from timesformer import TimeSformer, overlay
from timesformer.maps import attention_maps, rollout
from timesformer.video import probe, read_frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("attention")


@pytest.fixture(scope="module", params=["divided_space_time", "joint_space_time", "space_only"])
def any_model(folder, request):
    return make_model(folder / request.param, attention_type=request.param)


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder / "model")


@pytest.fixture(scope="module")
def video(folder):
    return make_video(folder / "a.mp4")


def numbers(capsys, path, video, model, *options):
    code, _, err = call(capsys, "attention", video, "-o", path, "--model", model, *options)
    assert code == 0, err
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) if name != "settings" else arrays[name] for name in arrays.files}


def close(got, exact):
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def test_rollout(capsys, tmp_path, any_model, video):
    loaded, views = TimeSformer.from_pretrained(any_model), views_of(video)
    got = numbers(capsys, tmp_path / "m.npz", video, any_model)
    close(got["map"], rollout(loaded, views)[0])
    assert got["frames"].tolist() == [0, 42, 84, 127]
    about = json.loads(str(got["settings"]))
    assert (about["method"], about["preset"], about["num_frames"]) == ("rollout", "k400-base", 4)
    got = numbers(capsys, tmp_path / "m.npz", video, any_model, "--head", "max", "--discard", 0.5)
    close(got["map"], rollout(loaded, views, fusion="max", discard=0.5)[0])


def test_space(capsys, tmp_path, any_model, video):
    loaded, views = TimeSformer.from_pretrained(any_model), views_of(video)
    joint = loaded.config.attention_type == "joint_space_time"
    got = numbers(capsys, tmp_path / "m.npz", video, any_model, "--method", "space", "--layer", 1, "--head", 2)
    maps = attention_maps(loaded, views, 1, head=2).space[0]
    close(got["space"], maps)
    row = maps[0, 0, 1:] if joint else maps[:, 0, 1:]
    close(got["map"], rearrange(row, "(h w t) -> t h w" if joint else "t (h w) -> t h w", h=4, w=4))
    options = ["--method", "space", "--query", "1,3"]
    if joint:
        fails(capsys, tmp_path, 1, "a joint model", "attention", video, "-o", tmp_path / "n.npz", "--model", any_model,
              *options)  # fmt: skip
    else:
        got = numbers(capsys, tmp_path / "m.npz", video, any_model, *options)
        maps = attention_maps(loaded, views, -1, head="mean").space[0]
        close(got["map"], rearrange(maps[:, 1 + 4 * 1 + 3, 1:], "t (h w) -> t h w", h=4))


def test_time(capsys, tmp_path, model, video):
    maps = attention_maps(TimeSformer.from_pretrained(model), views_of(video), -1, head="mean").time[0]
    got = numbers(capsys, tmp_path / "m.npz", video, model, "--method", "time")
    close(got["time"], maps)
    close(got["map"], rearrange(maps.mean(1), "(h w) t -> t h w", h=4))
    got = numbers(capsys, tmp_path / "m.npz", video, model, "--method", "time", "--query", 2)
    close(got["map"], rearrange(maps[:, 2], "(h w) t -> t h w", h=4))


def test_time_without_time_attention(capsys, tmp_path, video):
    model = make_model(tmp_path / "model", attention_type="space_only")
    argv = ["attention", video, "-o", tmp_path / "m.png", "--model", model, "--method", "time"]
    fails(capsys, tmp_path, 1, "has no time attention", *argv)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def picture(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def brightness(x):
    return x.astype(np.float64).mean(-1)


def test_png_holds_frames_and_overlays(capsys, tmp_path, model, video):
    argv = ["attention", video, "-o", tmp_path / "m.png", "--model", model, "--size", 48, "--frames", 10, "--rate", 13]
    assert call(capsys, *argv)[0] == 0
    image = picture(tmp_path / "m.png")
    assert image.shape == (4 * 48 + 3 * 4, 8 * 48 + 7 * 4, 3)  # ten frames: rows of eight and two, each with overlays
    frames = read_frames(video, [0, 14, 28, 43, 57, 71, 86, 100, 114, 129])[:, :, 8:56]  # the centre crop of 48 x 64
    for number, frame in enumerate(frames):
        top, left = 2 * 52 * (number // 8), 52 * (number % 8)
        shown = image[top : top + 48, left : left + 48].astype(int)
        assert abs(shown - frame).max() <= 1
        assert abs(image[top + 52 : top + 100, left : left + 48].astype(int) - frame).mean() > 20  # drawn over
    assert (image[104:, 2 * 52 :] == 255).all()  # nothing where there is no frame


def test_overlay_is_brightest_where_the_map_is_largest():
    frames = np.full((3, 32, 64, 3), 128, np.uint8)
    maps = torch.full((3, 2, 4), 0.1)
    maps[1, 1, 2] = 0.9
    drawn = brightness(overlay.overlay(frames, maps))
    frame, row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert frame == 1 and 16 <= row < 32 and 32 <= column < 48
    assert np.ptp(drawn[0]) == np.ptp(drawn[2]) == 0  # one scale for the whole clip
    flat = overlay.overlay(frames, torch.full((3, 2, 4), 0.1))
    assert np.ptp(flat.reshape(-1, 3), axis=0).max() == 0  # no difference, no heat


def test_colours_grow_lighter():
    shown = brightness(overlay.colours(np.linspace(0, 1, 101)))
    assert (np.diff(shown) > 0).all()


def test_mp4_plays_as_fast_as_the_video(capsys, tmp_path, model, video):
    argv = ["attention", video, "-o", tmp_path / "m.mp4", "--model", model, "--size", 64, "--rate", 8]
    assert call(capsys, *argv)[0] == 0
    info = probe(tmp_path / "m.mp4")
    assert (info.frames, info.height, info.width) == (4, 64, 2 * 64 + 4)
    assert float(info.fps) == pytest.approx(30 / ((31 - 0) / 3), rel=1e-3)  # frames 0, 10, 20, 31
    drawn = read_frames(tmp_path / "m.mp4", range(4))
    shown = read_frames(video, [0, 10, 20, 31])[:, :, 8:56]  # a centre crop of 48 pixels, drawn at 64
    difference = abs(brightness(drawn[:, :, :64]).mean((1, 2)) - brightness(shown).mean((1, 2)))
    assert difference.max() < 3


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, message, options", [
    (2, "expected a name that ends in .png or .mp4 or .npz", ["-o", "m.gif"]),
    (1, "there is no folder", ["-o", "nowhere/m.png"]),
    (2, "--layer: rollout goes through all layers", ["-o", "m.png", "--layer", "1"]),
    (2, "--query: rollout goes through all layers", ["-o", "m.png", "--query", "1"]),
    (2, "--head: got 1, expected mean, max, min", ["-o", "m.png", "--head", "1"]),
    (2, "--head: got 'sum'", ["-o", "m.png", "--head", "sum"]),
    (2, "--discard: got 1.0", ["-o", "m.png", "--discard", "1"]),
    (2, "--discard: for rollout only", ["-o", "m.png", "--method", "space", "--discard", "0.1"]),
    (1, "head: got 4, expected one of the 4 heads", ["-o", "m.png", "--method", "space", "--head", "4"]),
    (1, "layer: got 3, expected one of the 3 layers", ["-o", "m.png", "--method", "time", "--layer", "3"]),
    (1, "--query: got '4,0'", ["-o", "m.png", "--method", "space", "--query", "4,0"]),
    (1, "--query: got '2'", ["-o", "m.png", "--method", "space", "--query", "2"]),
    (1, "expected one of the clip's frames, 0 to 3", ["-o", "m.png", "--method", "time", "--query", "4"]),
    (2, "--size: got 0", ["-o", "m.png", "--size", "0"]),
])  # fmt: skip
def test_bad_input(capsys, tmp_path, monkeypatch, model, video, code, message, options):
    monkeypatch.chdir(tmp_path)
    fails(capsys, tmp_path, code, message, "attention", video, "--model", model, *options)


def test_bad_video(capsys, tmp_path, model):
    bad = broken_video(tmp_path / "bad.mp4")
    fails(capsys, tmp_path, 1, "bad.mp4", "attention", bad, "-o", tmp_path / "m.png", "--model", model)
    fails(capsys, tmp_path, 1, "no such file", "attention", "gone.mp4", "-o", tmp_path / "m.png", "--model", model)


@pytest.mark.parametrize("suffix", ["png", "npz", "mp4"])
def test_full_disk_leaves_nothing(capsys, tmp_path, model, video, monkeypatch, suffix):
    if suffix == "png":
        full_disk(monkeypatch, Path, "write_bytes")
    elif suffix == "npz":
        full_disk(monkeypatch, np, "savez_compressed")
    else:
        full_disk(monkeypatch, av.VideoFrame, "from_ndarray")
    argv = ["attention", video, "-o", tmp_path / f"m.{suffix}", "--model", model]
    fails(capsys, tmp_path, 1, "No space left", *argv)
