# SPDX-License-Identifier: Apache-2.0
"""The half-block: both attentions with LayerNorm, projections and residuals, against the same by stock attention."""

import peers
import torch


def pytest_generate_tests(metafunc):
    dtypes = (torch.bfloat16,) if peers.DEVICE == "cuda" else (torch.float32,)
    peers.parametrize(metafunc, "half-block", dtypes=dtypes)


def test_half_block(measure, spec, direction, row):
    measure(peers.problem(*spec), row, direction, seconds=5.0, warmup=1, least=3)
