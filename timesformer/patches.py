# SPDX-License-Identifier: Apache-2.0
"""Patch embedding."""

from __future__ import annotations

from torch import Tensor, nn

from .recompute import Source, product


class PatchEmbed(nn.Module):
    """Patches of every frame -> tokens, by one gather into token order and one matrix product.

    `proj` is the convolution of the original (kernel = stride = patch) and holds weight and bias; its arithmetic is
    that of a matrix product over [C * P * P], which leaves nothing to permute afterwards.
    """

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, video: Tensor, per_frame: bool = False) -> Tensor:
        """video [B, C, T, h*P, w*Q] -> [B, 1 + h*w*T, dim] in order b (h w t), or [B*T, 1 + h*w, dim] per frame.

        Row 0 is zero, where the class token goes; the bias is not added (`proj.bias` goes with the position table).
        """
        weight, sizes = self.proj.weight.flatten(1), (*self.proj.kernel_size, per_frame)
        return product(gather(video, *sizes), weight, None, Source(gather, (video,), sizes))


def gather(video: Tensor, p: int, q: int, per_frame: bool) -> Tensor:
    """video [B, C, T, h*P, w*Q] -> its patches in token order behind a row of zeros, [B, 1 + h*w*T, C*P*Q], or per
    frame, [B*T, 1 + h*w, C*P*Q]."""
    b, c, t, height, width = video.shape
    h, w = height // p, width // q
    pixels = video.unflatten(4, (w, q)).unflatten(3, (h, p))  # [B, C, T, h, P, w, Q]
    if per_frame:
        patches = video.new_empty(b * t, 1 + h * w, c * p * q)
        target = patches[:, 1:].unflatten(0, (b, t)).unflatten(2, (h, w)).unflatten(4, (c, p, q))
        target.copy_(pixels.permute(0, 2, 3, 5, 1, 4, 6))
    else:
        patches = video.new_empty(b, 1 + h * w * t, c * p * q)
        target = patches[:, 1:].unflatten(1, (h, w, t)).unflatten(4, (c, p, q))
        target.copy_(pixels.permute(0, 3, 5, 2, 1, 4, 6))
    patches[:, 0].zero_()
    return patches
