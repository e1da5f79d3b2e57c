# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/, run as a user would; some are run by the tests of what they show."""

import json
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("safetensors")

from clips import call
from training import videos

from timesformer import TimeSformer, demo
from timesformer.cli import main as command
from timesformer.train.tasks import TASKS, scene
from timesformer.weights import read_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
BOX = str(demo.folder())


def example(capsys, name, *args):
    """What examples/NAME.py prints."""
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*map(str, args))
    return capsys.readouterr().out


def picture(path):
    import av

    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = videos(tmp_path_factory.mktemp("data"), "train", size=(48, 64), per_class=2)
    return videos(folder, "val", size=(48, 64), per_class=2, seed=1)


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "model"
    runpy.run_path(str(EXAMPLES / "fine_tune.py"))["main"](str(data), BOX, str(out), "3")
    return out


def test_every_example_is_run():
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tested or f'"{path.name}"' in tested or f"examples/{path.name}" in tested, path


def test_features(capsys, data):
    video = data / "val" / "walk" / "0.mp4"
    out = example(capsys, "video_features", video, BOX)
    assert "features (1, 64)" in out and out.count("\n") == 6
    code, answer, _ = call(capsys, "classify", video, "--model", BOX, "--json")
    best = json.loads(answer)["results"][0]["top"][0]
    assert code == 0 and f"{best['logit']:.3f}  {best['label']}" in out


def test_motion(capsys):
    out = example(capsys, "name_motion", 12)
    truth = TASKS["scenes"][scene("scenes", 12).label]
    assert out.startswith(f"clip 12: {truth} (") and out.endswith(f"drawn was: {truth}\n")
    assert "drawn was: " in example(capsys, "name_motion")


def test_fine_tuning(tuned, data):
    """A model of the folders' classes, away from where it started, that the command line takes."""
    before, after = read_checkpoint(BOX), read_checkpoint(tuned)
    assert after.config["id2label"] == {0: "fall", 1: "jump", 2: "walk"}
    name = "blocks.0.attn.qkv.weight"
    assert 0 < (after.state_dict[name] - before.state_dict[name]).abs().max() < 0.01
    assert command(["classify", str(data / "val"), "--model", str(tuned), "--workers", "0"]) == 0


def test_evaluation(capsys, tuned, data, tmp_path):
    out = example(capsys, "evaluate_folder", data, tuned)
    code, answer, _ = call(capsys, "evaluate", data, "--model", tuned, "--workers", 0, "--json")
    result = json.loads(answer)
    assert code == 0 and out == f"{round(result['top1'] * 6)} of 6 videos right, 0 skipped\n"


def test_attention_map(capsys, tmp_path):
    """The picture of the command, at the model's own size."""
    demo.write_clip(tmp_path / "clip.mp4", 1_000_001)
    out = example(capsys, "attention_map", tmp_path / "clip.mp4", tmp_path / "ours.png", BOX)
    assert "ours.png: 8 frames, most of it from frame " in out
    argv = ["attention", tmp_path / "clip.mp4", "-o", tmp_path / "theirs.png", "--model", BOX, "--size", 32]
    assert call(capsys, *argv)[0] == 0
    ours, theirs = (picture(tmp_path / name) for name in ("ours.png", "theirs.png"))
    assert ours.shape == theirs.shape == (2 * 32 + 4, 8 * 32 + 7 * 4, 3)
    assert abs(ours - theirs).mean() < 4  # the model's crop is resized by another rule than a shown frame


def test_export(capsys, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    out = example(capsys, "export_model", BOX, tmp_path / "model.onnx")
    assert "logits (2, 28)" in out and float(out.split("differ by ")[1].split()[0]) < 1e-5
    assert TimeSformer.from_pretrained(BOX).config.num_classes == 28
