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
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True  # fake tensors, FLOP counter, selective checkpoint, tracing
    for x in tensors:  # not any(), which takes as long as all the rest
        kind = type(x)
        if kind is not Tensor and kind is not Parameter:  # DTensor and other subclasses
            return True
    return tensors[0].device.type not in ("cpu", "cuda")


def fresh(like: Tensor) -> Tensor:
    """Memory of the shape, dtype and device of `like`, contiguous: new_empty takes three times as long to say so."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
