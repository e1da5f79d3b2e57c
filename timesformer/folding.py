# SPDX-License-Identifier: Apache-2.0
"""Products of a block that are one product in real arithmetic.

temporal_fc(s * proj(o)) = s * (o W' + W_fc b_proj) + b_fc,  W' = W_fc W_proj         s: factors of stochastic depth
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def fold(proj: nn.Linear, fc: nn.Linear, with_bias: bool = True) -> tuple[Tensor, Tensor]:
    """(weight, bias) of fc(proj(x)), or but for fc's own bias. Autograd goes through them to all parameters:

    dW_fc = dW' W_proj^T + (sum dy) b_proj^T,  dW_proj = W_fc^T dW',  db_proj = W_fc^T sum dy,  with s * dy for dy.
    """
    return fc.weight @ proj.weight, F.linear(proj.bias, fc.weight, fc.bias if with_bias else None)
