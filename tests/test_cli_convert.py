# SPDX-License-Identifier: Apache-2.0
"""`timesformer convert`: every format there and back, programs and ONNX files, and what is refused."""

import json

import pytest
import torch
from checkpoints import assert_same, tiny_config, tiny_state
from clips import call, fails, full_disk, make_model

pytest.importorskip("safetensors")

from timesformer import TimeSformer
from timesformer.weights import read_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder / "model")


@pytest.fixture(scope="module")
def small(folder):
    return make_model(folder / "small", depth=1)


def video():
    return torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(5))


def logits(model):
    with torch.inference_mode():
        return TimeSformer.from_pretrained(model)(video())


def converted(capsys, *argv):
    code, out, err = call(capsys, "convert", *argv)
    assert code == 0, err
    assert out == f"{argv[0]} -> {argv[1]}\n"


@pytest.mark.parametrize("name, to", [
    ("folder", None), ("folder", "huggingface"), ("m.safetensors", "timesformer"), ("m.safetensors", "huggingface"),
    ("m.pyth", "timesformer"), ("m.pth", "mmaction2"), ("m.bin", "huggingface"),
])  # fmt: skip
def test_there_and_back(capsys, tmp_path, model, name, to):
    converted(capsys, model, tmp_path / name, *([] if to is None else ["--to", to]), "--num-heads", 4)
    found = read_checkpoint(tmp_path / name, config={"num_heads": 4, "img_size": 32})
    assert found.fmt == (to or "timesformer")
    converted(capsys, tmp_path / name, tmp_path / "back", "--num-heads", 4)
    back, first = read_checkpoint(tmp_path / "back"), read_checkpoint(model)
    assert_same(back.state_dict, first.state_dict)
    if name != "m.bin":  # a bare state dict has no place for a configuration
        torch.testing.assert_close(logits(tmp_path / "back"), logits(model), rtol=0, atol=0)


def test_hugging_face_runs_it(capsys, tmp_path, model):
    transformers = pytest.importorskip("transformers")
    converted(capsys, model, tmp_path / "hf", "--to", "huggingface")
    theirs = transformers.TimesformerForVideoClassification.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        got, exact = theirs(video().transpose(1, 2)).logits, logits(model)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_inflate(capsys, tmp_path):
    config = tiny_config(attention_type="space_only", num_frames=1)
    image = TimeSformer(**config)
    image.load_state_dict(tiny_state(config))
    save_checkpoint(image, tmp_path / "vit.safetensors", fmt="vit")
    converted(capsys, tmp_path / "vit.safetensors", tmp_path / "video", "--inflate", "--frames", 6)
    found = read_checkpoint(tmp_path / "video")
    assert (found.config["attention_type"], found.config["num_frames"]) == ("divided_space_time", 6)
    assert torch.equal(found.state_dict["blocks.1.attn.qkv.weight"], image.blocks[1].attn.qkv.weight)
    assert not found.state_dict["blocks.1.temporal_fc.weight"].any()
    argv = ["convert", tmp_path / "video", tmp_path / "again", "--inflate"]
    fails(capsys, tmp_path, 1, "is a video model already, in format 'timesformer'", *argv)
    argv = ["convert", tmp_path / "vit.safetensors", tmp_path / "again"]
    fails(capsys, tmp_path, 1, "is an image ViT", *argv)


def test_program(capsys, tmp_path, small):
    converted(capsys, small, tmp_path / "m.pt2")
    got = torch.export.load(tmp_path / "m.pt2").module()(video())
    exact = logits(small)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_onnx(capsys, tmp_path, small):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    converted(capsys, small, tmp_path / "m.onnx", "--frames", 2, "--img-size", 24)
    clip = video()[:, :, :2, :24, :24].contiguous()
    (got,) = runtime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"video": clip.numpy()})
    with torch.inference_mode():
        exact = TimeSformer.from_pretrained(small)(clip)
    torch.testing.assert_close(torch.from_numpy(got), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("code, message, options", [
    (2, "--to: not for .onnx, .pt2", ["m.onnx", "--to", "huggingface"]),
    (2, "--inflate: not for .onnx, .pt2", ["m.pt2", "--inflate"]),
    (2, "--backend: an ONNX file holds standard operators alone", ["m.onnx", "--backend", "auto"]),
    (2, "--backend: got 'fpga'", ["m.pt2", "--backend", "fpga"]),
    (2, "--frames: for targets .onnx, .pt2 only", ["m.pyth", "--frames", "3"]),
    (2, "--img-size: for targets .onnx, .pt2 only", ["m.pyth", "--inflate", "--img-size", "32"]),
    (1, "there is no folder", ["nowhere/m.pt2"]),
    (1, "there is no folder", ["nowhere/m.safetensors"]),
    (1, "height a multiple of 8", ["m.pt2", "--img-size", "30"]),
    (2, "invalid choice: 'keras'", ["m.pyth", "--to", "keras"]),
    (1, "expected one of 'timesformer', 'huggingface' for a folder", ["m", "--to", "mmaction2"]),
])  # fmt: skip
def test_bad_input(capsys, tmp_path, monkeypatch, model, code, message, options):
    monkeypatch.chdir(tmp_path)
    fails(capsys, tmp_path, code, message, "convert", model, *options)


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"), (b"half a file", "damaged, truncated or not a torch checkpoint"),
])  # fmt: skip
def test_a_source_that_is_damaged(capsys, tmp_path, content, message):
    (tmp_path / "m.pyth").write_bytes(content)
    for target in ("n.pyth", "n.pt2"):
        fails(capsys, tmp_path, 1, message, "convert", tmp_path / "m.pyth", tmp_path / target)


def test_another_architecture(capsys, tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}}, tmp_path / "resnet.pth")
    code, out, err = call(capsys, "convert", tmp_path / "resnet.pth", tmp_path / "m")
    assert (code, out) == (1, "") and "resnet.pth" in err
    assert [path.name for path in tmp_path.iterdir()] == ["resnet.pth"]


def test_full_disk_leaves_the_old_file(capsys, tmp_path, model, monkeypatch):
    (tmp_path / "m.pyth").write_bytes(b"old")
    full_disk(monkeypatch, torch, "save")
    fails(capsys, tmp_path, 1, "No space left", "convert", model, tmp_path / "m.pyth")


def test_configuration_travels(capsys, tmp_path, model):
    converted(capsys, model, tmp_path / "folder")
    record = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (record["preset"], record["num_classes"], record["num_heads"]) == ("k400-base", 5, 4)
