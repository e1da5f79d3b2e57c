# SPDX-License-Identifier: Apache-2.0
"""The README's section on training and evaluation, run as written."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("safetensors")

from training import bits, moved, videos, weights

from timesformer import demo
from timesformer.cli import main

ROOT = Path(__file__).resolve().parents[1]


def section():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^## Train and evaluate\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return found


def run_apart(line):
    """What one line prints in processes of its own."""
    command = shlex.split(line)
    module = {"timesformer": "timesformer.cli", "torchrun": "torch.distributed.run"}[command[0]]
    command = [sys.executable, "-m", module, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(line, capsys):
    """What one line prints in this process."""
    program, *argv = shlex.split(line)
    capsys.readouterr()
    assert program == "timesformer" and main(argv) == 0, line
    return capsys.readouterr().out


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    videos(tmp_path / "videos", "train", size=(48, 64), frames=24)
    videos(tmp_path / "videos", "val", size=(48, 64), frames=24, per_class=1, seed=1)
    (block,) = re.findall(r"^```bash\n(.*?)^```", section(), re.MULTILINE | re.DOTALL)
    first, again, several, evaluate, classify, drawn = block.splitlines()
    assert "validation: " in run(first, capsys)
    trained = bits(Path("run"))
    run(again, capsys)
    assert bits(Path("run")) == trained
    run_apart(several)
    one, two = weights(Path("run")), weights(Path("run-2"))
    assert moved(one, two) < 1e-4 * max(value.abs().max().item() for value in one.values())
    result = json.loads(run(evaluate, capsys))
    assert (result["videos"], result["clips"], result["crops"], result["aggregate"]) == (3, 2, 3, "prob")
    assert len(run(classify, capsys).splitlines()) == 6
    assert "of 512 clips" in run(drawn, capsys)


def test_the_command_of_the_box_is_the_recorded_one():
    command = json.loads((demo.folder() / "training.json").read_text())["command"]
    assert f"`{command}`" in section()
