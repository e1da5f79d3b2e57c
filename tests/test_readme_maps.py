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

from timesformer import TimeSformer
from timesformer.cli import main
from timesformer.video import probe
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


def test_picture():
    """The picture of the README is small."""
    assert 10_000 < (ROOT / "docs" / "rollout.png").stat().st_size < 100_000
