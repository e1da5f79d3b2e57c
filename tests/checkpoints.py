# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made by hand for the tests: name tables written out a second time, and a model that is only its names."""

from types import SimpleNamespace

import torch
from torch import nn

# native, Hugging Face, mmaction2 divided, mmaction2 joint and space-only; weight and bias of each
TOP = [
    ("patch_embed.proj", "timesformer.embeddings.patch_embeddings.projection", "backbone.patch_embed.projection"),
    ("norm", "timesformer.layernorm", "backbone.norm"),
    ("head", "classifier", "cls_head.fc_cls"),
]
TABLES = [
    ("cls_token", "timesformer.embeddings.cls_token", "backbone.cls_token"),
    ("pos_embed", "timesformer.embeddings.position_embeddings", "backbone.pos_embed"),
    ("time_embed", "timesformer.embeddings.time_embeddings", "backbone.time_embed"),
]
LAYER = [
    ("temporal_norm1", "temporal_layernorm", "attentions.0.norm", None),
    ("temporal_attn.qkv", "temporal_attention.attention.qkv", "attentions.0.attn.in_proj", None),
    ("temporal_attn.proj", "temporal_attention.output.dense", "attentions.0.attn.out_proj", None),
    ("temporal_fc", "temporal_dense", "attentions.0.temporal_fc", None),
    ("norm1", "layernorm_before", "attentions.1.norm", "norms.0"),
    ("attn.qkv", "attention.attention.qkv", "attentions.1.attn.in_proj", "attentions.0.attn.in_proj"),
    ("attn.proj", "attention.output.dense", "attentions.1.attn.out_proj", "attentions.0.attn.out_proj"),
    ("norm2", "layernorm_after", "ffns.0.norm", "norms.1"),
    ("mlp.fc1", "intermediate.dense", "ffns.0.layers.0.0", "ffns.0.layers.0.0"),
    ("mlp.fc2", "output.dense", "ffns.0.layers.1", "ffns.0.layers.1"),
]
KINDS = ("divided_space_time", "joint_space_time", "space_only")


def tiny_config(**changes):
    config = {
        "img_size": 32,
        "patch_size": 8,
        "in_chans": 3,
        "num_classes": 5,
        "num_frames": 3,
        "attention_type": "divided_space_time",
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 1,
        "mlp_ratio": 2.0,
        "qkv_bias": True,
        "qk_scale": None,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "layer_norm_eps": 1e-6,
        "id2label": None,
        "preset": None,
    }
    assert set(changes) <= set(config)
    return config | changes


def tiny_state(config, seed=0, dtype=torch.float32):
    """Random tensors under the native names of `config`, shapes written out rather than computed by the package."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden, patch = config["embed_dim"], int(config["embed_dim"] * config["mlp_ratio"]), config["patch_size"]
    height, width = (config["img_size"],) * 2 if isinstance(config["img_size"], int) else config["img_size"]
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + (height // patch) * (width // patch), dim)}
    if config["attention_type"] != "space_only":
        shapes["time_embed"] = (1, config["num_frames"], dim)
    shapes |= {"patch_embed.proj.weight": (dim, config["in_chans"], patch, patch), "patch_embed.proj.bias": (dim,)}
    inner = {"qkv": (3 * dim, dim), "proj": (dim, dim), "fc": (dim, dim), "fc1": (hidden, dim), "fc2": (dim, hidden)}
    for i in range(config["depth"]):
        for name, *_ in LAYER:
            if name.startswith("temporal_") and config["attention_type"] != "divided_space_time":
                continue
            weight = inner.get(name.removeprefix("temporal_").rpartition(".")[2], (dim,))
            shapes[f"blocks.{i}.{name}.weight"] = weight
            if config["qkv_bias"] or not name.endswith("qkv"):
                shapes[f"blocks.{i}.{name}.bias"] = weight[:1]
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    if config["num_classes"]:
        shapes |= {"head.weight": (config["num_classes"], dim), "head.bias": (config["num_classes"],)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def foreign_name(name, fmt, divided=True):
    """Native name -> name in `fmt`, by the tables above."""
    column = {"huggingface": 1, "mmaction2": 2 if divided else 3}[fmt]
    for row in TABLES:
        if name == row[0]:
            return row[min(column, 2)]
    module, _, leaf = name.rpartition(".")
    if name.startswith("blocks."):
        _, index, inner = module.split(".", 2)
        foreign = next(row[column] for row in LAYER if row[0] == inner)
        layers = "timesformer.encoder.layer" if fmt == "huggingface" else "backbone.transformer_layers.layers"
        foreign = f"{layers}.{index}.{foreign}"
    else:
        foreign = next(row[min(column, 2)] for row in TOP if row[0] == module)
    return f"{foreign}_{leaf}" if foreign.endswith("in_proj") else f"{foreign}.{leaf}"


def foreign_state(state, fmt):
    divided = any(".temporal_" in name for name in state)
    return {foreign_name(name, fmt, divided): tensor for name, tensor in state.items()}


class Named(nn.Module):
    """The parameters of a TimeSformer under their names, and its configuration; no computation."""

    def __init__(self, config, seed=1):
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: dict(config))
        for name, tensor in tiny_state(config, seed).items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(tensor))


def assert_same(got, expected):
    """Same names, dtypes and bits."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
