# SPDX-License-Identifier: Apache-2.0
"""Two processes (gloo, on the CPU), replicated or sharded, compute what one does, up to the order of sums."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("safetensors")

from training import metrics, moved, small, train, videos, weights

from timesformer.train import checkpoint
from timesformer.train.loop import Trainer

# Everything in one launch: importing torch is most of the time. `stopped` gets SIGTERM in its third step, on one of the
# two processes only; `resumed` goes on with a checkpoint that one process wrote.
SEVERAL = """
import os, signal, sys
import torch.distributed
from timesformer.cli import main
from timesformer.train.loop import Trainer
out, *argv = sys.argv[1:]
step = Trainer._one_step

def stop_in_the_third(self, batches):
    if self.step == 2 and self.processes.first:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batches)

torch.distributed.init_process_group("gloo")
runs = [("ddp", "ddp", 0), ("fsdp", "fsdp", 0), ("ddp-resumed", "ddp", 0), ("fsdp-resumed", "fsdp", 0)]
for name, mode, expected in [*runs, ("ddp-stopped", "ddp", 143), ("fsdp-stopped", "fsdp", 143)]:
    Trainer._one_step = stop_in_the_third if expected else step
    options = ["--out", out + "/" + name, "--distributed", mode, *(["--resume"] if "resumed" in name else [])]
    code = main(["train", *argv, *options])
    if code != expected:
        raise SystemExit(f"{name} ended with {code}")
torch.distributed.destroy_process_group()
"""


def torchrun(folder, code, *argv):
    script = folder / "run.py"
    script.write_text(code)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(script), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the same training: dropped paths, four parts a step, clipped gradients."""
    folder = tmp_path_factory.mktemp("runs")
    data = videos(tmp_path_factory.mktemp("data"), "train")
    videos(data, "val", per_class=1, seed=1)  # 3 clips: the second process gets a filler
    argv = small(data, folder / "one", "--epochs", 4, "--lr", 0.05, "--clip-grad", 0.5, "--log-every", 1)
    with pytest.MonkeyPatch.context() as patch:
        save = Trainer.save

        def keep_the_third(self):
            save(self)
            if self.step == 3:
                for mode in ("ddp", "fsdp"):
                    (folder / f"{mode}-resumed").mkdir()
                    for name in ("checkpoint.pt", "metrics.jsonl"):
                        shutil.copy(self.folder / name, folder / f"{mode}-resumed")

        patch.setattr(Trainer, "save", keep_the_third)
        assert train(*argv, "--save-every", 1) == 0
    torchrun(folder, SEVERAL, folder, *without_out(argv))
    return folder, argv


def without_out(argv):
    place = argv.index("--out")
    return argv[:place] + argv[place + 2 :]


def size(values):
    return moved({name: torch.zeros_like(value) for name, value in values.items()}, values)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does(runs, mode):
    """Every loss; every weight, relative to how far training moved it; the momentum, which is the gradients' sum."""
    folder, _ = runs
    one, two = metrics(folder / "one"), metrics(folder / mode)
    assert len(one) == len(two) >= 6
    for ours, theirs in zip(two, one, strict=True):
        values = [line.get("val") or {"loss": line["loss"]} for line in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert moved(weights(folder / "one"), weights(folder / mode)) < 1e-5 * size(weights(folder / "one"))
    states = [checkpoint.load(folder / name / "checkpoint.pt")["optimiser"]["state"] for name in ("one", mode)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == len(weights(folder / mode))
    for name, state in states[0].items():
        gradient = state["momentum_buffer"]
        difference = (gradient - states[1][name]["momentum_buffer"]).abs().max()
        assert difference <= 1e-4 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_checkpoint_serves_any_number_of_processes(runs, mode):
    """What one process saved, two go on with; what two saved when one of them got a signal, one process finishes."""
    folder, argv = runs
    one = weights(folder / "one")
    assert moved(weights(folder / f"{mode}-resumed"), one) < 1e-5 * size(one)
    stopped = folder / f"{mode}-stopped"
    assert checkpoint.load(stopped / "checkpoint.pt")["step"] == 3 and not (stopped / "model").exists()
    assert train(*without_out(argv), "--out", stopped, "--resume") == 0
    assert moved(weights(stopped), one) < 1e-5 * size(one)
