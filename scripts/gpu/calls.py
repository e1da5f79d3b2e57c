# SPDX-License-Identifier: Apache-2.0
"""Calls of every kernel, for the programs that watch them run: attention of all kinds, and the fused steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from timesformer_kernels import fused, grid_attention_qkvpacked, registry

MODES = ("none", "exclude", "per_group", "key", "global")


@dataclass(frozen=True)
class Attention:
    """grid: height, width, frames. operands are [packed [B, S, 3, heads, head_dim], dout [B, S, heads, head_dim]]."""

    scheme: str
    grid: tuple[int, int, int]
    cls: str
    dtype: str = "bfloat16"
    head_dim: int = 64
    heads: int = 2
    batch: int = 2
    backend: str = "triton"

    def __str__(self):
        size = "x".join(map(str, self.grid))
        return (
            f"{self.backend}: {self.scheme} {self.cls} {size} {self.dtype} {self.heads}x{self.head_dim} B={self.batch}"
        )

    def operands(self, device: str, seed: int = 0) -> list[Tensor]:
        height, width, frames = self.grid
        rows = height * width * frames + (self.cls != "none")
        generator = torch.Generator(device).manual_seed(seed)
        options = dict(generator=generator, device=device, dtype=getattr(torch, self.dtype))
        packed = torch.randn(self.batch, rows, 3, self.heads, self.head_dim, **options)
        return [packed, torch.randn(self.batch, rows, self.heads, self.head_dim, **options)]

    def forward(self, packed: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        options = dict(grid=self.grid, scheme=self.scheme, cls=self.cls, backend=self.backend)
        return (grid_attention_qkvpacked(packed, **options),)

    def both(self, packed: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        """(out, gradient of packed)"""
        leaf = packed.detach().requires_grad_()
        (out,) = self.forward(leaf, dout)
        return (out.detach(), *torch.autograd.grad(out, leaf, dout))


@dataclass(frozen=True)
class AddLayerNorm:
    """operands are [x, branch, dnormed [B, S, width], weight, bias [width]]."""

    width: int
    rows: int = 9
    dtype: str = "bfloat16"
    batch: int = 2
    skip_cls: bool = True

    def __str__(self):
        return f"add_layer_norm {self.batch}x{self.rows}x{self.width} {self.dtype}"

    def operands(self, device: str, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        options = dict(generator=generator, device=device, dtype=getattr(torch, self.dtype))
        wide = [torch.randn(self.batch, self.rows, self.width, **options) for _ in range(3)]
        return [*wide, *(torch.randn(self.width, **options) for _ in range(2))]

    def forward(self, x, branch, dnormed, weight, bias):
        return fused.add_layer_norm(x, branch, weight, bias, skip_cls=self.skip_cls, backend="triton")

    def both(self, x, branch, dnormed, weight, bias):
        """(sum, normed, gradients of x, branch, weight, bias)"""
        leaves = [t.detach().requires_grad_() for t in (x, branch, weight, bias)]
        total, normed = self.forward(*leaves[:2], dnormed, *leaves[2:])
        grads = torch.autograd.grad((total, normed), leaves, (dnormed, dnormed))
        return (total.detach(), normed.detach(), *grads)


@dataclass(frozen=True)
class BiasGelu:
    """operands are [x, dout [B, S, width], bias [width]]."""

    width: int
    rows: int = 9
    dtype: str = "bfloat16"
    batch: int = 2

    def __str__(self):
        return f"bias_gelu {self.batch}x{self.rows}x{self.width} {self.dtype}"

    def operands(self, device: str, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        options = dict(generator=generator, device=device, dtype=getattr(torch, self.dtype))
        x, dout = (torch.randn(self.batch, self.rows, self.width, **options) for _ in range(2))
        return [x, dout, torch.randn(self.width, **options)]

    def forward(self, x, dout, bias):
        return (fused.bias_gelu(x, bias, backend="triton"),)

    def both(self, x, dout, bias):
        """(out, gradients of x and bias)"""
        leaves = [t.detach().requires_grad_() for t in (x, bias)]
        (out,) = self.forward(leaves[0], dout, leaves[1])
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def every_kernel(cpu: bool) -> list:
    """Tiny calls of each kind of kernel in each class mode; for a CPU the smallest of each kind."""
    packed = [Attention("time", (2, 3, 5), cls) for cls in MODES]  # several sequences to a tile
    streaming = [Attention("space", (6, 6, 2), cls, "float32", 40) for cls in MODES]  # and a masked head_dim
    fused_steps = [AddLayerNorm(72), BiasGelu(72)]
    if cpu:
        return [packed[2], *streaming[3:], *fused_steps]
    resident = [Attention("space", (7, 7, 2), cls, "float16", 80) for cls in MODES]
    keeping = [Attention("space", (12, 12, 2), cls) for cls in MODES]  # resident, its forward keeps statistics
    long = [Attention("space", (15, 15, 2), cls) for cls in MODES]
    axes = [Attention(scheme, (4, 4, 4), "per_group") for scheme in ("height", "local", "global", "joint")]
    fused_steps += [AddLayerNorm(768, dtype="float32", skip_cls=False), BiasGelu(3072, dtype="float16")]
    calls = [*packed, *streaming, *resident, *keeping, *long, *axes]
    if registry.get("cuda").why_not("cuda", torch.bfloat16, 64) is None:
        native = [replace(call, backend="cuda") for call in calls]
        wide = [replace(call, head_dim=128) for call in native if call.head_dim == 80]  # 80 is the plain kernel's
        narrow = dict(backend="cuda", head_dim=32)  # no product of four warps: those of one
        narrow = [Attention("space", (side, 16, 2), "per_group", **narrow) for side in (3, 12, 17)]
        rings = [Attention("space", (17, 16, 2), cls, backend="cuda") for cls in ("none", "per_group", "global")]
        few = [Attention("time", (2, 3, frames), "per_group", backend="cuda") for frames in (1, 4, 16)]
        calls += [*native, *wide, *narrow, *rings, *few]
    return [*calls, *fused_steps]
