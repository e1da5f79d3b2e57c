#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Breaks the sources on purpose, one edit at a time, and demands that a test notices.

    python scripts/mutate.py [--only TEXT] [--list] [--isa baseline|avx2|avx512]

Works in a temporary copy of the tree. A mutant of csrc/cpu is compiled for one instruction set, which is enough: the
sources are the same for all. Prints a table; exits 1 if a mutant survives, if a pattern no longer occurs exactly once,
or if the tests fail before anything was broken.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import MUTANTS, TILE_ATTENTION, TILES
from mutants_choice import MUTANTS as CHOICE
from mutants_cuda import MUTANTS as CUDA
from mutants_hopper import MUTANTS as HOPPER
from mutants_inplace import MUTANTS as INPLACE
from mutants_model import MUTANTS as MODEL
from mutants_steps import MUTANTS as STEPS
from mutants_triton import MUTANTS as TRITON
from mutants_users import MUTANTS as USERS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "kernels", "timesformer", "tests", "scripts")
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
FLAGS["avx512bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]
FLAGS["amx"] = [*FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
ATTENTION_ALONE = ("amx",)  # its other kernels are those of the one before it
LIBRARY = "kernels/timesformer_kernels/_cpu.so"


class Tree:
    """A copy of the sources in which one mutant lives at a time."""

    def __init__(self, folder, isa):
        self.root, self.isa = folder, isa
        for name in FOLDERS:
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.intact = None

    def build(self):
        """None, or the compiler's message. One compilation for each kernel file, all at once."""
        flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w"]
        have = [] if self.isa == "baseline" else [f"-DTSK_HAVE_{isa.upper()}=1" for isa in FLAGS if isa != "baseline"]
        compiler, jobs, objects = os.environ.get("CXX", "g++"), [], []
        for isa in dict.fromkeys(("baseline", *(FLAGS if self.isa != "baseline" else ()))):
            extra = [*flags, *FLAGS[isa], f"-DTSK_ISA={isa}"]
            for stem in ("attention", "steps")[: 1 if isa in ATTENTION_ALONE else 2]:
                jobs.append((extra, self.root / f"csrc/cpu/{stem}.cpp", self.root / f"{stem}_{isa}.o"))
        for source in (self.root / "csrc/cpu").glob("*.cpp"):
            if source.stem not in ("attention", "steps"):
                jobs.append(([*flags, *have], source, self.root / f"{source.stem}.o"))
        running = []
        for extra, source, target in jobs:
            command = [compiler, *extra, "-c", str(source), "-o", str(target)]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            objects.append(str(target))
        for job in running:
            message = job.communicate()[1]
            if job.returncode:
                return message
        link = subprocess.run(
            [compiler, "-shared", *objects, "-o", str(self.root / LIBRARY)], capture_output=True, text=True
        )
        return link.stderr if link.returncode else None

    def simulate(self):
        """None, or the compiler's message: the CUDA kernels, compiled for the CPU where their tests will find them."""
        done = subprocess.run([sys.executable, "tests/simt_build.py"], cwd=self.root, capture_output=True, text=True)
        return done.stderr.strip()[-300:] if done.returncode else None

    def test(self, selection):
        """(exit status, what to print) of the tests in the copy; a crash counts as a failure."""
        environment = dict(
            os.environ, PYTHONPATH=f"{self.root / 'kernels'}{os.pathsep}{self.root}", PYTHONDONTWRITEBYTECODE="1"
        )
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=no",
            "--no-header",
            "-p",
            "no:cacheprovider",
            *selection,
        ]
        try:
            done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return 1, "hangs"
        if done.returncode < 0:
            return 1, f"crashes with signal {-done.returncode}"
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        lines = failed or done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
        return done.returncode, lines[-1].split(" - ")[0]


def check_patterns(mutants):
    stale = []
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1:
            stale.append(f"{mutant.name}: the pattern occurs {count} times in {mutant.file}, expected once")
    return stale


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose name or file contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the mutants and check their patterns, run nothing")
    parser.add_argument("--isa", default="baseline", choices=FLAGS, help="instruction set to compile for")
    options = parser.parse_args()
    chosen = (*MUTANTS, *CHOICE, *TRITON, *CUDA, *HOPPER, *INPLACE, *MODEL, *STEPS, *USERS)
    mutants = [m for m in chosen if options.only in m.name or options.only in m.file]
    stale = check_patterns(mutants)
    if options.isa != "amx" and not options.list:
        before, mutants = len(mutants), [m for m in mutants if m.file not in (TILES, TILE_ATTENTION)]
        if before > len(mutants):
            print(f"{before - len(mutants)} mutants left out: they need --isa amx, and a chip that has it")
    if options.list:
        print("\n".join(f"{m.file:45} {m.name}" for m in mutants))
    for line in stale:
        print("STALE    " + line)
    if options.list or stale or not mutants:
        return int(bool(stale) or not mutants)

    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Tree(Path(folder), options.isa)
        if message := tree.build():
            print(message, file=sys.stderr)
            return 1
        library = (tree.root / LIBRARY).read_bytes()
        for selection in dict.fromkeys(m.tests for m in mutants):
            status, line = tree.test(selection)
            print(f"intact   {' '.join(selection)}: {line}", flush=True)
            if status:
                return 1
        for mutant in mutants:
            started, path = time.monotonic(), tree.root / mutant.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            native = mutant.file.startswith("csrc/cpu/")
            message = tree.build() if native else tree.simulate() if mutant.file.startswith("csrc/cuda/") else None
            status, line = (1, "does not compile") if message else tree.test(mutant.tests)
            verdict = {0: "SURVIVED", 1: "killed"}.get(status, "BROKEN") if not message else "BROKEN"
            path.write_text(text, encoding="utf-8")
            if native:
                (tree.root / LIBRARY).unlink(missing_ok=True)
                (tree.root / LIBRARY).write_bytes(library)
            if verdict != "killed":
                survivors.append(mutant.name)
            print(f"{verdict:8} {mutant.name:48} {time.monotonic() - started:5.1f} s  {message or line}", flush=True)
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} mutants killed")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
