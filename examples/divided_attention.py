# SPDX-License-Identifier: Apache-2.0
"""Divided space-time attention in a model of your own: one module per block, tokens stay one tensor throughout."""

import torch
from torch import nn

from timesformer import DividedSTAttention


class VideoEncoder(nn.Module):
    """video tokens [B, N * T, dim], in order b (h w t) and without a class token -> clip features [B, dim]."""

    def __init__(self, dim: int = 192, depth: int = 4, num_heads: int = 3):
        super().__init__()
        self.attention = nn.ModuleList(DividedSTAttention(dim, num_heads, class_token=False) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(depth)
        )

    def forward(self, tokens: torch.Tensor, frames: int) -> torch.Tensor:
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            tokens = attention(tokens, frames)  # both residuals included
            tokens = tokens + mlp(tokens)
        return tokens.mean(1)


def main() -> None:
    torch.manual_seed(0)
    model, frames, patches = VideoEncoder(), 8, 49
    tokens = torch.randn(2, patches * frames, 192)
    features = model(tokens, frames)
    features.square().mean().backward()
    size = model.attention[0].temporal_fc.weight.grad.norm()
    print(f"features {tuple(features.shape)}, gradient of the first temporal_fc {size:.3g}")


if __name__ == "__main__":
    main()
