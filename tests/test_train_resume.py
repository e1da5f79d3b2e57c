# SPDX-License-Identifier: Apache-2.0
"""A training that is killed, stopped or has no room to write goes on exactly where its last checkpoint was."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("safetensors")

from training import bits, metrics, same, small, train, videos, weights

from timesformer.train import checkpoint
from timesformer.train.loop import Trainer

# One process imports everything and forks: a child trains and is killed without warning, a random number of steps and a
# random part of a step later. What a step and a checkpoint take decides where that is: before, in or after a write.
KILLER = """
import os, random, signal, sys, time
from timesformer.cli import main
seed, out, *argv = sys.argv[1:]
moments, kills = random.Random(int(seed)), 0

def steps():
    try:
        return open(out + "/metrics.jsonl").read().count("\\n")
    except FileNotFoundError:
        return 0

while True:
    enough, child = steps() + moments.randint(1, 2), os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resume = ["--resume"] if os.path.exists(out + "/checkpoint.pt") else []
        os._exit(main(["train", *argv, "--out", out, *resume]))
    done = 0
    while not done and (kills == 5 or steps() < enough):
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    if done:
        print(kills, os.waitstatus_to_exitcode(status))
        break
    time.sleep(moments.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = videos(tmp_path_factory.mktemp("data"), "train")
    return videos(folder, "val", per_class=1, seed=1)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted training, and its arguments without --out: 14 steps of 8 clips, dropped paths included."""
    out = tmp_path_factory.mktemp("whole") / "run"
    argv = small(data, out, "--epochs", 12, "--lr", 0.05, "--log-every", 1, "--save-every", 1)
    assert train(*argv) == 0
    return out, argv


def without_out(argv):
    place = argv.index("--out")
    return [str(arg) for arg in argv[:place] + argv[place + 2 :]]


def test_kill_9_at_random_moments(whole, tmp_path):
    """Weights bit for bit and metrics line by line those of the uninterrupted run, and no half-written file."""
    out, argv = whole
    command = [sys.executable, "-c", KILLER, "7", str(tmp_path / "run"), *without_out(argv)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kills, code = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0 and kills >= 3
    assert bits(tmp_path / "run") == bits(out)
    assert metrics(tmp_path / "run") == metrics(out)
    names = sorted(path.name for path in (tmp_path / "run").iterdir() if path.name != "tensorboard")
    assert names == ["checkpoint.pt", "metrics.jsonl", "model"]


@pytest.mark.parametrize("optimiser, amp, number", [
    ("adamw", "off", signal.SIGTERM), ("sgd", "float16", signal.SIGINT),
])  # fmt: skip
def test_a_signal_ends_the_step_and_saves(data, tmp_path, monkeypatch, capsys, optimiser, amp, number):
    """Exit code 128 + signal, a line that says how to go on, and the same end; workers read ahead meanwhile."""
    options = ["--epochs", 6, "--lr", 0.02, "--optimiser", optimiser, "--amp", amp, "--workers", 1]
    assert train(*small(data, tmp_path / "whole", *options)) == 0
    step = Trainer._one_step

    def stop_in_the_third(self, batches):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_one_step", stop_in_the_third)
    argv = small(data, tmp_path / "run", *options)
    assert train(*argv) == 128 + number
    assert "stopped after step 3; --resume goes on" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    assert train(*argv, "--resume") == 0
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_resume_after_the_end_changes_nothing(whole):
    out, argv = whole
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    trained = bits(out)
    assert train(*argv, "--resume") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert bits(out) == trained


def test_randomness_matters_here(whole, data, tmp_path):
    """Another seed gives other weights: equal bits above are not for want of chance."""
    out, _ = whole
    argv = small(data, tmp_path / "run", "--epochs", 12, "--lr", 0.05, "--log-every", 1, "--seed", 1)
    assert train(*argv) == 0
    assert not same(weights(tmp_path / "run"), weights(out))


# what can go wrong


def interrupted(whole, tmp_path):
    """A folder with the checkpoint and metrics of a finished run, and its arguments."""
    out, argv = whole
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (run / name).write_bytes((out / name).read_bytes())
    argv = list(argv)
    argv[argv.index("--out") + 1] = run
    return run, argv


def error_of(capsys, *argv):
    """The one line on stderr of a `train` that ends with exit code 1."""
    assert train(*argv) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


def test_a_finished_folder_is_not_overwritten(whole, tmp_path, capsys):
    run, argv = interrupted(whole, tmp_path)
    before = (run / "checkpoint.pt").read_bytes()
    assert "exists: pass --resume to go on with it, or another --out" in error_of(capsys, *argv)
    assert (run / "checkpoint.pt").read_bytes() == before


def test_resume_without_a_checkpoint(data, tmp_path, capsys):
    line = error_of(capsys, *small(data, tmp_path / "run", "--resume"))
    assert "--resume: there is no checkpoint" in line and "run" in line


@pytest.mark.parametrize("damage", ["truncated", "text", "other", "empty"])
def test_resume_from_a_damaged_checkpoint(whole, tmp_path, capsys, damage):
    run, argv = interrupted(whole, tmp_path)
    path = run / "checkpoint.pt"
    if damage == "other":
        torch.save({"model_state": {}}, path)
    else:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "text": b"no checkpoint", "empty": b""}[damage])
    line = error_of(capsys, *argv, "--resume")
    assert "checkpoint.pt is " in line and ("damaged" in line or "not a checkpoint of a training" in line)


def test_resume_with_another_architecture_or_recipe(whole, data, tmp_path, capsys):
    run, argv = interrupted(whole, tmp_path)
    wider = Path(tmp_path / "wider.json")
    wider.write_text(json.dumps({"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}))
    changed = list(argv)
    changed[changed.index("--config") + 1] = wider
    changed[changed.index("--lr") + 1] = 0.1
    line = error_of(capsys, *changed, "--resume")
    assert "is of another training" in line
    assert "model embed_dim is 16 there, 32 here" in line and "recipe lr is 0.05 there, 0.1 here" in line


def test_resume_with_other_data(whole, tmp_path, capsys):
    run, argv = interrupted(whole, tmp_path)
    argv[0] = videos(tmp_path / "more", "train", per_class=4)
    assert "data videos is 9 there, 12 here" in error_of(capsys, *argv, "--resume")


@pytest.mark.parametrize("first", [True, False], ids=["first checkpoint", "later checkpoint"])
def test_disk_full(whole, data, tmp_path, capsys, first):
    """The limit on the size of files stands in for a full disk: the write fails half way, by the system's own error."""
    run, argv = tmp_path / "run", small(data, tmp_path / "run", "--epochs", 12, "--save-every", 1)
    if not first:
        run, argv = interrupted(whole, tmp_path)
        state = checkpoint.load(run / "checkpoint.pt")
        checkpoint.save(run / "checkpoint.pt", {**state, "step": 3})
        argv = [*argv, "--resume"]
        before = (run / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        line = error_of(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {run / 'checkpoint.pt'}: File too large" in line
    assert line.endswith("the checkpoint before it is kept") is not first
    assert not (run / "model").exists()
    assert [path.name for path in run.iterdir() if path.suffix in (".pt", ".tmp")] == (
        [] if first else ["checkpoint.pt"]
    )
    if not first:
        assert (run / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_training(data, tmp_path, capsys):
    """Checkpoints up to then are kept; the broken weights are not saved over them."""
    line = error_of(capsys, *small(data, tmp_path / "run", "--epochs", 12, "--lr", 1e30, "--save-every", 1))
    assert "the loss is nan" in line or "the loss is inf" in line
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] >= 1 and not (tmp_path / "run" / "model").exists()
