# SPDX-License-Identifier: Apache-2.0
"""Writing and converting checkpoints, whole or not at all; TimeSformer's from_pretrained and save_pretrained."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, Named, assert_same, foreign_state, tiny_config, tiny_state

from timesformer import TimeSformer
from timesformer.weights import (
    CheckpointError,
    convert,
    from_native,
    read_checkpoint,
    resize_pos_embed,
    save_checkpoint,
    save_pretrained,
    state_dict_shapes,
)

safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

SUFFIXES = (".pyth", ".pth", ".pt", ".bin", ".safetensors")
LABELS = {i: f"class {i}" for i in range(5)}


def contents(folder):
    """Every file below `folder` with its bytes: what an interrupted write must leave as it was."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is written reads back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", ["timesformer", "huggingface"])
def test_save_pretrained_round_trip(tmp_path, kind, fmt):
    config = tiny_config(attention_type=kind, id2label=LABELS)
    model = Named(config)
    save_pretrained(model, tmp_path / "new" / "folder", fmt=fmt)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    checkpoint = read_checkpoint(tmp_path / "new" / "folder")
    assert checkpoint.fmt == fmt and checkpoint.license is None
    assert_same(checkpoint.state_dict, model.state_dict())
    assert {k: v for k, v in config.items() if v is not None} == {
        k: v for k, v in checkpoint.config.items() if v is not None
    }


def test_our_own_config_keeps_everything(tmp_path):
    config = tiny_config(img_size=(48, 16), embed_dim=60, num_heads=5, mlp_ratio=1.7, qk_scale=0.3, drop_path_rate=0.1)
    save_pretrained(Named(config), tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.config == config and checkpoint.grid == (6, 2)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", ["timesformer", "huggingface", "mmaction2", "vit"])
def test_save_checkpoint_round_trip(tmp_path, suffix, kind, fmt):
    config = tiny_config(attention_type=kind, id2label=LABELS)
    model, path = Named(config), tmp_path / f"a{suffix}"
    if fmt == "vit" and kind != "space_only":
        with pytest.raises(CheckpointError, match="have no name in format 'vit'.*time_embed"):
            save_checkpoint(model, path, fmt)
        assert not list(tmp_path.iterdir())
        return
    save_checkpoint(model, path, fmt)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state_dict, model.state_dict())
    assert checkpoint.fmt == fmt and checkpoint.license is None
    if suffix == ".safetensors" and fmt != "vit":  # the format and the labels travel in the file
        assert checkpoint.config == config
    assert checkpoint.config["num_heads"] == config["num_heads"]


def test_files_are_laid_out_as_their_readers_expect(tmp_path):
    model = Named(tiny_config())
    state = dict(model.state_dict())
    save_checkpoint(model, tmp_path / "a.pyth")
    save_checkpoint(model, tmp_path / "a.pth", "mmaction2")
    save_checkpoint(model, tmp_path / "a.bin", "huggingface")
    save_checkpoint(model, tmp_path / "a.safetensors", "huggingface")
    load = lambda name: torch.load(tmp_path / name, weights_only=True)  # noqa: E731
    assert_same(load("a.pyth")["model_state"], {"model." + name: tensor for name, tensor in state.items()})
    assert_same(load("a.pth")["state_dict"], foreign_state(state, "mmaction2"))
    assert_same(load("a.bin"), foreign_state(state, "huggingface"))
    assert_same(safetensors_torch.load_file(tmp_path / "a.safetensors"), foreign_state(state, "huggingface"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [0, 2, 5])
def test_transformers_opens_our_folder(tmp_path, kind, classes):
    labels = {i: f"class {i}" for i in range(classes)} or None
    model = Named(tiny_config(attention_type=kind, num_classes=classes, id2label=labels, drop_path_rate=0.1))
    save_pretrained(model, tmp_path, fmt="huggingface")
    cls = transformers.TimesformerForVideoClassification if classes else transformers.TimesformerModel
    opened, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(opened.state_dict(), from_native(model.state_dict(), "huggingface"))
    assert opened.config.num_frames == 3 and opened.config.attention_type == kind
    if classes:
        assert opened.config.num_labels == classes and opened.config.id2label == labels


def test_what_transformers_cannot_express_is_refused(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"square images and patches only, got img_size \(48, 16\)"):
        save_pretrained(Named(tiny_config(img_size=(48, 16))), tmp_path / "a", fmt="huggingface")
    with pytest.raises(ValueError, match="fixes qk_scale at head_dim .* got 0.3"):
        save_pretrained(Named(tiny_config(qk_scale=0.3)), tmp_path / "a", fmt="huggingface")
    assert not list(tmp_path.iterdir())
    save_pretrained(Named(tiny_config(drop_path_rate=0.1)), tmp_path / "a", fmt="huggingface")
    assert "drop_path_rate 0.1 is written as 0" in caplog.text


@pytest.mark.parametrize(("src", "dst"), list(itertools.product(["timesformer", "huggingface", "mmaction2"], repeat=2)))
@pytest.mark.parametrize("kind", KINDS)
def test_convert_in_each_direction(tmp_path, src, dst, kind):
    state = tiny_state(tiny_config(attention_type=kind), dtype=torch.bfloat16)
    wrapped = (
        {"model_state": from_native(state, src, prefix="model.")} if src == "timesformer" else foreign_state(state, src)
    )
    torch.save(wrapped, tmp_path / "a.pyth")
    convert(tmp_path / "a.pyth", tmp_path / "b.safetensors", dst)
    checkpoint = read_checkpoint(tmp_path / "b.safetensors")
    assert checkpoint.fmt == dst
    assert_same(checkpoint.state_dict, state)
    if dst != "mmaction2":
        convert(tmp_path / "b.safetensors", tmp_path / "folder", dst)
        assert_same(read_checkpoint(tmp_path / "folder").state_dict, state)


def test_convert_carries_the_licence(tmp_path, caplog):
    torch.save({"model_state": tiny_state(tiny_config())}, tmp_path / "official.pyth")
    convert(tmp_path / "official.pyth", tmp_path / "hf", "huggingface")
    convert(tmp_path / "hf", tmp_path / "mm.pth", "mmaction2")
    convert(tmp_path / "mm.pth", tmp_path / "own", "timesformer")
    caplog.clear()
    assert read_checkpoint(tmp_path / "own").license == "cc-by-nc-4.0" and "CC-BY-NC 4.0" in caplog.text


def test_convert_refuses_what_it_cannot_know(tmp_path):
    torch.save({"state_dict": tiny_state(tiny_config(embed_dim=48))}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="num_heads cannot be told from the source's tensors"):
        convert(tmp_path / "a.pth", tmp_path / "b", "huggingface")
    convert(tmp_path / "a.pth", tmp_path / "b", "huggingface", config={"num_heads": 4})
    assert read_checkpoint(tmp_path / "b").config["num_heads"] == 4
    torch.save(tiny_state(tiny_config(attention_type="space_only")), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="is an image ViT"):
        convert(tmp_path / "vit.pth", tmp_path / "c", "timesformer")
    convert(tmp_path / "vit.pth", tmp_path / "c.pyth", "timesformer", src_fmt="timesformer")
    assert read_checkpoint(tmp_path / "c.pyth").fmt == "timesformer"
    with pytest.raises(
        ValueError, match="fmt: got 'mmaction2', expected one of 'timesformer', 'huggingface' for a folder"
    ):
        convert(tmp_path / "a.pth", tmp_path / "d", "mmaction2", config={"num_heads": 4})
    assert not (tmp_path / "d").exists()


def test_views_do_not_drag_their_storage_along(tmp_path):
    model = Named(tiny_config())
    model.norm.weight = torch.nn.Parameter(torch.randn(1000, 64).t()[:, 3])  # strided, in a storage of 64,000 values
    save_checkpoint(model, tmp_path / "a.pyth")
    save_checkpoint(model, tmp_path / "a.safetensors")
    size = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    assert all(path.stat().st_size < size + 100_000 for path in tmp_path.iterdir())
    assert_same(read_checkpoint(tmp_path / "a.pyth").state_dict, model.state_dict())


def test_bad_targets(tmp_path):
    model = Named(tiny_config())
    with pytest.raises(ValueError, match=r"path: suffix '\.onnx' .* expected one of"):
        save_checkpoint(model, tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_checkpoint(model, tmp_path / "none" / "a.pt")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is a file"):
        save_pretrained(model, tmp_path / "file")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(FileExistsError, match="exists and is a folder"):
        save_checkpoint(model, tmp_path / "folder.pt")
    with pytest.raises(TypeError, match="model: expected a TimeSformer with a config, got Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(ValueError, match="meta device"):
        save_pretrained(Named(tiny_config()).to("meta"), tmp_path / "x")
    model.config.to_dict = lambda: tiny_config(num_classes=7)
    with pytest.raises(CheckpointError, match=r"head.weight is \(5, 64\), expected \(7, 64\)"):
        save_pretrained(model, tmp_path / "x")
    assert contents(tmp_path) == {(tmp_path / "file").relative_to(tmp_path): b"x"}


def test_safetensors_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'pip install "timesformer-kernels\[hub\]"'):
        save_pretrained(Named(tiny_config()), tmp_path / "x")
    assert not list(tmp_path.iterdir())


# ---- whole or not at all


def half_then_fail(*args, **kwargs):
    file = next(arg for arg in args if isinstance(arg, os.PathLike) or hasattr(arg, "write"))
    Path(file.name if hasattr(file, "write") else file).write_bytes(b"half of a file")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over-an-old-one"])
@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "pathlib.Path.write_text", "os.fsync", "os.replace"])
def test_a_folder_is_whole_or_absent(monkeypatch, tmp_path, existing, where):
    if existing:
        save_pretrained(Named(tiny_config(), seed=2), tmp_path / "m")
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, half_then_fail if where.endswith("save_file") else fail)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(Named(tiny_config(), seed=3), tmp_path / "m")
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["m"] if existing else [])
    if existing:
        assert_same(read_checkpoint(tmp_path / "m").state_dict, Named(tiny_config(), seed=2).state_dict())


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over-an-old-one"])
@pytest.mark.parametrize(
    ("where", "suffix"),
    [("torch.save", ".pyth"), ("safetensors.torch.save_file", ".safetensors"), ("os.replace", ".bin")],
)
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_file_is_whole_or_absent(monkeypatch, tmp_path, existing, where, suffix, kind):
    path = tmp_path / f"a{suffix}"
    if existing:
        save_checkpoint(Named(tiny_config(), seed=2), path)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        if where == "os.replace":
            raise kind("stopped")
        with pytest.raises(OSError, match="No space"):
            half_then_fail(*args)
        raise kind("stopped")

    monkeypatch.setattr(where, fail)
    with pytest.raises(kind, match="stopped"):
        save_checkpoint(Named(tiny_config(), seed=3), path)
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_an_interrupted_replacement_is_noticed(monkeypatch, tmp_path):
    """Two files cannot be replaced at one instant: new weights beside an old configuration are an error."""
    save_pretrained(Named(tiny_config()), tmp_path / "m")
    replace = os.replace

    def fail_second(source, target):
        if os.fspath(target).endswith("config.json"):
            raise OSError("stopped")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail_second)
    with pytest.raises(OSError, match="stopped"):
        save_pretrained(Named(tiny_config(num_classes=7)), tmp_path / "m")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"head.weight is \(7, 64\), expected \(5, 64\)"):
        read_checkpoint(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "m", "model.safetensors"]


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        save_checkpoint(Named(tiny_config()), tmp_path / "a.pyth")
        save_pretrained(Named(tiny_config()), tmp_path / "m")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()} == {"0o644"}
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o755


# ---- with the model itself


def randomised(**options):
    model = TimeSformer(32, 8, 5, 3, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.5, **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_the_model(kind):
    for options in ({}, {"qkv_bias": False}, {"in_chans": 1}):
        model = randomised(attention_type=kind, **options)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert shapes == state_dict_shapes(model.config.to_dict())


@pytest.mark.parametrize("fmt", ["timesformer", "huggingface"])
@pytest.mark.parametrize("kind", KINDS)
def test_model_round_trip(tmp_path, kind, fmt):
    model = randomised(attention_type=kind, id2label=LABELS, drop_path_rate=0.0)
    model.save_pretrained(tmp_path / "m", fmt=fmt)
    again = TimeSformer.from_pretrained(tmp_path / "m")
    assert again.config == model.config and not again.training
    assert_same(again.state_dict(), model.state_dict())
    video = torch.randn(1, 3, 3, 32, 32)
    assert torch.equal(again(video), model(video))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_transformers_computes_what_we_compute(tmp_path, kind):
    """The names are right only if the numbers are: a swapped pair of norms survives any round trip."""
    model = randomised(attention_type=kind).double()
    model.save_pretrained(tmp_path / "m", fmt="huggingface")
    theirs = transformers.TimesformerForVideoClassification.from_pretrained(tmp_path / "m", dtype=torch.float64).eval()
    video = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(theirs(video.transpose(1, 2)).logits, model(video), rtol=0, atol=1e-10)


def test_from_pretrained_with_other_sizes(tmp_path):
    model = randomised()
    save_checkpoint(model, tmp_path / "a.pyth")
    other = TimeSformer.from_pretrained(
        tmp_path / "a.pyth", num_heads=4, num_classes=7, num_frames=6, img_size=(48, 16), pos_resize="bilinear"
    )
    assert other.config.num_classes == 7 and other.config.num_frames == 6 and other.config.img_size == (48, 16)
    expected = resize_pos_embed(model.pos_embed.detach(), (4, 4), (6, 2), "bilinear")
    assert torch.equal(other.pos_embed.detach(), expected)
    assert other(torch.randn(1, 3, 6, 48, 16)).shape == (1, 7)


@pytest.mark.parametrize("files", ["vit.pth", "vit.safetensors"])
def test_from_pretrained_inflates_an_image_model(tmp_path, files):
    image = randomised(attention_type="space_only")
    save_checkpoint(image, tmp_path / "own.safetensors", "vit")
    state = read_checkpoint(tmp_path / "own.safetensors").state_dict
    if files.endswith("pth"):
        torch.save(state, tmp_path / files)
    else:
        safetensors_torch.save_file(state, tmp_path / files)
    video = TimeSformer.from_pretrained(
        tmp_path / files, num_heads=4, num_frames=3, attention_type="divided_space_time"
    )
    clip = torch.randn(1, 3, 1, 32, 32).expand(-1, -1, 3, -1, -1).contiguous()
    torch.testing.assert_close(video(clip), image(clip), rtol=1e-4, atol=1e-4)


def test_from_pretrained_lists_what_is_wrong(tmp_path):
    model = randomised()
    save_checkpoint(model, tmp_path / "a.safetensors")
    state = safetensors_torch.load_file(tmp_path / "a.safetensors")
    del state["blocks.0.temporal_fc.weight"], state["cls_token"]
    state["junk"] = torch.zeros(1)
    torch.save({"model_state": state}, tmp_path / "b.pyth")
    with pytest.raises(CheckpointError, match="junk"):
        TimeSformer.from_pretrained(tmp_path / "b.pyth")
    del state["junk"]
    torch.save({"model_state": state}, tmp_path / "b.pyth")
    with pytest.raises(CheckpointError, match=r"missing \(2\): cls_token, blocks\.0\.temporal_fc\.weight"):
        TimeSformer.from_pretrained(tmp_path / "b.pyth")
    assert json.loads(json.dumps(model.config.to_dict()))["img_size"] == 32
