# SPDX-License-Identifier: Apache-2.0
"""Two processes (gloo, on the CPU), replicated or sharded, compute what one does, up to the order of sums."""

import os
import socket
import subprocess
import sys

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("safetensors")

from training import metrics, moved, small, train, videos, weights

from timesformer.train import checkpoint

# Both modes in one launch: importing torch is most of the time.
BOTH = """
import sys
from timesformer.cli import main
out, *argv = sys.argv[1:]
for mode in ("ddp", "fsdp"):
    code = main(["train", *argv, "--out", out + "/" + mode, "--distributed", mode])
    if code:
        raise SystemExit(code)
"""


def torchrun(folder, code, *argv, check=True):
    """What two processes print."""
    script = folder / "both.py"
    script.write_text(code)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += [str(script), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders one, ddp and fsdp of the same training: dropped paths, four parts a step, clipped gradients."""
    folder = tmp_path_factory.mktemp("runs")
    data = videos(tmp_path_factory.mktemp("data"), "train")
    videos(data, "val", per_class=1, seed=1)  # 3 clips: the second process gets a filler
    argv = small(data, folder / "one", "--epochs", 4, "--lr", 0.05, "--clip-grad", 0.5, "--log-every", 1)
    assert train(*argv) == 0
    place = argv.index("--out")
    torchrun(folder, BOTH, folder, *argv[:place], *argv[place + 2 :])
    return folder, argv


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does(runs, mode):
    """Every loss; every weight, relative to how far training moved it; the momentum, which is the gradients' sum."""
    folder, _ = runs
    one, two = metrics(folder / "one"), metrics(folder / mode)
    assert len(one) == len(two) >= 6
    for ours, theirs in zip(two, one, strict=True):
        values = [line.get("val") or {"loss": line["loss"]} for line in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.manual_seed(0)
    before = {name: torch.zeros_like(value) for name, value in weights(folder / "one").items()}
    scale = moved(before, weights(folder / "one"))
    assert moved(weights(folder / "one"), weights(folder / mode)) < 1e-5 * scale
    states = [checkpoint.load(folder / name / "checkpoint.pt")["optimiser"]["state"] for name in ("one", mode)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == len(before)
    for name, state in states[0].items():
        gradient = state["momentum_buffer"]
        difference = (gradient - states[1][name]["momentum_buffer"]).abs().max()
        assert difference <= 1e-4 * gradient.abs().max() + 1e-7, name


def test_a_checkpoint_serves_any_number_of_processes(runs, tmp_path):
    """What two sharded processes saved half way, one process finishes; what one saved, two go on with."""
    folder, argv = runs
    one = weights(folder / "one")
    for mode in ("ddp", "fsdp"):
        state = checkpoint.load(folder / mode / "checkpoint.pt")
        assert state["step"] == 5 and state["weights"].keys() == one.keys()
        again = list(argv)
        again[again.index("--out") + 1] = folder / mode
        assert train(*again, "--resume") == 0
        assert moved(weights(folder / mode), one) < 1e-5 * moved({k: torch.zeros_like(v) for k, v in one.items()}, one)


def test_parts_that_cannot_be_shared(runs, tmp_path):
    """An odd number of parts and two processes: one line, and no process left waiting."""
    _, argv = runs
    argv = list(argv)
    argv[argv.index("--micro-batch") + 1] = 8
    argv[argv.index("--out") + 1] = tmp_path / "run"
    code = "import sys; from timesformer.cli import main; sys.exit(main(['train', *sys.argv[1:]]))"
    done = torchrun(tmp_path, code, *argv, check=False)
    assert done.returncode != 0
    assert "are 1 parts, which 2 processes cannot share evenly" in done.stderr
