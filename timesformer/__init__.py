# SPDX-License-Identifier: Apache-2.0
"""TimeSformer on fused divided space-time attention."""

from .attention import DividedSTAttention, JointSTAttention
from .config import TimeSformerConfig
from .model import TimeSformer

__all__ = ["DividedSTAttention", "JointSTAttention", "TimeSformer", "TimeSformerConfig"]
