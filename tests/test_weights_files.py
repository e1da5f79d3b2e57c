# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: every file kind, wrapping and folder, and what is wrong with a file that cannot be read."""

import json
import logging
import pickle
import sys

import pytest
import torch
from checkpoints import KINDS, assert_same, foreign_state, tiny_config, tiny_state

from timesformer.weights import CheckpointError, from_native, read_checkpoint

safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

# What a bare file tells: everything but rates, labels and the epsilon.
TOLD = ("img_size", "patch_size", "in_chans", "num_classes", "attention_type", "embed_dim", "depth", "num_heads")
TOLD += ("mlp_ratio", "qkv_bias")


def hf_config(**changes):
    options = {"image_size": 32, "patch_size": 8, "num_frames": 3, "hidden_size": 48, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "intermediate_size": 111, "num_labels": 5, "layer_norm_eps": 1e-5}
    return transformers.TimesformerConfig(**options | changes)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


# ---- single files


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model.", "model.module."])
@pytest.mark.parametrize("wrap", ["model_state", "state_dict", "model", "model_state/state_dict", ""])
@pytest.mark.parametrize("suffix", [".pyth", ".pth", ".pt", ".bin"])
def test_official_files_in_all_wrappings(tmp_path, prefix, wrap, suffix):
    config = tiny_config()
    state = tiny_state(config)
    content = from_native(state, "timesformer", prefix=prefix)
    for name in reversed(wrap.split("/") if wrap else []):
        content = {"epoch": 14, name: content, "optimizer_state": {"state": {0: torch.zeros(2)}}, "cfg": "TRAIN: x\n"}
    path = tmp_path / f"clip{suffix}"
    torch.save(content, path)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state_dict, state)
    assert checkpoint.fmt == "timesformer" and checkpoint.source == str(path)
    assert {name: checkpoint.config[name] for name in TOLD} == {name: config[name] for name in TOLD}
    assert checkpoint.config["num_frames"] == 3 and checkpoint.grid == (4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_mmaction2_files(tmp_path, kind):
    state = tiny_state(tiny_config(attention_type=kind))
    torch.save({"meta": {"epoch": 15}, "state_dict": foreign_state(state, "mmaction2")}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.fmt == "mmaction2" and checkpoint.config["attention_type"] == kind
    assert_same(checkpoint.state_dict, state)


def test_space_only_is_told_from_a_vit_by_its_wrapping(tmp_path):
    state = tiny_state(tiny_config(attention_type="space_only"))
    torch.save({"model_state": state}, tmp_path / "official.pyth")
    torch.save({"model": state}, tmp_path / "deit.pth")
    assert read_checkpoint(tmp_path / "official.pyth").config["attention_type"] == "space_only"
    image = read_checkpoint(tmp_path / "deit.pth")
    assert image.fmt == "vit" and not {"attention_type", "num_frames"} & set(image.config)
    assert_same(image.state_dict, state)
    forced = read_checkpoint(tmp_path / "deit.pth", fmt="timesformer")
    assert forced.fmt == "timesformer" and forced.config["attention_type"] == "space_only"


def test_timm_folder(tmp_path):
    state = tiny_state(tiny_config(attention_type="space_only", num_classes=1000))
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny", "num_classes": 1000}))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.fmt == "vit" and checkpoint.config["num_classes"] == 1000
    assert_same(checkpoint.state_dict, state)


def test_what_the_tensors_do_not_tell_is_none_until_given(tmp_path):
    state = tiny_state(tiny_config(embed_dim=48, img_size=(48, 16), qkv_bias=False, num_classes=0))
    torch.save(state, tmp_path / "a.pt")
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert checkpoint.config["num_heads"] is None and checkpoint.config["img_size"] is None and checkpoint.grid is None
    assert checkpoint.config["num_classes"] == 0 and checkpoint.config["qkv_bias"] is False
    told = read_checkpoint(tmp_path / "a.pt", config={"num_heads": 4, "img_size": (48, 16)})
    assert told.config["num_heads"] == 4 and told.grid == (6, 2)
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 13, 48\), expected \(1, 17, 48\)"):
        read_checkpoint(tmp_path / "a.pt", config={"img_size": 32})


# ---- Hugging Face folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("headless", [False, True], ids=["classifier", "headless"])
@pytest.mark.parametrize("files", ["safetensors", "safetensors-sharded", "bin", "bin-sharded"])
def test_transformers_folders(tmp_path, kind, headless, files):
    cls = transformers.TimesformerModel if headless else transformers.TimesformerForVideoClassification
    model = cls(hf_config(attention_type=kind, id2label={i: f"class {i}" for i in range(5)}))
    model.save_pretrained(tmp_path, max_shard_size="40KB" if files.endswith("sharded") else "1GB")
    assert files.endswith("sharded") == (tmp_path / "model.safetensors.index.json").exists()
    if files.startswith("bin"):  # what older releases of transformers wrote
        for path in sorted(tmp_path.glob("*.safetensors")):
            name = path.stem.replace("model", "pytorch_model") + ".bin"
            torch.save(safetensors_torch.load_file(path), tmp_path / name)
            path.unlink()
        index = tmp_path / "model.safetensors.index.json"
        if index.exists():
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.fmt == "huggingface"
    assert_same(from_native(checkpoint.state_dict, "huggingface"), model.state_dict())
    config = checkpoint.config
    assert config["img_size"] == 32 and config["patch_size"] == 8 and config["num_frames"] == 3
    assert config["embed_dim"] == 48 and config["depth"] == 2 and config["num_heads"] == 4 and config["in_chans"] == 3
    assert int(48 * config["mlp_ratio"]) == 111 and config["attention_type"] == kind and config["qkv_bias"] is True
    assert config["layer_norm_eps"] == 1e-5 and config["num_classes"] == (0 if headless else 5)
    assert config["id2label"] == (None if headless else {i: f"class {i}" for i in range(5)})


@pytest.mark.parametrize("labels", [2, 5])
def test_transformers_filler_labels_are_no_labels(tmp_path, labels):
    model = transformers.TimesformerForVideoClassification(hf_config(num_labels=labels, qkv_bias=False))
    model.save_pretrained(tmp_path)
    config = read_checkpoint(tmp_path).config
    assert config["num_classes"] == labels and config["id2label"] is None and config["qkv_bias"] is False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_frames": 4}, r"time_embed is \(1, 3, 48\), expected \(1, 4, 48\)"),
        ({"num_hidden_layers": 3}, r"missing .*blocks\.2\.mlp\.fc2\.bias"),
        ({"num_hidden_layers": 10**9}, r"depth: got 1000000000 blocks for \d+ tensors"),
        ({"model_type": "videomae"}, "model_type 'videomae', expected 'timesformer'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu', expected 'gelu'"),
        ({"attention_type": "sideways"}, "attention_type 'sideways', expected one of"),
        ({"image_size": "large"}, "malformed configuration"),
        ({"id2label": {"a": "b"}}, "id2label must map class numbers to names"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_contradicts_the_tensors(tmp_path, change, words):
    transformers.TimesformerForVideoClassification(hf_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_shards_must_match_their_index(tmp_path):
    transformers.TimesformerForVideoClassification(hf_config()).save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = list(index["weight_map"])[:2]
    moved = {key: shard for key, shard in index["weight_map"].items() if key != first} | {"ghost": "../secret.bin"}
    path.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"not in its folder: \.\./secret\.bin"):
        read_checkpoint(tmp_path)
    moved["ghost"] = index["weight_map"][second]
    path.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=rf"(?s)ghost is not in .*{first} in .* is not in the index|{first} in"):
        read_checkpoint(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        read_checkpoint(tmp_path)


# ---- incomplete, damaged and hostile files


def test_missing_unexpected_and_misshapen_tensors_of_a_bare_file(tmp_path):
    state = tiny_state(tiny_config())
    for name in ("cls_token", "blocks.1.attn.proj.bias"):
        del state[name]
    torch.save({"model_state": state}, tmp_path / "a.pyth")
    with pytest.raises(CheckpointError, match=r"missing \(2\): cls_token, blocks\.1\.attn\.proj\.bias"):
        read_checkpoint(tmp_path / "a.pyth")
    state = tiny_state(tiny_config()) | {"norm.bias": torch.zeros(3), "blocks.0.norm2.weight": torch.zeros(64, 1)}
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"wrong shape \(2\): .*norm2.weight is \(64, 1\).*norm.bias is \(3,\)"):
        read_checkpoint(tmp_path / "b.pt")
    torch.save(tiny_state(tiny_config()) | {"pos_embed": torch.zeros(17, 64)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"pos_embed is \(17, 64\), expected 3 dimensions"):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("suffix", [".pyth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 7, 0.1, 0.5, 0.9, -1])
def test_truncated_files(tmp_path, suffix, keep):
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        safetensors_torch.save_file(tiny_state(tiny_config()), path)
    else:
        torch.save({"model_state": tiny_state(tiny_config())}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(
        CheckpointError, match="the file is empty" if keep == 0 else "damaged, truncated or not a"
    ) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".pyth", ".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello, this is a text\n" * 9, "damaged, truncated or not a"),
        (bytes(range(256)), "damaged, truncated or not a"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    ],
    ids=["text", "bytes", "git-lfs"],
)
def test_files_that_are_something_else(tmp_path, suffix, content, words):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(path)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "bare-pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, how):
    path, marker = tmp_path / "evil.pyth", tmp_path / "executed"
    content = {"model_state": {"cls_token": Payload(marker)}}
    if how == "bare-pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match="refused, it holds more than tensors.*open") as error:
        read_checkpoint(path)
    assert not marker.exists()
    assert "weights_only" not in str(error.value)  # torch's own advice to switch the guard off


@pytest.mark.parametrize("content", [[1, 2], 7, torch.zeros(2), {"model_state": {"a": 1}}, {}], ids=repr)
def test_torch_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="expected"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_wrapper_that_contains_itself(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="got more than 8 wrappers"):
        read_checkpoint(tmp_path / "a.pt")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder '.*nothing.pyth'"):
        read_checkpoint(tmp_path / "nothing.pyth")
    with pytest.raises(FileNotFoundError, match="no file or folder 'weights/clip.bin'"):
        read_checkpoint("weights/clip.bin")
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected one of model\.safetensors, .* found readme\.txt"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"suffix '\.txt', expected one of \.pyth"):
        read_checkpoint(tmp_path / "readme.txt")
    with pytest.raises(TypeError, match="src: expected a path or a hub id, got int"):
        read_checkpoint(3)
    with pytest.raises(ValueError, match="fmt: got 'onnx'"):
        read_checkpoint(tmp_path, fmt="onnx")


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "timesformer", "image_size": []}'])
def test_damaged_config(tmp_path, text):
    transformers.TimesformerForVideoClassification(hf_config()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not valid JSON|expected a JSON object|malformed configuration"):
        read_checkpoint(tmp_path)


# ---- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository; -> (its folder, the calls made). Only what the patterns ask for is 'downloaded'."""
    from fnmatch import fnmatch

    import huggingface_hub

    remote, local, calls = tmp_path / "remote", tmp_path / "local", []
    remote.mkdir()
    local.mkdir()

    def snapshot_download(repo, *, revision, local_files_only, allow_patterns):
        calls.append((repo, revision, local_files_only, allow_patterns))
        if repo.startswith("nobody/"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing cached")
        for path in remote.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                (local / path.name).write_bytes(path.read_bytes())
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote, calls


@pytest.mark.parametrize("files", ["both", "bin"])
def test_hub_prefers_safetensors_and_falls_back_to_bin(hub, files, caplog):
    remote, calls = hub
    model = transformers.TimesformerForVideoClassification(hf_config())
    model.save_pretrained(remote)
    torch.save(model.state_dict(), remote / "pytorch_model.bin")
    (remote / "training_args.bin").write_bytes(b"never asked for")
    if files == "bin":
        (remote / "model.safetensors").unlink()
    checkpoint = read_checkpoint("facebook/timesformer-base-finetuned-k400", local_files_only=True, revision="main")
    assert_same(from_native(checkpoint.state_dict, "huggingface"), model.state_dict())
    assert checkpoint.source == "facebook/timesformer-base-finetuned-k400" and checkpoint.license == "cc-by-nc-4.0"
    assert len(calls) == (1 if files == "both" else 2)
    assert all(call[:3] == ("facebook/timesformer-base-finetuned-k400", "main", True) for call in calls)
    fetched = {path.name for path in (remote.parent / "local").iterdir()}
    assert fetched == {"config.json", "model.safetensors" if files == "both" else "pytorch_model.bin"}
    assert caplog.text.count("CC-BY-NC 4.0") == 1


def test_the_licence_notice_is_for_released_weights_only(hub, tmp_path, caplog):
    transformers.TimesformerForVideoClassification(hf_config()).save_pretrained(hub[0])
    assert read_checkpoint("fcakyon/timesformer-large-finetuned-k400").license == "cc-by-nc-4.0"
    assert caplog.text.count("CC-BY-NC") == 1
    assert read_checkpoint("someone/my-timesformer").license is None
    torch.save({"state_dict": tiny_state(tiny_config())}, tmp_path / "mine.pth")
    assert read_checkpoint(tmp_path / "mine.pth").license is None
    assert caplog.text.count("CC-BY-NC") == 1
    torch.save({"model_state": tiny_state(tiny_config())}, tmp_path / "TimeSformer_divST_8x32_224_K400.pyth")
    assert read_checkpoint(tmp_path / "TimeSformer_divST_8x32_224_K400.pyth").license == "cc-by-nc-4.0"
    assert caplog.text.count("CC-BY-NC") == 2 and all(r.levelno == logging.WARNING for r in caplog.records)


def test_hub_errors_name_the_repository(hub):
    with pytest.raises(
        CheckpointError, match="'nobody/none': neither a file or folder here .* local cache: nothing cached"
    ):
        read_checkpoint("nobody/none", local_files_only=True)


def test_a_repository_that_is_not_cached_is_not_looked_for_online():
    with pytest.raises(CheckpointError, match="'nobody-at-all/none': neither a file .* local cache"):
        read_checkpoint("nobody-at-all/none", local_files_only=True)


@pytest.mark.parametrize(("package", "src"), [("huggingface_hub", "a/b"), ("safetensors", "a.safetensors")])
def test_optional_packages_are_asked_for(monkeypatch, tmp_path, package, src):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "timesformer-kernels\[hub\]"'):
        read_checkpoint(src)
