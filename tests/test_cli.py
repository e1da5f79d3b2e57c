# SPDX-License-Identifier: Apache-2.0
"""The command line, in this process on tiny models and real H.264 files; once as a user runs it."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("safetensors")

from timesformer import TimeSformer
from timesformer.cli import main
from timesformer.cli.classify import read_labels
from timesformer.cli.demo import _randomise, shapes
from timesformer.presets import Preset
from timesformer.video import clip_views, write_video
from timesformer_kernels import available_backends, registry

LABELS = {0: "walking", 1: "running", 2: "jumping", 3: "falling", 4: "flying"}
SIZE = {"img_size": 32, "patch_size": 8, "num_frames": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def video(folder):
    path = folder / "shapes.mp4"
    write_video(path, shapes(140, 48, 64), 30, options={"g": "20"})
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    """A folder written by save_pretrained: all parameters random, attention peaked."""
    model = TimeSformer(**SIZE, num_classes=5, id2label=LABELS, preset="k400-base").eval()
    _randomise(model, seed=1)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))  # answers far apart
    model.save_pretrained(folder / "model")
    return str(folder / "model")


def call(capsys, *argv):
    """(exit code, stdout, stderr)"""
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def classify(capsys, *argv):
    code, out, _ = call(capsys, "classify", *argv, "--json")
    assert code == 0
    return json.loads(out)


# classify


def test_classify_equals_the_library(capsys, video, model):
    """What the command prints is the model on `clip_views`, logits averaged over the three crops."""
    answer = classify(capsys, video, "--model", model)
    loaded = TimeSformer.from_pretrained(model)
    preset = Preset("by hand", 32, 4, "kinetics", 32, 5)
    with torch.inference_mode():
        logits = loaded(clip_views(video, preset)).double().mean(0)
    expected = logits.softmax(0).sort(descending=True)
    (result,) = answer["results"]
    assert result["clips"] == [[0, 42, 84, 127]]
    assert (result["frames"], result["fps"], result["views"]) == (140, 30, 3)
    assert [top["class"] for top in result["top"]] == expected.indices.tolist()
    assert [top["label"] for top in result["top"]] == [LABELS[index] for index in expected.indices.tolist()]
    np.testing.assert_allclose([top["probability"] for top in result["top"]], expected.values, rtol=1e-4)
    np.testing.assert_allclose([top["logit"] for top in result["top"]], logits[expected.indices], rtol=1e-4, atol=1e-5)
    assert (answer["preset"], answer["untrained"]) == ("k400-base", False)


@pytest.mark.parametrize("name", [name for name in available_backends() if name != "reference"])
def test_classify_equals_the_reference_backend(capsys, video, model, name):
    if reason := registry.get(name).why_not("cpu", torch.float32, 8):
        pytest.skip(f"{name}: {reason}")
    tops = []
    for backend in (name, "reference"):
        top = classify(capsys, video, "--model", model, "--backend", backend)["results"][0]["top"]
        tops.append({entry["class"]: entry["logit"] for entry in top})
    scale = max(map(abs, tops[1].values()))
    assert max(abs(tops[0][index] - tops[1][index]) for index in range(5)) < 1e-5 * scale


@pytest.mark.parametrize("dtype, limit", [("float64", 1e-5), ("bfloat16", 0.1), ("float16", 0.02)])
def test_classify_dtypes(capsys, video, model, dtype, limit):
    plain = classify(capsys, video, "--model", model)["results"][0]["top"]
    other = classify(capsys, video, "--model", model, "--dtype", dtype)["results"][0]["top"]
    logits = {entry["class"]: entry["logit"] for entry in other}
    scale = max(abs(entry["logit"]) for entry in plain)
    assert max(abs(entry["logit"] - logits[entry["class"]]) for entry in plain) < limit * scale


def test_classify_options(capsys, video, model):
    options = ["--frames", 3, "--rate", 10, "--clips", 2, "--crops", 1, "--top-k", 2, "--img-size", 48]
    answer = classify(capsys, video, "--model", model, *options)
    (result,) = answer["results"]
    # a span of 30 frames; the second clip starts half way into the room of 110
    assert result["clips"] == [[0, 14, 29], [55, 69, 84]]
    assert (result["views"], len(result["top"])) == (2, 2)
    assert (answer["num_frames"], answer["img_size"], answer["rate"]) == (3, 48, 10)
    segments = classify(capsys, video, "--model", model, "--sampling", "segments", "--crops", 1)
    assert segments["results"][0]["clips"] == [[17, 52, 87, 121]]
    uniform = classify(capsys, video, "--model", model, "--sampling", "uniform", "--crops", 1)
    assert uniform["results"][0]["clips"] == [[0, 46, 92, 139]]


def test_classify_aggregates_probabilities(capsys, video, model):
    answer = classify(capsys, video, "--model", model, "--aggregate", "prob")
    loaded = TimeSformer.from_pretrained(model)
    with torch.inference_mode():
        logits = loaded(clip_views(video, Preset("by hand", 32, 4, "kinetics", 32, 5)))
    expected = logits.softmax(1).mean(0)
    for top in answer["results"][0]["top"]:
        assert top["probability"] == pytest.approx(expected[top["class"]].item(), rel=1e-4)


def test_classify_resize_rules_differ(capsys, video, model):
    logits = [
        classify(capsys, video, "--model", model, "--resize", rule, "--top-k", 1)["results"][0]["top"][0]["logit"]
        for rule in ("pil", "original")
    ]
    assert logits[0] != logits[1]


def test_classify_prints_names_and_percents(capsys, video, model):
    code, out, err = call(capsys, "classify", video, "--model", model, "--top-k", 3)
    assert code == 0
    header, *lines = out.splitlines()
    assert header.startswith(f"{video}: 140 frames, 30.00 fps; 3 views of 4 x 32 x 32")
    assert len(lines) == 3 and all("%" in line and line.split()[-1] in LABELS.values() for line in lines)
    assert "UNTRAINED" not in err


def test_classify_several_videos_one_bad(capsys, video, model, tmp_path):
    """The good ones are answered; the bad one costs a line on stderr and the exit code."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video" * 100)
    code, out, err = call(capsys, "classify", video, bad, video, "--model", model, "--json")
    assert code == 1
    results = json.loads(out)["results"]
    assert [("error" in result) for result in results] == [False, False, True]
    assert results[0]["top"] == results[1]["top"] and results[2]["video"] == str(bad)
    assert [line for line in err.splitlines() if "error" in line] == [
        f"timesformer classify: error: {results[2]['error']}"
    ]


def test_classify_bad_video_is_found_before_the_model_is_loaded(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(TimeSformer, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    code, out, err = call(capsys, "classify", tmp_path / "gone.mp4")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1 and "gone.mp4" in err and "no such file" in err


def test_classify_missing_model(capsys, video, tmp_path):
    code, out, err = call(capsys, "classify", video, "--model", tmp_path / "nothing")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1 and "nothing" in err


def test_classify_untrained_says_so(capsys, video):
    argv = [video, "--model", "untrained", "--frames", 2, "--img-size", 32, "--crops", 1]
    code, out, err = call(capsys, "classify", *argv, "--json")
    answer = json.loads(out)
    assert code == 0 and answer["untrained"] is True
    assert "UNTRAINED MODEL" in err and "mean nothing" in err
    assert answer["results"][0]["top"][0]["label"].startswith("class ")


def hub(monkeypatch, source, files):
    """huggingface_hub answering from local folders; `files` lists what hf_hub_download has."""
    import huggingface_hub

    asked = []

    def snapshot_download(repo, **kwargs):
        asked.append(repo)
        return str(source)

    def hf_hub_download(repo, name):
        if name not in files:
            raise FileNotFoundError(name)
        return str(source / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


def test_classify_default_model(capsys, caplog, video, monkeypatch, tmp_path):
    """The default is the released K400 model from the hub, by transformers' files, with its own statistics."""
    transformers = pytest.importorskip("transformers")
    config = transformers.TimesformerConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=5, id2label=LABELS,
    )  # fmt: skip
    transformers.TimesformerForVideoClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}')
    asked = hub(monkeypatch, tmp_path, ["preprocessor_config.json"])
    with caplog.at_level(logging.WARNING, "timesformer"):
        answer = classify(capsys, video)
    assert set(asked) == {"facebook/timesformer-base-finetuned-k400"}
    assert "CC-BY-NC" in caplog.text
    assert (answer["preset"], answer["num_frames"], answer["img_size"]) == ("k400-base", 4, 32)
    assert (answer["mean"], answer["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert {top["label"] for top in answer["results"][0]["top"]} == set(LABELS.values())

    hub(monkeypatch, tmp_path, [])  # a repository without a preprocessor file
    with caplog.at_level(logging.WARNING, "timesformer"):
        answer = classify(capsys, video, "--model", "facebook/timesformer-hr-finetuned-ssv2")
    assert (answer["preset"], answer["channel_order"], answer["mean"]) == ("ssv2-hr", "BGR", [0.45] * 3)
    assert "preprocessor_config.json" in caplog.text


def test_classify_statistics_of_a_folder(capsys, video, model, tmp_path):
    import shutil

    shutil.copytree(model, tmp_path / "model")
    stated = tmp_path / "model" / "preprocessor_config.json"
    stated.write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    answer = classify(capsys, video, "--model", tmp_path / "model")
    assert (answer["mean"], answer["std"]) == ([0.1, 0.2, 0.3], [1, 1, 1])
    explicit = classify(capsys, video, "--model", tmp_path / "model", "--preset", "k400-base", "--img-size", 32)
    assert (explicit["mean"], explicit["num_frames"]) == ([0.45] * 3, 8)
    stated.write_text('{"image_mean": 3}')
    code, _, err = call(capsys, "classify", video, "--model", tmp_path / "model")
    assert code == 1 and "image_mean" in err.splitlines()[-1]


def test_labels_files(tmp_path):
    names = {0: "a", 1: "b c", 2: "d"}
    for name, text in [
        ("labels.txt", "a\nb c\nd\n"),
        ("list.json", '["a", "b c", "d"]'),
        ("by_number.json", '{"0": "a", "1": "b c", "2": "d"}'),
        ("by_name.json", '{"a": 0, "\\"b c\\"": 1, "d": 2}'),  # the Kinetics list quotes its names
    ]:
        (tmp_path / name).write_text(text)
        assert read_labels(str(tmp_path / name)) == names
    (tmp_path / "bad.json").write_text("3")
    with pytest.raises(ValueError, match="expected a JSON list"):
        read_labels(str(tmp_path / "bad.json"))


def test_labels_are_used_and_counted(capsys, video, model, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("ABCDE"))
    answer = classify(capsys, video, "--model", model, "--labels", labels)
    assert all(top["label"] == "ABCDE"[top["class"]] for top in answer["results"][0]["top"])
    labels.write_text("A\nB")
    code, _, err = call(capsys, "classify", video, "--model", model, "--labels", labels)
    assert code == 1 and "got 2 names, expected one for each of 5 classes" in err


@pytest.mark.parametrize("argv, message", [
    (["--backend", "fpga"], "--backend: got 'fpga', expected one of auto"),
    (["--preset", "k700"], "--preset: got 'k700', expected one of k400-base"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--crops", "2"], "invalid choice: 2"),
    (["--frames", "0"], "got 0, expected at least 1"),
    (["--sampling", "uniform", "--rate", "4"], "uniform sampling covers the whole video"),
])  # fmt: skip
def test_wrong_usage_exits_with_2(capsys, video, model, argv, message):
    with pytest.raises(SystemExit) as exit:
        main(["classify", video, "--model", model, *argv])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_no_command_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    capsys.readouterr()


def test_a_backend_that_cannot_run_gives_its_reason(capsys, video, model, monkeypatch):
    broken = registry.Backend("broken", None, None, lambda device, dtype, head_dim: "it is Sunday")
    monkeypatch.setitem(registry._BACKENDS, "broken", broken)
    registry.resolve.cache_clear()
    for argv in (["classify", video, "--model", model], ["demo", "--tiny"]):
        code, _, err = call(capsys, *argv, "--backend", "broken")
        assert code == 1 and "backend 'broken' cannot run: it is Sunday" in err.splitlines()[-1]


def test_unusable_device(capsys, video, model):
    code, _, err = call(capsys, "classify", video, "--model", model, "--device", "nonsense")
    assert code == 1 and err.startswith("timesformer classify: error: --device nonsense")


# demo and env


def test_demo(capsys, tmp_path):
    keep = tmp_path / "kept.mp4"
    code, out, err = call(capsys, "demo", "--tiny", "--clip", 0, "--keep", keep, "--json")
    result = json.loads(out)
    assert code == 0 and result["agree"] and result["relative_difference"] <= result["limit"] == 1e-4
    assert (result["video"]["frames"], result["video"]["codec"]) == (264, "h264")
    assert result["video"]["mean_error_grey_levels"] < 4
    assert result["clip"] == [0, 36, 72, 109, 145, 182, 218, 255]
    assert result["model"]["untrained"] and keep.stat().st_size > 1000
    assert set(result["seconds"]) == {result["backend"], "reference"} and min(result["seconds"].values()) > 0


def test_demo_text(capsys):
    code, out, _ = call(capsys, "demo", "--tiny", "--clip", 0, "--frames", 2, "--seed", 3, "--dtype", "float64")
    assert code == 0
    assert "UNTRAINED, random weights from seed 3" in out and "agreement  yes" in out
    assert "frames 0, 255" in out


@pytest.mark.parametrize("scheme", ["time", "space"])
def test_demo_notices_a_wrong_grouping(capsys, monkeypatch, scheme):
    """Tokens read in the other order by the fused backend alone: far beyond every limit, and exit code 1."""
    import timesformer.attention as attention

    right = attention.grid_attention_qkvpacked
    called = []

    def wrong(*args, **options):
        if options["scheme"] == scheme and options["backend"] != "reference":
            called.append(options["backend"])
            options["order"] = "time_major"
        return right(*args, **options)

    monkeypatch.setattr(attention, "grid_attention_qkvpacked", wrong)
    if registry.resolve("auto", "cpu", torch.float32, 8).name == "reference":
        pytest.skip("no fused backend runs here")
    code, out, _ = call(capsys, "demo", "--tiny", "--clip", 0, "--json")
    result = json.loads(out)
    assert called and code == 1 and not result["agree"] and result["relative_difference"] > 0.1


def test_demo_without_tqdm(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    code, _, err = call(capsys, "demo", "--tiny", "--clip", 0)
    assert code == 0
    assert err.splitlines()[0].startswith("[1/7] drawing clip") and err.splitlines()[-1].startswith("[7/7]")


def test_env(capsys):
    code, out, _ = call(capsys, "env", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["torch"] == torch.__version__
    optional = {"av", "tqdm", "safetensors", "huggingface_hub", "transformers", "onnx", "onnxscript", "onnxruntime"}
    assert set(report["optional"]) == optional
    assert report["backends"]["cpu"]["float32"]["reference"] is None
    code, out, _ = call(capsys, "env")
    assert code == 0 and "reference" in out and f"av               {report['optional']['av']}" in out


@pytest.mark.parametrize("command", ["classify", "demo", "env", "evaluate", "train"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"example:\n  timesformer {command}" in capsys.readouterr().out


def test_as_a_user_runs_it(video, model, tmp_path):
    """A process of its own: answers on stdout, one line on stderr and exit code 1 for a bad file."""
    command = [sys.executable, "-m", "timesformer.cli", "classify", "--model", model]
    good = subprocess.run([*command, video, "--top-k", "1"], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert len(good.stdout.splitlines()) == 2
    (tmp_path / "empty.mp4").touch()
    bad = subprocess.run([*command, str(tmp_path / "empty.mp4")], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert len(bad.stderr.splitlines()) == 1 and "the file is empty" in bad.stderr
