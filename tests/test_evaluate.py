# SPDX-License-Identifier: Apache-2.0
"""Several views to one answer, accuracy over folders, and what happens to files that cannot be read."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("av")
pytest.importorskip("safetensors")

from training import CLASSES, TINY, videos

from timesformer import TimeSformer
from timesformer.cli import main
from timesformer.cli.demo import _randomise
from timesformer.evaluation import aggregate, predict
from timesformer.presets import find_preset
from timesformer.train.folders import read_folder, video_files
from timesformer.video import VideoError, clip_views
from timesformer.video.loading import load_views


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return videos(tmp_path_factory.mktemp("data"), "val", frames=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder: a random model that answers differently from view to view; its classes are in another order."""
    folder = tmp_path_factory.mktemp("model")
    labels = {0: "walk", 1: "fall", 2: "jump"}
    model = TimeSformer(**TINY, img_size=16, num_frames=2, num_classes=3, id2label=labels, preset="k400-base").eval()
    _randomise(model, seed=1)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(folder)
    return folder


def call(capsys, *argv):
    """(exit code, stdout, stderr)"""
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


VIEWS = ["--rate", 5, "--clips", 2, "--crops", 3]


def evaluate(capsys, data, model, *argv):
    code, out, _ = call(capsys, "evaluate", data, "--model", model, *VIEWS, *argv, "--json")
    assert code == 0
    return json.loads(out)


def by_hand(data, model, how):
    """[(path, label, probabilities [3])] from single views, aggregated here."""
    from dataclasses import replace

    model = TimeSformer.from_pretrained(model)
    preset = replace(find_preset("k400-base"), img_size=16, num_frames=2, rate=5, clips=2)
    numbers = {name: number for number, name in model.config.id2label.items()}
    folder, answers = read_folder(data, "val"), []
    for path, label in folder.clips:
        views = clip_views(path, preset)
        assert len(views) == 6
        with torch.inference_mode():
            logits = torch.stack([model(view[None])[0] for view in views]).double()
        score = (logits.sum(0) / 6).softmax(0) if how == "logits" else sum(F.softmax(row, 0) for row in logits) / 6
        answers.append((path, numbers[folder.classes[label]], score))
    return answers


@pytest.mark.parametrize("how", ["logits", "prob"])
def test_evaluate_equals_the_library(capsys, data, model, how):
    """Accuracies, loss and every answer from six views a video, the class folders mapped by name."""
    result = evaluate(capsys, data, model, "--aggregate", how, "--workers", 0)
    expected = by_hand(data, model, how)
    right = [score.argmax().item() == label for _, label, score in expected]
    assert (result["videos"], result["skipped"], result["top1"]) == (9, 0, sum(right) / 9)
    loss = -sum(score[label].log().item() for _, label, score in expected) / 9
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    for answer, (path, label, score) in zip(result["answers"], expected, strict=True):
        assert (answer["video"], answer["label"], answer["answer"]) == (path, label, score.argmax().item())
        assert answer["probability"] == pytest.approx(score.max().item(), rel=1e-5)
    assert result["top5"] == 1.0 and 0 < sum(right) < 9  # three classes; some right, some wrong


def test_mean_over_classes_weighs_classes_alike(capsys, data, model, tmp_path):
    """Two videos of one class are left out: top-1 moves, the mean over classes is that of the classes."""
    shutil.copytree(data, tmp_path / "data")
    for path in read_folder(data, "val").clips[1:3]:
        (tmp_path / "data" / "val" / CLASSES[0] / path[0].rpartition("/")[2]).unlink()
    result = evaluate(capsys, tmp_path / "data", model)
    by_class = {}
    for answer in result["answers"]:
        by_class.setdefault(answer["label"], []).append(answer["right"])
    means = [sum(answers) / len(answers) for answers in by_class.values()]
    assert sorted(map(len, by_class.values())) == [1, 3, 3]
    assert result["mean_class"] == pytest.approx(sum(means) / 3)
    assert result["top1"] == sum(answer["right"] for answer in result["answers"]) / 7


@pytest.mark.parametrize("options", [("--workers", 2), ("--batch-size", 4)], ids=["workers", "several views at once"])
def test_workers_and_batches_change_nothing(capsys, data, model, options):
    plain, other = (evaluate(capsys, data, model, *extra) for extra in (("--workers", 0), ("--workers", 0, *options)))
    for ours, theirs in zip(other["answers"], plain["answers"], strict=True):
        assert (ours["video"], ours["answer"]) == (theirs["video"], theirs["answer"])
        assert ours["probability"] == pytest.approx(theirs["probability"], rel=1e-5)


def test_aggregates_of_made_up_logits():
    """Where the two rules disagree: one view that is very sure against two that are a little sure."""
    logits = torch.tensor([[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    assert aggregate(logits, "logits").argmax() == 0 and aggregate(logits, "prob").argmax() == 1
    assert aggregate(logits, "logits").tolist() == pytest.approx(torch.tensor([3.0, 4 / 3]).softmax(0).tolist())
    with pytest.raises(ValueError, match="aggregate: got 'max', expected one of logits, prob"):
        aggregate(logits, "max")
    with pytest.raises(ValueError, match="not finite"):
        aggregate(torch.tensor([[float("nan"), 0.0]]))


def test_predict_keeps_the_order_of_views(model):
    model, views = TimeSformer.from_pretrained(model), torch.randn(5, 3, 2, 16, 16)
    with torch.inference_mode():
        expected = torch.cat([model(view[None]) for view in views]).double()
    for batch in (1, 2, 5, 8):
        torch.testing.assert_close(predict(model, views, batch=batch), expected, rtol=1e-5, atol=1e-6)


# files that cannot be read


@pytest.fixture
def broken(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "val" / "jump" / "1.mp4"
    path.write_bytes(path.read_bytes()[:300])
    return tmp_path / "data", path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_is_skipped_named_and_counted(capsys, broken, model, workers):
    folder, path = broken
    code, out, err = call(capsys, "evaluate", folder, "--model", model, "--workers", workers, "--json")
    result = json.loads(out)
    assert (code, result["videos"], result["skipped"]) == (0, 8, 1)
    (bad,) = result["unreadable"]
    assert bad["video"] == str(path) and "cannot be opened" in bad["error"]
    assert f"timesformer evaluate: skipped: {bad['error']}" in err
    code, out, _ = call(capsys, "evaluate", folder, "--model", model)
    assert code == 0 and "8 videos, 1 x 3 views of 2 x 16 x 16; 1 skipped" in out


def test_strict_makes_it_an_error(capsys, broken, model):
    folder, path = broken
    code, out, err = call(capsys, "evaluate", folder, "--model", model, "--strict", "--workers", 0)
    assert (code, out) == (1, "")
    assert str(path) in err.splitlines()[-1] and ": error: " in err.splitlines()[-1]


def test_nothing_to_evaluate(capsys, data, model, tmp_path):
    def error(*argv):
        code, out, err = call(capsys, "evaluate", *argv, "--model", model, "--workers", 0)
        assert (code, out) == (1, "")
        return err.splitlines()[-1]

    assert "has no folder 'test'" in error(data, "--split", "test")
    assert "no such folder" in error(tmp_path / "gone")
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.mp4"):
        path.write_bytes(b"x")
    assert "not one of the 9 videos can be read" in error(tmp_path / "data")
    (tmp_path / "data" / "val" / "swim").mkdir()
    assert "no video in the class folder 'swim'" in error(tmp_path / "data")
    shutil.copy(tmp_path / "data" / "val" / "walk" / "0.mp4", tmp_path / "data" / "val" / "swim")
    assert "'swim' is not among the model's 3 classes (walk, fall, jump)" in error(tmp_path / "data")


def test_a_model_without_names_takes_folders_in_order(capsys, data, tmp_path):
    """As many folders as classes, or an error."""
    for classes in (3, 4):
        TimeSformer(**TINY, img_size=16, num_frames=2, num_classes=classes).save_pretrained(tmp_path / str(classes))
    code, out, _ = call(capsys, "evaluate", data, "--model", tmp_path / "3", "--json")
    assert code == 0 and json.loads(out)["classes"] == list(CLASSES)
    code, _, err = call(capsys, "evaluate", data, "--model", tmp_path / "4")
    assert code == 1 and "3 class folders, but the model has 4 classes without names" in err


# classify on folders


def test_classify_a_folder(capsys, broken, model):
    """Every video below it; a bad one is skipped, counted and not fatal, as it is when it is named."""
    folder, path = broken
    (folder / "val" / "notes.txt").write_text("no video")
    options = ["--model", model, "--workers", 2, "--crops", 1, "--json"]
    code, out, err = call(capsys, "classify", folder, *options)
    results = json.loads(out)["results"]
    assert code == 0
    assert [result["video"] for result in results] == [p for p in video_files(folder) if p != str(path)] + [str(path)]
    assert "cannot be opened" in results[-1]["error"]
    assert "1 of 9 videos cannot be read and were skipped" in err
    single = call(capsys, "classify", results[4]["video"], *options)[1]
    assert json.loads(single)["results"][0]["top"] == results[4]["top"]
    assert call(capsys, "classify", path, results[0]["video"], *options)[0] == 1
    code, out, err = call(capsys, "classify", folder, *options, "--strict")
    assert (code, out) == (1, "") and str(path) in err.splitlines()[-1]
    (folder / "nothing").mkdir()
    code, _, err = call(capsys, "classify", folder / "nothing", *options)
    assert code == 1 and "holds no video file" in err


def test_loaded_views_come_in_order_with_errors_in_place(broken):
    folder, path = broken
    preset = find_preset("miniature")
    loaded = list(load_views(video_files(folder), preset, workers=2))
    assert [video.path for video in loaded] == video_files(folder)
    for video in loaded:
        if video.path == str(path):
            with pytest.raises(VideoError) as caught:
                clip_views(path, preset)
            assert (video.views, video.error) == (None, str(caught.value))
        else:
            assert torch.equal(video.views, clip_views(video.path, preset)) and video.info.frames == 40
