# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: single files, folders, sharded folders and hub repositories of every known origin."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import check_config, from_huggingface, grid_of, infer_config, int_labels
from .names import CheckpointError, check_format, detect_format, to_native

logger = logging.getLogger("timesformer")

TORCH_SUFFIXES = (".pyth", ".pth", ".pt", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
OWN_FORMAT = "timesformer-kernels"  # value of "format" in what save_pretrained and save_checkpoint record
OWN_FIELDS = ("format", "names", "license")  # what that record holds beside the configuration
OWN_KEY = "timesformer_kernels"  # where single files keep that record, as JSON text
WRAPPERS = ("model_state", "state_dict", "model")
_MOST_WRAPPERS = 8  # a pickled dict may contain itself
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json")
FOLDER_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
RELEASED_LICENSE = "cc-by-nc-4.0"
_RELEASED_OWNERS = ("facebook/", "fcakyon/")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """state_dict: native names -> CPU tensors in the dtype of the file.

    config: fields of TimeSformerConfig; for fmt "vit" without attention_type and num_frames, which an image model does
    not have. num_heads or img_size is None where a file without configuration does not tell it.
    fmt: "timesformer", "huggingface", "mmaction2" or "vit". source: path or hub id. license: as known, or None.
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any]
    fmt: str
    source: str
    license: str | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the stored position table, None if unknown."""
        return None if self.config["img_size"] is None else grid_of(self.config)


@dataclass
class _Raw:
    """What a file or folder holds before names are translated."""

    state_dict: Mapping[str, Tensor]
    record: dict[str, Any] | None = None  # config.json, or what save_checkpoint recorded
    wrapper: str | None = None


def _open_failed(path: Path, kind: str, error: BaseException) -> CheckpointError:
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return CheckpointError(f"{path}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path}: a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'")
    # torch's text opens with advice to load without the guard, which must not be passed on.
    lines = [re.sub(r".*WeightsUnpickler error:", "", line).strip() for line in str(error).splitlines()]
    reasons = [line.split(". Please")[0] for line in lines if line and not re.search("weights_only|Weights only", line)]
    reason = f"{type(error).__name__}: {reasons[0]}" if reasons else type(error).__name__
    if re.search("unsupported global|unsupported class|unrecognized", reason, re.IGNORECASE):
        why = "it holds more than tensors and plain values, and loading it could run code"
        return CheckpointError(f"{path}: refused, {why}: {reason}")
    return CheckpointError(f"{path}: damaged, truncated or not a {kind} file: {reason}")


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise _open_failed(path, "torch checkpoint", error) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f'reading {path} needs safetensors: pip install "timesformer-kernels[hub]"') from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _open_failed(path, "safetensors", error) from error


def _unwrap(value: Any, path: Path) -> tuple[Mapping[str, Any], str | None]:
    """-> (the state dict inside model_state | state_dict | model, the innermost wrapper's name)."""
    wrapper = None
    for _ in range(_MOST_WRAPPERS):
        if not isinstance(value, Mapping):
            break
        inner = next((name for name in WRAPPERS if isinstance(value.get(name), Mapping)), None)
        if inner is None:
            return value, wrapper
        value, wrapper = value[inner], inner
    found = f"more than {_MOST_WRAPPERS} wrappers" if isinstance(value, Mapping) else type(value).__name__
    raise CheckpointError(f"{path}: expected a state dict or {' | '.join(WRAPPERS)}, got {found}")


def _own_record(text: Any, path: Path) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        record = json.loads(text)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its {OWN_KEY} entry is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: its {OWN_KEY} entry is a {type(record).__name__}, expected a JSON object")
    return record


def _read_file(path: Path) -> _Raw:
    if path.suffix == SAFETENSORS_SUFFIX:
        tensors, metadata = _read_safetensors(path)
        return _Raw(tensors, _own_record(metadata.get(OWN_KEY), path))
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{path}: suffix {path.suffix!r}, expected one of {', '.join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))}"
        )
    value = _read_torch(path)
    record = value.get(OWN_KEY) if isinstance(value, Mapping) else None
    tensors, wrapper = _unwrap(value, path)
    return _Raw(tensors, _own_record(record, path), wrapper)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' of tensor names to file names")
    shards = sorted(set(weight_map.values()))
    # An index is untrusted text: it may name files of its own folder only.
    bad = [name for name in shards if name != os.path.basename(name) or not (index.parent / name).is_file()]
    if bad:
        raise CheckpointError(f"{index}: names {len(bad)} shard(s) that are not in its folder: {', '.join(bad)}")
    tensors: dict[str, Tensor] = {}
    problems = []
    for shard in shards:
        found = _read_file(index.parent / shard).state_dict
        expected = {key for key, name in weight_map.items() if name == shard}
        problems += [f"{key} is not in {shard}" for key in sorted(expected - set(found))]
        problems += [f"{key} in {shard} is not in the index" for key in found if key not in expected]
        tensors.update(found)
    if problems:
        raise CheckpointError(f"{index}: the shards do not match: {', '.join(problems)}")
    return tensors


def _read_folder(folder: Path) -> _Raw:
    name = next((name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if name is None:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{folder}: expected one of {', '.join(FOLDER_FILES)}, found {held}")
    config = folder / "config.json"
    record = _read_json(config) if config.is_file() else None
    if name.endswith(".index.json"):
        return _Raw(_read_shards(folder / name), record)
    raw = _read_file(folder / name)
    return _Raw(raw.state_dict, record if record is not None else raw.record, raw.wrapper)


def _download(repo: str, local_files_only: bool, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(f'reading {repo} from the hub needs: pip install "timesformer-kernels[hub]"') from error

    def download(*patterns: str) -> Path:
        folder = snapshot_download(
            repo, revision=revision, local_files_only=local_files_only, allow_patterns=["config.json", *patterns]
        )
        return Path(folder)

    try:
        folder = download("model*.safetensors", "model.safetensors.index.json")
        # Repositories often hold the same weights twice; the second copy is fetched only where there is no first.
        if not any(folder.glob("model*.safetensors")):
            folder = download("pytorch_model*.bin", "pytorch_model.bin.index.json")
        return folder
    except (OSError, ValueError) as error:
        where = "the local cache" if local_files_only else "the hub"
        raise CheckpointError(
            f"{repo!r}: neither a file or folder here nor a repository that can be read from {where}: {error}"
        ) from error


def _locate(src: str | os.PathLike, local_files_only: bool, revision: str | None) -> tuple[Path, str | None]:
    """-> (existing path, hub id or None)."""
    if not isinstance(src, (str, os.PathLike)):
        raise TypeError(f"src: expected a path or a hub id, got {type(src).__name__}")
    path = Path(src).expanduser()
    if path.exists():
        return path, None
    name = os.fspath(src)
    if not _HUB_ID.fullmatch(name) or path.suffix in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        raise FileNotFoundError(f"src: no file or folder {name!r}, nor is that a hub id of the form owner/name")
    return _download(name, local_files_only, revision), name


def _understand(raw: _Raw, fmt: str | None, known: dict[str, Any], source: str) -> tuple[dict, dict, str]:
    """-> (native state dict, configuration, format)."""
    record = raw.record or {}
    own = record.get("format") == OWN_FORMAT
    if fmt is None and own:
        fmt = record.get("names")
    if fmt is None:
        fmt = detect_format(raw.state_dict)
        if fmt == "vit" and raw.wrapper == "model_state":
            fmt = "timesformer"  # the original project's own wrapper around a space-only model
    native = to_native(raw.state_dict, fmt)
    if own:
        config = {key: value for key, value in record.items() if key not in OWN_FIELDS} | known
        config["id2label"] = int_labels(config.get("id2label"))
        for size in ("img_size", "patch_size"):
            config[size] = tuple(config[size]) if isinstance(config[size], list) else config[size]
    elif raw.record is not None and fmt == "huggingface":
        config = from_huggingface(record, native) | known
    elif raw.record is not None and fmt != "vit":
        raise CheckpointError(
            f"{source}: the tensors have the names of {fmt!r}, but its config.json is another format's"
        )
    else:
        config = infer_config(native, known)
    check_config(native, config, source)
    if fmt == "vit":
        config.pop("attention_type")
        config.pop("num_frames", None)
    return native, config, fmt


def read_checkpoint(
    src: str | os.PathLike,
    *,
    fmt: str | None = None,
    config: Mapping[str, Any] | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known origin and check every tensor against its configuration.

    src: a .pyth, .pth, .pt, .bin or .safetensors file; a folder with model.safetensors or pytorch_model.bin, whole or
    sharded, and config.json; or a hub id "owner/name" (local_files_only: from the local cache, revision: a branch, tag
    or commit). Wrappers model_state | state_dict | model and prefixes module. | model. come off in any combination.
    Torch files are opened with weights_only=True: a file that would run code is refused.

    fmt: names the format where detection would guess wrong (a space-only state dict without a wrapper looks like an
    image ViT). config: fields that complete or overrule what the file tells, such as num_heads for a bare file whose
    embed_dim 64 does not divide.

    Logs the licence of the released weights when they are read. Raises CheckpointError (a ValueError) for files that
    are damaged, refused, or whose tensors are missing, unexpected or wrongly shaped, all listed; FileNotFoundError;
    ImportError where an optional package is needed.
    """
    if fmt is not None:
        check_format(fmt)
    path, repo = _locate(src, local_files_only, revision)
    source = repo or os.fspath(src)
    raw = _read_folder(path) if path.is_dir() else _read_file(path)
    try:
        native, values, found = _understand(raw, fmt, dict(config or {}), source)
    except CheckpointError as error:
        if str(error).startswith(source):
            raise
        raise CheckpointError(f"{source}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if raw.record is None:
            raise
        raise CheckpointError(f"{source}: malformed configuration: {type(error).__name__}: {error}") from error
    license = _license(raw, repo, path, found)
    if license == RELEASED_LICENSE:
        logger.warning("%s: the released TimeSformer weights are licensed CC-BY-NC 4.0, non-commercial only", source)
    return Checkpoint(native, values, found, source, license)


def _license(raw: _Raw, repo: str | None, path: Path, fmt: str) -> str | None:
    recorded = (raw.record or {}).get("license")
    if recorded:
        return str(recorded)
    released = repo is not None and repo.startswith(_RELEASED_OWNERS) and fmt != "vit"
    official = raw.wrapper == "model_state" and path.suffix == ".pyth" and raw.record is None and fmt == "timesformer"
    return RELEASED_LICENSE if released or official else None
