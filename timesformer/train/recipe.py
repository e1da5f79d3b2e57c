# SPDX-License-Identifier: Apache-2.0
"""How a model is trained, as data: batch, optimiser, schedule. The defaults are the original's recipe."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

OPTIMISERS = ("sgd", "adamw")
SCHEDULES = ("steps", "cosine")
AMP = ("off", "bfloat16", "float16")
STEPS = ((0.0, 1.0), (11 / 15, 0.1), (14 / 15, 0.01))  # (part of the training done, factor): epochs 11 and 14 of 15


@dataclass(frozen=True)
class Recipe:
    """batch_size clips make one step, in parts of micro_batch clips that go through the model at once.

    What a step computes depends on these two alone, not on how many processes share the parts. optimiser: "sgd" is
    SGD with Nesterov's momentum 0.9, "adamw" AdamW. schedule: "steps" falls to a tenth after 11/15 of the epochs and
    to a hundredth after 14/15; "cosine" falls to zero. warmup: steps of linear growth at the start. clip_grad: largest
    norm of the gradient, 0 for any. weight_decay applies to every parameter, as in the original, or with
    decay_all=False to matrices alone. amp: autocast to that dtype. seed: of every random choice.

    Raises ValueError naming the field that is wrong.
    """

    batch_size: int = 64
    micro_batch: int = 8
    epochs: int = 15
    optimiser: str = "sgd"
    lr: float = 0.005
    weight_decay: float = 1e-4
    decay_all: bool = True
    schedule: str = "steps"
    warmup: int = 0
    clip_grad: float = 0.0
    label_smoothing: float = 0.0
    amp: str = "off"
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "micro_batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected a multiple of micro_batch = {self.micro_batch}"
            )
        for name in ("weight_decay", "warmup", "clip_grad", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: got {self.lr}, expected a positive number")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: got {self.label_smoothing}, expected a number in [0, 1)")
        for name, known in (("optimiser", OPTIMISERS), ("schedule", SCHEDULES), ("amp", AMP)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")

    @property
    def parts(self) -> int:
        """Micro-batches of one step."""
        return self.batch_size // self.micro_batch

    def steps(self, clips: int) -> int:
        """Steps of the whole training on `clips` clips an epoch; the last step may reach into one epoch more."""
        return math.ceil(self.epochs * clips / self.batch_size)

    def lr_at(self, step: int, clips: int) -> float:
        """The learning rate of step number `step`, counted from 0. Changes between epochs with "steps"."""
        if self.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * step / self.steps(clips)))
        else:
            epoch = step * self.batch_size // clips
            factor = [f for part, f in STEPS if epoch >= round(part * self.epochs, 9)][-1]
        return self.lr * factor * min((step + 1) / max(self.warmup, 1), 1.0)

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of the model's parameters that take gradients."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        spared = set() if self.decay_all else {name for name, p in named if p.ndim < 2 or name.endswith(SPARED)}
        groups = [
            {"params": [p for name, p in named if name not in spared], "weight_decay": self.weight_decay},
            {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimiser == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)

    def to_dict(self) -> dict:
        return asdict(self)


SPARED = ("pos_embed", "cls_token", "time_embed")  # tables of vectors, which weight decay would pull to zero

# What the miniature tasks of `timesformer.train.tasks` take.
MINIATURE = Recipe(
    batch_size=32, micro_batch=32, epochs=10, optimiser="adamw", lr=2e-3, weight_decay=0.01, decay_all=False,
    schedule="cosine", warmup=50, clip_grad=1.0,
)  # fmt: skip
