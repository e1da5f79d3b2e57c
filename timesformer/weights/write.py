# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints. A file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import whole
from .config import check_config, to_huggingface
from .names import check_format, from_native, strip_prefixes
from .read import OWN_FORMAT, OWN_KEY, SAFETENSORS_SUFFIX, TORCH_SUFFIXES, read_checkpoint

FOLDER_FORMATS = ("timesformer", "huggingface")


def _storable(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that own exactly their storage; a view would drag its whole storage into the file."""
    stored = {}
    for key, value in state_dict.items():
        value = value.detach().cpu().contiguous()
        alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        stored[key] = value if alone else value.clone()
    return stored


def _of_model(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (native state dict, configuration)."""
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "to_dict"):
        raise TypeError(f"model: expected a TimeSformer with a config, got {type(model).__name__}")
    state_dict, _ = strip_prefixes(model.state_dict())
    meta = [key for key, value in state_dict.items() if value.is_meta]
    if meta:
        raise ValueError(f"model: {len(meta)} parameter(s) are on the meta device and have no values to save")
    return state_dict, model.config.to_dict()


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in ("num_heads", "img_size") if config[name] is None]
    if unknown:
        raise ValueError(
            f"config: {' and '.join(unknown)} cannot be told from the source's tensors; name them in config={{...}}"
        )
    return dict(config)


def _record(config: Mapping[str, Any], names: str, license: str | None) -> dict[str, Any]:
    return {"format": OWN_FORMAT, "names": names, **({"license": license} if license else {}), **config}


def save_safetensors(state_dict: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write named tensors to exactly that path, readable as the umask says."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError('writing .safetensors needs safetensors: pip install "timesformer-kernels[hub]"') from error
    path.touch()
    mode = path.stat().st_mode
    save_file(_storable(state_dict), path, metadata={"format": "pt", **metadata})
    path.chmod(mode)  # safetensors 0.8 leaves 0600, whatever the umask: colleagues could not read the file


def _save_torch(state_dict: Mapping[str, Tensor], path: Path, fmt: str, record: str) -> None:
    content = tensors = _storable(state_dict)  # transformers and timm take the bare state dict
    if fmt == "timesformer":
        content = {"model_state": {"model." + key: value for key, value in tensors.items()}, OWN_KEY: record}
    elif fmt == "mmaction2":
        content = {"state_dict": tensors, OWN_KEY: record}
    with open(path, "wb") as file:  # torch's own files do not say why they cannot be written
        torch.save(content, file)


def _write_folder(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, fmt: str, license: str | None
) -> None:
    if fmt not in FOLDER_FORMATS:
        raise ValueError(f"fmt: got {fmt!r}, expected one of {', '.join(map(repr, FOLDER_FORMATS))} for a folder")
    config = _complete(config)
    check_config(state_dict, config, "the state dict")
    if fmt == "huggingface":
        record = to_huggingface(config) | ({"license": license} if license else {})
    else:
        record = _record(config, fmt, license)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    tensors = from_native(state_dict, fmt)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder, folder=True) as temporary:
        save_safetensors(tensors, temporary / "model.safetensors", {})
        (temporary / "config.json").write_text(text, encoding="utf-8")


def _write_file(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], path: Path, fmt: str, license: str | None
) -> None:
    check_format(fmt)
    suffixes = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
    if path.suffix not in suffixes:
        raise ValueError(f"path: suffix {path.suffix!r} of {path}, expected one of {', '.join(suffixes)}")
    config = _complete(config)
    check_config(state_dict, config, "the state dict")
    record = json.dumps(_record(config, fmt, license), ensure_ascii=False)
    tensors = from_native(state_dict, fmt)
    with whole(path) as temporary:
        if path.suffix == SAFETENSORS_SUFFIX:
            save_safetensors(tensors, temporary, {OWN_KEY: record})
        else:
            _save_torch(tensors, temporary, fmt, record)


def save_pretrained(model: nn.Module, folder: str | os.PathLike, *, fmt: str = "timesformer") -> None:
    """Write config.json and model.safetensors into `folder`, which is created where it does not exist.

    fmt "timesformer": our own names and configuration; "huggingface": what transformers'
    TimesformerForVideoClassification (TimesformerModel without a head) loads.
    Needs safetensors. Raises ValueError for what `fmt` cannot express. A new folder appears at once; in an existing
    one each file is replaced whole, after all of them have been written.
    """
    state_dict, config = _of_model(model)
    _write_folder(state_dict, config, Path(folder), fmt, None)


def save_checkpoint(model: nn.Module, path: str | os.PathLike, fmt: str = "timesformer") -> None:
    """Write one file: .safetensors, or a torch file (.pyth, .pth, .pt, .bin).

    Torch files are laid out as their readers expect: "timesformer" {"model_state": {"model." + name}}, "mmaction2"
    {"state_dict"}, "huggingface" and "vit" (space-only models) the bare state dict. Our configuration travels along,
    except in bare state dicts, which have no place for it. The file is written under another name, then renamed.
    """
    state_dict, config = _of_model(model)
    _write_file(state_dict, config, Path(path), fmt, None)


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    fmt: str,
    *,
    src_fmt: str | None = None,
    config: Mapping[str, Any] | None = None,
    local_files_only: bool = False,
) -> None:
    """Convert a checkpoint of any known origin (see `read_checkpoint`) to `fmt`; no model is built.

    dst: a file with one of the suffixes of `save_checkpoint`, or else a folder as `save_pretrained` writes it.
    src_fmt, config: as fmt and config of `read_checkpoint`. A known licence is carried over.
    Raises ValueError for an image ViT: it becomes a video model by `inflate_vit` only.
    """
    check_format(fmt)
    source = read_checkpoint(src, fmt=src_fmt, config=config, local_files_only=local_files_only)
    if source.fmt == "vit":
        raise ValueError(
            f"src: {source.source} is an image ViT; build a TimeSformer from it and save that, "
            "or pass src_fmt='timesformer' if it is a space-only TimeSformer"
        )
    target = Path(dst)
    write = _write_file if target.suffix in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX) else _write_folder
    write(source.state_dict, source.config, target, fmt, source.license)
