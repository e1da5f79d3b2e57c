# SPDX-License-Identifier: Apache-2.0
"""What every registered operator here is mounted with: its namespace and tags, and when a call must be a visible op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

NAMESPACE = "timesformer_kernels"
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def needs_op(*tensors: Tensor) -> bool:
    """True when something watches or wraps the call, so that it must be a visible operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, FLOP counter, selective checkpoint, tracing
        or any(type(x) is not Tensor and type(x) is not Parameter for x in tensors)  # DTensor and other subclasses
        or tensors[0].device.type not in ("cpu", "cuda")
    )
