# SPDX-License-Identifier: Apache-2.0
"""What the tests of training and evaluation share: small labelled videos, and the command on a tiny model."""

import json

import numpy as np
import torch

from timesformer.cli import main
from timesformer.video import write_video

CLASSES = ("fall", "jump", "walk")
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.2}


def videos(folder, split, per_class=3, classes=CLASSES, frames=12, size=(24, 32), seed=0):
    """folder/split/<class>/<n>.mp4: smooth random pictures that drift, brighter by class."""
    random = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        for index in range(per_class):
            coarse = random.uniform(0, 120, (frames, 3, 4, 3)) + 60 * number
            picture = coarse.repeat(size[0] // 3, 1).repeat(size[1] // 4, 2).astype(np.uint8)
            write_video(folder / split / name / f"{index}.mp4", picture, 30)
    return folder


def tiny_config(folder):
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def train(*argv):
    """The exit code of `timesformer train ARGV`."""
    return main(["train", *map(str, argv)])


def small(data, out, *argv):
    """Arguments of a training that takes a second: 9 videos, 8 a step, in micro-batches of 2."""
    return [
        data, "--model", "untrained", "--config", tiny_config(data), "--out", out, "--frames", 2, "--img-size", 16,
        "--train-scale", 18, 22, "--batch-size", 8, "--micro-batch", 2, "--workers", 0, "--threads", 1, *argv,
    ]  # fmt: skip


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def bits(out):
    """The trained model, byte by byte."""
    return (out / "model" / "model.safetensors").read_bytes()


def metrics(out):
    """Lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "clips_per_second"} for line in lines]


def moved(before, after):
    """Largest change of any weight."""
    return max((after[name] - before[name]).abs().max().item() for name in before)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
