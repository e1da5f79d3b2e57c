# SPDX-License-Identifier: Apache-2.0
"""`timesformer demo` as a user starts it: a process of its own, from its start to its end, at full size.

It draws, encodes and decodes two videos, names the one, and runs TimeSformer-B on the other twice fused and twice in
plain torch. Run it by itself, with the threads that the machine has: `pytest benchmarks/bench_demo.py --threads 2`.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("safetensors")


def run(threads: int, tiny: bool) -> None:
    """Raises CalledProcessError where the demo ends with another exit code than 0."""
    command = [sys.executable, "-m", "timesformer.cli", "demo", "--clip", "0", *(["--tiny"] if tiny else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def test_demo(request, compare, threads):
    tiny = request.config.getoption("--tiny", False)
    compare(
        "demo",
        lambda: {"demo": lambda: run(threads, tiny)},
        dtype=torch.float32,
        group="demo",
        grad=False,
        seconds=0.0,
        warmup=1,
        least=3,
        cold=False,
        table_seconds=0,
        info=dict(kind="demo", op="demo", shape="two videos, TimeSformer-B at 8x224", direction="forward", frames=8),
    )
