# SPDX-License-Identifier: Apache-2.0
"""Level 5, the training step: forward, cross-entropy, backward and AdamW, in the model's dtype.

Row "ours-light" is ours with `checkpoint="light"`, which keeps less and computes more.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from .model import ModelProblem
from .timing import Timed

STEP, LIGHT = "step", "ours-light"


class TrainProblem(ModelProblem):
    """The gradients are those that the model level checks; the optimiser is torch's, fused, the same for every row."""

    level = "train"
    directions = (STEP,)

    @property
    def op(self):
        return f"{super().op} training"

    def peers(self, full):
        return [LIGHT, *super().peers(full)]

    def peer(self, row):
        if row != LIGHT:
            return super().peer(row)
        module = copy.deepcopy(self.module, {id(p): p for p in self.module.parameters()})
        self.set_backend(module, next(iter(self.ours.values()))[0])
        module.set_checkpoint("light")
        return lambda x: self.apply(module, x)

    def timed(self, row, direction):
        """Learning rate 0: all arithmetic of a step, while every row and repetition sees the same weights."""
        if row == "products":
            return super().timed(row, "forward+backward")
        task = self.task(row)
        optimiser = torch.optim.AdamW(self.module.parameters(), lr=0.0, fused=True)
        labels = torch.arange(self.shape.batch, device=self.device) % self.classes

        def step():
            F.cross_entropy(task.run(self.x).float(), labels).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return Timed(step)

    def group(self, direction):
        return super().group("step")

    def check(self, row, direction):
        return super().check(row, "forward+backward")

    def flops(self, row, direction):
        return super().flops(row, "forward+backward")

    def nbytes(self, row, direction):
        """And AdamW: weights, gradients and both moments in, weights and moments out."""
        weights = 0 if row == "products" else sum(p.numel() for p in self.module.parameters())
        return super().nbytes(row, "forward+backward") + 7 * weights * self.dtype.itemsize
