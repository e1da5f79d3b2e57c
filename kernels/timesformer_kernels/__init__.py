# SPDX-License-Identifier: Apache-2.0
"""Fused attention over views of the video token grid: time, space, joint, axial, local and global, without copies."""

from .ops import grid_attention, grid_attention_qkvpacked, space_attention, time_attention
from .registry import available_backends, explain
from .warmup import warmup

__version__ = "0.1.0"
__all__ = [
    "available_backends",
    "explain",
    "grid_attention",
    "grid_attention_qkvpacked",
    "space_attention",
    "time_attention",
    "warmup",
]
