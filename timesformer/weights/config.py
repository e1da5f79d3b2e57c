# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's configuration: from its tensors, from a Hugging Face config.json, and to one.

Configurations are plain dicts with the field names of TimeSformerConfig. A value of None for num_heads or img_size
means that the file does not tell it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import ATTENTION_TYPES
from ..layers import pair
from .names import CheckpointError

logger = logging.getLogger("timesformer")

_REQUIRED = ("attention_type", "depth", "qkv_bias", "img_size", "patch_size", "in_chans", "num_classes", "embed_dim")
_REQUIRED += ("num_heads", "mlp_ratio")
_STANDARD_HEAD_DIM = 64  # every published ViT-S, -B and -L, and every published TimeSformer
_HF_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "num_frames": 8,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "attention_type": "divided_space_time",
    "drop_path_rate": 0,
}


def _unpair(height: int, width: int) -> int | tuple[int, int]:
    return height if height == width else (height, width)


def grid_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """-> (height, width) of the patch grid that the position table of `config` covers."""
    (height, width), (patch_height, patch_width) = pair(config["img_size"]), pair(config["patch_size"])
    return height // patch_height, width // patch_width


def _blocks_hidden(config: Mapping[str, Any]) -> int:
    return int(config["embed_dim"] * config["mlp_ratio"])


def state_dict_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model that `config` describes: native name -> shape."""
    dim, hidden, kind = config["embed_dim"], _blocks_hidden(config), config["attention_type"]
    if kind not in ATTENTION_TYPES:
        raise CheckpointError(f"config: attention_type {kind!r}, expected one of {', '.join(ATTENTION_TYPES)}")

    def affine(name: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})

    height, width = grid_of(config)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + height * width, dim)}
    if kind != "space_only":
        shapes["time_embed"] = (1, config["num_frames"], dim)
    shapes |= affine("patch_embed.proj", dim, config["in_chans"], *pair(config["patch_size"]))
    for i in range(config["depth"]):
        block = f"blocks.{i}."
        if kind == "divided_space_time":
            shapes |= affine(block + "temporal_norm1", dim)
            shapes |= affine(block + "temporal_attn.qkv", 3 * dim, dim, bias=config["qkv_bias"])
            shapes |= affine(block + "temporal_attn.proj", dim, dim)
            shapes |= affine(block + "temporal_fc", dim, dim)
        shapes |= affine(block + "norm1", dim)
        shapes |= affine(block + "attn.qkv", 3 * dim, dim, bias=config["qkv_bias"])
        shapes |= affine(block + "attn.proj", dim, dim)
        shapes |= affine(block + "norm2", dim)
        shapes |= affine(block + "mlp.fc1", hidden, dim)
        shapes |= affine(block + "mlp.fc2", dim, hidden)
    shapes |= affine("norm", dim)
    return shapes | (affine("head", config["num_classes"], dim) if config["num_classes"] else {})


def differences(state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every missing, unexpected, wrongly shaped or non-floating tensor of a native state dict, as lines of text."""
    missing = [key for key in shapes if key not in state_dict]
    unexpected = [key for key in state_dict if key not in shapes]
    wrong = [
        f"{key} is {tuple(value.shape)}, expected {tuple(shapes[key])}"
        for key, value in state_dict.items()
        if key in shapes and tuple(value.shape) != tuple(shapes[key])
    ]
    kinds = [f"{key} is {value.dtype}" for key, value in state_dict.items() if not value.is_floating_point()]
    lists = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong, "not floating point": kinds}
    return [f"{name} ({len(entries)}): {', '.join(entries)}" for name, entries in lists.items() if entries]


def raise_differences(what: str, lines: list[str], *hints: str) -> None:
    """One CheckpointError with all `lines`, if there are any."""
    if lines:
        raise CheckpointError("\n  ".join([what, *lines, *hints]))


def mlp_ratio_of(hidden: int, dim: int) -> float:
    """-> the ratio r with int(dim * r) == hidden, whichever way hidden / dim was rounded."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _check_depth(depth: int, state_dict: Mapping[str, Tensor]) -> None:
    # A damaged number must not start a loop over billions of blocks; every block has far more than one tensor.
    if not isinstance(depth, int) or not 0 < depth <= max(1, len(state_dict)):
        raise CheckpointError(f"depth: got {depth!r} blocks for {len(state_dict)} tensors")


def infer_config(state_dict: Mapping[str, Tensor], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read every size from the tensors of a native state dict. `known` completes or overrules what was read.

    num_heads is embed_dim // 64, or None where 64 does not divide; img_size is None where the position table is not
    a square grid; num_frames is left out for space-only models, which have no time table.

    Raises CheckpointError listing the missing and unexpected names, or the tensors no size can be read from.
    """
    blocks = [int(match[1]) for key in state_dict if (match := re.match(r"blocks\.([0-9]+)\.", key))]
    divided = any(".temporal_" in key for key in state_dict)
    _check_depth(max(blocks, default=0) + 1, state_dict)
    kind = ATTENTION_TYPES[0] if divided else ATTENTION_TYPES[1] if "time_embed" in state_dict else ATTENTION_TYPES[2]
    config: dict[str, Any] = {
        "attention_type": kind,
        "depth": max(blocks, default=0) + 1,
        "qkv_bias": any(key.endswith("attn.qkv.bias") for key in state_dict),
    }
    one = {"img_size": 1, "patch_size": 1, "in_chans": 1, "embed_dim": 1, "mlp_ratio": 1, "num_frames": 1}
    names = state_dict_shapes(config | one | {"num_classes": int(any(key.startswith("head.") for key in state_dict))})
    raise_differences(
        f"state_dict: not a complete {kind} checkpoint of depth {config['depth']}",
        [line for line in differences(state_dict, names) if not line.startswith("wrong shape")],
    )
    ranks = {"patch_embed.proj.weight": 4, "pos_embed": 3, "time_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    ranks["head.weight"] = 2
    raise_differences(
        "state_dict: sizes cannot be read",
        [
            f"{key} is {tuple(state_dict[key].shape)}, expected {rank} dimensions and no empty one"
            for key, rank in ranks.items()
            if key in state_dict and (state_dict[key].ndim != rank or state_dict[key].numel() == 0)
        ],
    )
    dim, in_chans, patch_height, patch_width = state_dict["patch_embed.proj.weight"].shape
    tokens = state_dict["pos_embed"].shape[1] - 1
    side = math.isqrt(tokens)
    config |= {
        "img_size": _unpair(side * patch_height, side * patch_width) if tokens and side * side == tokens else None,
        "patch_size": _unpair(patch_height, patch_width),
        "in_chans": in_chans,
        "num_classes": state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        "embed_dim": dim,
        "num_heads": None if dim % _STANDARD_HEAD_DIM else dim // _STANDARD_HEAD_DIM,
        "mlp_ratio": mlp_ratio_of(state_dict["blocks.0.mlp.fc1.weight"].shape[0], dim),
    }
    if "time_embed" in state_dict:
        config["num_frames"] = state_dict["time_embed"].shape[1]
    return config | dict(known or {})


def check_config(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError listing everything in which the tensors differ from what `config` describes."""
    absent = [key for key in _REQUIRED if key not in config]
    if config.get("attention_type") != "space_only" and "num_frames" not in config:
        absent.append("num_frames")
    if absent:
        raise CheckpointError(f"{source}: the configuration lacks {', '.join(absent)}")
    _check_depth(config["depth"], state_dict)
    shapes = state_dict_shapes(config | {"img_size": 0} if config["img_size"] is None else config)
    if config["img_size"] is None and "pos_embed" in state_dict:
        shapes["pos_embed"] = (1, state_dict["pos_embed"].shape[-2], config["embed_dim"])
    raise_differences(f"{source}: the tensors do not match the configuration", differences(state_dict, shapes))


def int_labels(id2label: Mapping[Any, str] | None) -> dict[int, str] | None:
    """id2label with int keys (JSON has only strings); None for no labels and for transformers' LABEL_i fillers."""
    if not id2label:
        return None
    try:
        labels = {int(key): str(label) for key, label in id2label.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"config: id2label must map class numbers to names, got {id2label!r}") from error
    return None if all(label == f"LABEL_{key}" for key, label in labels.items()) else labels


def from_huggingface(hf: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """TimesformerConfig as a dict -> our configuration. The class count of a model without a head is 0."""
    if hf.get("model_type", "timesformer") != "timesformer":
        raise CheckpointError(f"config.json: model_type {hf['model_type']!r}, expected 'timesformer'")
    hf = {**_HF_DEFAULTS, **hf}
    if hf["hidden_act"] != "gelu":
        raise CheckpointError(f"config.json: hidden_act {hf['hidden_act']!r}, expected 'gelu', the model's only one")
    labels = hf.get("id2label")
    has_head = "head.weight" in state_dict
    return {
        "img_size": _unpair(*pair(hf["image_size"])),
        "patch_size": _unpair(*pair(hf["patch_size"])),
        "in_chans": hf["num_channels"],
        "num_classes": 0 if not has_head else len(labels) if labels else 2,  # transformers leaves its default, 2, out
        "num_frames": hf["num_frames"],
        "attention_type": hf["attention_type"],
        "embed_dim": hf["hidden_size"],
        "depth": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "mlp_ratio": mlp_ratio_of(hf["intermediate_size"], hf["hidden_size"]),
        "qkv_bias": hf["qkv_bias"],
        "drop_rate": hf["hidden_dropout_prob"],
        "attn_drop_rate": hf["attention_probs_dropout_prob"],
        "drop_path_rate": hf["drop_path_rate"],
        "layer_norm_eps": hf["layer_norm_eps"],
        "id2label": int_labels(labels) if has_head else None,
    }


def to_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration -> a config.json that transformers' TimeSformer loads.

    Raises ValueError for what transformers' model cannot do: rectangular images or patches, another attention scale.
    """
    image, patch = pair(config["img_size"]), pair(config["patch_size"])
    if image[0] != image[1] or patch[0] != patch[1]:
        raise ValueError(
            f"fmt='huggingface': transformers' TimeSformer takes square images and patches only, "
            f"got img_size {image} and patch_size {patch}"
        )
    scale = config.get("qk_scale")
    if scale is not None and scale != (config["embed_dim"] // config["num_heads"]) ** -0.5:
        raise ValueError(f"fmt='huggingface': transformers fixes qk_scale at head_dim ** -0.5, got {scale}")
    if config["attention_type"] == "space_only":
        logger.warning("transformers' own space_only forward does not average over frames; the file itself is complete")
    if config.get("drop_path_rate"):
        logger.warning(
            "drop_path_rate %g is written as 0: transformers accepts whole numbers only", config["drop_path_rate"]
        )
    classes = config["num_classes"]
    labels = int_labels(config.get("id2label")) or {i: f"LABEL_{i}" for i in range(classes)}
    hf = {
        "model_type": "timesformer",
        "architectures": ["TimesformerForVideoClassification" if classes else "TimesformerModel"],
        "image_size": image[0],
        "patch_size": patch[0],
        "num_channels": config["in_chans"],
        "num_frames": config.get("num_frames", _HF_DEFAULTS["num_frames"]),
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": _blocks_hidden(config),
        "hidden_act": "gelu",
        "hidden_dropout_prob": float(config.get("drop_rate", 0.0)),
        "attention_probs_dropout_prob": float(config.get("attn_drop_rate", 0.0)),
        "layer_norm_eps": config.get("layer_norm_eps", _HF_DEFAULTS["layer_norm_eps"]),
        "qkv_bias": config["qkv_bias"],
        "attention_type": config["attention_type"],
        "drop_path_rate": 0,
    }
    if classes:
        hf["id2label"] = {str(i): label for i, label in sorted(labels.items())}
        hf["label2id"] = {label: i for i, label in sorted(labels.items())}
    return hf
