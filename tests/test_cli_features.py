# SPDX-License-Identifier: Apache-2.0
"""`timesformer features` on tiny models and real H.264 files."""

import json

import pytest
import torch
from clips import broken_video, call, fails, full_disk, make_model, make_video, no_grad, views_of

pytest.importorskip("av")
pytest.importorskip("safetensors")

from safetensors import safe_open

from timesformer import TimeSformer
from timesformer.features import features
from timesformer.weights import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder / "model")


@pytest.fixture(scope="module")
def videos(folder):
    return [make_video(folder / "a.mp4"), make_video(folder / "b.mp4", frames=70)]


def read(path):
    """(tensors, record)"""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["timesformer_features"])
        return {name: file.get_tensor(name) for name in file.keys()}, record


@pytest.mark.parametrize("layer, kind, norm", [
    (None, None, None), (-1, "frame", None), (0, "cls", None), (1, "patch", True), (-1, "patch", False),
])  # fmt: skip
def test_equals_the_library(capsys, tmp_path, model, videos, layer, kind, norm):
    options = [] if layer is None else ["--layer", layer, "--kind", kind]
    options += {None: [], True: ["--norm"], False: ["--no-norm"]}[norm]
    code, out, err = call(capsys, "features", *videos, "-o", tmp_path / "f.safetensors", "--model", model, *options)
    assert code == 0, err
    tensors, record = read(tmp_path / "f.safetensors")
    layer, kind = -1 if layer is None else layer, kind or "cls"
    assert list(tensors) == list(record["videos"]) == videos
    loaded = TimeSformer.from_pretrained(model)
    for path in videos:
        exact = no_grad(features, loaded, views_of(path), layer, kind, norm)
        torch.testing.assert_close(tensors[path], exact, rtol=1e-5, atol=1e-5)
    assert (record["layer"], record["kind"]) == (layer % 3, kind)
    assert record["norm"] == (layer == -1 if norm is None else norm)
    assert record["videos"][videos[0]] == {"frames": 140, "fps": 30.0, "clips": [[0, 42, 84, 127]]}
    assert (record["preset"], record["num_frames"], record["img_size"]) == ("k400-base", 4, 32)
    assert f"of layer {layer % 3} of 2 videos" in out
    assert (tmp_path / "f.safetensors").stat().st_mode & 0o444  # readable as the umask says


def test_several_views_in_batches(capsys, tmp_path, model, videos):
    options = ["--crops", 3, "--clips", 2, "--rate", 10, "--batch-size", 4, "--dtype", "float64"]
    output = tmp_path / "f.safetensors"
    assert call(capsys, "features", videos[0], "-o", output, "--model", model, *options)[0] == 0
    (found,), record = read(output)[0].values(), read(output)[1]
    loaded = TimeSformer.from_pretrained(model).double()
    exact = no_grad(features, loaded, views_of(videos[0], crops=3, clips=2, rate=10).double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)
    assert record["videos"][videos[0]]["clips"] == [[0, 13, 26, 39], [50, 63, 76, 89]]


def test_a_model_without_a_head(capsys, tmp_path, videos):
    model = make_model(tmp_path / "model", num_classes=0)
    assert call(capsys, "features", videos[0], "-o", tmp_path / "f.safetensors", "--model", model)[0] == 0
    (found,) = read(tmp_path / "f.safetensors")[0].values()
    exact = no_grad(TimeSformer.from_pretrained(model), views_of(videos[0]))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_a_bad_video_is_named_and_left_out(capsys, tmp_path, model, videos):
    bad, output = broken_video(tmp_path / "bad.mp4"), tmp_path / "f.safetensors"
    code, _, err = call(capsys, "features", bad, *videos, "-o", output, "--model", model)
    assert code == 1 and list(read(output)[0]) == videos
    assert "bad.mp4" in err and "1 of 3 videos cannot be read" in err
    output.unlink()
    fails(capsys, tmp_path, 1, "bad.mp4", "features", videos[0], bad, "-o", output, "--model", model, "--strict")
    fails(capsys, tmp_path, 1, "bad.mp4", "features", bad, "-o", output, "--model", model)


def test_full_disk_leaves_the_old_file(capsys, tmp_path, model, videos, monkeypatch):
    output = tmp_path / "f.safetensors"
    output.write_bytes(b"old")
    full_disk(monkeypatch, write, "save_safetensors")
    fails(capsys, tmp_path, 1, "No space left", "features", videos[0], "-o", output, "--model", model)
    assert output.read_bytes() == b"old"


@pytest.mark.parametrize("code, message, options", [
    (2, "expected a name that ends in .safetensors", ["-o", "f.pt"]),
    (1, "there is no folder", ["-o", "nowhere/f.safetensors"]),
    (1, "it exists and is a folder", ["-o", "folder.safetensors"]),
    (1, "--layer: got 3, expected one of the 3 layers, -3 to 2", ["-o", "f.safetensors", "--layer", "3"]),
    (2, "--preset: got 'k700'", ["-o", "f.safetensors", "--preset", "k700"]),
    (2, "--backend: got 'fpga'", ["-o", "f.safetensors", "--backend", "fpga"]),
    (2, "uniform sampling covers the whole video", ["-o", "f.safetensors", "--sampling", "uniform", "--rate", "3"]),
    (1, "--device nonsense: cannot be used", ["-o", "f.safetensors", "--device", "nonsense"]),
])  # fmt: skip
def test_bad_input(capsys, tmp_path, monkeypatch, model, videos, code, message, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    fails(capsys, tmp_path, code, message, "features", videos[0], "--model", model, *options)


def test_not_finite(capsys, tmp_path, videos):
    model = TimeSformer.from_pretrained(make_model(tmp_path / "model"))
    model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    argv = ["features", videos[0], "-o", tmp_path / "f.safetensors", "--model", tmp_path / "model"]
    fails(capsys, tmp_path, 1, "the features are not finite in float32", *argv)
