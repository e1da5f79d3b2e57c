# SPDX-License-Identifier: Apache-2.0
"""An independent TimeSformer, slow on purpose: functions of a parameter dict, in einops strings and stock attention.

It follows the published description step by step (class token repeated per frame, concatenations, a convolution per
frame), shares no code with the package, and takes T, H and W from its input, never from a configuration.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

TINY = dict(img_size=32, patch_size=8, num_classes=5, num_frames=4, embed_dim=32, depth=2, num_heads=4)


def clip(generator, batch=2, frames=4, height=32, width=32, dtype=torch.float64):
    """Random pixels for a model of TINY's sizes: (B, 3, T, height, width)."""
    return torch.randn(batch, 3, frames, height, width, generator=generator, dtype=torch.float64).to(dtype)


def randomise(module, generator, peak=4.0):
    """Give every parameter a random value, and qkv weights large enough that softmax has clear winners.

    With its default zeros a model that ignores time agrees, and near-uniform attention forgives a wrong grouping.
    """
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.dim() == 1:
                noise = 0.3 * noise + ("norm" in name and name.endswith("weight"))
            elif p.dim() == 2 or p.dim() == 4:
                noise = noise * p[0].numel() ** -0.5 * (peak if "qkv" in name else 1.0) ** 0.5
            p.copy_(noise)
    return module


def parameters_of(module, dtype=torch.float64):
    """Leaf copies of the parameters, for the functions below."""
    return {name: p.detach().to(dtype).clone().requires_grad_() for name, p in module.named_parameters()}


def norm(p, name, x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def attention(p, name, x, heads, scale=None):
    """Ordinary multi-head self-attention: x (rows, length, dim)."""
    q, k, v = rearrange(linear(p, f"{name}.qkv", x), "r l (three h d) -> three r h l d", three=3, h=heads)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return linear(p, f"{name}.proj", rearrange(out, "r h l d -> r l (h d)"))


def divided(p, name, x, frames, heads, cls=True, time_mask=None, space_mask=None, scale=None):
    """Time, then space. time_mask (B, N) and space_mask (B, T) are the factors of stochastic depth."""
    first = int(cls)
    row, patches = x[:, :first], x[:, first:]
    b, n = len(x), patches.shape[1] // frames

    along_time = rearrange(norm(p, f"{name}temporal_norm1", patches), "b (n t) d -> (b n) t d", t=frames)
    out = attention(p, f"{name}temporal_attn", along_time, heads, scale)
    if time_mask is not None:
        out = out * rearrange(time_mask, "b n -> (b n) 1 1")
    out = rearrange(linear(p, f"{name}temporal_fc", out), "(b n) t d -> b (n t) d", b=b)
    patches = patches + out

    frame = rearrange(patches, "b (n t) d -> (b t) n d", t=frames)
    if cls:
        frame = torch.cat([repeat(row, "b 1 d -> (b t) 1 d", t=frames), frame], 1)
    out = attention(p, f"{name}attn", norm(p, f"{name}norm1", frame), heads, scale)
    if space_mask is not None:
        out = out * rearrange(space_mask, "b t -> (b t) 1 1")
    patches = patches + rearrange(out[:, first:], "(b t) n d -> b (n t) d", t=frames, n=n)
    if not cls:
        return patches
    return torch.cat([row + reduce(out[:, :1], "(b t) 1 d -> b 1 d", "mean", t=frames), patches], 1)


def joint(p, name, x, heads, mask=None):
    """Every token with every token. mask (B,) are the factors of stochastic depth."""
    out = attention(p, f"{name}attn", norm(p, f"{name}norm1", x), heads)
    return x + (out if mask is None else out * rearrange(mask, "b -> b 1 1"))


def mlp(p, name, x, mask=None):
    out = linear(p, f"{name}mlp.fc2", F.gelu(linear(p, f"{name}mlp.fc1", norm(p, f"{name}norm2", x))))
    return x + (out if mask is None else out * rearrange(mask, "b -> b 1 1"))


def nearest(table, sizes):
    """table (source..., D) -> (sizes..., D) by index arithmetic: output i reads floor(i * source / size)."""
    for axis, size in enumerate(sizes):
        source = table.shape[axis]
        table = table.index_select(axis, torch.tensor([i * source // size for i in range(size)]))
    return table


def frame_tokens(p, video, grid):
    """video (B, C, T, H, W) -> (B, T, 1 + N, dim): patches of each frame with class token and positions.

    grid: (height, width) of the stored position table.
    """
    frames = rearrange(video, "b c t h w -> (b t) c h w")
    patch = p["patch_embed.proj.weight"].shape[2:]
    patches = F.conv2d(frames, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=patch)
    height, width = patches.shape[2:]
    pos = nearest(rearrange(p["pos_embed"][0, 1:], "(h w) d -> h w d", h=grid[0]), (height, width))
    pos = torch.cat([p["pos_embed"][0, :1], rearrange(pos, "h w d -> (h w) d")])
    row = repeat(p["cls_token"], "1 1 d -> r 1 d", r=len(patches))
    tokens = torch.cat([row, rearrange(patches, "r d h w -> r (h w) d")], 1) + pos
    return rearrange(tokens, "(b t) n d -> b t n d", t=video.shape[2])


def with_time(p, tokens):
    """(B, T, 1 + N, dim) -> (B, 1 + N*T, dim) in order b (h w t), with the time embedding on the patches."""
    time = nearest(p["time_embed"][0], (tokens.shape[1],))
    patches = rearrange(tokens[:, :, 1:], "b t n d -> b n t d") + time
    return torch.cat([tokens[:, 0, :1], rearrange(patches, "b n t d -> b (n t) d")], 1)


def depth_of(p):
    return 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))


def timesformer(p, video, grid, heads, kind="divided_space_time"):
    """The whole model, evaluation mode: video (B, C, T, H, W) -> logits."""
    tokens = frame_tokens(p, video, grid)
    frames = video.shape[2]
    x = rearrange(tokens, "b t n d -> (b t) n d") if kind == "space_only" else with_time(p, tokens)
    for i in range(depth_of(p)):
        name = f"blocks.{i}."
        x = divided(p, name, x, frames, heads) if kind == "divided_space_time" else joint(p, name, x, heads)
        x = mlp(p, name, x)
    if kind == "space_only":
        x = reduce(x, "(b t) n d -> b n d", "mean", t=frames)
    return linear(p, "head", norm(p, "norm", x)[:, 0])


def image_vit(p, image, grid, heads):
    """An ordinary image ViT on the spatial parameters: image (B, C, H, W) -> logits."""
    x = frame_tokens(p, image[:, :, None], grid)[:, 0]
    for i in range(depth_of(p)):
        x = mlp(p, f"blocks.{i}.", joint(p, f"blocks.{i}.", x, heads))
    return linear(p, "head", norm(p, "norm", x)[:, 0])
