# SPDX-License-Identifier: Apache-2.0
"""Level 3, the block: the half-block and its MLP, against Hugging Face's layer."""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType

import torch.nn.functional as F
from torch import nn

from ..integrations import accelerate_transformers
from ..model import TimeSformer
from ..weights import from_native
from .modules import ModuleProblem, compiled_peer
from .peers import COMPILE_MODES
from .shapes import PATCH, Shape

HUGGING_FACE = ("huggingface", "huggingface-sdpa", "huggingface-accelerated")


def hf_config(shape: Shape, depth: int, patch: int, classes: int):
    from transformers import TimesformerConfig

    return TimesformerConfig(
        image_size=shape.width * patch,
        patch_size=patch,
        num_frames=shape.frames,
        hidden_size=shape.dim,
        num_hidden_layers=depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.dim,
        num_labels=classes,
    )


def _sdpa_forward(self, hidden_states, output_attentions=False):
    """Hugging Face's self-attention with scaled_dot_product_attention in the place of its three operations."""
    qkv = self.qkv(hidden_states).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2),)


def with_sdpa(module: nn.Module) -> nn.Module:
    """Binds that forward to every attention of a Hugging Face TimeSformer, or of a part of it."""
    from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention

    for part in module.modules():
        if isinstance(part, TimesformerSelfAttention):
            part.forward = MethodType(_sdpa_forward, part)
    return module


class HuggingFaceProblem(ModuleProblem):
    """Base of block, model and training step: peers are Hugging Face's modules around the parameters of ours."""

    patch, classes = PATCH, 400

    def model_of(self, depth: int) -> TimeSformer:
        shape, p = self.shape, self.patch
        size = (shape.height * p, shape.width * p)
        sizes = dict(embed_dim=shape.dim, depth=depth, num_heads=shape.heads, drop_path_rate=0.0)
        return TimeSformer(size, p, self.classes, shape.frames, **sizes)

    def peers(self, full):
        return [*HUGGING_FACE, *(COMPILE_MODES if full else ())]

    def why_not(self, row):
        if row in (*HUGGING_FACE, *COMPILE_MODES) and find_spec("transformers") is None:
            return "transformers is not installed"
        return super().why_not(row)

    def peer(self, row):
        theirs = self.hugging_face()
        if row == "huggingface-sdpa":
            with_sdpa(theirs)
        elif row == "huggingface-accelerated":  # our kernels in their model, by the one line of the README
            accelerate_transformers(theirs)
        run = self.hf_call(theirs)
        return compiled_peer(row, run) if row in COMPILE_MODES else run

    def hugging_face(self) -> nn.Module:
        """Their module around the parameters of `module`, in evaluation mode."""
        raise NotImplementedError

    def hf_call(self, theirs: nn.Module):
        """x -> out"""
        raise NotImplementedError


class BlockProblem(HuggingFaceProblem):
    level = "block"

    def build(self):
        self._model = self.model_of(depth=1)
        return self._model.blocks[0]

    def hugging_face(self):
        from transformers.models.timesformer.modeling_timesformer import TimesformerLayer

        state = dict(self._model.named_parameters())
        state |= {f"blocks.0.{name}": p for name, p in self.module.named_parameters()}
        prefix = "timesformer.encoder.layer.0."
        named = from_native(state, "huggingface").items()
        theirs = TimesformerLayer(hf_config(self.shape, 1, self.patch, self.classes), 0)
        theirs.load_state_dict({k.removeprefix(prefix): p for k, p in named if k.startswith(prefix)}, assign=True)
        return theirs.eval()

    def hf_call(self, theirs):
        return lambda x: theirs(x)[0]
