# SPDX-License-Identifier: Apache-2.0
"""For tests of commands that take videos: a tiny model of random weights, an H.264 file, and how to call a command."""

import torch

from timesformer import TimeSformer
from timesformer.cli import main
from timesformer.cli.demo import _randomise, shapes
from timesformer.video import write_video

SIZE = {"img_size": 32, "patch_size": 8, "num_frames": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
PIXELS = {"mean": (0.45,) * 3, "std": (0.225,) * 3}  # of the k400 presets


def make_model(folder, **options):
    """A folder written by save_pretrained: all parameters random, attention peaked."""
    model = TimeSformer(**{**SIZE, "num_classes": 5, "preset": "k400-base", **options}).eval()
    _randomise(model, seed=1)
    model.save_pretrained(folder)
    return str(folder)


def make_video(path, frames=140):
    write_video(path, shapes(frames, 48, 64), 30, options={"g": "20"})
    return str(path)


def broken_video(path):
    path.write_bytes(b"not a video" * 100)
    return str(path)


def call(capsys, *argv):
    """(exit code, stdout, stderr) of a command; wrong usage gives its code too."""
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, folder, code, message, *argv):
    """The command ends with that code and says so in one error line, and `folder` holds the same files as before."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    got, out, err = call(capsys, *argv)
    assert got == code and out == "", (got, out, err)
    assert message in err.splitlines()[-1], err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def full_disk(monkeypatch, module, name):
    """Let a writer put down half a file and then find the disk full."""
    write = getattr(module, name)

    def half(*args, **kwargs):
        write(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, half)


def views_of(path, **changes):
    """The clip that a command should see: one centre crop, unless changed."""
    from timesformer.presets import Preset
    from timesformer.video import clip_views

    return clip_views(path, Preset(**{**dict(name="by hand", img_size=32, num_frames=4, sampler="kinetics", rate=32,
                                             num_classes=5, crops=1), **PIXELS, **changes}))  # fmt: skip


def no_grad(function, *args, **kwargs):
    with torch.no_grad():
        return function(*args, **kwargs)
