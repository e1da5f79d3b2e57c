# SPDX-License-Identifier: Apache-2.0
"""What `timesformer train` says to folders, files and options that cannot serve: one line, the exit code, no files."""

import pytest

pytest.importorskip("av")
pytest.importorskip("safetensors")

from training import TINY, small, tiny_config, train, videos

from timesformer import TimeSformer


@pytest.fixture
def data(tmp_path):
    return videos(tmp_path / "data", "train", per_class=2)


def error_of(capsys, *argv):
    """The one line on stderr of a `train` that ends with exit code 1."""
    assert train(*argv) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


def test_folders_that_hold_no_data(data, tmp_path, capsys):
    def message(folder):
        line = error_of(capsys, folder, "--model", "untrained", "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return line

    assert "gone': no such folder" in message(tmp_path / "gone")
    assert "0.mp4': is a file, expected a folder" in message(data / "train" / "fall" / "0.mp4")
    (tmp_path / "empty").mkdir()
    assert "has no folder 'train'; expected train/<class>/*.mp4" in message(tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    assert "train': has no class" in message(tmp_path / "empty")
    (data / "train" / "sit").mkdir()
    (data / "train" / "sit" / "notes.txt").write_text("no video")
    assert "no video in the class folder 'sit'" in message(data)
    (data / "train" / "stand").mkdir()
    assert "no video in the class folders 'sit', 'stand'" in message(data)


def test_validation_classes_that_training_lacks(data, tmp_path, capsys):
    videos(data, "val", per_class=1, classes=("walk", "swim"))
    line = error_of(capsys, *small(data, tmp_path / "run"))
    assert "'swim' is not among the model's 3 classes (fall, jump, walk)" in line


def test_a_bad_video_is_replaced_named_and_counted(data, tmp_path, capsys):
    bad = data / "train" / "jump" / "1.mp4"
    bad.write_bytes(b"not a video" * 50)
    argv = small(data, tmp_path / "run", "--epochs", 4)
    assert train(*argv) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "skipped: " in line]  # once, though it comes up every epoch
    assert str(bad) in line and "cannot be opened" in line
    assert "4 times a video could not be read and another took its place" in out
    assert str(bad) in error_of(capsys, *small(data, tmp_path / "strict", "--epochs", 4, "--strict"))


def test_a_bad_validation_video_does_not_count(data, tmp_path, capsys):
    videos(data, "val", per_class=1)
    (data / "val" / "jump" / "0.mp4").write_bytes(b"")
    assert train(*small(data, tmp_path / "run", "--epochs", 1)) == 0
    out, err = capsys.readouterr()
    assert "of 2 clips" in out and "the file is empty" in err
    for name in ("fall", "walk"):
        (data / "val" / name / "0.mp4").write_bytes(b"")
    assert "not one of the validation clips can be read" in error_of(capsys, *small(data, tmp_path / "none"))


def test_nothing_but_bad_videos(data, tmp_path, capsys):
    for path in data.rglob("*.mp4"):
        path.write_bytes(b"not a video")
    assert "10 videos in a row cannot be read" in error_of(capsys, *small(data, tmp_path / "run"))


def test_a_checkpoint_of_another_architecture(data, tmp_path, capsys):
    TimeSformer(**TINY, img_size=16, num_frames=2, num_classes=3, attention_type="joint_space_time").save_pretrained(
        tmp_path / "joint"
    )
    argv = [data, "--model", tmp_path / "joint", "--attention", "divided_space_time", "--out", tmp_path / "run"]
    assert "got 'divided_space_time', expected that of the checkpoint, 'joint_space_time'" in error_of(capsys, *argv)
    (tmp_path / "joint" / "model.safetensors").write_bytes(b"damaged")
    assert "model.safetensors" in error_of(capsys, data, "--model", tmp_path / "joint", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_that_makes_no_model(data, tmp_path, capsys):
    for text, message in [
        ("[1]", "expected a JSON object"),
        ("{", "expected a JSON object"),
        ('{"width": 3}', "unknown fields width"),
    ]:
        path = tmp_path / "config.json"
        path.write_text(text)
        line = error_of(capsys, data, "--model", "untrained", "--config", path, "--out", tmp_path / "run")
        assert message in line


@pytest.mark.parametrize("argv, message", [
    ([], "expected either DATA_DIR or --task"),
    (["data", "--task", "shape"], "expected either DATA_DIR or --task"),
    (["data", "--config", "x.json"], "--config: describes an untrained model"),
    (["--task", "shape", "--model", "some/model"], "--model some/model has no place there"),
    (["data", "--preset", "k700"], "--preset: got 'k700'"),
    (["data", "--batch-size", "9", "--micro-batch", "4"], "--batch-size: got 9, expected a multiple of micro_batch"),
    (["data", "--lr", "0"], "--lr: got 0.0, expected a positive number"),
    (["data", "--weight-decay", "-1"], "--weight-decay: got -1.0, expected at least 0"),
    (["data", "--workers", "-1"], "got -1, expected at least 0"),
    (["data", "--backend", "fpga"], "--backend: got 'fpga'"),
])  # fmt: skip
def test_wrong_usage_exits_with_2(capsys, tmp_path, argv, message):
    with pytest.raises(SystemExit) as exit:
        train(*argv, "--out", tmp_path / "run")
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_out_that_cannot_be_a_folder(data, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "file" in error_of(capsys, *small(data, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_crop_larger_than_the_random_side(data, tmp_path, capsys):
    argv = [data, "--model", "untrained", "--config", tiny_config(data), "--out", tmp_path / "run", "--img-size", 16]
    with pytest.raises(SystemExit) as exit:
        train(*argv, "--train-scale", 12, 22)
    assert exit.value.code == 2 and "--train-scale: got (12, 22)" in capsys.readouterr().err
