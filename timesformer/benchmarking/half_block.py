# SPDX-License-Identifier: Apache-2.0
"""Level 2, the half-block: LayerNorm, time attention, LayerNorm, space attention, with projections and residuals."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import DividedSTAttention
from .modules import ModuleProblem, compiled_peer
from .peers import COMPILE_MODES, eager_core

CORES = {"eager": eager_core, "sdpa": F.scaled_dot_product_attention}


def _attend(part: nn.Module, x: Tensor, core) -> Tensor:
    """Ordinary multi-head attention with its projection: x [G, L, dim] -> [G, L, dim]."""
    q, k, v = part.qkv(x).unflatten(2, (3, part.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return part.proj(core(q, k, v).transpose(1, 2).flatten(2))


def stock_half_block(module: DividedSTAttention, x: Tensor, frames: int, core) -> Tensor:
    """x [B, 1 + N*T, dim] -> the same shape, with the copies that stock attention takes.

    The steps of Hugging Face's TimesformerLayer up to its MLP: each location a sequence, then each frame with a class
    row of its own, put together by concatenation.
    """
    batch, dim = len(x), x.shape[2]
    row, patches = x[:, :1], x[:, 1:]
    along_time = module.temporal_norm1(patches.reshape(-1, frames, dim))  # [B*N, T, dim]
    branch = _attend(module.temporal_attn, along_time, core).reshape(batch, -1, dim)
    patches = patches + module.temporal_fc(branch)
    rows = row.repeat(1, frames, 1).reshape(-1, 1, dim)  # [B*T, 1, dim]
    frame = patches.reshape(batch, -1, frames, dim).transpose(1, 2).reshape(batch * frames, -1, dim)
    branch = _attend(module.attn, module.norm1(torch.cat([rows, frame], 1)), core)  # [B*T, 1 + N, dim]
    mean = branch[:, 0].reshape(batch, frames, dim).mean(1, keepdim=True)
    branch = branch[:, 1:].reshape(batch, frames, -1, dim).transpose(1, 2).reshape(patches.shape)
    return torch.cat([row, patches], 1) + torch.cat([mean, branch], 1)


class HalfBlockProblem(ModuleProblem):
    level = "half-block"

    def build(self):
        return DividedSTAttention(self.shape.dim, self.shape.heads)

    def peers(self, full):
        return [*CORES, *(COMPILE_MODES if full else ())]

    def peer(self, row):
        core = CORES.get(row, eager_core)
        run = partial(stock_half_block, self.module, frames=self.shape.frames, core=core)
        return run if row in CORES else compiled_peer(row, run)
