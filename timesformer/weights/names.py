# SPDX-License-Identifier: Apache-2.0
"""Names of one TimeSformer parameter in every known checkpoint format, both ways, whole name against whole name.

Native names are the original project's without its ``model.`` prefix. Nothing is transposed or permuted anywhere, so
a conversion there and back returns the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

FORMATS = ("timesformer", "huggingface", "mmaction2", "vit")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, the original project


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, understood, or matched to a model."""


# A row that ends in "." or "_" stands for its weight and its bias.
_TOP = (  # native, Hugging Face, mmaction2
    ("cls_token", "embeddings.cls_token", "cls_token"),
    ("pos_embed", "embeddings.position_embeddings", "pos_embed"),
    ("time_embed", "embeddings.time_embeddings", "time_embed"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection.", "patch_embed.projection."),
    ("norm.", "layernorm.", "norm."),
)
_BLOCK = (  # native, Hugging Face, mmaction2 divided, mmaction2 joint and space-only
    ("temporal_norm1.", "temporal_layernorm.", "attentions.0.norm.", None),
    ("temporal_attn.qkv.", "temporal_attention.attention.qkv.", "attentions.0.attn.in_proj_", None),
    ("temporal_attn.proj.", "temporal_attention.output.dense.", "attentions.0.attn.out_proj.", None),
    ("temporal_fc.", "temporal_dense.", "attentions.0.temporal_fc.", None),
    ("norm1.", "layernorm_before.", "attentions.1.norm.", "norms.0."),
    ("attn.qkv.", "attention.attention.qkv.", "attentions.1.attn.in_proj_", "attentions.0.attn.in_proj_"),
    ("attn.proj.", "attention.output.dense.", "attentions.1.attn.out_proj.", "attentions.0.attn.out_proj."),
    ("norm2.", "layernorm_after.", "ffns.0.norm.", "norms.1."),
    ("mlp.fc1.", "intermediate.dense.", "ffns.0.layers.0.0.", "ffns.0.layers.0.0."),
    ("mlp.fc2.", "output.dense.", "ffns.0.layers.1.", "ffns.0.layers.1."),
)
_NATIVE_LAYERS = "blocks."


@dataclass(frozen=True)
class _Naming:
    """Native name -> foreign name: whole names outside the blocks, names inside a block, and the block's prefix."""

    top: dict[str, str]
    block: dict[str, str]
    layers: str


def _expand(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {
        native + end: foreign + end
        for native, foreign in rows
        for end in (("weight", "bias") if native.endswith(".") else ("",))
    }


def _naming(fmt: str, *, divided: bool = True, bare: bool = False) -> _Naming:
    """bare: the backbone alone, without the name of the attribute that holds it in the full model."""
    if fmt == "huggingface":
        body = "" if bare else "timesformer."
        top = [(native, body + hf) for native, hf, _ in _TOP]
        top += [] if bare else [("head.", "classifier.")]
        return _Naming(_expand(top), _expand((n, hf) for n, hf, _, _ in _BLOCK), f"{body}encoder.layer.")
    if fmt == "mmaction2":
        body = "" if bare else "backbone."
        top = [(native, body + mm) for native, _, mm in _TOP]
        top += [] if bare else [("head.", "cls_head.fc_cls.")]
        block = ((row[0], row[2 if divided else 3]) for row in _BLOCK)
        return _Naming(
            _expand(top), _expand((n, mm) for n, mm in block if mm is not None), f"{body}transformer_layers.layers."
        )
    space_time = fmt == "timesformer"
    top = [(native, native) for native, _, _ in _TOP if space_time or native != "time_embed"]
    block = [(native, native) for native, *_ in _BLOCK if space_time or not native.startswith("temporal_")]
    return _Naming(_expand([*top, ("head.", "head.")]), _expand(block), _NATIVE_LAYERS)


def _rename(
    state_dict: Mapping[str, Tensor], top: dict[str, str], block: dict[str, str], layers: tuple[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """-> (renamed state dict, keys that have no name on the other side)."""
    inside = re.compile(re.escape(layers[0]) + r"(0|[1-9][0-9]*)\.(.+)")
    renamed, unknown = {}, []
    for key, value in state_dict.items():
        match = inside.fullmatch(key)
        if key in top:
            renamed[top[key]] = value
        elif match and match[2] in block:
            renamed[f"{layers[1]}{match[1]}.{block[match[2]]}"] = value
        else:
            unknown.append(key)
    return renamed, unknown


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take off ``module.``, ``_orig_mod.`` and ``model.`` in any order and number, each only if every key carries it.

    -> (state dict, the prefixes taken off, outermost first).
    """
    stripped, taken = dict(state_dict), []
    while stripped:
        prefix = next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in stripped)), None)
        if prefix is None:
            break
        taken.append(prefix)
        stripped = {key[len(prefix) :]: value for key, value in stripped.items()}
    return stripped, tuple(taken)


def _check_state_dict(state_dict: Mapping[str, Tensor]) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}")
    wrong = [f"{key!r} ({type(value).__name__})" for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(f"state_dict: expected only tensors, got {', '.join(wrong)}")
    names = [repr(key) for key in state_dict if not isinstance(key, str)]
    if names:
        raise CheckpointError(f"state_dict: expected names that are strings, got {', '.join(names)}")


def check_format(fmt: str) -> None:
    """Raise ValueError for a format that does not exist."""
    if fmt not in FORMATS:
        raise ValueError(f"fmt: got {fmt!r}, expected one of {', '.join(map(repr, FORMATS))}")


def detect_format(state_dict: Mapping[str, Tensor]) -> str:
    """Tell the origin of a state dict by its names: "timesformer", "huggingface", "mmaction2" or "vit".

    A space-only TimeSformer and an image ViT have the same parameters under the same names. Such a state dict counts
    as "timesformer" if its keys carry the original's ``model.`` prefix, else as "vit".

    Raises CheckpointError, listing the keys seen, for anything else.
    """
    _check_state_dict(state_dict)
    stripped, prefixes = strip_prefixes(state_dict)
    if any(re.match(r"(timesformer\.)?(embeddings\.|encoder\.layer\.)", key) for key in stripped):
        return "huggingface"
    if any(re.match(r"(backbone\.)?transformer_layers\.layers\.", key) for key in stripped):
        return "mmaction2"
    if any(re.match(r"time_embed$|blocks\.[0-9]+\.temporal_", key) for key in stripped):
        return "timesformer"
    if any(key.startswith("blocks.") for key in stripped):
        return "timesformer" if "model." in prefixes else "vit"
    seen = ", ".join(state_dict) if state_dict else "no keys at all"
    raise CheckpointError(
        f"state_dict: not a checkpoint of a known format ({', '.join(FORMATS)}); expected keys such as 'pos_embed' "
        f"and 'blocks.0.attn.qkv.weight'; got {seen}"
    )


def to_native(state_dict: Mapping[str, Tensor], fmt: str | None = None) -> dict[str, Tensor]:
    """Rename a checkpoint of any known format to native names; the tensors are passed on, not copied.

    ``module.``, ``_orig_mod.`` and ``model.`` prefixes are taken off first. fmt None detects the format. A "vit" keeps
    its names: it is the input of `inflate_vit`.

    Raises CheckpointError that lists every key without a native name.
    """
    _check_state_dict(state_dict)
    fmt = detect_format(state_dict) if fmt is None else fmt
    check_format(fmt)
    stripped, _ = strip_prefixes(state_dict)
    body = {"huggingface": "timesformer.", "mmaction2": "backbone."}.get(fmt, "")
    naming = _naming(
        fmt,
        divided=not any(re.search(r"(^|\.)layers\.[0-9]+\.norms\.", key) for key in stripped),
        bare=not any(key.startswith(body) for key in stripped),
    )
    top = {foreign: native for native, foreign in naming.top.items()}
    block = {foreign: native for native, foreign in naming.block.items()}
    renamed, unknown = _rename(stripped, top, block, (naming.layers, _NATIVE_LAYERS))
    if unknown:
        raise CheckpointError(f"state_dict: {len(unknown)} unknown key(s) for format {fmt!r}: {', '.join(unknown)}")
    return renamed


def from_native(state_dict: Mapping[str, Tensor], fmt: str, *, prefix: str = "") -> dict[str, Tensor]:
    """Rename native names to those of `fmt`, each behind `prefix` (the original's files use ``model.``).

    Without a head, "huggingface" gives the names of TimesformerModel, with one those of
    TimesformerForVideoClassification. "vit" takes a space-only model.

    Raises CheckpointError that lists every key `fmt` has no name for.
    """
    _check_state_dict(state_dict)
    check_format(fmt)
    naming = _naming(
        fmt,
        divided=any(".temporal_" in key for key in state_dict),
        bare=fmt == "huggingface" and "head.weight" not in state_dict,
    )
    renamed, unknown = _rename(state_dict, naming.top, naming.block, (_NATIVE_LAYERS, naming.layers))
    if unknown:
        raise CheckpointError(f"state_dict: {len(unknown)} key(s) have no name in format {fmt!r}: {', '.join(unknown)}")
    if fmt == "mmaction2":
        # One flag of nn.MultiheadAttention gives or withholds the bias of qkv and projection together.
        weights = [key for key in state_dict if key.endswith("attn.qkv.weight")]
        missing = [key for key in (w[: -len("weight")] + "bias" for w in weights) if key not in state_dict]
        if missing:
            raise CheckpointError(f"state_dict: mmaction2 cannot do without qkv bias; missing {', '.join(missing)}")
    return {prefix + key: value for key, value in renamed.items()}
