# SPDX-License-Identifier: Apache-2.0
"""The tests' oracle as the judge of every row, and which problems, rows and directions a run has.

The peers themselves are `timesformer.benchmarking.peers` and the modules beside it: `timesformer benchmark` has them
without a source tree, too, but without an oracle that shares no code with the package.
"""

from __future__ import annotations

from functools import lru_cache

import blocks
import oracle
import pytest
import torch

from timesformer.benchmarking import gate, shapes
from timesformer.benchmarking.block import BlockProblem
from timesformer.benchmarking.core import AttentionProblem
from timesformer.benchmarking.half_block import HalfBlockProblem
from timesformer.benchmarking.model import ModelProblem
from timesformer.benchmarking.train import TrainProblem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16,) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)
QUICK_DIRECTIONS = ("forward", "forward+backward")
LEVELS = {"half-block": HalfBlockProblem, "block": BlockProblem, "model": ModelProblem, "train": TrainProblem}


class OracleJudge(gate.Judge):
    """Exact results by tests/oracle.py and tests/blocks.py, and the one error rule."""

    def attention(self, q, k, v, dout, shape, scheme, cls):
        case = oracle.Case(scheme, (shape.height, shape.width, shape.frames), cls)
        with torch.enable_grad():
            return oracle.with_gradients(lambda *x: oracle.attention(*x, case), q, k, v, dout)

    def module(self, level, module, dtype, shape):
        """On the CPU wherever the module is."""
        p = {name: x.detach().cpu().to(dtype).requires_grad_() for name, x in module.named_parameters()}

        def run(x):
            x = x.cpu()
            if level in ("model", "train"):
                return blocks.timesformer(p, x, (shape.height, shape.width), shape.heads)
            out = blocks.divided(p, "", x, shape.frames, shape.heads)
            return blocks.mlp(p, "", out) if level == "block" else out

        return run, p

    def accept(self, name, got, exact, plain):
        oracle.assert_no_worse(name, got, exact, plain())


@lru_cache(maxsize=1)  # one at a time: the exact results of a long clip are large
def problem(level: str, scheme: str | None, shape: shapes.Shape, dtype: torch.dtype):
    if level == "core":
        return AttentionProblem(scheme, shape, dtype, DEVICE, OracleJudge())
    made = LEVELS[level](shape, dtype, DEVICE, OracleJudge())
    if shape == shapes.TINY_SQUARE and level in ("model", "train"):
        made.patch, made.depth, made.classes = 8, 2, 5
    return made


def all_rows(config, shape) -> bool:
    """Whether peers that compile for seconds take part: in a --full run, on the first shape."""
    return config.getoption("--full", False) and shape in shapes.quick_shapes(DEVICE)


def parametrize(metafunc, level: str, directions=QUICK_DIRECTIONS, dtypes=DTYPES, batches=()) -> None:
    """spec, direction and row of a benchmark: --tiny, the quick set, or with --full all lengths, sizes and peers."""
    option = metafunc.config.getoption
    full = option("--full", False)
    if option("--tiny", False):
        sizes = (shapes.TINY if level in ("core", "half-block") else shapes.TINY_SQUARE,)
    else:
        sizes = shapes.full_shapes(DEVICE) if full else shapes.quick_shapes(DEVICE)
        sizes += tuple(shapes.clip(8, 224, batch=b) for b in batches if full and b != sizes[0].batch)
    cases = []
    for size in sizes:
        for scheme in shapes.CLS if level == "core" else [None]:
            for dtype in dtypes:
                made = problem(level, scheme, size, dtype)
                names = [scheme or level, size.label.replace(" ", "-"), str(dtype)[6:]]
                for direction in made.directions if full else [d for d in made.directions if d in directions]:
                    for row in made.rows(all_rows(metafunc.config, size)):
                        key = "-".join([*names, direction, row])
                        cases.append(pytest.param((level, scheme, size, dtype), direction, row, id=key))
    metafunc.parametrize("spec, direction, row", cases)
