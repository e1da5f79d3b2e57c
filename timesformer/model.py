# SPDX-License-Identifier: Apache-2.0
"""TimeSformer, top to bottom.

Paper: "Is Space-Time Attention All You Need for Video Understanding?", arXiv 2102.05095. Constructor, parameter names
and arithmetic are those of the original project; the code is written from the paper and from its described behaviour.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timesformer_kernels.registry import get as get_backend

from . import folding, weights
from .attention import DividedSTAttention, JointSTAttention
from .config import TimeSformerConfig
from .layers import hooked, pair, plain
from .mlp import Mlp
from .patches import PatchEmbed
from .recompute import segment
from .stream import Stream

__all__ = ["DividedBlock", "JointBlock", "TimeSformer", "TimeSformerConfig"]


CHECKPOINTS = ("none", "light", "full")


class _MlpHalf(nn.Module):
    """Completes an attention half-block: x += DropPath(mlp(norm2(x))), whole clips dropped."""

    def __init__(self, dim: int, hidden: int, drop: float, layer_norm_eps: float, **attention):
        super().__init__(dim, proj_drop=drop, layer_norm_eps=layer_norm_eps, **attention)
        self.norm2 = nn.LayerNorm(dim, layer_norm_eps)
        self.mlp = Mlp(dim, hidden, drop)

    def run(self, stream: Stream, frames: int, class_row_only: bool = False) -> None:
        super().run(stream, frames, class_row_only)
        if self.checkpoint == "light" and torch.is_grad_enabled():
            scale, random = self.drop_path.per_clip(stream.x), self.training and self.mlp.drop > 0
            branch = segment(True, self._mlp_of, stream.sum(), random=random)
        else:
            normed, source = stream.norm(self.norm2, self.backend)
            scale = self.drop_path.per_clip(stream.x)
            branch = self.mlp(normed, source, self.backend)
        stream.add(branch, scale)

    def _mlp_of(self, x: Tensor) -> Tensor:
        # Without a source: what this keeps lives for one backward, and fc2 itself need not run again.
        return self.mlp(Stream(x).norm(self.norm2, self.backend)[0], None, self.backend)


def mergeable(block: nn.Module) -> bool:
    """True where nobody but the next block asks what the block gives: no wrapper, its own forward, no hooks."""
    return (
        plain(block, type(block))
        and isinstance(block, _MlpHalf)
        and type(block).forward in (DividedSTAttention.forward, JointSTAttention.forward)
        and block._compiled_call_impl is None
    )


class DividedBlock(_MlpHalf, DividedSTAttention):
    """Time attention, space attention, MLP; [B, 1 + N * frames, dim] -> same shape."""


class JointBlock(_MlpHalf, JointSTAttention):
    """Joint attention, MLP; [B, 1 + N * frames, dim] -> same shape. Space-only models run it with frames = 1."""


class TimeSformer(nn.Module):
    """Video classifier: frames -> patches -> `depth` blocks -> class token -> logits.

    attention_type: "divided_space_time", "joint_space_time" or "space_only". The arguments up to pretrained_model and
    their order are the original's. num_classes=0 leaves out the head. pretrained_model is a file, a folder or a hub id
    that is loaded at construction, as the original does: an image ViT is inflated (`weights.inflate_vit`), a
    TimeSformer loaded, and a head of another class count started anew, which the log says. Without it nothing is
    downloaded. backend: "auto" or a name of `timesformer_kernels.available_backends()`; see `set_backend`.

    Any number of frames and any height and width in whole patches run. A grid other than `img_size`'s takes nearest
    neighbours in the position table in two dimensions, another number of frames the nearest in the time table. The
    original compares token counts alone, and so leaves the table of a grid with the same count but another aspect
    ratio (7 x 28 for 14 x 14) as it lies; here it is resized too.

    The logits need nothing but the class row of the last block, so that block projects and passes through its MLP that
    row alone and returns [B, 1, dim]; not when a forward hook in it would see the difference. On a CPU that row attends
    without keys and values (`class_row`).

    checkpoint: "none", "light" or "full", what training keeps in memory; see `set_checkpoint`.

    With drop_rate or attn_drop_rate above 0, training runs on the reference backend (see `DividedSTAttention`).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_classes: int = 400,
        num_frames: int = 8,
        attention_type: str = "divided_space_time",
        pretrained_model: str | os.PathLike = "",
        *,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        layer_norm_eps: float = 1e-6,
        backend: str = "auto",
        checkpoint: str = "none",
        id2label: dict[int, str] | None = None,
        preset: str | None = None,
    ):
        super().__init__()
        self._folded: list[folding.Folded] | None = None
        self.config = config = TimeSformerConfig(
            img_size, patch_size, in_chans, num_classes, num_frames, attention_type, embed_dim, depth, num_heads,
            mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, drop_path_rate, layer_norm_eps, id2label, preset,
        )  # fmt: skip
        height, width = config.grid
        self.patch_embed = PatchEmbed(pair(patch_size), in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + height * width, embed_dim))
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.empty(1, num_frames, embed_dim))
        block = DividedBlock if attention_type == "divided_space_time" else JointBlock
        self.blocks = nn.ModuleList(
            block(
                embed_dim,
                int(embed_dim * mlp_ratio),
                drop_rate,
                layer_norm_eps,
                num_heads=num_heads,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, layer_norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()
        self.set_backend(backend)
        self.set_checkpoint(checkpoint)
        if pretrained_model:
            self._load_at_construction(weights.read_checkpoint(pretrained_model))

    @classmethod
    def from_config(cls, config: TimeSformerConfig, *, backend: str = "auto") -> TimeSformer:
        """An untrained model of that configuration."""
        return cls(**config.to_dict(), backend=backend)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        *,
        num_classes: int | None = None,
        num_frames: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        num_heads: int | None = None,
        attention_type: str | None = None,
        backend: str = "auto",
        pos_resize: str = "nearest",
        time_resize: str = "nearest",
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> TimeSformer:
        """A trained model in evaluation mode from a file, a folder or a hub id of any format of `timesformer.weights`.

        num_classes other than the checkpoint's starts a new head, which the log says; num_frames and img_size other
        than its own resize the embeddings by the named rules (see `weights.load_into`). num_heads is needed for bare
        files whose width is not a multiple of 64. attention_type applies to image ViTs alone, which are inflated.
        Raises `weights.CheckpointError`, a ValueError, that lists everything that does not fit.
        """
        known = {} if num_heads is None else {"num_heads": num_heads}
        checkpoint = weights.read_checkpoint(
            path_or_id, config=known, local_files_only=local_files_only, revision=revision
        )
        found = checkpoint.config.get("attention_type")
        if attention_type is not None and found is not None and attention_type != found:
            raise ValueError(f"attention_type: got {attention_type!r}, expected that of the checkpoint, {found!r}")
        wanted = {"num_classes": num_classes, "num_frames": num_frames, "img_size": img_size}
        wanted = {k: v for k, v in {**wanted, "attention_type": attention_type}.items() if v is not None}
        config = checkpoint.config | wanted
        for name in ("num_heads", "img_size"):
            if config[name] is None:
                raise ValueError(f"{name}: {checkpoint.source} does not tell it; pass {name}=")
        if config["num_classes"] != checkpoint.config["num_classes"]:
            config |= {"id2label": None}

        with torch.device("meta"):  # no initialisation that the checkpoint would overwrite
            model = cls.from_config(TimeSformerConfig.from_dict(config), backend=backend)
        model = model.to_empty(device="cpu")
        if checkpoint.fmt == "vit":
            keep = num_classes is None and config["num_classes"] > 0
            options = dict(keep_head=keep, pos_resize=pos_resize, source_grid=checkpoint.grid)
            weights.inflate_vit(checkpoint.state_dict, model, **options)
        else:
            options = dict(pos_resize=pos_resize, time_resize=time_resize, source_grid=checkpoint.grid)
            weights.load_into(
                model,
                checkpoint.state_dict,
                num_classes_change="reinit" if num_classes is not None else "error",
                **options,
            )
        return model.eval()

    def _load_at_construction(self, checkpoint: weights.Checkpoint) -> None:
        if checkpoint.fmt == "vit":
            weights.inflate_vit(checkpoint.state_dict, self, source_grid=checkpoint.grid)
        else:
            weights.load_into(self, checkpoint.state_dict, num_classes_change="reinit", source_grid=checkpoint.grid)

    def save_pretrained(self, folder: str | os.PathLike, *, fmt: str = "timesformer") -> None:
        """Write config.json and model.safetensors; fmt is "timesformer" or "huggingface" (weights.save_pretrained)."""
        weights.save_pretrained(self, folder, fmt=fmt)

    def _init_weights(self) -> None:
        """The original's: every Linear truncated normal (std 0.02, cut at +-2) and zero bias, LayerNorm and patch
        convolution as PyTorch has them, and no time at all at first: time_embed = 0, temporal_fc = 0 in every block."""
        for table in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(table, std=0.02, a=-2.0, b=2.0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
        if self.config.attention_type != "space_only":
            nn.init.zeros_(self.time_embed)
        for block in self.blocks:
            if isinstance(block, DividedSTAttention):
                nn.init.zeros_(block.temporal_fc.weight)

    def set_backend(self, backend: str) -> None:
        """Run attention on "auto" or on a named backend, which then runs or raises; never on another silently."""
        if backend != "auto":
            get_backend(backend)
        self.backend = backend
        for block in self.blocks:
            block.backend = backend

    def set_checkpoint(self, mode: str) -> None:
        """What training keeps of a divided block for the backward, in tensors [B, S, dim], and what it computes twice:

        "none": 15; LayerNorms and GELU. "light": 9; attention (without its products), LayerNorms, fc1 and GELU.
        "full": 1; the whole block. Values and gradients are the same. Raises ValueError for another mode.
        """
        if mode not in CHECKPOINTS:
            raise ValueError(f"checkpoint: got {mode!r}, expected one of {', '.join(CHECKPOINTS)}")
        for block in self.blocks.modules():  # blocks that something wraps included
            if isinstance(block, _MlpHalf):
                block.checkpoint = mode

    def fuse(self) -> TimeSformer:
        """Keep, for inference without gradients, the products of each block that are one in real arithmetic: `proj`
        with `temporal_fc`, and each LayerNorm's scale and shift with the product that follows. Returns the model.

        The parameters stay as they are (the products take 11 / 19 of a divided block's weights again): state_dict,
        saved files and copies are those of the unfused model, training and autograd never use the products, and a
        parameter that changes makes them anew. Without this call `proj` and `temporal_fc` are still applied as one
        wherever that pays. On a CPU the products leave their biases to the steps between them, and all blocks share
        the same memory (`inplace`). Raises RuntimeError that names the module which cannot be folded and why, and
        leaves the model as it is.
        """
        for i, block in enumerate(self.blocks):
            if not mergeable(block):
                reason = f"got {type(block).__name__} with hooks or another forward, expected a block of this package"
                raise RuntimeError(f"fuse: blocks.{i}: {reason}")
            if reason := folding.refusal(block):
                raise RuntimeError(f"fuse: blocks.{i}.{reason}")
        self._folded = [folding.Folded(block) for block in self.blocks]
        return self

    def unfuse(self) -> TimeSformer:
        """Drop what `fuse` keeps. Returns the model."""
        self._folded = None
        return self

    @property
    def fused(self) -> bool:
        """True between `fuse` and `unfuse`."""
        return self._folded is not None

    def __getstate__(self):
        return {**self.__dict__, "_folded": None}  # copies and files are unfused

    def reset_classifier(self, num_classes: int) -> None:
        """Start a new head; 0 removes it. The names of the classes go with the old one."""
        self.config = replace(self.config, num_classes=num_classes, id2label=None)
        weight = self.patch_embed.proj.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.config.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
            _init_linear(self.head)

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimisers usually spare from weight decay. (The original lists them and decays them.)"""
        return {"pos_embed", "cls_token", "time_embed"} & {name for name, _ in self.named_parameters(recurse=False)}

    def forward(self, video: Tensor) -> Tensor:
        """video: [B, C, T, height, width] -> logits [B, num_classes]; without a head the features.

        video has the model's dtype (any floating one under autocast). Raises ValueError for another shape or dtype.
        """
        return self.head(self.forward_features(video))

    def forward_features(self, video: Tensor) -> Tensor:
        """video: [B, C, T, height, width] -> the class token after the last LayerNorm, [B, dim]."""
        self._check(video)
        batch, frames = video.shape[0], video.shape[2]
        space_only = self.config.attention_type == "space_only"
        x = self._through_blocks(self._embed(video), 1 if space_only else frames)[:, 0]
        if space_only:  # features are averaged over frames, before the LayerNorm
            x = x.unflatten(0, (batch, frames)).mean(1)
        return self.norm(x)

    def _through_blocks(self, stream: Stream, frames: int) -> Tensor:
        """The sum after the last block, [B, S, dim], or its class row alone [B, 1, dim]."""
        blocks = tuple(self.blocks)
        for i, block in enumerate(blocks):
            class_row_only = i == len(blocks) - 1 and not hooked(block)
            if getattr(block, "checkpoint", None) == "full" and torch.is_grad_enabled():
                run = partial(block, frames=frames, class_row_only=class_row_only)
                stream = Stream(segment(True, run, stream.sum(), random=True))
            elif mergeable(block):  # its last sum merges with the first LayerNorm of the next block
                serving = block if self._folded is None else self._folded[i].serving(block, stream)
                serving.run(stream, frames, class_row_only)
            else:
                stream = Stream(block(stream.sum(), frames, class_row_only))
        return stream.sum()

    def _check(self, video: Tensor) -> None:
        if not isinstance(video, Tensor):
            raise TypeError(f"video: got {type(video).__name__}, expected a torch.Tensor")
        weight, channels, (p, q) = self.patch_embed.proj.weight, self.config.in_chans, pair(self.config.patch_size)
        got = f"video: got shape {tuple(video.shape)}"
        if video.dim() != 5 or video.shape[1] != channels:
            raise ValueError(f"{got}, expected (batch, {channels}, frames, height, width)")
        if min(video.shape[2:]) < 1 or video.shape[3] % p or video.shape[4] % q:
            raise ValueError(
                f"{got}, expected at least one frame, height a multiple of {p} and width a multiple of {q}"
            )
        if not video.is_floating_point():
            raise ValueError(f"video: got dtype {video.dtype}, expected a floating one: normalised pixels")
        device = video.device.type
        if video.dtype != weight.dtype and (device == "meta" or not torch.is_autocast_enabled(device)):
            raise ValueError(f"video: got dtype {video.dtype}, expected the model's, {weight.dtype}")

    def _embed(self, video: Tensor) -> Stream:
        """video -> tokens [B, 1 + N*T, dim], or [B*T, 1 + N, dim] for space-only models.

        The products of the patches are left as a branch beside the table of class token, positions and times: sum and
        first LayerNorm are one pass.
        """
        p, q = self.patch_embed.proj.kernel_size
        frames, grid = video.shape[2], (video.shape[3] // p, video.shape[4] // q)
        has_time, rate = self.config.attention_type != "space_only", self.config.drop_rate
        tokens = self.patch_embed(video, per_frame=not has_time)
        if not (self.training and rate > 0):
            stream = Stream(self._table(grid, frames if has_time else 1, has_time).expand(tokens.shape[0], -1, -1))
            stream.add(tokens)
            return stream
        # Dropout comes between the positions and the time embedding, and after it on the patches alone.
        x = F.dropout(tokens + self._table(grid, frames if has_time else 1, False), rate)
        if not has_time:
            return Stream(x)
        patches = (x[:, 1:].unflatten(1, (grid[0] * grid[1], frames)) + self._time(frames)).flatten(1, 2)
        return Stream(torch.cat([x[:, :1], F.dropout(patches, rate)], 1))

    def _table(self, grid: tuple[int, int], frames: int, with_time: bool) -> Tensor:
        """What is added to the patch products: [1 + N*T, dim]. Row 0 is the class token with its position, no time."""
        cls, patches = self.pos_embed[0, :1], self.pos_embed[0, 1:]
        if torch.compiler.is_compiling() or grid != self.config.grid:  # one graph for all sizes: no comparison in it
            stored = patches.t().unflatten(1, self.config.grid)[None]  # [1, dim, h, w]
            patches = F.interpolate(stored, size=grid, mode="nearest")[0].flatten(1).t()
        patches = (patches + self.patch_embed.proj.bias)[:, None]  # [N, 1, dim]
        patches = patches + self._time(frames) if with_time else patches.expand(-1, frames, -1)
        return torch.cat([self.cls_token[0] + cls, patches.flatten(0, 1)])

    def _time(self, frames: int) -> Tensor:
        """[T, dim]"""
        time = self.time_embed[0]
        if not torch.compiler.is_compiling() and frames == time.shape[0]:
            return time
        return F.interpolate(time.t()[None], size=frames, mode="nearest")[0].t()

    def forward_intermediates(self, video: Tensor, indices=None, **options):
        """Patch tokens after chosen layers, in the manner of timm: see `features.forward_intermediates`."""
        from .features import forward_intermediates

        return forward_intermediates(self, video, indices, **options)


def _init_linear(module: nn.Linear) -> None:
    nn.init.trunc_normal_(module.weight, std=0.02, a=-2.0, b=2.0)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
