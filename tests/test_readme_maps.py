# SPDX-License-Identifier: Apache-2.0
"""The README's sections on features, attention maps and other formats, run as written."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import SIZE

pytest.importorskip("av")
pytest.importorskip("safetensors")

from timesformer import TimeSformer, demo
from timesformer.cli import main
from timesformer.maps import rollout
from timesformer.presets import find_preset
from timesformer.video import clip_views, probe
from timesformer.weights import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def blocks(section, language):
    """The fenced blocks of a section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", found, re.MULTILINE | re.DOTALL)


def commands(section):
    (block,) = blocks(section, "bash")
    return block.splitlines()


def run(line):
    program, *argv = shlex.split(line)
    assert program == "timesformer" and main(argv) == 0, line


def test_features_and_attention_maps(tmp_path, monkeypatch):
    pytest.importorskip("timesformer.demo", reason="the model in the box")
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    for line in commands("Features and attention maps"):
        run(line)
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert probe("map.mp4").frames == 8
    with np.load("maps.npz") as arrays:
        assert arrays["time"].shape == (16, 8, 8) and np.allclose(arrays["time"].sum(-1), 1, atol=1e-5)
    assert load_file("features.safetensors")["clip.mp4"].shape == (1, 8, 64)


def test_python():
    (block,) = blocks("Features and attention maps", "python")
    names = {}
    exec(block, names)
    shapes = {name: tuple(names[name].shape) for name in ("frame", "time", "space", "share")}
    assert shapes == {"frame": (1, 8, 64), "time": (1, 16, 4, 8, 8), "space": (1, 8, 4, 17, 17), "share": (1, 8, 4, 4)}
    assert [tuple(x.shape) for x in names["maps"]] == 2 * [(1, 64, 8, 4, 4)]


def test_other_formats(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_checkpoint(TimeSformer(**{**SIZE, "depth": 1}, num_classes=5), "model.pyth")
    for line in commands("Other formats"):
        run(line)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"model.pyth", "model.safetensors", "huggingface-model", "model.onnx", "model.pt2"}


def pixels(path):
    import av

    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)


def test_the_picture_is_what_the_commands_make(tmp_path, monkeypatch):
    """But for the last bits of sums, and of another build of the video codec."""
    monkeypatch.chdir(tmp_path)
    for line in commands("Features and attention maps")[:2]:
        run(line)
    shown, made = pixels(ROOT / "docs" / "rollout.png"), pixels("map.png")
    assert shown.shape == made.shape and abs(shown - made).mean() < 1
    assert (ROOT / "docs" / "rollout.png").stat().st_size < 100_000


def test_the_moving_shape_lights_up(tmp_path):
    """As the README says of fresh clips: the patches under the shape weigh many times those under nothing."""
    model, ratios = TimeSformer.from_pretrained(demo.folder()), []
    for number in range(1_000_000, 1_000_020):
        if "moves" not in demo.write_clip(tmp_path / "clip.mp4", number):
            continue
        views = clip_views(tmp_path / "clip.mp4", find_preset(model.config.preset))  # [1, 3, 8, 32, 32]
        with torch.no_grad():
            share = rollout(model, views)[0]  # [8, 4, 4]
        grey = views[0].mean(0)
        moves = (grey - grey.median(0).values).abs() > 0.5  # the background is what most frames show
        covered = torch.nn.functional.avg_pool2d(moves[:, None].float(), 8)[:, 0]  # of each patch
        ratios.append((share[covered > 0.3].mean() / share[covered == 0].mean()).item())
    assert len(ratios) >= 5 and min(ratios) > 5, ratios
