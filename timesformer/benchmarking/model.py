# SPDX-License-Identifier: Apache-2.0
"""Level 4, the model: TimeSformer against Hugging Face's, and against its matrix products alone.

"products" runs every Linear of the model and the patch projection, nothing else, on random rows: what no attention
kernel can save. Its shapes are those of our unfused model, S = 1 + N*T rows a clip:

    patch projection           [S, 3*P*P] x [3*P*P, D]
    12 blocks: qkv of time     [S, D] x [D, 3D]      proj  [S, D] x [D, D]      temporal_fc  [S, D] x [D, D]
               qkv of space    [S, D] x [D, 3D]      proj  [S, D] x [D, D]
               fc1             [S, D] x [D, 4D]      fc2   [S, 4D] x [4D, D]
    head                       [1, D] x [D, classes]

Ours needs fewer: it applies proj and temporal_fc of time as one product, which `fuse` keeps for inference, and the last
block passes only the class row on, on a CPU without a key or a value. A ratio below 1 is therefore possible. What
`fuse` keeps are weights: no row counts them in its peak.
"""

from __future__ import annotations

import torch

from ..weights import from_native
from .block import HuggingFaceProblem, hf_config


class ModelProblem(HuggingFaceProblem):
    kind = "model"
    level = "model"
    depth = 12
    differentiate = False  # nobody asks for the gradient of pixels

    @property
    def op(self):
        return "TimeSformer-B" if (self.depth, self.shape.dim) == (12, 768) else "TimeSformer"

    def build(self):
        return self.model_of(self.depth)

    @property
    def in_shape(self):
        shape, p = self.shape, self.patch
        return (shape.batch, 3, shape.frames, shape.height * p, shape.width * p)

    @property
    def out_shape(self):
        return (self.shape.batch, self.classes)

    def apply(self, module, x):
        return module(x)

    def set_backend(self, module, name):
        module.set_backend(name)

    def prepare(self, module):
        module.fuse()  # serves where no gradient is wanted

    def products(self):
        model, shape = self.module, self.shape
        rows = shape.batch * shape.tokens
        linear = [pair for pair in super().products() if pair[0] is not model.head.weight]
        return [(model.patch_embed.proj.weight.flatten(1), rows), *linear, (model.head.weight, shape.batch)]

    def hugging_face(self):
        from transformers import TimesformerForVideoClassification

        with torch.device("meta"):
            theirs = TimesformerForVideoClassification(hf_config(self.shape, self.depth, self.patch, self.classes))
        named = from_native(dict(self.module.named_parameters()), "huggingface")
        theirs.load_state_dict(named, assign=True)
        return theirs.eval()

    def hf_call(self, theirs):
        return lambda x: theirs(x.transpose(1, 2)).logits
