# SPDX-License-Identifier: Apache-2.0
"""The block: half-block and MLP, against Hugging Face's layer, eager and with its attention replaced by SDPA.

On a CPU the quick set holds the forward alone.
"""

import peers
import torch


def pytest_generate_tests(metafunc):
    dtypes = (torch.bfloat16,) if peers.DEVICE == "cuda" else (torch.float32,)
    directions = peers.QUICK_DIRECTIONS if peers.DEVICE == "cuda" else ("forward",)
    if metafunc.config.getoption("--tiny", False):
        directions = peers.QUICK_DIRECTIONS
    peers.parametrize(metafunc, "block", directions=directions, dtypes=dtypes)


def test_block(measure, spec, direction, row):
    measure(peers.problem(*spec), row, direction, seconds=5.0, warmup=1, least=3)
