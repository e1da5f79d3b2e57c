# SPDX-License-Identifier: Apache-2.0
"""One training step of TimeSformer-B: forward, loss, backward, AdamW. With --train or --full, and in --tiny runs."""

import peers
import pytest
import torch

from timesformer.benchmarking.train import STEP


def pytest_generate_tests(metafunc):
    dtypes = (torch.bfloat16,) if peers.DEVICE == "cuda" else (torch.float32,)
    peers.parametrize(metafunc, "train", directions=(STEP,), dtypes=dtypes)


def test_train_step(request, measure, spec, direction, row):
    if not any(request.config.getoption(name, False) for name in ("--train", "--full", "--tiny")):
        pytest.skip("train step: runs with --train or --full")
    measure(peers.problem(*spec), row, direction, seconds=120.0, warmup=1, table_seconds=0)
