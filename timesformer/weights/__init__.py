# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every known origin, in and out: original .pyth, Hugging Face, mmaction2, timm ViT, and our own."""

from .config import infer_config, state_dict_shapes
from .load import inflate_vit, load_into, resize_pos_embed, resize_time_embed
from .names import FORMATS, CheckpointError, detect_format, from_native, to_native
from .read import Checkpoint, read_checkpoint
from .write import convert, save_checkpoint, save_pretrained

__all__ = [
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "convert",
    "detect_format",
    "from_native",
    "infer_config",
    "inflate_vit",
    "load_into",
    "read_checkpoint",
    "resize_pos_embed",
    "resize_time_embed",
    "save_checkpoint",
    "save_pretrained",
    "state_dict_shapes",
    "to_native",
]
